"""What an experiment in games found, in words and numbers: a table, verdicts, JSON. No picture (`figure.py`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from alignment.games import rates
from alignment.games.lab import Curve, Experiment, Panel

SHARES = (0.1, 0.5, 1.0)  # of a setting's iterations, the rows of the tables
NOTHING = 1e-13  # gaps below it are rounding
CONVERGED = 1e-6  # where the EGPO authors cut their plots
ENOUGH = 15.0  # nats that the linearised gap must fall in a run for its rate to be judged
AS_FAST = 0.9  # share of the linearised rate's exponent that counts as that rate
Verdict = tuple[bool | None, str]
_WORDS = {True: "holds", False: "FAILS", None: "not judged"}


def number(value: float) -> str:
    """`3e-5`; `0` below rounding."""
    if not math.isfinite(value):
        return "–"
    if value < NOTHING:
        return "0"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _cell(gaps: Tensor) -> str:
    return f"{number(float(gaps.quantile(0.5)))} / {number(float(gaps.max()))}"


def tables(panels: Sequence[Panel]) -> str:
    """Two Markdown tables of median / largest gap over games (and seeds): per iteration, per gradient evaluation."""
    names = list(panels[0].curves)
    found = []
    for what in ("iterations", "gradients"):
        lines = [f"| setting | {what} | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
        for panel in panels:
            for share in SHARES:
                count = max(1, round(share * panel.setting.iterations))
                cells = [_cell(_after(curve, what, count)) for curve in panel.curves.values()]
                lines.append(f"| beta {panel.setting.beta:g}, {panel.step} | {count} | " + " | ".join(cells) + " |")
        found.append("\n".join(lines))
    return "\n\n".join(found)


def _after(curve: Curve, what: str, count: int) -> Tensor:
    return curve.at(count if what == "iterations" else count // curve.evaluations)


def verdicts(experiment: Experiment, panels: Sequence[Panel]) -> list[Verdict]:
    """What must hold, and whether it does here: (holds, sentence); None where no run could have shown it.

    Of every run: its gaps are finite; said only where they are not. Of exact tabular runs, what theory says of them.

    Extragradient: in every run the gap falls at the linearised rate or faster, or is 0; not judged where that rate has
    too few iterations to show. Mirror descent: it converges in no run whose Nash policy repels it, but for those that
    start there.
    """
    found: list[Verdict] = [
        _diverged(panel, name, curve)
        for panel in panels
        for name, curve in panel.curves.items()
        if not bool(curve.gaps.isfinite().all())
    ]
    if experiment.policy != "tabular" or experiment.samples is not None:
        return found
    for panel in panels:
        for name, curve in panel.curves.items():
            method = curve.method
            plain = method.rate_scale == 1 and not method.hyperparameters
            mirror = plain and method.mirror and method.opponent == "policy"
            if mirror and method.look_ahead:
                if bool((-2 * panel.extra.log() * panel.setting.iterations >= ENOUGH).all()):
                    found.append(_linear(panel, name, curve))
            elif mirror or (plain and method.objective == "inpo" and method.exact and method.sampler == "policy"):
                found.append(_repelled(panel, name, curve))
    return found


def _diverged(panel: Panel, name: str, curve: Curve) -> Verdict:
    lost = ~curve.gaps.isfinite()
    first = int(curve.iterations[lost.any(1)][0])
    text = (
        f"beta {panel.setting.beta:g}: {name}'s policy is not finite in {_of(lost.any(0))}, first seen after {first} "
        f"iterations (shown as –); a lower learning rate may help"
    )
    return False, text


def _linear(panel: Panel, name: str, curve: Curve) -> Verdict:
    fall, theory = rates.measured(curve.iterations, curve.gaps, NOTHING), panel.extra**2
    holds = (fall.log() <= AS_FAST * theory.log()) | (fall.isnan() & (curve.gaps[-1] < NOTHING))
    text = (
        f"beta {panel.setting.beta:g}: {name}'s gap falls linearly in {_of(holds)}: by {_range(1 - fall)} per "
        f"iteration at the end of its curve; linearised: {_range(1 - theory)}"
    )
    return bool(holds.all()), text


def _repelled(panel: Panel, name: str, curve: Curve) -> Verdict:
    """Judged in the runs that the Nash policy repels; None where there are none."""
    repelled = (panel.mirror > 1) & (curve.gaps[0] > NOTHING)
    far = ~(curve.gaps[-1] <= CONVERGED)
    count, rate = int(repelled.sum()), f"linearised rate {_range(panel.mirror, 6)}"
    end = f"ends with a gap above {number(CONVERGED)} in"
    if not count:
        return None, (
            f"beta {panel.setting.beta:g}: {name} is repelled by the Nash policy of no run, so nothing is claimed; "
            f"{end} {_of(far)}; {rate}"
        )
    text = (
        f"beta {panel.setting.beta:g}: {name} {end} {int((repelled & far).sum())} of the {count} runs whose Nash "
        f"policy repels it, and in {_of(far)} altogether; {rate}"
    )
    return bool((far | ~repelled).all()), text


def _of(which: Tensor) -> str:
    return f"{int(which.sum())} of {len(which)} runs"


def _range(values: Tensor, digits: int = 2) -> str:
    """`0.96` or `0.95 to 0.97` with so many significant digits."""
    kept = values[~values.isnan()]
    if not len(kept):
        return "–"
    low, high = (f"{float(each):.{digits}g}" for each in (kept.min(), kept.max()))
    return low if low == high else f"{low} to {high}"


def describe(claim: str, experiment: Experiment, panels: Sequence[Panel], checks: Iterable[Verdict]) -> str:
    """table.md: the claim, the tables, the verdicts."""
    games = experiment.games
    which = "given" if games.matrix is not None else games.kind.replace("_", " ")
    gradients = "exact gradients" if experiment.samples is None else f"{experiment.samples} samples per gradient"
    seeds = f" and {experiment.seeds} seeds" if experiment.seeds > 1 else ""
    arms = len(games.make()[0][0])
    head = (
        f"{claim}\n\nDuality gap, median / largest over {games.count} game{'s' if games.count > 1 else ''} ({which}, "
        f"{arms} arms){seeds}; {experiment.policy} policies, {gradients}. 0: below {NOTHING:g}."
    )
    lines = [f"* {_WORDS[holds]}: {text}" for holds, text in checks]
    return "\n\n".join([head, tables(panels), *(["\n".join(lines)] if lines else [])]) + "\n"


def as_json(claim: str, experiment: Experiment, panels: Sequence[Panel], checks: Iterable[Verdict]) -> Any:
    """table.json: the same with whole curves (median, smallest, largest) and every game's last gap."""
    return {
        "claim": claim,
        "experiment": asdict(experiment),
        "panels": [
            {
                **asdict(panel.setting),
                "eta": panel.eta,
                "rates": {"mirror": panel.mirror.tolist(), "extragradient": panel.extra.tolist()},
                "curves": {name: _curve(curve) for name, curve in panel.curves.items()},
            }
            for panel in panels
        ],
        "verdicts": [{"holds": holds, "text": text} for holds, text in checks],
    }


def _curve(curve: Curve) -> dict[str, Any]:
    return {
        "evaluations_per_iteration": curve.evaluations,
        "iterations": curve.iterations.tolist(),
        "median": curve.gaps.quantile(0.5, 1).tolist(),
        "smallest": curve.gaps.amin(1).tolist(),
        "largest": curve.gaps.amax(1).tolist(),
        "last": curve.gaps[-1].tolist(),
    }
