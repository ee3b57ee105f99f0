"""How an on-policy trainer draws responses: from the policy, from the reference, or from a mixture of the two.

Sampling itself is TRL's (`RLOOTrainer._generate_single_turn`): transformers' `generate`, or vLLM where the recipe asks
for it (which nothing here has run). Draws of one stage depend on (seed, rollout, stage, process) alone, so that a
resumed run draws what the interrupted one would have drawn. Token ids are kept as they were drawn.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import GenerationConfig, LogitsProcessor
from trl import RLOOTrainer
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import use_adapter

from alignment.errors import UserError
from alignment.models.finite import FiniteScores, processing
from alignment.models.sampling import own_defaults_only
from alignment.trainers.reference import ReferenceTrainer


@dataclass(frozen=True)
class Sampler:
    """A distribution to draw from: the model at a temperature, truncated or not."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def plain(self) -> bool:
        """Whether it is the model's own distribution."""
        return (self.temperature, self.top_p, self.top_k) == (1.0, 1.0, 0)


class GeometricMixture(LogitsProcessor):
    """Next-token distribution proportional to pi^(1 - share) ref^share (Nash-MD's opponent).

    Normalised token by token, which is not the normalised mixture of whole sequences; the released EGPO code and
    Nash-MD's paper (Munos et al. 2312.00886, section 7) sample the same way.

    Args:
        score: the reference's forward, `(input_ids, attention_mask, position_ids, past_key_values) -> output`.
        lengths: tokens of each prompt, which stand padded on the left in the first call's rows.
        share: weight of the reference, in [0, 1].
    """

    def __init__(self, score: Any, lengths: Sequence[int], share: float):
        self.score, self.lengths, self.share, self.cache = score, list(lengths), share, None
        self.width = 0  # of the prompts with their padding

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mixed log-probs of the next token, `[rows, vocabulary]`."""
        columns = torch.arange(input_ids.size(1), device=input_ids.device)
        if self.cache is None:
            self.width = input_ids.size(1)
        first = torch.tensor([self.width - n for n in self.lengths], device=input_ids.device)
        mask = (columns[None] >= first[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        new = slice(None) if self.cache is None else slice(-1, None)
        output = self.score(
            input_ids=input_ids[:, new],
            attention_mask=mask,
            position_ids=positions[:, new],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        reference = output.logits[:, -1].float().log_softmax(-1)
        return (1 - self.share) * scores.float().log_softmax(-1) + self.share * reference


class DrawingTrainer(ReferenceTrainer, RLOOTrainer):
    """Draws; the attributes are set by `OnlinePreferenceTrainer`."""

    draw_batch: int
    undrawable: set[int]  # places of prompts behind which a model's scores were not finite

    def _seeded(self, *which: int) -> contextlib.AbstractContextManager[None]:
        """The generators as (seed, which…, process) makes them, restored afterwards."""
        return _seeded(self.accelerator.device, self.args.seed, *which, self.accelerator.process_index)

    def _draw(
        self, prompts: Sequence[list[int]], n: int, sampler: Sampler, *, source: str = "policy", share: float = 0.0
    ) -> list[list[list[int]]]:
        """n continuations of each prompt as token ids, up to and including the first end token.

        Args:
            prompts: token ids; the same number on every process.
            n: continuations of each.
            sampler: temperature and truncation.
            source: `policy`, `reference`, or `mixture` (`GeometricMixture` with `share` of the reference).
        """
        if source != "policy" and self.use_vllm:
            raise UserError(
                f"rollout.vllm: vLLM holds the policy alone, and the {source} is sampled, too; leave it out"
            )
        found: list[list[list[int]]] = []
        scores = FiniteScores()
        per_batch = max(1, self.draw_batch // n)
        shipped: Any = self.accelerator.unwrap_model(self.model_wrapped)
        if source == "reference" and self.ref_model is not None:
            shipped = self.accelerator.unwrap_model(self.ref_model)
        # `generate` fills what TRL leaves open (min-p, beams …) from the file that came with the model.
        with self._sampling(sampler, n), own_defaults_only(shipped):
            for start in range(0, len(prompts), per_batch):
                rows = [ids for ids in prompts[start : start + per_batch] for _ in range(n)]
                with processing(shipped, scores), self._from(source, [len(ids) for ids in rows], share, scores):
                    drawn = self._generate_single_turn(rows, None, {})
                self.undrawable |= {start + row // n for row in scores.take()}
                found += [drawn[i : i + n] for i in range(0, len(drawn), n)]
        return found

    @contextlib.contextmanager
    def _sampling(self, sampler: Sampler, n: int) -> Iterator[None]:
        """TRL's settings of generation, as `sampler` says."""
        settings: dict[str, Any] = {"temperature": sampler.temperature, "top_p": sampler.top_p, "top_k": sampler.top_k}
        before = self.num_generations
        self.num_generations = n
        if self.use_vllm:
            settings["generation_kwargs"] = self.vllm_generation.generation_kwargs | {
                "stop_token_ids": list(self.eos_token_ids)  # vLLM knows those of the model's files
            }
            kept = {name: getattr(self.vllm_generation, name) for name in settings}
            for name, value in settings.items():
                setattr(self.vllm_generation, name, value)
        else:
            configured = self.generation_config, self.generation_kwargs
            self.generation_kwargs = self.generation_kwargs | settings
            self.generation_config = GenerationConfig(**self.generation_kwargs, disable_compile=True)
        try:
            yield
        finally:
            self.num_generations = before
            if self.use_vllm:
                for name, value in kept.items():
                    setattr(self.vllm_generation, name, value)
            else:
                self.generation_config, self.generation_kwargs = configured

    @contextlib.contextmanager
    def _from(self, source: str, lengths: list[int], share: float, scores: FiniteScores) -> Iterator[None]:
        """Make TRL's `generate` draw from another model than the policy; `scores` goes behind a mixture's."""
        if source == "policy":
            yield
            return
        policy: Any = self.model_wrapped
        adapted = self.accelerator.unwrap_model(policy)
        switched: Any = contextlib.nullcontext
        if self.ref_model is None and is_peft_model(adapted):
            name = "ref" if "ref" in adapted.peft_config else None
            switched = functools.partial(use_adapter, adapted, adapter_name=name)
        if source == "reference":
            self.model_wrapped = self.ref_model if self.ref_model is not None else policy
            try:
                with switched():
                    yield
            finally:
                self.model_wrapped = policy
            return
        with unwrap_model_for_generation(
            self.ref_model if self.ref_model is not None else policy, self.accelerator
        ) as reference:

            def score(**inputs: Any) -> Any:
                with switched(), torch.no_grad():
                    return reference(**inputs)

            plain = adapted.generate
            mixed = [GeometricMixture(score, lengths, share), scores]
            adapted.generate = functools.partial(plain, logits_processor=mixed)
            try:
                yield
            finally:
                adapted.generate = plain


@contextlib.contextmanager
def _seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
