"""A trained general preference model as an oracle: it embeds responses and may be intransitive (GPM, 2410.02197).

    oracle: {name: general, path: runs/preference-model/final}

Trained by scripts/train_reward_model.py with `reward_model.loss: general`; the formulas are in `losses`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from alignment.errors import UserError
from alignment.rewards.base import Prompt, check_lengths
from alignment.rewards.scored import Loaded, check_keys, load, outputs, token_rows


@dataclass(frozen=True)
class GeneralOracle:
    """P(a > b) = sigmoid(s(a > b) / tau) of unit embeddings; P(a, b) + P(b, a) = 1 since s is antisymmetric.

    Each different response is embedded once, however many pairs it stands in.

    Attributes:
        path: folder of the model, or its run's.
        batch_size, dtype, revision, trust_remote_code: as of reward `model`.
    """

    path: str
    batch_size: int = 16
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    name: ClassVar[str] = "general"

    def __post_init__(self) -> None:
        check_keys(self, "oracle")

    def _load(self) -> Loaded:
        loaded = load(self.path, self.dtype, self.revision, self.trust_remote_code, "oracle.path")
        if loaded.facts.kind != "general":
            raise UserError(f"oracle general: {self.path} is a reward model; use oracle bradley_terry on reward model")
        return loaded

    def scores(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """s(first > second) in [-1, 1]; NaN where a response cannot be read, as of reward `model`."""
        import torch

        from alignment.rewards.losses import general_score, unit

        check_lengths(prompts, first, second)
        loaded = self._load()
        wanted = {(str(p), r): (p, r) for p, a, b in zip(prompts, first, second, strict=True) for r in (a, b)}
        rows = token_rows(loaded, [p for p, _ in wanted.values()], [r for _, r in wanted.values()])
        table = dict(zip(wanted, outputs(loaded, rows, self.batch_size), strict=True))
        v, w = (
            torch.tensor([table[str(p), r] for p, r in zip(prompts, responses, strict=True)], dtype=torch.float32)
            for responses in (first, second)
        )
        if not len(prompts):
            return []
        if not loaded.facts.gated:
            return [float(s) for s in general_score(unit(v), unit(w))]
        size = 2 * loaded.facts.outputs // 3
        gate = torch.tensor(self._gates(loaded, prompts))
        return [float(s) for s in general_score(unit(v[:, :size]), unit(w[:, :size]), gate)]

    def _gates(self, loaded: Loaded, prompts: Sequence[Prompt]) -> list[list[float]]:
        """softmax of the last third of the outputs at each prompt's end, as in training."""
        import torch

        different = {str(p): p for p in prompts}
        rows = [prompt_row(loaded, p) for p in different.values()]
        logits = torch.tensor(outputs(loaded, rows, self.batch_size))[:, 2 * loaded.facts.outputs // 3 :]
        gates = dict(zip(different, logits.softmax(-1).tolist(), strict=True))
        return [gates[str(p)] for p in prompts]

    def probability(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """P(first > second); one half where both are the same text."""
        tau = self._load().facts.temperature
        return [
            0.5 if a == b else _sigmoid(s / tau)
            for s, a, b in zip(self.scores(prompts, first, second), first, second, strict=True)
        ]

    def describe(self) -> str:
        return f"general preference model {self.path} ({self._load().digest}, {self.dtype}); may be intransitive"


def _sigmoid(x: float) -> float:
    """Of the smaller side, so that P(a, b) + P(b, a) is 1 to the last bit."""
    if math.isnan(x):
        return x
    small = math.exp(-abs(x)) / (1 + math.exp(-abs(x)))
    return 1 - small if x > 0 else small


def prompt_row(loaded: Loaded, prompt: Prompt) -> list[int]:
    """Token ids of a prompt alone, with the generation prompt where it is a chat."""
    from alignment.models.sampling import prompt_ids
    from alignment.rewards.base import prompt_text

    if loaded.facts.chat:
        messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return prompt_ids(loaded.tokenizer, messages)
    return prompt_ids(loaded.tokenizer, prompt_text(prompt))
