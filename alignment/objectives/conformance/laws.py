"""Closed-form value and slopes at the start of training, and how large the loss and its slopes can get.

The laws are derived by hand at policy == reference (equal, equally long responses where there is no reference); they
take plain floats and know nothing of the implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from alignment.objectives.base import Objective
from alignment.objectives.conformance.batches import (
    DOUBLE,
    close,
    grid_batch,
    require,
    settings_of,
    slopes,
    start_batch,
)

Row = dict[str, float]
Law = tuple[float, float, float, float]  # loss, dL/ds_w, dL/ds_l, dL/ds_cal
LOG2 = math.log(2)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _ipo(h: dict[str, Any], row: Row) -> Law:
    mean = h["normalization"] == "mean"
    lengths = (row["chosen_length"], row["rejected_length"]) if mean else (1.0, 1.0)
    return 1 / (4 * h["tau"] ** 2), -1 / (h["tau"] * lengths[0]), 1 / (h["tau"] * lengths[1]), 0.0


def _rpo(h: dict[str, Any], row: Row) -> Law:
    column = "chosen" if h["baseline"] == "chosen" else "calibration"
    weight = h["eta"] * h["beta"] if h["form"] == "sum" else h["eta"] / row[f"{column}_length"]
    on_chosen, on_calibration = (weight, 0.0) if column == "chosen" else (0.0, weight)
    return LOG2 - weight * row[column], -h["beta"] / 2 - on_chosen, h["beta"] / 2, -on_calibration


def _reward_aware_rpo(h: dict[str, Any], row: Row) -> Law:
    gap = h["scale"] * (row["reward_chosen"] - row["reward_rejected"])
    win = _sigmoid(gap)
    laws = {
        "sq": (gap**2, -2 * gap),
        "bwd_kl": (LOG2 + win * math.log(win) + (1 - win) * math.log(1 - win), 0.5 - win),  # log 2 - entropy
        "fwd_kl": (-LOG2 - (math.log(win) + math.log(1 - win)) / 2, -gap / 4),
    }
    value, slope = laws[h["form"]]
    return value, h["beta"] * slope, -h["beta"] * slope, 0.0


def _f_dpo(h: dict[str, Any], row: Row) -> Law:
    first = 0.5 if h["divergence"] == "jsd" else 1.0  # f''(1) u at u = 1
    return LOG2, -h["beta"] * first / 2, h["beta"] * first / 2, 0.0


def _vpo(h: dict[str, Any], row: Row) -> Law:
    push = h["alpha"] * h["beta"] * (1 if h["mode"] == "online" else -1)
    on = [push * (h["calibration"] == name) for name in ("chosen", "rejected", "given")]
    return LOG2, -h["beta"] / 2 + on[0], h["beta"] / 2 + on[1], on[2]


def _orpo(h: dict[str, Any], row: Row) -> Law:
    tokens = row["chosen_length"]
    mean = row["chosen"] / tokens
    odds = h["lam"] / (2 * tokens * (1 - math.exp(mean)))
    return -mean + h["lam"] * LOG2, -1 / tokens - odds, odds, 0.0


def _cpo(h: dict[str, Any], row: Row) -> Law:
    weight = h["nll_weight"] / (row["chosen_length"] if h["form"] == "mean" else 1.0)
    return LOG2 - weight * row["chosen"], -h["beta"] / 2 - weight, h["beta"] / 2, 0.0


def _simpo(h: dict[str, Any], row: Row) -> Law:
    slope = h["beta"] * _sigmoid(h["gamma"]) / row["chosen_length"]
    return math.log(1 + math.exp(h["gamma"])), -slope, slope, 0.0


def _dpo(h: dict[str, Any], row: Row) -> Law:
    slope = h["beta"] * (1 - 2 * h["label_smoothing"]) / 2
    return LOG2, -slope, slope, 0.0


def _robust(h: dict[str, Any], row: Row) -> Law:
    slope = h["beta"] / (2 * (1 - 2 * h["label_smoothing"]))
    return LOG2, -slope, slope, 0.0


def _to_targets(chosen: float, rejected: float) -> Law:
    """Log-ratios of 0 against these targets."""
    return (chosen**2 + rejected**2) / 2, -chosen, -rejected, 0.0


def _sppo(h: dict[str, Any], row: Row) -> Law:
    return _to_targets(*(h["eta"] * row[f"preference_{y}"] - h["eta"] / 2 for y in ("chosen", "rejected")))


def _gpo(h: dict[str, Any], row: Row) -> Law:
    return _to_targets(*(h["eta"] * row[f"log_odds_{y}"] for y in ("chosen", "rejected")))


def _spo(h: dict[str, Any], row: Row) -> Law:
    base = h | {name.removeprefix("base_"): value for name, value in h.items() if name.startswith("base_")}
    value, *slopes_ = START_LAWS[h["base"]](base, row)
    return (value + h["gamma"] * math.log(h["degrees"]), *slopes_)


START_LAWS: dict[str, Callable[[dict[str, Any], Row], Law]] = {
    "dpo": _dpo,
    "robust": _robust,
    "ipo": _ipo,
    "hinge": lambda h, row: (1.0, -h["beta"], h["beta"], 0.0),
    "rpo": _rpo,
    "reward_aware_rpo": _reward_aware_rpo,
    "f_dpo": _f_dpo,
    "vpo": _vpo,
    "inpo": lambda h, row: (1 / (4 * h["eta"] ** 2), -1 / h["eta"], 1 / h["eta"], 0.0),
    "sppo": _sppo,
    "gpo": _gpo,
    "simpo": _simpo,
    "orpo": _orpo,
    "cpo": _cpo,
    "dpop": lambda h, row: (LOG2, -h["beta"] / 2, h["beta"] / 2, 0.0),  # at the kink, seen from above
    "spo": _spo,  # a zero head guesses each of N degrees with probability 1/N
}


def has_start_law(cls: type[Objective]) -> bool:
    return cls.card.name in START_LAWS


def start_law(cls: type[Objective]) -> str:
    """Loss and slopes at policy == reference equal their closed form."""
    for objective in settings_of(cls):
        batch, h = start_batch(objective), objective.hyperparameters
        rows = [
            {name: float(value[i]) for name, value in batch.columns().items() if value.dim() == 1} for i in range(3)
        ]
        laws = torch.tensor([START_LAWS[cls.card.name](h, row) for row in rows], dtype=DOUBLE)
        got = slopes(objective, batch)
        close(objective.loss(batch), laws[:, 0], f"{h}: loss at the start", rtol=1e-11)
        for index, column in enumerate(("chosen", "rejected", "calibration"), start=1):
            close(got[column], laws[:, index], f"{h}: slope by {column} at the start", rtol=1e-11)
    return "closed form of the loss and three slopes"


# name -> settings, lower bound of the loss (None: tested to be unbounded below), largest |dL/ds_w|, largest |dL/ds_l|.
Bound = tuple[dict[str, Any], float | None, float, float]
_B, _E10, _INF = 0.1, math.exp(10), math.inf
_H01 = -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))  # binary entropy of 0.1
BOUNDS: dict[str, list[Bound]] = {
    "dpo": [({"beta": _B}, 0.0, _B, _B), ({"beta": _B, "label_smoothing": 0.1}, _H01, _B, _B)],
    "robust": [({"beta": _B, "label_smoothing": 0.1}, None, _B * 0.9 / 0.8, _B * 0.9 / 0.8)],
    "ipo": [({}, 0.0, _INF, _INF)],
    "hinge": [({"beta": _B}, 0.0, _B, _B)],
    "rpo": [({"beta": _B, "eta": 0.5}, 0.0, _B * 1.5, _B)],
    "reward_aware_rpo": [
        ({"beta": _B}, 0.0, _B, _B),
        ({"beta": _B, "form": "sq"}, 0.0, _INF, _INF),
        ({"beta": _B, "form": "fwd_kl"}, 0.0, _INF, _INF),
    ],
    "f_dpo": [
        ({"beta": _B}, 0.0, _B, _B),
        ({"beta": _B, "divergence": "jsd"}, 0.0, _B, _B),
        ({"beta": _B, "divergence": "forward_kl"}, 0.0, _B * _E10, _B * _E10),
        ({"beta": _B, "divergence": "alpha", "alpha": 0.5}, 0.0, _B * _E10, _B * _E10),
    ],
    "vpo": [
        ({"beta": _B, "alpha": 0.5}, -0.5 * _B * 1000, _B * 1.5, _B),  # the references below are -1000
        ({"beta": _B, "alpha": 0.5, "mode": "online"}, None, _B, _B),
    ],
    "inpo": [({"eta": 0.1}, 0.0, _INF, _INF)],
    "sppo": [({"eta": 2.0}, 0.0, _INF, _INF)],
    "gpo": [({"eta": 2.0}, 0.0, _INF, _INF)],
    "simpo": [({}, 0.0, 2.0 / 7, 2.0 / 13)],
    "orpo": [({}, 0.0, _INF, _INF)],
    "cpo": [({"beta": _B}, 0.0, _B + 1, _B)],
    "dpop": [({"beta": _B, "lam": 5.0}, 0.0, _B * 6, _B)],
    "spo": [
        ({"beta": _B, "gamma": 1.0}, 0.0, _B, _B),
        ({"base": "simpo"}, 0.0, 2.0 / 7, 2.0 / 13),
        ({"base": "robust", "beta": _B, "gamma": 1e-3}, None, _B * 0.9 / 0.8, _B * 0.9 / 0.8),
    ],
}
# What else the cards claim: name -> settings, claim, pairs that keep it by hyper-parameters, columns, loss and slopes.
Columns = dict[str, torch.Tensor]
Holds = Callable[[dict[str, Any], Columns, torch.Tensor, Columns], torch.Tensor]


def _margin(columns: Columns) -> torch.Tensor:
    return columns["chosen"] - columns["ref_chosen"] - (columns["rejected"] - columns["ref_rejected"])


def _reward_gap(h: dict[str, Any], columns: Columns) -> torch.Tensor:
    return h["scale"] * (columns["reward_chosen"] - columns["reward_rejected"])


def _positive_off_target(h: dict[str, Any], columns: Columns, loss: torch.Tensor, slope: Columns) -> torch.Tensor:
    return (loss > 0) | (h["beta"] * _margin(columns) == _reward_gap(h, columns))


def _below_softplus(h: dict[str, Any], columns: Columns, loss: torch.Tensor, slope: Columns) -> torch.Tensor:
    return loss <= torch.log1p(_reward_gap(h, columns).abs().exp()) * (1 + 1e-12)


def _linear_slope(h: dict[str, Any], columns: Columns, loss: torch.Tensor, slope: Columns) -> torch.Tensor:
    rest = slope["chosen"] - 2 * _margin(columns)
    return (rest - rest[0]).abs() <= 1e-9


def _own_slope(h: dict[str, Any], columns: Columns, loss: torch.Tensor, slope: Columns) -> torch.Tensor:
    rest = [slope[y] - (columns[y] - columns[f"ref_{y}"]) for y in ("chosen", "rejected")]
    return torch.stack([(offset - offset[0]).abs() <= 1e-9 for offset in rest]).all(0)


def _all_or_nothing(h: dict[str, Any], columns: Columns, loss: torch.Tensor, slope: Columns) -> torch.Tensor:
    return slope["chosen"] == -h["beta"] * (h["beta"] * _margin(columns) < 1).to(DOUBLE)


def _never_lets_go(h: dict[str, Any], columns: Columns, loss: torch.Tensor, slope: Columns) -> torch.Tensor:
    return slope["chosen"] <= -h["eta"] * h["beta"]


def _limit_of_slope(h: dict[str, Any], columns: Columns, loss: torch.Tensor, slope: Columns) -> torch.Tensor:
    limit = -h["beta"] * h["label_smoothing"] / (1 - 2 * h["label_smoothing"])
    return (_margin(columns) < 400) | ((slope["chosen"] - limit).abs() <= 1e-9)


CLAIMS: dict[str, list[tuple[dict[str, Any], str, Holds]]] = {
    "reward_aware_rpo": [
        ({"beta": _B}, "loss 0 only at m' = D", _positive_off_target),
        ({"beta": _B, "form": "sq"}, "loss 0 only at m' = D", _positive_off_target),
        ({"beta": _B, "form": "fwd_kl"}, "loss 0 only at m' = D", _positive_off_target),
        ({"beta": _B, "form": "fwd_kl"}, "loss <= softplus(|D|)", _below_softplus),
        ({"beta": _B, "form": "fwd_kl", "scale": 3.0}, "loss <= softplus(|D|)", _below_softplus),
    ],
    "hinge": [({"beta": _B}, "slope beta before beta m = 1, 0 after", _all_or_nothing)],
    "ipo": [({}, "slope linear in m", _linear_slope)],
    "inpo": [({"eta": 0.1}, "slope linear in h", _linear_slope)],
    "sppo": [({"eta": 2.0}, "slope linear in the response's own z", _own_slope)],
    "gpo": [({"eta": 2.0}, "slope linear in the response's own z", _own_slope)],
    "rpo": [({"beta": _B, "eta": 0.5}, "|dL/ds_w| >= eta beta at every margin", _never_lets_go)],
    "robust": [({"beta": _B, "label_smoothing": 0.1}, "slope tends to -beta e/(1-2e)", _limit_of_slope)],
}
RATIOS = (-800.0, -80.0, -8.0, -1.0, 0.0, 1.0, 8.0, 21.97, 80.0, 800.0)


def has_bounds(cls: type[Objective]) -> bool:
    return cls.card.name in BOUNDS


def bounds(cls: type[Objective]) -> str:
    """The card's claims about the size of the loss and its slopes, over log-ratios up to +-800 in all combinations."""
    batch = grid_batch(RATIOS)
    for keywords, low, steepest_chosen, steepest_rejected in BOUNDS[cls.card.name]:
        objective = cls.build(**keywords)
        loss, slope = objective.loss(batch), slopes(objective, batch)
        smallest = loss.min().item()
        if low is None:
            require(
                smallest < -0.5, f"{keywords}: said to be unbounded below, yet the smallest value is {smallest:.6g}"
            )
        else:
            require(smallest >= low - 1e-9, f"{keywords}: loss {smallest:.9g} is below the bound {low:.9g}")
        for column, limit in (("chosen", steepest_chosen), ("rejected", steepest_rejected)):
            largest = slope[column].abs().max().item()
            require(largest <= limit * (1 + 1e-9), f"{keywords}: |dL/d {column}| = {largest:.6g} exceeds {limit:.6g}")
    for keywords, claim, holds in CLAIMS.get(cls.card.name, []):
        objective = cls.build(**keywords)
        kept = holds(objective.hyperparameters, batch.columns(), objective.loss(batch), slopes(objective, batch))
        require(bool(kept.all()), f"{keywords}: {claim}: not so for {int((~kept).sum())} of {len(kept)} pairs")
    return cls.card.bounds
