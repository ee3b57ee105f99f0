"""Length-controlled win rate (Dubois et al. 2024, arXiv:2404.04475): what the win rate would be at equal lengths.

A logistic model of the preference, P(system wins) = sigmoid(a tanh(d) + b γ + c): d the standardised difference of
lengths (baseline minus system, so `a` is negative where the judge likes length), γ the instruction's difficulty, c the
system's own strength. The length-controlled rate is the mean prediction with d = 0.

What of AlpacaEval (cd543a149, metrics/glm_winrate.py) is reproduced: features, objective (L1 norm + C times the
weighted log loss, no intercept), the ten C from 1e-4 to 1e4, five folds by example scored by the mean weighted log
loss, the refit at the best C, and gamed systems' rows at weight λ / their number, with c = 0. What is not: liblinear
stops at a tolerance of 1e-4, this at the optimum; examples are dealt to folds in turn, which is
scikit-learn's rule for groups of one size up to how numpy's sort orders equals; and where a prompt has several rows
they are one example here (AlpacaEval has one row for each). Pure functions on arrays; no files.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from evaluation.estimates import cluster_codes, standard_error
from evaluation.intervals import Interval, percentile_interval

Array = NDArray[np.float64]

CS = np.logspace(-4, 4, 10)  # inverse regularisation strengths, scikit-learn's `Cs=10`
FOLDS = 5
LAMBDA = 0.2  # weight of all gamed rows together, per row of theirs: `regularize_to_baseline_lambda`
FEW_ROWS = 10  # under this many there is nothing to fit
SHRUNK = 0.05  # the share of resamples at 1/2 exactly from which an interval is said to be shrunk
FEATURES = ("length", "difficulty", "system")
IDENTICAL = "identical"  # the variant of a system against itself


@dataclass(frozen=True)
class LengthControl:
    """A fitted length-controlled win rate. Rates are shares in [0, 1].

    Attributes:
        rate: mean prediction at equal lengths.
        standard_error: sd (ddof 1) of the predictions / sqrt(n), AlpacaEval's `lc_standard_error`. It only measures
            how difficulties differ, not how well the coefficients are known: read the interval. None where the
            predictions are all alike, as they are without difficulties.
        interval: bootstrap over prompts, the model refitted at the same C and with the same gamed rows. None without
            resamples, and where the fit `says_nothing`.
        coefficients: by feature: length (a), difficulty (b; absent without γ), system (c).
        c: the chosen inverse regularisation strength.
        variant: "regularised", "plain", either with or without difficulty; or "identical".
        predictions: [n] P(system wins) of each row at equal lengths; NaN nowhere.
        refits: what the resamples gave; None without resamples.
        warning: what is doubtful about what it was fitted on.
        unanimous: whether one side won every pair: no finite coefficients fit best, and the rate is the penalty's.
    """

    rate: float
    standard_error: float | None
    interval: Interval | None
    coefficients: dict[str, float]
    c: float | None
    variant: str
    predictions: Array
    refits: Refits | None = None
    warning: str | None = None
    unanimous: bool = False

    @property
    def says_nothing(self) -> bool:
        """Whether the penalty left no coefficient, so that the rate is 1/2 whatever the data, or is all there is."""
        return self.c is not None and (self.unanimous or not any(self.coefficients.values()))

    @property
    def collapsed(self) -> float:
        """Share of the resamples whose rate is exactly 1/2, as the penalty left no coefficient but that of length."""
        if self.refits is None:
            return 0.0
        others = [i for i, name in enumerate(self.coefficients) if name != FEATURES[0]]
        return float((self.refits.coefficients[:, others] == 0).all(axis=1).mean())


@dataclass(frozen=True)
class Refits:
    """Of R resamples of C prompts.

    Attributes:
        coefficients: [R, k], in the order of `LengthControl.coefficients`.
        times: [R, C] how often each prompt was drawn, prompts in order of first appearance.
    """

    coefficients: Array
    times: Array


@dataclass(frozen=True)
class Gamed:
    """Annotations of a system that games length (answers like the baseline, told to be verbose or concise).

    Attributes:
        length: [n] tanh of its standardised length differences.
        difficulty: [n] γ; None without.
        share: [n] what it got of each pair, in [0, 1]; NaN is left out.
    """

    length: Array
    difficulty: Array | None
    share: Array


def standardise(baseline: ArrayLike, system: ArrayLike) -> Array:
    """tanh((len_1 - len_2) / sd(len_1 - len_2)), sd with ddof 1; all 0 where the difference never varies.

    Args:
        baseline: [n] characters of output_1.
        system: [n] characters of output_2.
    """
    delta = np.asarray(baseline, dtype=np.float64) - np.asarray(system, dtype=np.float64)
    sd = float(delta.std(ddof=1)) if len(delta) > 1 else 0.0
    return np.zeros_like(delta) if sd == 0 else np.tanh(delta / sd)


def fit_l1(features: Array, share: Array, weight: Array, c: float) -> Array:
    """argmin_w ||w||_1 + C sum_i weight_i (log(1 + exp(x_i w)) - share_i x_i w), without an intercept.

    A share p stands for two rows, (y=1, weight p) and (y=0, weight 1-p), as AlpacaEval duplicates them. Proximal
    Newton: a step minimises the loss's quadratic model plus the norm, and is halved until it helps.

    Args:
        features: [n, k].
        share: [n] in [0, 1].
        weight: [n].
        c: inverse regularisation strength.

    Returns:
        [k] coefficients.
    """

    def objective(w: Array) -> float:
        z = features @ w
        return float(np.abs(w).sum() + c * (weight @ (np.logaddexp(0, z) - share * z)))

    w = np.zeros(features.shape[1])
    value = objective(w)
    for _ in range(200):
        p = expit(features @ w)
        gradient = c * (features.T @ (weight * (p - share)))
        hessian = c * (features.T @ (features * (weight * p * (1 - p))[:, None]))
        step = _l1_step(w, gradient, hessian)
        size, least = 1.0, value - 1e-14 * abs(value)
        while size > 1e-8 and objective(w + size * step) > least:
            size /= 2
        if size <= 1e-8:
            break  # as low as rounding lets it be
        w = w + size * step
        value = objective(w)
        if np.abs(size * step).max() < 1e-10:
            break
    return w


def _l1_step(w: Array, gradient: Array, hessian: Array) -> Array:
    """argmin_d g d + d H d / 2 + ||w + d||_1, [k], by trying the signs of u = w + d: with two or three, they are few.

    With signs s on its support, u solves H u = H w - g - s there; elsewhere |H w - g - H u| <= 1.
    """
    linear, slack = hessian @ w - gradient, 1 + 1e-9
    best, least = -w, 0.0
    for signs in (np.sign(w), *map(np.array, itertools.product((-1.0, 0.0, 1.0), repeat=len(w)))):
        on, u = signs != 0, np.zeros_like(w)
        if on.any():
            u[on] = np.linalg.lstsq(hessian[np.ix_(on, on)], linear[on] - signs[on], rcond=1e-14)[0]
        if (u * signs < 0).any():
            continue
        if (np.abs(linear - hessian @ u)[~on] <= slack).all():
            return np.asarray(u - w)
        value = float(u @ hessian @ u / 2 - linear @ u + np.abs(u).sum())
        if value < least:
            best, least = u - w, value
    return best  # rounding hid the minimum from the conditions above


def choose_c(features: Array, share: Array, weight: Array, groups: NDArray[np.intp]) -> float:
    """The C of `CS` with the least log loss on left-out groups, averaged over `FOLDS` folds; the first of equals.

    Fewer groups make fewer folds.

    Args:
        features, share, weight: as of `fit_l1`.
        groups: [n] number of each row's group, which no fold splits: rows of one prompt know each other's outcome.
    """
    folds = min(FOLDS, int(groups.max()) + 1)
    fold = groups % folds
    losses = np.zeros(len(CS))
    for held_out in (fold == number for number in range(folds)):
        kept = ~held_out
        for i, c in enumerate(CS):
            w = fit_l1(features[kept], share[kept], weight[kept], c)
            p = np.clip(expit(features[held_out] @ w), 1e-15, 1 - 1e-15)
            y = share[held_out]
            losses[i] -= float(np.mean(weight[held_out] * (y * np.log(p) + (1 - y) * np.log(1 - p)))) / folds
    return float(CS[int(np.argmin(losses))])


def length_controlled(
    length: Array,
    share: Array,
    *,
    difficulty: Array | None = None,
    gamed: list[Gamed] | None = None,
    clusters: list[Any] | None = None,
    resamples: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> LengthControl:
    """Fit the model and predict at equal lengths.

    Args:
        length: [n] `standardise`d length differences.
        share: [n] what the system got of each pair, in [0, 1]; rows with NaN do not fit but are predicted.
        difficulty: [n] γ.
        gamed: annotations that hold `a` and `b` near the baseline's own (the regularised variant); each file's rows
            weigh `LAMBDA` / number of files.
        clusters: n labels (prompts) for the interval; None: every row is its own.
        resamples: of the interval; 0 for none.
        seed: of the resampling.
        level: of the interval.

    Raises:
        ValueError: fewer than `FEW_ROWS` rows or two prompts are known, or gamed rows lack the difficulty that the
            others have.
    """
    known = ~np.isnan(share)
    if known.sum() < FEW_ROWS:
        raise ValueError(f"{int(known.sum())} judged pairs; length control needs {FEW_ROWS}")
    columns = [length, np.ones_like(length)] if difficulty is None else [length, difficulty, np.ones_like(length)]
    rows, names = np.column_stack(columns), FEATURES if difficulty is not None else (FEATURES[0], FEATURES[2])
    extra, extra_share, extra_weight = _gamed_rows(gamed or [], difficulty is not None)
    x, y = np.concatenate([extra, rows[known]]), np.concatenate([extra_share, share[known]])
    weight = np.concatenate([extra_weight, np.ones(int(known.sum()))])
    prompts = list(range(len(known)) if clusters is None else clusters)
    groups, judged = cluster_codes([prompt for prompt, ok in zip(prompts, known, strict=True) if ok])
    if judged < 2:
        raise ValueError("pairs of one prompt; length control needs several")
    c = choose_c(x, y, weight, np.concatenate([np.arange(len(extra)), len(extra) + groups]))
    w = fit_l1(x, y, weight, c)
    unanimous = bool((share[known] == 0).all() or (share[known] == 1).all())
    level_rows = rows.copy()
    level_rows[:, 0] = 0
    predictions = expit(level_rows @ w)
    interval, refits = None, None
    if resamples:
        codes, count = cluster_codes(prompts)
        refits = _refitted(x, y, weight, codes[known], count, c, resamples, seed)
        if w.any() and not unanimous:
            pairs = zip(refits.coefficients, refits.times, strict=True)
            draws = [np.average(expit(level_rows @ u), weights=times[codes]) for u, times in pairs]
            interval = percentile_interval(float(predictions.mean()), np.array(draws), level)
    kind = "regularised" if gamed else "plain"
    return LengthControl(
        rate=float(predictions.mean()),
        standard_error=standard_error(predictions),
        interval=interval,
        coefficients=dict(zip(names, w.tolist(), strict=True)),
        c=c,
        variant=f"{kind}, {'with' if difficulty is not None else 'without'} difficulty",
        predictions=predictions,
        refits=refits,
        warning=_one_sided(length[known]),
        unanimous=unanimous,
    )


def _one_sided(length: Array) -> str | None:
    """What makes an estimate at equal lengths an extrapolation."""
    for longer, side in ((length < 0).all(), "longer"), ((length > 0).all(), "shorter"):
        if longer:
            return (
                f"every response is {side} than the baseline's: equal lengths lie outside of what was judged, and the "
                "rate is an extrapolation"
            )
    return None


def identical(n: int) -> LengthControl:
    """A system against itself: one half by definition, as AlpacaEval has it."""
    half = np.full(n, 0.5)
    return LengthControl(0.5, 0.0, Interval(0.5, 0.5, 0.5), dict.fromkeys(FEATURES, 0.0), None, IDENTICAL, half)


def _gamed_rows(gamed: list[Gamed], with_difficulty: bool) -> tuple[Array, Array, Array]:
    """Rows with system = 0, their shares, and their weights."""
    blocks, shares, weights = [np.empty((0, 3 if with_difficulty else 2))], [np.empty(0)], [np.empty(0)]
    for one in gamed:
        if with_difficulty and one.difficulty is None:
            raise ValueError("gamed annotations without a difficulty")
        known = ~np.isnan(one.share)
        columns = [one.length, one.difficulty] if with_difficulty else [one.length]
        blocks.append(np.column_stack([*columns, np.zeros(len(one.length))])[known])
        shares.append(one.share[known])
        weights.append(np.full(int(known.sum()), LAMBDA / len(gamed)))
    return np.concatenate(blocks), np.concatenate(shares), np.concatenate(weights)


def _refitted(
    x: Array, y: Array, weight: Array, codes: NDArray[np.intp], count: int, c: float, resamples: int, seed: int
) -> Refits:
    """Fits on resamples of whole clusters, as weights of the rows.

    Args:
        x, y, weight: the fit's rows, gamed ones first, which every resample keeps.
        codes: clusters of the last rows of `x`, all but the gamed ones.
        count: of clusters.
    """
    rng = np.random.default_rng(seed)
    times = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    gamed = weight[: len(x) - len(codes)]
    fits = [fit_l1(x, y, np.concatenate([gamed, drawn[codes]]), c) for drawn in times]
    return Refits(np.array(fits), times)


def between_systems(
    system: LengthControl, other: LengthControl, difficulty: Array | None = None, level: float = 0.95
) -> Interval:
    """Length-controlled win rate of one system over another, from their fits against one baseline.

    mean_i sigmoid((c_s - c_o) + (b_s - b_o) γ_i), AlpacaEval's `predict_winrate`: rate(s, o) = 1 - rate(o, s), and 1/2
    for a system against itself. The interval takes a resample of both at once, so that it is paired.

    Args:
        system, other: fitted on rows of the same prompts, which appear in the same order, with the same seed and
            number of resamples; `identical` for the baseline itself.
        difficulty: [C] γ of the prompts, in that order; None where the coefficients have none.
        level: of the interval.

    Raises:
        ValueError: the two were resampled differently, or not at all.
    """
    if system.variant == other.variant == IDENTICAL:
        return Interval(0.5, 0.5, 0.5)  # the baseline against itself
    taken = [one.refits.times for one in (system, other) if one.refits is not None]
    if not taken or not np.array_equal(taken[0], taken[-1]):
        raise ValueError("length control between systems needs the same resamples of the same prompts")
    drawn = taken[0]
    gamma = np.zeros(drawn.shape[1]) if difficulty is None else difficulty

    def logits(one: LengthControl) -> tuple[Array, Array]:
        """[C] at the estimate and [R, C] of the resamples."""
        at = one.coefficients
        mean = at["system"] + at.get("difficulty", 0.0) * gamma
        if one.refits is None:
            return mean, np.broadcast_to(mean, drawn.shape)
        fits = dict(zip(at, one.refits.coefficients.T, strict=True))
        return mean, fits["system"][:, None] + (fits["difficulty"][:, None] * gamma if "difficulty" in fits else 0.0)

    (mean_s, resampled_s), (mean_o, resampled_o) = logits(system), logits(other)
    draws = (drawn * expit(resampled_s - resampled_o)).sum(axis=1) / drawn.sum(axis=1)
    return percentile_interval(float(expit(mean_s - mean_o).mean()), draws, level)
