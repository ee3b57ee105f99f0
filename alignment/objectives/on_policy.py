"""Bases of the objectives that learn from the policy's own samples: what they read, refuse and log.

No formula and no sampling. `SampleObjective` reads `SamplePairs`, `GroupObjective` reads `GroupLogps`; names,
cards and hyper-parameter checks are those of `Objective`, without the implicit rewards of labelled pairs.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from torch import Tensor

from alignment.objectives.base import BatchKind, Objective
from alignment.objectives.batch import Columns, MissingColumn, PairLogps
from alignment.objectives.samples import NEEDS_OF, GroupLogps, SamplePairs

NO_PAIRS = "learns from samples and has no rewards of labelled pairs; statistics() has what to log"
B = TypeVar("B", bound=Columns)


class OnPolicyObjective(Objective):
    """What both kinds share; not to be subclassed by an objective itself."""

    def _read(self, batch: Any, kind: type[B]) -> B:
        """The batch if it is of this kind and has every column that the settings need; else ValueError saying what."""
        if not isinstance(batch, kind):
            self.refuse(f"learns from {kind.__name__}, got {type(batch).__name__}")
        try:
            for need in self.needs:
                for column in NEEDS_OF[self.batch_kind][need]:
                    batch.column(column)
        except MissingColumn as error:
            raise ValueError(f"objective {self.card.name!r} needs {', '.join(self.needs)}: {error}") from None
        return batch

    def pair_rewards(self, batch: PairLogps) -> tuple[Tensor, Tensor]:
        """Refused: there are no labelled pairs."""
        raise ValueError(f"{self.card.name}: {NO_PAIRS}")

    def saturated(self, batch: PairLogps) -> Tensor:
        """Refused: there are no labelled pairs."""
        raise ValueError(f"{self.card.name}: {NO_PAIRS}")


class SampleObjective(OnPolicyObjective):
    """Base of objectives on two samples per prompt: write `sample_loss` and `sample_statistics`."""

    batch_kind: ClassVar[BatchKind] = "samples"

    def sample_loss(self, batch: SamplePairs) -> Tensor:
        """The formula: one value per pair, `[B]`, to be minimised."""
        raise NotImplementedError(f"{type(self).__name__} defines no sample_loss")

    def sample_statistics(self, batch: SamplePairs) -> dict[str, Tensor]:
        """What `statistics` returns, before detaching."""
        return {}

    def loss(self, batch: SamplePairs) -> Tensor:  # type: ignore[override]  # not of labelled pairs
        """One value per pair, `[B]`, differentiable in first and second; ValueError naming a column that lacks."""
        return self.sample_loss(self._read(batch, SamplePairs))

    def statistics(self, batch: SamplePairs) -> dict[str, Tensor]:
        """Numbers to log, detached: name -> `[N]`, one value per pair; log their mean."""
        return {name: value.detach() for name, value in self.sample_statistics(self._read(batch, SamplePairs)).items()}


class GroupObjective(OnPolicyObjective):
    """Base of objectives on a group of samples per prompt: write `group_loss` and `group_statistics`."""

    batch_kind: ClassVar[BatchKind] = "groups"

    def group_loss(self, batch: GroupLogps) -> Tensor:
        """The formula: one value per prompt, `[B]`, to be minimised."""
        raise NotImplementedError(f"{type(self).__name__} defines no group_loss")

    def group_statistics(self, batch: GroupLogps) -> dict[str, Tensor]:
        """What `statistics` returns, before detaching."""
        return {}

    def loss(self, batch: GroupLogps) -> Tensor:  # type: ignore[override]  # not of labelled pairs
        """One value per prompt, `[B]`, differentiable in cot and answer; ValueError naming a column that lacks."""
        return self.group_loss(self._read(batch, GroupLogps))

    def statistics(self, batch: GroupLogps) -> dict[str, Tensor]:
        """Numbers to log, detached: name -> `[N]`, a value per prompt, sample or valid sample (N may be 0)."""
        return {name: value.detach() for name, value in self.group_statistics(self._read(batch, GroupLogps)).items()}
