"""How strongly several models prefer a row's chosen response, and what to do with rows that they doubt.

Wang et al. 2024, "Secrets of RLHF in Large Language Models Part II: Reward Modeling" (arXiv:2401.06080): the mean mu
and the deviation sigma, over models, of the margin r(chosen) - r(rejected). Rows are ranked by mu: the lowest are
likely mislabelled, the next ones are coin flips, the highest are easy. The paper's models are ten reward models,
trained on the same data in other orders. Here each row is judged only by models that have not seen it (one that was
trained on a wrong label learns to agree with it), and `cross_fitted_margins` fits the cheapest such models: linear
Bradley-Terry heads on features of a frozen model.

Arrays in, arrays and rows out. Not here: the features (`alignment.models`), and the losses that read a row's `label`
and `margin` (`alignment.trainers`, `alignment.objectives`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

from alignment.data.overlap import prompt_hash
from alignment.data.preferences import TOGETHER
from alignment.errors import UserError

Row = dict[str, Any]
Floats = NDArray[np.float64]

_SWAPPED = (("chosen", "rejected"), ("chosen_ids", "rejected_ids"), *TOGETHER)


# Margins of models that have not seen the rows


def prompt_folds(rows: Sequence[Row], folds: int, seed: int) -> NDArray[np.int64]:
    """A fold for every row, [n] in 0 .. folds-1; all rows of one prompt are in the same one.

    Args:
        rows: canonical rows.
        folds: how many, of nearly equal numbers of prompts.
        seed: of the deal.

    Raises:
        UserError: there are fewer prompts than folds.
    """
    prompts = [prompt_hash(row["prompt"]) for row in rows]
    different = list(dict.fromkeys(prompts))
    if not 2 <= folds <= len(different):
        raise UserError(f"folds must be from 2 to the number of prompts, {len(different)}, not {folds}")
    dealt = np.random.default_rng(seed).permutation(len(different)) % folds
    fold = dict(zip(different, dealt.tolist(), strict=True))
    return np.array([fold[prompt] for prompt in prompts], dtype=np.int64)


def fit_head(difference: Floats, label: Floats, l2: float) -> Floats:
    """The linear Bradley-Terry head without bias: argmin over w of mean loss + l2/2 |w|^2, [h].

    The loss of a row with d = w . (f(chosen) - f(rejected)) and label p = P(chosen is preferred) is
    -p logsig(d) - (1-p) logsig(-d). A bias would cancel in d.

    Args:
        difference: [n, h], features of chosen minus features of rejected.
        label: [n], in [0, 1].
        l2: above 0: where the rows can be separated there is no optimum without it.
    """
    n = len(difference)

    def loss(w: Floats) -> tuple[float, Floats]:
        d = difference @ w
        value = (label * np.logaddexp(0, -d) + (1 - label) * np.logaddexp(0, d)).mean() + l2 / 2 * (w @ w)
        return float(value), difference.T @ (expit(d) - label) / n + l2 * w

    found = minimize(loss, np.zeros(difference.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    weights: Floats = found.x
    return weights


def cross_fitted_margins(
    features_chosen: NDArray[Any],
    features_rejected: NDArray[Any],
    folds: NDArray[np.int64],
    members: int,
    seed: int,
    l2: float = 1e-2,
    label: Floats | None = None,
) -> Floats:
    """Margins of `members` heads on every row, each fitted without the row's fold.

    A head's optimum is unique, so members that only differed in the order of the data would be one model `members`
    times: member m is fitted on a bootstrap of the other folds' rows, drawn with replacement, as many as there are.
    A single member is fitted on the rows as they are. Features are divided by their root mean square difference over
    the rows that a head is fitted on, so that `l2` means the same for every model; they are not centred, for swapping
    chosen and rejected must negate a margin. Both choices, and the default of `l2`, are ours.

    Args:
        features_chosen, features_rejected: [n, h], of a frozen model.
        folds: [n], the fold of each row (`prompt_folds`).
        members: M.
        seed: of the bootstraps.
        l2: see `fit_head`.
        label: [n], P(chosen is preferred) as the data have it; None: 1.

    Returns:
        [M, n], in log-odds.

    Raises:
        UserError: a feature is not a finite number, or `members`, `l2` is out of range.
        ValueError: the arrays do not fit together.
    """
    difference = np.asarray(features_chosen, dtype=np.float64) - np.asarray(features_rejected, dtype=np.float64)
    labels = np.ones(len(difference)) if label is None else np.asarray(label, dtype=np.float64)
    if not len(difference) == len(labels) == len(folds):
        raise ValueError(f"{len(difference)} rows of features, {len(labels)} labels, {len(folds)} folds")
    if members < 1 or not l2 > 0:
        raise UserError(f"members must be at least 1 and l2 above 0, not {members} and {l2}")
    bad = np.flatnonzero(~np.isfinite(difference).all(axis=1))
    if len(bad):
        raise UserError(f"the features of row {bad[0] + 1} ({len(bad)} rows in all) are not finite numbers")
    if len(np.unique(folds)) < 2:
        raise UserError(
            "folds: all rows are in one fold, so that nothing is left to fit its models on; give 2 or more"
        )
    margins = np.full((members, len(difference)), np.nan)
    for fold in np.unique(folds):
        outside, inside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        for member in range(members):
            drawn = outside
            if members > 1:
                drawn = np.random.default_rng([seed, int(fold), member]).choice(outside, len(outside))
            scale = np.sqrt((difference[drawn] ** 2).mean(axis=0))
            scale[scale == 0] = 1.0  # a feature that never differs says nothing
            head = fit_head(difference[drawn] / scale, labels[drawn], l2)
            margins[member, inside] = difference[inside] / scale @ head
    return margins


# Preference strength


def strength(margins: Floats, *, standardise: bool = True) -> tuple[Floats, Floats]:
    """mu and sigma of every row: mean and population deviation over models of their margins.

    Standardised (ours; the source does not say), each model's margins are divided by their own deviation over the rows
    and multiplied by the models' mean deviation: scales are equal then, and mu is still in log-odds, for a soft label
    sigmoid(mu). The mean is not taken off: a margin of 0 means no preference, and must go on to.

    Args:
        margins: [M, n], d[m, i] = r_m(chosen) - r_m(rejected); every one from a model that has not seen row i.

    Returns:
        mu [n], sigma [n]; sigma is 0 for one model.

    Raises:
        UserError: a margin is not finite, or a model gives all rows the same one.
    """
    if not np.isfinite(margins).all():
        model, row = np.argwhere(~np.isfinite(margins))[0]
        raise UserError(f"the margin of model {model + 1} on row {row + 1} is not a finite number")
    if standardise:
        deviation = margins.std(axis=1, keepdims=True)
        if (deviation == 0).any():
            model = int(np.flatnonzero(deviation[:, 0] == 0)[0])
            raise UserError(f"model {model + 1} gives every row the same margin: it has learned nothing; leave it out")
        margins = margins / deviation * deviation.mean()
    return margins.mean(axis=0), margins.std(axis=0)


def flip_auroc(mu: Floats, flipped: NDArray[np.bool_]) -> float:
    """How well low strength tells flipped rows: P(mu of a flipped row < mu of another one), ties a half.

    Raises:
        ValueError: all rows are flipped, or none.
    """
    positives = int(flipped.sum())
    negatives = len(flipped) - positives
    if not positives or not negatives:
        raise ValueError("AUROC needs flipped rows and others")
    ranks = rankdata(-mu)
    return float((ranks[flipped].sum() - positives * (positives + 1) / 2) / (positives * negatives))


# Treatments: a row, its mu, the smoothing a -> the row, or None to drop it


def flip(row: Row) -> Row:
    """The opposite statement: what was rejected is preferred, as probably as the other was. Its own inverse.

    Token ids and rewards stay with their response, `label` with the statement, and a `margin` changes its sign.
    """
    flipped = dict(row)
    for one, other in _SWAPPED:
        if one in row:
            flipped[one], flipped[other] = row[other], row[one]
    if "margin" in row:
        flipped["margin"] = -row["margin"]
    return flipped


def oriented(row: Row) -> Row:
    """The same statement with the response that `label` prefers as chosen: what mu is the strength of."""
    return flip(row) | {"label": 1 - row["label"]} if row.get("label", 1.0) < 0.5 else row


def _flipped(row: Row, mu: float, smoothing: float) -> Row:
    return flip(row) if mu < 0 else row


def _soft(row: Row, mu: float, smoothing: float) -> Row:
    return row | {"label": float(expit(mu))}  # p_i = sig(mu_i)


def _smoothed(row: Row, mu: float, smoothing: float) -> Row:
    label = row.get("label", 1.0)
    return row | {"label": (1 - smoothing) * label + smoothing * (1 - label)}


_TREATMENTS: dict[str, Callable[[Row, float, float], Row | None]] = {
    "flip": _flipped,
    "soft": _soft,
    "margin": lambda row, mu, smoothing: row | {"margin": float(mu)},  # -logsig(D - mu_i)
    "smooth": _smoothed,
    "drop": lambda row, mu, smoothing: None,
    "keep": lambda row, mu, smoothing: row,
}
TREATMENTS = tuple(_TREATMENTS)


@dataclass(frozen=True)
class Bands:
    """What becomes of a row by the rank of its mu; the defaults are the source's shares and, where it has several, the
    first of its treatments.

    Attributes:
        lowest, low, high: treatment of the lowest rows, of those above them, of the highest ones. One of `flip`
            (only rows with mu < 0: where the models agree with the label there is nothing to mend. Ours), `soft`
            (label := sigmoid(mu)), `margin` (margin := mu), `smooth` (the label holds with probability 1 - smoothing),
            `drop`, `keep`.
        middle: of all the others; the source leaves them, or gives them `margin`.
        lowest_share, low_share, high_share: shares of the rows, rounded down.
        smoothing: a of `smooth`; a guess, the source does not give it.

    Raises:
        UserError: an unknown treatment, a share out of range, shares above 1 together, or smoothing outside [0, .5).
    """

    lowest: str = "flip"
    low: str = "soft"
    middle: str = "keep"
    high: str = "smooth"
    lowest_share: float = 0.2
    low_share: float = 0.2
    high_share: float = 0.1
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        for band in BANDS:
            if getattr(self, band) not in TREATMENTS:
                raise UserError(f"bands: {band} must be one of {', '.join(TREATMENTS)}, not {getattr(self, band)!r}")
        shares = (self.lowest_share, self.low_share, self.high_share)
        if not all(0 <= share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
            raise UserError(f"bands: shares must be from 0 to 1 and at most 1 together, not {shares}")
        if not 0 <= self.smoothing < 0.5:
            raise UserError(f"bands: smoothing must be at least 0 and below .5, not {self.smoothing}")


BANDS = ("lowest", "low", "middle", "high")


def band_of(mu: Floats, bands: Bands) -> list[str]:
    """The band of every row; equal strengths rank in the order of the rows."""
    order = np.argsort(mu, kind="stable")
    lowest, low, high = (  # 0.7 * 90 is a little less than 63 in floating point
        int(share * len(mu) + 1e-9) for share in (bands.lowest_share, bands.low_share, bands.high_share)
    )
    first, second, third = lowest, lowest + low, len(mu) - high
    found = [""] * len(mu)
    for rank, row in enumerate(order.tolist()):
        found[row] = BANDS[(rank >= first) + (rank >= second) + (rank >= third)]
    return found


@dataclass(frozen=True)
class Treated:
    """Rows after treatment, and what was done.

    Attributes:
        rows: in the order of the data, each with its `strength`: mu, sigma, its band and its number (from 1) in the
            data, which readers of preference rows leave aside.
        counts: band -> "treatment" -> rows; a row of a `flip` band that is not flipped counts as "keep".
    """

    rows: list[Row]
    counts: Mapping[str, Mapping[str, int]]

    def lines(self) -> list[str]:
        """For people: one line per band."""
        return [
            f"{band}: " + (", ".join(f"{done} {count}" for done, count in self.counts[band].items()) or "no rows")
            for band in BANDS
        ]


def treat(rows: Sequence[Row], mu: Floats, sigma: Floats, bands: Bands) -> Treated:
    """Flip, soften, drop … every row as its band says.

    If any band gives margins, rows without one get the margin 0: that is the loss without margin, and readers want a
    column in all rows or in none.

    Args:
        rows: canonical rows, n.
        mu, sigma: [n], see `strength`.

    Raises:
        ValueError: the lengths differ.
        UserError: no row is left.
    """
    counts: dict[str, Counter[str]] = {band: Counter() for band in BANDS}
    margins = "margin" in {getattr(bands, band) for band in BANDS}
    kept = []
    for number, (row, m, s, band) in enumerate(zip(rows, mu, sigma, band_of(mu, bands), strict=True), start=1):
        treatment = getattr(bands, band)
        given = {"margin": 0.0} | row if margins else row
        new = _TREATMENTS[treatment](given, float(m), bands.smoothing)
        counts[band]["keep" if new is given else treatment] += 1
        if new is not None:
            kept.append(new | {"strength": {"mu": float(m), "sigma": float(s), "band": band, "row": number}})
    if not kept:
        raise UserError("bands: no row is left; let a band keep its rows")
    return Treated(kept, counts)


def by_strength(
    rows: Sequence[Row],
    features_chosen: NDArray[Any],
    features_rejected: NDArray[Any],
    bands: Bands,
    *,
    members: int = 10,
    folds: int = 5,
    seed: int = 0,
    l2: float = 1e-2,
) -> Treated:
    """From rows and their features to treated rows: `treat(strength(cross_fitted_margins(...)))`.

    Rows whose label prefers the rejected response are turned round first (`oriented`).

    Args:
        rows: canonical rows, n.
        features_chosen, features_rejected: [n, h], of a frozen model.
        bands: what becomes of whom.
        members: M models; the paper's ten.
        folds: of prompts; each model learns on all but one.
        seed, l2: see `cross_fitted_margins`.
    """
    fold = prompt_folds(rows, folds, seed)
    labels = np.array([row.get("label", 1.0) for row in rows])
    margins = cross_fitted_margins(features_chosen, features_rejected, fold, members, seed, l2, labels)
    mu, sigma = strength(np.where(labels < 0.5, -margins, margins))
    return treat([oriented(row) for row in rows], mu, sigma, bands)
