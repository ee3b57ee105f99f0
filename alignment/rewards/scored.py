"""Rewards that are trained models: one sequence-classification reward model, or an ensemble of them.

    reward: {name: model, path: runs/reward-model/final}
    reward: {name: ensemble, path: runs/reward-ensemble, how: uwo, lam: 0.5, normalise: member}

Weights are loaded at the first score. Training is `scripts/train_reward_model.py`; any model that
`AutoModelForSequenceClassification` loads with one label will do for `model`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from alignment.errors import UserError
from alignment.rewards.base import Prompt, Reward, check_lengths


@dataclass(frozen=True)
class Loaded:
    """A model ready to score."""

    model: Any
    tokenizer: Any
    facts: Any
    pad: int
    is_ours: bool = True  # reward_model.json says what its outputs are

    @cached_property
    def digest(self) -> str:
        """Of the weights: a folder may be trained again under the same name."""
        from alignment.models.loading import fingerprint

        return fingerprint(self.model)


def load(
    path: str, dtype: str, revision: str | None = None, trust_remote_code: bool = False, key: str = "reward.path"
) -> Loaded:
    """The model of `path`, which may be a run's folder; kept in memory until its file changes.

    Raises:
        UserError: it cannot be loaded; the message begins with `key`, where the user named it.
    """
    folder = Path(path) / "final" if (Path(path) / "final").is_dir() else Path(path)
    written = max((file.stat().st_mtime_ns for file in folder.glob("*.safetensors")), default=0)
    try:
        return _loaded(str(folder) if folder.is_dir() else path, dtype, revision, trust_remote_code, written)
    except UserError as error:
        what = str(error).removeprefix("model.name_or_path: ").removeprefix("model: ")
        raise UserError(f"{key}: {what}") from error


@lru_cache(maxsize=16)
def _loaded(path: str, dtype: str, revision: str | None, trust_remote_code: bool, written: int) -> Loaded:
    import torch

    from alignment.models import load_tokenizer
    from alignment.models.loading import resolve_path
    from alignment.models.reward_model import Facts, load_reward_model, read_facts, settle_padding

    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(path, **options)
    model = load_reward_model(path, dtype=dtype, **options).requires_grad_(False)
    written_facts = read_facts(Path(resolve_path(path)))
    facts = written_facts or Facts(outputs=int(model.config.num_labels))
    pad = model.config.get_text_config().pad_token_id
    if pad is None:  # else it says at which token the model was trained to be read
        pad = settle_padding(model, tokenizer, remedy=f"set pad_token_id in config.json of {path}")
    if torch.cuda.is_available():
        model.cuda()
    return Loaded(model, tokenizer, facts, int(pad), is_ours=written_facts is not None)


def token_rows(loaded: Loaded, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[list[int] | None]:
    """Token ids of prompt and response as training encodes them; None where they cannot be encoded, or the prompt
    alone fills `max_length` (all its responses would be one row, and get one score).

    A text prompt of a model that was trained on chats is what the user says.
    """
    from alignment.data.preferences import BadRow
    from alignment.data.tokens import encode

    limit = loaded.facts.max_length
    found: list[list[int] | None] = [None for _ in prompts]
    for chat in (True, False):
        numbers = [i for i, prompt in enumerate(prompts) if _as_chat(prompt, loaded) == chat]
        rows = [_row(prompts[i], responses[i], chat) for i in numbers]
        for start in range(0, len(rows), 1000):
            encoded = encode(rows[start : start + 1000], loaded.tokenizer, ("chosen",))
            for i, ids in zip(numbers[start : start + 1000], encoded, strict=True):
                if isinstance(ids, BadRow):
                    continue
                if limit is None or len(ids[0]["prompt_ids"]) < limit:
                    found[i] = (ids[0]["prompt_ids"] + ids[0]["chosen_ids"])[:limit]
    return found


def _as_chat(prompt: Prompt, loaded: Loaded) -> bool:
    return not isinstance(prompt, str) if loaded.facts.chat is None else bool(loaded.facts.chat)


def _row(prompt: Prompt, response: str, chat: bool) -> dict[str, Any]:
    if not chat:
        from alignment.rewards.base import prompt_text

        return {"prompt": prompt_text(prompt), "chosen": response}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {"prompt": messages, "chosen": [{"role": "assistant", "content": response}]}


def outputs(loaded: Loaded, rows: Sequence[list[int] | None], batch_size: int) -> list[list[float]]:
    """The head's outputs of each row; NaN where there is none."""
    from alignment.models.reward_model import score_rows

    kept = [row for row in rows if row]
    progress = f"scoring with {loaded.model.config._name_or_path or 'a reward model'}" if len(kept) > 500 else None
    scores = iter(score_rows(loaded.model, kept, loaded.pad, batch_size, progress).tolist())
    width = int(loaded.model.config.num_labels)
    return [next(scores) if row else [math.nan] * width for row in rows]


@dataclass(frozen=True)
class ModelReward(Reward):
    """The score of a sequence-classification reward model; its unit is the model's own (Bradley–Terry: nats).

    Scores do not depend on what else is scored, nor on padding (float32: to rounding, about 1e-6 of the largest).

    Attributes:
        path: folder, hub id, or the run folder of scripts/train_reward_model.py.
        standardise: subtract the mean and divide by the standard deviation that training measured and stored.
        batch_size: rows per forward pass; lower it if memory runs out.
        dtype: of the weights.
        revision, trust_remote_code: as in the recipe's model section.

    Raises:
        UserError: no such model, no trained head, several labels, no pad token, no stored constants to standardise by.
    """

    path: str
    standardise: bool = False
    batch_size: int = 16
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    name: ClassVar[str] = "model"

    def __post_init__(self) -> None:
        check_keys(self)

    def _load(self) -> Loaded:
        return load(self.path, self.dtype, self.revision, self.trust_remote_code)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """One score per pair; NaN where the chat template refuses a conversation or the prompt leaves no room."""
        check_lengths(prompts, responses)
        loaded = self._load()
        if loaded.facts.kind != "scalar":
            raise UserError(
                f"reward model: {self.path} compares responses instead of scoring them; it is oracle general"
            )
        if (labels := int(loaded.model.config.num_labels)) != 1:
            raise UserError(
                f"reward model: {self.path} has {labels} labels, and a reward has one; an ensemble with a head per "
                "member is reward ensemble"
            )
        scores = [row[0] for row in outputs(loaded, token_rows(loaded, prompts, responses), self.batch_size)]
        if not self.standardise:
            return scores
        mean, std = _constants(loaded, self.path)
        return [(score - mean[0]) / max(std[0], 1e-6) for score in scores]

    def describe(self) -> str:
        how = "standardised by its calibration responses" if self.standardise else "in its own unit"
        return f"score of the reward model {self.path} ({self._load().digest}, {self.dtype}), {how}"


@dataclass(frozen=True)
class EnsembleReward(Reward):
    """Several reward models as one score (Coste et al. 2024, arXiv:2310.02743, eq. 3 to 5).

    Attributes:
        path: run folder of an ensemble (`member-0` …), or one model with a head per member (shared trunk).
        members: or the members' folders one by one; they may be different models.
        how: mean; wco, the worst member; uwo, mean - lam * population variance.
        lam: weight of the variance; 0 is the mean.
        normalise: member standardises each member by its stored constants first. Bradley–Terry leaves a member's
            offset free, so that wco and uwo compare scores of different zero points without it.
        batch_size, dtype, trust_remote_code: as of reward `model`.
    """

    path: str | None = None
    members: tuple[str, ...] | list[str] = ()
    how: Literal["mean", "wco", "uwo"] = "uwo"
    lam: float = 0.5
    normalise: Literal["none", "member"] = "member"
    batch_size: int = 16
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    name: ClassVar[str] = "ensemble"

    def __post_init__(self) -> None:
        check_keys(self)
        object.__setattr__(self, "members", tuple(self.members))
        if (self.path is None) == (not self.members):
            raise UserError("reward ensemble: give either path (an ensemble's run) or members (a list of folders)")
        if self.how not in ("mean", "wco", "uwo"):
            raise UserError(f"reward ensemble: how must be mean, wco or uwo, got {self.how!r}")
        if self.normalise not in ("none", "member"):
            raise UserError(f"reward ensemble: normalise must be none or member, got {self.normalise!r}")
        if not self.lam >= 0:
            raise UserError(f"reward ensemble: lam must be at least 0, got {self.lam!r}")

    def _paths(self) -> list[str]:
        if self.members:
            return list(self.members)
        found = sorted(Path(str(self.path)).glob("member-*"), key=lambda p: int(p.name.rpartition("-")[2]))
        return [str(member) for member in found] or [str(self.path)]

    def _load(self) -> list[Loaded]:
        key = "reward.members" if self.members else "reward.path"
        models = [load(path, self.dtype, None, self.trust_remote_code, key) for path in self._paths()]
        for path, loaded in zip(self._paths(), models, strict=True):
            if loaded.facts.kind != "scalar":
                raise UserError(f"reward ensemble: {path} compares responses and has no scores to aggregate")
            labels = int(loaded.model.config.num_labels)
            if labels != 1 and not loaded.is_ours:
                raise UserError(
                    f"reward ensemble: {path} has {labels} labels and no reward_model.json that calls them members' "
                    "scores: a classifier is no ensemble"
                )
        return models

    def member_scores(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Any:
        """`[k, n]` float64 scores of every member, NaN where one could not score; not standardised."""
        import numpy as np

        check_lengths(prompts, responses)
        tables = [outputs(m, token_rows(m, prompts, responses), self.batch_size) for m in self._load()]
        return np.concatenate([np.array(table, dtype=np.float64).reshape(len(prompts), -1).T for table in tables])

    def constants(self) -> tuple[list[float], list[float]]:
        """(mean, std) of every member over its calibration responses, `[k]` each; UserError where one has none."""
        found = [_constants(loaded, path) for loaded, path in zip(self._load(), self._paths(), strict=True)]
        return [m for mean, _ in found for m in mean], [s for _, std in found for s in std]

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """The members' aggregate."""
        from alignment.rewards.aggregate import aggregate

        mean, std = self.constants() if self.normalise == "member" else (None, None)
        scores = self.member_scores(prompts, responses)
        found = aggregate(scores, how=self.how, lam=self.lam, normalise=self.normalise, mean=mean, std=std)
        return [float(value) for value in found]

    def describe(self) -> str:
        how = f"uwo, lambda {self.lam:g}" if self.how == "uwo" else self.how
        unit = "each standardised by its calibration responses" if self.normalise == "member" else "in their own units"
        digests = ", ".join(
            f"{path} ({loaded.digest})" for path, loaded in zip(self._paths(), self._load(), strict=True)
        )
        return f"{how} of the reward models {digests}, {self.dtype}, {unit}"


def check_keys(judge: Any, kind: str = "reward") -> None:
    """Recipe values that YAML may give another type than the field's."""
    for key, wanted in (
        ("path", str),
        ("standardise", bool),
        ("batch_size", int),
        ("dtype", str),
        ("lam", int | float),
    ):
        value = vars(judge).get(key)
        if value is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool)):
            raise UserError(f"{kind} {judge.name}: {key} must be {_WORDS[key]}, got {value!r}")
    if judge.batch_size < 1:
        raise UserError(f"{kind} {judge.name}: batch_size must be at least 1, got {judge.batch_size}")
    if judge.dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"{kind} {judge.name}: dtype must be float32, bfloat16 or float16, got {judge.dtype!r}")


_WORDS = {
    "path": "text",
    "standardise": "true or false",
    "batch_size": "a whole number",
    "dtype": "text",
    "lam": "a number",
}


def _constants(loaded: Loaded, path: str) -> tuple[list[float], list[float]]:
    mean, std = loaded.facts.mean, loaded.facts.std
    if mean is None or std is None:
        raise UserError(
            f"{path}: has no stored mean and std (reward_model.json) to standardise by; train it with "
            "scripts/train_reward_model.py, or set normalise: none (standardise: false)"
        )
    if not all(isinstance(value, float | int) and math.isfinite(value) for value in (*mean, *std)):
        raise UserError(
            f"{path}: reward_model.json: mean and std must be finite numbers, got {mean} and {std}; train it "
            "again, or set normalise: none (standardise: false)"
        )
    return mean, std
