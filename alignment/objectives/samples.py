"""`SamplePairs` and `GroupLogps`: the numbers an on-policy objective may read, one tensor per column.

Not a sampler and not a forward pass: whoever sampled and scored the responses fills the columns. Log-probabilities are
sums over completion tokens, end token included once, in nats, at temperature 1. As in `batch.py`, half precision
becomes float32 and float64 stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.objectives.base import BatchKind
from alignment.objectives.batch import NEEDS, WHY, Columns

SAMPLE_NEEDS: dict[str, tuple[str, ...]] = {
    "behaviour": ("behaviour_first", "behaviour_second"),
    "reference": ("ref_first", "ref_second"),
    "length": ("first_length", "second_length"),
    "reward": ("reward_first", "reward_second"),
    "preference": ("preference_first", "preference_second"),
    "duel": ("preference",),
}
SAMPLE_WHY: dict[str, str] = {
    "behaviour": "log-probabilities under the policy that sampled the responses, frozen",
    "reference": "log-probabilities under the frozen reference model",
    "length": "numbers of completion tokens",
    "reward": "scalar rewards of the two responses",
    "preference": "probabilities that the first and that the second response beat a third, the opponent's",
    "duel": "probability that the first response beats the second",
}
GROUP_NEEDS: dict[str, tuple[str, ...]] = {"answer": ("answer", "answer_mask"), "verified": ("verified",)}
GROUP_WHY: dict[str, str] = {
    "answer": "token log-probabilities of the reference answer after each chain of thought, and which tokens count",
    "verified": "a verifier's verdict on each sampled answer",
}
NEEDS_OF: dict[BatchKind, dict[str, tuple[str, ...]]] = {
    "pairs": NEEDS,
    "samples": SAMPLE_NEEDS,
    "groups": GROUP_NEEDS,
}
WHY_OF: dict[BatchKind, dict[str, str]] = {"pairs": WHY, "samples": SAMPLE_WHY, "groups": GROUP_WHY}


class _Samples(Columns):
    """Checks and conversions that both batches share."""

    def _floats(self, name: str, value: object) -> None:
        """Refuse what is no tensor, and make half precision float32."""
        if not isinstance(value, Tensor):
            raise ValueError(f"{type(self).__name__}: {name} must be a tensor, got {type(value).__name__}")
        if value.dtype in (torch.float16, torch.bfloat16):
            object.__setattr__(self, name, value.float())

    def _floating(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value.is_floating_point():
                raise ValueError(f"{type(self).__name__}: {name} must be floating point, got {value.dtype}")

    def _shaped(self, name: str, *allowed: list[int]) -> None:
        shape = list(getattr(self, name).shape)
        if shape not in allowed:
            expected = " or ".join(map(str, allowed))
            raise ValueError(f"{type(self).__name__}: {name} has shape {shape}, expected {expected}")


@dataclass(frozen=True)
class SamplePairs(_Samples):
    """B prompts with two sampled responses each; every column has shape `[B]`.

    Attributes:
        first, second: log-probabilities under the policy; these carry the gradient.
        behaviour_first, behaviour_second: under the policy that sampled the responses.
        ref_first, ref_second: under the frozen reference.
        first_length, second_length: completion tokens, at least 1.
        reward_first, reward_second: scalar rewards. NaN is not refused: it becomes the loss of its pair.
        preference_first, preference_second: P(response beats the opponent's response y''), in [0, 1].
        preference: P(first beats second), in [0, 1].

    Raises:
        ValueError: a column has another shape than `first`, a log-probability is not floating point, or a length or
            probability is out of range (a look at the values: one small synchronisation on a GPU).
    """

    first: Tensor
    second: Tensor
    behaviour_first: Tensor | None = None
    behaviour_second: Tensor | None = None
    ref_first: Tensor | None = None
    ref_second: Tensor | None = None
    first_length: Tensor | None = None
    second_length: Tensor | None = None
    reward_first: Tensor | None = None
    reward_second: Tensor | None = None
    preference_first: Tensor | None = None
    preference_second: Tensor | None = None
    preference: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in self.columns().items():
            self._floats(name, value)
        self._floating("first", "second", "behaviour_first", "behaviour_second", "ref_first", "ref_second")
        if self.first.dim() != 1:
            raise ValueError(f"SamplePairs: first has shape {list(self.first.shape)}, expected [B]")
        for name, value in self.columns().items():
            self._shaped(name, list(self.first.shape))
            if name.startswith("preference"):
                self._refuse(~((value >= 0) & (value <= 1)), value, f"{name} must be in [0, 1]")
            if name.endswith("_length"):
                self._refuse(~(value >= 1), value, f"{name} must be at least 1")

    @classmethod
    def why(cls, column: str) -> str:
        """What the column is, for the message that it is missing."""
        return next((SAMPLE_WHY[need] for need, columns in SAMPLE_NEEDS.items() if column in columns), "")

    def swapped(self) -> SamplePairs:
        """The same pairs with first and second exchanged; `preference` becomes 1 - preference."""
        columns = {_mirrored(name): value for name, value in self.columns().items()}
        if self.preference is not None:
            columns["preference"] = 1 - self.preference
        return SamplePairs(**columns)

    @property
    def log_ratio_first(self) -> Tensor:
        """z1 = log pi(y1) - log ref(y1), `[B]`."""
        return self.first - self.column("ref_first")

    @property
    def log_ratio_second(self) -> Tensor:
        """z2 = log pi(y2) - log ref(y2), `[B]`."""
        return self.second - self.column("ref_second")


def _mirrored(name: str) -> str:
    return name.replace("first", "second") if "first" in name else name.replace("second", "first")


@dataclass(frozen=True)
class GroupLogps(_Samples):
    """B prompts with G samples each, and a reference answer of up to A tokens scored after every sample.

    A sample is a chain of thought z; where its own answer a counts (a verifier's rewards), it is z and a together.

    Attributes:
        cot: `[B, G]`, log-probability of the sample's own tokens under the policy (a sum); carries a gradient.
        answer: `[B, G, A]`, log pi(a*_t | prompt, z_i, a*_<t): one value per token of the reference answer, as
            its forward pass gives it, not summed; carries a gradient.
        answer_mask: `[B, 1, A]` (or `[B, G, A]`), true where a token exists. What stands elsewhere is never read.
        verified: `[B, G]`, 1 for a right answer and 0 for a wrong one, or grades between.
        valid: `[B, G]`, false for samples without the answer's form; absent is true for all. `answer` and `verified`
            of such a sample are never read; `cot` is where the objective counts it with reward 0. A sample whose
            answer has no token is not valid.

    Raises:
        ValueError: shapes do not fit, or `cot` / `answer` is not floating point.
    """

    cot: Tensor
    answer: Tensor | None = None
    answer_mask: Tensor | None = None
    verified: Tensor | None = None
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in self.columns().items():
            self._floats(name, value)
        self._floating("cot", "answer")
        if self.cot.dim() != 2:
            raise ValueError(f"GroupLogps: cot has shape {list(self.cot.shape)}, expected [B, G]")
        rows, size = self.cot.shape
        tokens = next((c.shape[-1] for c in (self.answer, self.answer_mask) if c is not None and c.dim() == 3), 0)
        if self.answer is not None:
            self._shaped("answer", [rows, size, tokens])
        if self.answer_mask is not None:
            self._shaped("answer_mask", [rows, 1, tokens], [rows, size, tokens])
        for name in ("verified", "valid"):
            if getattr(self, name) is not None:
                self._shaped(name, [rows, size])

    @classmethod
    def why(cls, column: str) -> str:
        """What the column is, for the message that it is missing."""
        return next((GROUP_WHY[need] for need, columns in GROUP_NEEDS.items() if column in columns), "")

    @property
    def kept(self) -> Tensor:
        """`[B, G]` bool: the valid samples whose answer (where there is one) has a token."""
        kept = torch.ones_like(self.cot, dtype=torch.bool) if self.valid is None else self.valid.bool()
        return kept if self.answer_mask is None else kept & self.answer_mask.bool().any(-1)
