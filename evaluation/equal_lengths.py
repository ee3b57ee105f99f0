"""Length control of annotations: `length_control`'s fit on judged pairs, what to be told of it, and two systems' fits.

Rates are in the caller's unit; `head_to_head` has percent, `outputs` shares. No text is printed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.annotations import Annotation, difficulty_of, refuse_two_difficulties, shares
from evaluation.intervals import Interval
from evaluation.length_control import (
    SHRUNK,
    Gamed,
    LengthControl,
    between_systems,
    identical,
    length_controlled,
    standardise,
)

Array = NDArray[np.float64]
Difficulty = Mapping[str | int, float]

NO_ERROR = (
    "AlpacaEval's lc_standard_error measures how instructions differ in difficulty; here all have the same "
    "prediction, and it measures nothing: read the interval"
)
EXTREME_POINTS, EXTREME_SHARE = 10, 1 / 4  # AlpacaEval warns of a change beyond both (glm_winrate.py)


def fit_annotations(
    rows: Sequence[Annotation],
    gamed: Sequence[Sequence[Annotation]] = (),
    difficulty: Difficulty | None = None,
    *,
    seed: int = 1,
) -> LengthControl:
    """The length-controlled win rate of annotations (`length_control`), 1/2 for a system against itself.

    Raises:
        ValueError: too few rows.
        UserError: a row has no difficulty, or an instruction another one in a gamed file.
    """
    if rows[0].generator_1 == rows[0].generator_2:
        return identical(len(rows))

    def features(of: Sequence[Annotation]) -> tuple[Array, Array | None]:
        length = standardise([len(row.output_1) for row in of], [len(row.output_2) for row in of])
        return length, None if difficulty is None else difficulty_of(of, difficulty)

    length, gamma = features(rows)
    if difficulty is not None:
        for of in gamed:
            refuse_two_difficulties(rows, of, difficulty)
    others = [Gamed(*features(of), shares(of)) for of in gamed]
    prompts = [row.instruction for row in rows]
    found = length_controlled(length, shares(rows), difficulty=gamma, gamed=others, clusters=prompts, seed=seed)
    values = set() if gamma is None else set(zip(prompts, gamma.tolist(), strict=True))
    if (several := len(values) - len(set(prompts))) > 0:  # a set of instructions may repeat one, so it is no error
        warning = f"{several} rows repeat an instruction at another difficulty: a row's `index` has to be its prompt's"
        return replace(found, warning=warning)
    return found


def described(found: LengthControl | None, raw: float, note: str | None = None) -> dict[str, Any]:
    """What stands beside a length-controlled rate.

    Args:
        found: the fit; None where there is none, for the reason in `note`.
        raw: the plain win rate in percent.
        note: the reason.
    """
    if found is None:
        return {"variant": None, "note": note}
    return {
        "variant": found.variant,
        "coefficients": found.coefficients,
        "C": found.c,
        "resamples": 0 if found.refits is None else len(found.refits.times),
        "note": caution(raw, found),
        **({} if found.standard_error is not None or found.says_nothing else {"standard_error_note": NO_ERROR}),
    }


def caution(raw: float, found: LengthControl) -> str | None:
    """What makes a length-controlled rate doubtful: no coefficient is left, or AlpacaEval's warning of a big change.

    The latter stands where it changes the rate by over 10 points and over a quarter of the way. Unanimous pairs,
    doubtful rows and lengths that all differ one way come before it.

    Args:
        raw: the plain win rate in percent.
        found: the fit.
    """
    if found.unanimous:
        return (
            "one side won every pair, so that no finite strength fits best and the rate would be the penalty's alone"
        )
    if found.says_nothing:
        return (
            f"cross-validation chose the strongest penalty (C = {found.c:.2g}), which leaves no "
            "coefficient; too few rows, or preferences that neither length nor system explains"
        )
    if found.warning is not None:
        return found.warning
    if (collapsed := found.collapsed) > SHRUNK:
        return (
            f"the penalty left the system no strength of its own in {100 * collapsed:.0f} % of the resamples: as many "
            "of the values behind the interval are exactly 50, which means too little to tell, not equal"
        )
    controlled = 100 * found.rate
    room = raw if controlled < raw else 100 - raw
    if abs(controlled - raw) <= max(EXTREME_POINTS, EXTREME_SHARE * room):
        return None
    return (
        f"length control changes {raw:.1f} % into {controlled:.1f} %: the model may have failed; look at the lengths"
    )


class Fits:
    """Fits of systems against one baseline on the instructions that two of them share, each made once.

    Rows stand in the order of their instructions' texts, so that the folds, and with them the fits, are the same
    whichever of two systems is asked about first: the two rates add up to 1.

    Args:
        systems: name → its annotations.
        gamed, difficulty, seed: as of `fit_annotations`.
    """

    def __init__(
        self,
        systems: Mapping[str, Sequence[Annotation]],
        gamed: Sequence[Sequence[Annotation]],
        difficulty: Difficulty | None,
        seed: int,
    ) -> None:
        self.systems, self.gamed, self.difficulty, self.seed = systems, gamed, difficulty, seed
        self._fits: dict[tuple[str, frozenset[str]], LengthControl | None] = {}

    def between(self, first: str, second: str, common: frozenset[str]) -> Interval | None:
        """First over second at equal lengths, in [0, 1]; None where one of the fits says nothing or cannot be made.

        Raises:
            UserError: an instruction has another difficulty in each of the two.
        """
        one, other = self._fit(first, common), self._fit(second, common)
        if one is None or other is None or one.says_nothing or other.says_nothing:
            return None
        if self.difficulty is None:
            return between_systems(one, other)
        refuse_two_difficulties(self._rows(first, common), self._rows(second, common), self.difficulty)
        one_each = {row.instruction: row for row in self._rows(first, common)}
        return between_systems(one, other, difficulty_of(list(one_each.values()), self.difficulty))

    def _rows(self, name: str, common: frozenset[str]) -> list[Annotation]:
        rows = (row for row in self.systems[name] if row.instruction in common)
        return sorted(rows, key=lambda row: row.instruction)

    def _fit(self, name: str, common: frozenset[str]) -> LengthControl | None:
        key = name, common
        if key not in self._fits:
            try:
                rows = self._rows(name, common)
                self._fits[key] = fit_annotations(rows, self.gamed, self.difficulty, seed=self.seed)
            except ValueError:  # too few rows
                self._fits[key] = None
        return self._fits[key]
