"""`PairLogps`: the numbers an offline objective may read, one tensor per column. (`samples.py`: on-policy ones.)

Not a data loader and not a forward pass: whoever scored the responses fills the columns (sums over completion tokens,
in nats). An objective reads an optional column with `batch.column(name)`, so that a missing one is an error that says
which and why instead of a `None` deep inside a formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

# What an objective can ask for, and the columns that satisfy it.
NEEDS: dict[str, tuple[str, ...]] = {
    "reference": ("ref_chosen", "ref_rejected"),
    "length": ("chosen_length", "rejected_length"),
    "previous": ("prev_chosen", "prev_rejected"),
    "calibration": ("calibration",),
    "ref_calibration": ("ref_calibration",),
    "calibration_length": ("calibration_length",),
    "reward": ("reward_chosen", "reward_rejected"),
    "preference": ("preference_chosen", "preference_rejected"),
    "log_odds": ("log_odds_chosen", "log_odds_rejected"),
    "degree": ("degree_logits", "degree_labels"),
}
WHY: dict[str, str] = {
    "reference": "log-probabilities under the frozen reference model",
    "length": "numbers of completion tokens",
    "previous": "log-probabilities under the previous iterate, the policy that generated this iteration's pairs",
    "calibration": "log-probability of the calibration (baseline) response under the policy",
    "ref_calibration": "log-probability of the calibration response under the reference model",
    "calibration_length": "number of completion tokens of the calibration response",
    "reward": "scalar scores of the two responses by a reward model",
    "preference": "probabilities that each response beats the policy",
    "log_odds": "mean log-odds with which each response beats the policy's samples",
    "degree": "degree logits of degraded copies, from a classification head on the policy, and their labels",
}
POLICY_COLUMNS = ("chosen", "rejected", "calibration")  # the columns that carry a gradient
DEGREE_COLUMNS = ("degree_logits", "degree_labels")


def _mirrored(name: str) -> str:
    """The other response's column: `rejected_length` for `chosen_length`; a column of neither is its own."""
    return name.replace("chosen", "rejected") if "chosen" in name else name.replace("rejected", "chosen")


class MissingColumn(ValueError):
    """An optional column that an objective asked for is not in the batch; `why` says what it is."""

    def __init__(self, column: str, why: str = ""):
        super().__init__(f"the batch lacks {column!r}" + (f" ({why})" if why else ""))


class Columns:
    """What every batch can do; a subclass is a frozen dataclass of tensors, the optional ones None where absent."""

    def columns(self) -> dict[str, Tensor]:
        """The columns that are present, by name."""
        own: Any = self  # a dataclass in every subclass
        pairs = ((field.name, getattr(self, field.name)) for field in fields(own))
        return {name: value for name, value in pairs if value is not None}

    def column(self, name: str) -> Tensor:
        """The column `name`; raises `MissingColumn` (a ValueError) if the batch lacks it."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise MissingColumn(name, self.why(name))
        return value

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A batch with `function` applied to every column: `batch.map(lambda column: column[index])`."""
        return type(self)(**{name: function(value) for name, value in self.columns().items()})

    @classmethod
    def why(cls, column: str) -> str:
        """What the column is, for the message that it is missing."""
        return ""

    def _refuse(self, wrong: Tensor, values: Tensor, rule: str) -> None:
        """ValueError with the first wrong value and its row; a look at the values, so one synchronisation on a GPU."""
        if bool(wrong.any()):
            first = wrong.nonzero()[0]
            raise ValueError(
                f"{type(self).__name__}: {rule}, got {values[tuple(first)].item():g} in row {int(first[0])}"
            )


@dataclass(frozen=True)
class PairLogps(Columns):
    """Sequence log-probabilities of B preference pairs; shape `[B]` each unless said, in nats.

    A log-probability is the sum over the completion's tokens, end token included once. Half-precision columns become
    float32 here: a bf16 number near 200 has spacing 1, more than most margins. float64 stays float64.

    Attributes:
        chosen, rejected: under the policy; these (and `calibration`) carry the gradient.
        ref_chosen, ref_rejected: under the frozen reference.
        chosen_length, rejected_length: completion tokens.
        prev_chosen, prev_rejected: under the previous iterate (INPO).
        calibration, ref_calibration, calibration_length: a third response per prompt (VPO, RPO).
        reward_chosen, reward_rejected: scalar scores.
        preference_chosen, preference_rejected: P(response beats the policy that sampled the pair).
        log_odds_chosen, log_odds_rejected: mean log-odds of the response against that policy's samples.
        degree_logits, degree_labels: of K degraded copies per pair and N degrees, `[B, K, N]` and integers `[B, K]`
            (-1: there is no such copy); SPO only.
        label: probability that `chosen` is the better response; absent is 1 for every pair.

    Raises:
        ValueError: a column has another shape than `chosen`, `chosen` / `rejected` is not floating point, or a label
            or degree is out of range (a look at the values: one small synchronisation on a GPU).
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_length: Tensor | None = None
    rejected_length: Tensor | None = None
    prev_chosen: Tensor | None = None
    prev_rejected: Tensor | None = None
    calibration: Tensor | None = None
    ref_calibration: Tensor | None = None
    calibration_length: Tensor | None = None
    reward_chosen: Tensor | None = None
    reward_rejected: Tensor | None = None
    preference_chosen: Tensor | None = None
    preference_rejected: Tensor | None = None
    log_odds_chosen: Tensor | None = None
    log_odds_rejected: Tensor | None = None
    degree_logits: Tensor | None = None
    degree_labels: Tensor | None = None
    label: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in self.columns().items():
            if not isinstance(value, Tensor):
                raise ValueError(f"PairLogps: {name} must be a tensor, got {type(value).__name__}")
            if name in (*POLICY_COLUMNS, "label") and not value.is_floating_point():
                raise ValueError(f"PairLogps: {name} must be floating point, got {value.dtype}")
            if name not in DEGREE_COLUMNS and (value.dim() != 1 or value.shape != self.chosen.shape):
                expected = list(self.chosen.shape) if self.chosen.dim() == 1 else "[B]"
                raise ValueError(f"PairLogps: {name} has shape {list(value.shape)}, expected {expected}")
            if value.dtype in (torch.float16, torch.bfloat16):
                object.__setattr__(self, name, value.float())
        if self.label is not None:
            self._refuse(~((self.label >= 0) & (self.label <= 1)), self.label, "label must be in [0, 1]")
        self._check_degrees()

    def _check_degrees(self) -> None:
        logits, labels, pairs = self.degree_logits, self.degree_labels, len(self.chosen)
        if logits is not None and (logits.dim() != 3 or len(logits) != pairs or not logits.is_floating_point()):
            raise ValueError(
                f"PairLogps: degree_logits must be floating point of shape [{pairs}, copies, degrees], "
                f"got {logits.dtype} of shape {list(logits.shape)}"
            )
        if labels is None:
            return
        shape = [pairs, labels.shape[-1]] if logits is None else list(logits.shape[:2])
        if list(labels.shape) != shape or labels.is_floating_point():
            raise ValueError(
                f"PairLogps: degree_labels must be integers of shape {shape}, "
                f"got {labels.dtype} of shape {list(labels.shape)}"
            )
        if logits is not None:
            degrees = logits.shape[2]
            wrong = (labels < -1) | (labels >= degrees)
            self._refuse(wrong, labels, f"degree_labels must be -1 (no such copy) or 0 to {degrees - 1}")

    @classmethod
    def why(cls, column: str) -> str:
        """What the column is, for the message that it is missing."""
        return next((WHY[need] for need, columns in NEEDS.items() if column in columns), "")

    def swapped(self) -> PairLogps:
        """The same pairs labelled the other way round: every column of one response becomes the other's.

        `label` becomes 1 - label, so that a soft-labelled batch and its swap say the same. Columns that belong to no
        response of the two (calibration, degrees) stay.
        """
        columns = {_mirrored(name): value for name, value in self.columns().items()}
        if self.label is not None:
            columns["label"] = 1 - self.label
        return PairLogps(**columns)

    @property
    def log_ratio_chosen(self) -> Tensor:
        """z_w = log pi(chosen) - log ref(chosen), `[B]`."""
        return self.chosen - self.column("ref_chosen")

    @property
    def log_ratio_rejected(self) -> Tensor:
        """z_l = log pi(rejected) - log ref(rejected), `[B]`."""
        return self.rejected - self.column("ref_rejected")

    @property
    def margin(self) -> Tensor:
        """m = z_w - z_l, `[B]`."""
        return self.log_ratio_chosen - self.log_ratio_rejected
