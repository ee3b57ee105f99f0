"""Bradley–Terry ratings of several systems from annotated pairs, with intervals over prompts and control of style.

    python evaluation/ratings.py runs/*/annotations.json                 # any pairs of systems, AlpacaEval's format
    python evaluation/ratings.py a.json b.json --style length --style markdown --anchor gpt4_1106_preview

P(second beats first) = sigmoid(θ_second - θ_first + style · b). A preference counts as the share that it gives, a tie
as one half. Prompts are resampled whole: the pairs of one prompt resemble each other, and an interval that resamples
pairs is too narrow. First pure functions on arrays, then the program. docs/win_rates.md explains the numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from alignment.errors import UserError, nearest, run_or_exit
from evaluation.estimates import cluster_codes, cluster_sums, holm, sign_flip_p_value
from evaluation.files import deliver
from evaluation.intervals import FEW_PROMPTS, Interval, percentile_interval

Array = NDArray[np.float64]
Index = NDArray[np.intp]

ELO = 400 / math.log(10)  # points per nat: 400 points are odds of ten to one
RESAMPLES, LEVEL = 1000, 0.95
FEW_PAIRS = 10  # a feature of style that differs in fewer has no coefficient worth the name, and often no finite one


@dataclass(frozen=True)
class Ratings:
    """Fitted ratings. θ is in nats (log odds), 0 for the anchor, or on average without one.

    Attributes:
        theta: by system, θ with its interval.
        style: by feature, the coefficient of one standard deviation of difference, with its interval.
        resamples: how many bootstrap resamples count.
        resamples_left_out: resamples without a finite rating (some system won or lost everything in them).
    """

    theta: dict[str, Interval]
    style: dict[str, Interval]
    resamples: int
    resamples_left_out: int


def fit(features: Array, won: Array, games: Array) -> Array | None:
    """Maximum-likelihood coefficients of won_i ~ Binomial(games_i, sigmoid(x_i w)), by Newton's method.

    Args:
        features: [m, d] of full column rank.
        won: [m] what the second got, 0 <= won <= games; need not be whole.
        games: [m] weights.

    Returns:
        [d]; None where the maximum is not finite or not unique.
    """
    from scipy.special import expit

    w = np.zeros(features.shape[1])
    for _ in range(100):
        p = expit(features @ w)
        gradient = features.T @ (won - games * p)
        hessian = features.T @ (features * (games * p * (1 - p))[:, None])
        try:
            step = np.linalg.solve(hessian, gradient)
        except np.linalg.LinAlgError:
            return None
        w = w + step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-300))
        if np.abs(w).max() > 30:
            return None
        if np.abs(step).max() < 1e-10:
            return w
    return None


def separated(first: Index, second: Index, share: Array, systems: int) -> tuple[list[int], str] | None:
    """A group of systems that no finite ratings can place against the others, and why; None where all is well.

    Ratings exist where one can go from every system to every other along "took something from" (Ford 1957).

    Args:
        first, second: [n] numbers of the two systems of each pair.
        share: [n] what the second got, in [0, 1].
        systems: S.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    winner = np.concatenate([second[share > 0], first[share < 1]])
    loser = np.concatenate([first[share > 0], second[share < 1]])
    graph = coo_array((np.ones(len(winner)), (winner, loser)), shape=(systems, systems)).tocsr()
    parts, label = connected_components(graph, directed=True, connection="weak")
    if parts > 1:
        return np.flatnonzero(label == label[-1]).tolist(), "was never compared with"
    parts, label = connected_components(graph, directed=True, connection="strong")
    if parts == 1:
        return None
    for part in range(parts):  # in the order of components there is one that nobody outside took anything from
        inside = label == part
        if not (inside[loser] & ~inside[winner]).any():
            return np.flatnonzero(inside).tolist(), "won every pair against"
    raise AssertionError("a condensed graph has a source")


def rate(
    names: Sequence[str],
    first: Index,
    second: Index,
    share: Array,
    *,
    clusters: Sequence[Hashable] | None = None,
    style: Array | None = None,
    features: Sequence[str] = (),
    anchor: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Ratings:
    """Ratings of S systems from n pairs, with bootstrap intervals over clusters.

    Args:
        names: S names.
        first, second: [n] numbers of the systems of each pair.
        share: [n] what the second got, in [0, 1]; no NaN.
        clusters: n labels, the pairs' prompts; None: every pair is its own.
        style: [n, k] differences of style, second relative to first (`evaluation.style`).
        features: k names of the columns of `style`.
        anchor: the system with θ = 0; None: the mean is 0.
        resamples: bootstrap resamples; 0 for no intervals (the limits are then NaN, as where resamples are all alike).
        seed: of the resampling.
        level: of the intervals.

    Raises:
        UserError: no finite ratings exist, in words.
    """
    if problem := separated(first, second, share, len(names)):
        group, why = problem
        shown, others = (
            ", ".join([n for i, n in enumerate(names) if (i in group) == inside][:4]) for inside in (True, False)
        )
        raise UserError(f"no finite ratings: {shown} {why} {others}; more pairs between the two groups are needed")
    table = _Table.of(len(names), first, second, share, clusters, style)
    found = table.solve(np.ones(table.clusters))
    if found is None:
        raise UserError("no finite ratings: style and systems cannot be told apart; leave out --style")
    rng = np.random.default_rng(seed)
    times = rng.multinomial(table.clusters, np.full(table.clusters, 1 / table.clusters), size=resamples)
    solved = [table.solve(drawn.astype(np.float64)) for drawn in times]
    kept = [w for w in solved if w is not None]
    count, at = len(names), None if anchor is None else list(names).index(anchor)

    def centred(w: Array) -> Array:
        theta = np.concatenate([[0.0], w[: count - 1]])
        return np.concatenate([theta - (theta.mean() if at is None else theta[at]), w[count - 1 :]])

    estimate = centred(found)
    draws = np.array([centred(w) for w in kept]).reshape(len(kept), len(estimate))
    limits = [_interval(value, draws[:, i], level) for i, value in enumerate(estimate.tolist())]
    if at is not None:
        limits[at] = Interval(0.0, 0.0, 0.0)  # by definition
    return Ratings(
        dict(zip(names, limits[:count], strict=True)),
        dict(zip(features, limits[count:], strict=True)),
        len(kept),
        resamples - len(kept),
    )


def _interval(value: float, draws: Array, level: float) -> Interval:
    """The bootstrap's; limits NaN without resamples, and where all are alike, as those of one prompt are."""
    if not len(draws) or np.ptp(draws) <= 1e-12 * max(1.0, abs(value)):
        return Interval(value, math.nan, math.nan)
    return percentile_interval(value, draws, level)


@dataclass(frozen=True)
class _Table:
    """Pairs as a weighted regression without the first system's column; a resample gives clusters other weights.

    Without style, pairs of the same two systems are one row and counts are summed by cluster; with it, each is a row.
    """

    features: Array  # [m, S - 1 + k]
    won: Array  # [C, m], or [m] with `codes`
    games: Array
    codes: Index | None  # [m] each row's cluster
    clusters: int

    @classmethod
    def of(
        cls,
        systems: int,
        first: Index,
        second: Index,
        share: Array,
        clusters: Sequence[Hashable] | None,
        style: Array | None,
    ) -> _Table:
        codes, count = cluster_codes(range(len(share)) if clusters is None else clusters)
        if style is not None:
            design = np.column_stack([_design(first, second, systems), style])
            return cls(design, share, np.ones(len(share)), codes, count)
        low, high = np.minimum(first, second), np.maximum(first, second)
        pairs, at = np.unique(np.stack([low, high], axis=1), axis=0, return_inverse=True)
        won, games = np.zeros((count, len(pairs))), np.zeros((count, len(pairs)))
        np.add.at(won, (codes, at.ravel()), np.where(second == high, share, 1 - share))
        np.add.at(games, (codes, at.ravel()), 1.0)
        return cls(_design(pairs[:, 0], pairs[:, 1], systems), won, games, None, count)

    def solve(self, weight: Array) -> Array | None:
        """Coefficients with the given weights of clusters, [C]."""
        if self.codes is None:
            return fit(self.features, weight @ self.won, weight @ self.games)
        of_row = weight[self.codes]
        return fit(self.features, of_row * self.won, of_row * self.games)


def _design(first: Index, second: Index, systems: int) -> Array:
    rows = np.zeros((len(first), systems))
    rows[np.arange(len(first)), second] += 1
    rows[np.arange(len(first)), first] -= 1
    return rows[:, 1:]


def compare_pairs(
    names: Sequence[str],
    first: Index,
    second: Index,
    share: Array,
    clusters: Sequence[Hashable],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Every two systems that met: games, the second's win rate, a sign-flip test over prompts, and Holm over all."""
    rows: list[dict[str, Any]] = []
    for a, b in itertools.combinations(range(len(names)), 2):
        met = ((first == a) & (second == b)) | ((first == b) & (second == a))
        if met.any():
            got = np.where(second[met] == b, share[met], 1 - share[met])
            sums = cluster_sums(got[:, None] - 0.5, [c for c, here in zip(clusters, met, strict=True) if here])[:, 0]
            p = sign_flip_p_value(sums, resamples, np.random.default_rng(seed))
            rows.append({"first": names[a], "second": names[b], "games": int(met.sum())})
            rows[-1] |= {"win_rate": float(got.mean()), "p_value": p}
    for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_holm"] = float(adjusted)
    return rows


def circles(pairs: Sequence[dict[str, Any]]) -> int:
    """How many triples of systems beat each other in a circle, by win rate above one half."""
    beats = {(r["second"], r["first"]) for r in pairs if r["win_rate"] > 0.5}
    beats |= {(r["first"], r["second"]) for r in pairs if r["win_rate"] < 0.5}
    names = sorted({name for pair in beats for name in pair})
    orders = [o for a, b, c in itertools.combinations(names, 3) for o in ((a, b, c), (a, c, b))]
    return sum((a, b) in beats and (b, c) in beats and (c, a) in beats for a, b, c in orders)


def rate_files(
    files: Sequence[Path],
    *,
    style: Sequence[str] = (),
    anchor: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Ratings of all systems in annotation files: the content of ratings.json.

    Args:
        files: AlpacaEval's annotations; the two outputs' generators name the systems.
        style: groups of features to control, of `evaluation.style.GROUPS`.
        anchor: the system with θ = 0 whose win rate against each is stated; None: the mean.
        resamples, seed: of the bootstrap.

    Raises:
        UserError: nothing usable in the files, an unknown name, or no finite ratings.
    """
    from evaluation.annotations import read_annotations
    from evaluation.style import GROUPS, style_differences

    unknown = [group for group in style if group not in GROUPS]
    if unknown:
        raise UserError(f"--style {unknown[0]!r}: unknown{nearest(unknown[0], GROUPS)}")
    rows = [row for file in files for row in read_annotations(file)]
    used = [row for row in rows if not math.isnan(row.share) and row.generator_1 != row.generator_2]
    names = sorted({name for row in used for name in (row.generator_1, row.generator_2)})
    if not used:
        raise UserError(f"{files[0]}: no usable pair of two different systems; generator_1 and generator_2 name them")
    if anchor is not None and anchor not in names:
        raise UserError(f"--anchor {anchor!r}: no such system{nearest(anchor, names)}")
    place = {name: i for i, name in enumerate(names)}
    first, second = (
        np.array([place[name] for name in side], dtype=np.intp)
        for side in ([row.generator_1 for row in used], [row.generator_2 for row in used])
    )
    share, prompts = np.array([row.share for row in used]), [row.instruction for row in used]
    asked = [name for group in GROUPS if group in style for name in GROUPS[group]]
    table = style_differences([row.output_1 for row in used], [row.output_2 for row in used], asked)
    pairs_that_differ = (table != 0).sum(axis=0)  # [k]
    differs = pairs_that_differ >= FEW_PAIRS
    features = [name for name, does in zip(asked, differs.tolist(), strict=True) if does]
    found = rate(
        names, first, second, share, clusters=prompts, style=table[:, differs] if features else None,
        features=features, anchor=anchor, resamples=resamples, seed=seed,
    )  # fmt: skip
    pairs = compare_pairs(names, first, second, share, prompts, seed=seed)
    return {
        "systems": [_system(name, found.theta[name], int((first == i).sum() + (second == i).sum()))
                    for name, i in sorted(place.items(), key=lambda item: -found.theta[item[0]].estimate)],
        "anchor": anchor,
        "style": {name: _limits(value) for name, value in found.style.items()},
        "style_left_out": {n: k for n, k in zip(asked, pairs_that_differ.tolist(), strict=True) if n not in features},
        "pairs": pairs,
        "circles": circles(pairs),
        "annotations": len(used),
        "annotations_left_out": len(rows) - len(used),
        "prompts": len(set(prompts)),
        "bootstrap": {"resamples": found.resamples, "left_out": found.resamples_left_out, "seed": seed,
                      "unit": "prompt", "level": LEVEL},
    }  # fmt: skip


def _limits(value: Interval) -> dict[str, Any]:
    return {"estimate": value.estimate, "interval": _known([value.low, value.high])}


def _known(limits: list[float]) -> list[float | None]:
    return [None if math.isnan(limit) else limit for limit in limits]


def _system(name: str, theta: Interval, games: int) -> dict[str, Any]:
    """Elo points are θ scaled; `win_rate` is P(it beats a system at θ = 0)."""
    values = (theta.estimate, theta.low, theta.high)
    elo, win = [ELO * v for v in values], [1 / (1 + math.exp(-v)) for v in values]
    return {"name": name, "theta": values[0], "interval": _known(list(values[1:])), "elo": elo[0],
            "elo_interval": _known(elo[1:]), "win_rate": win[0], "win_rate_interval": _known(win[1:]),
            "games": games}  # fmt: skip


def describe(result: dict[str, Any]) -> str:
    """A Markdown table of the systems, and what else is to be said."""
    against = result["anchor"] or "the mean"
    lines = [f"| system | Elo | 95 % interval | beats {against} | pairs |", "| --- | --- | --- | --- | --- |"]
    for one in result["systems"]:
        low, high = one["elo_interval"]
        limits = "not known" if low is None else f"{low:+.0f} to {high:+.0f}"
        row = f"| {one['name']} | {one['elo']:+.0f} | {limits} | {100 * one['win_rate']:.1f} % |"
        lines.append(f"{row} {one['games']} |")
    drawn, same = result["bootstrap"], [row for row in result["pairs"] if row["p_holm"] > 0.05]
    text = f"\n{result['annotations']} pairs of {result['prompts']} prompts; {drawn['resamples']} resamples of prompts"
    lines.append(f"{text}, {drawn['left_out']} without finite ratings left out; circles of three: {result['circles']}")
    if result["prompts"] < FEW_PROMPTS:
        lines.append(f"{result['prompts']} prompts: intervals that resample fewer than {FEW_PROMPTS} are too narrow")
    lines += [
        f"no significant difference (Holm over {len(result['pairs'])} pairs): {row['first']} and {row['second']}, "
        f"p = {row['p_holm']:.2g}"
        for row in same
    ]
    for name, value in result["style"].items():
        low, high = value["interval"]
        limits = "interval not known" if low is None else f"{low:+.3f} to {high:+.3f}"
        lines.append(f"style {name}: {value['estimate']:+.3f} nats per standard deviation ({limits})")
    lines += [f"style {name}: differs in {k} pairs only, left out" for name, k in result["style_left_out"].items()]
    return "\n".join(lines)


def main(
    files: Annotated[list[Path], typer.Argument(help="Annotation files, AlpacaEval's format; any pairs of systems.")],
    style: Annotated[list[str] | None, typer.Option(help="Control of length, of markdown, or both. [none]")] = None,
    anchor: Annotated[str | None, typer.Option(help="System with rating 0. [the mean of all]")] = None,
    bootstrap: Annotated[int, typer.Option(min=100, help="Resamples of prompts.")] = RESAMPLES,
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Folder for ratings.json and ratings.md. [nothing kept]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print ratings.json's content.")] = False,
) -> None:
    """Bradley–Terry ratings of all systems in annotation files, with 95 % intervals over prompts."""
    result = rate_files(files, style=style or (), anchor=anchor, resamples=bootstrap, seed=seed)
    deliver(result, describe(result), "ratings", output, as_json)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    run_or_exit(app)
