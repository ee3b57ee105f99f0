"""Fixed numbers and independent formulas: does each loss compute what its paper says?

`GOLDEN` holds numbers that were derived by hand or by an independent calculation for the pair of `golden_batch`;
`formulas.py` gives further values and all slopes at 50 digits.
"""

from __future__ import annotations

from typing import Any

import torch

from alignment.objectives.base import Objective
from alignment.objectives.batch import PairLogps
from alignment.objectives.conformance.batches import DOUBLE, close, golden_batch, random_batch, settings_of, slopes
from alignment.objectives.conformance.formulas import FORMULAS, evaluate

_DPO = 0.6209570477895  # log(1 + e^-0.15)
GOLDEN: dict[str, list[tuple[dict[str, Any], float]]] = {
    "dpo": [({"beta": 0.1}, _DPO), ({"beta": 0.1, "label_smoothing": 0.1}, 0.6359570477895)],
    "robust": [({"beta": 0.1, "label_smoothing": 0.1}, 0.6022070477895)],
    "ipo": [({"tau": 0.1}, 12.25), ({"tau": 0.1, "normalization": "mean"}, 24.3377777778)],  # (1.5-5)^2
    "hinge": [({"beta": 0.1}, 0.85)],
    "rpo": [
        ({"beta": 0.1, "eta": 0.005}, 0.6259570477895),
        ({"beta": 0.1, "eta": 0.0005, "form": "mean"}, 0.6212070477895),
        ({"beta": 0.1, "eta": 1.0, "form": "mean"}, 1.1209570477895),  # TRL's former rpo_alpha = 1 on one pair
    ],
    "reward_aware_rpo": [
        ({"beta": 0.1, "form": "sq"}, 0.5625),
        ({"beta": 0.1, "form": "bwd_kl"}, 0.0630153000),
        ({"beta": 0.1, "form": "fwd_kl"}, 0.0671244429),
    ],
    "f_dpo": [
        ({"beta": 0.1, "divergence": "reverse_kl"}, _DPO),
        ({"beta": 0.1, "divergence": "jsd"}, 0.660652162510),
        ({"beta": 0.1, "divergence": "forward_kl"}, 0.631154383572),
        ({"beta": 0.1, "divergence": "alpha", "alpha": 0.3}, 0.625437693864),
        ({"beta": 0.1, "divergence": "alpha", "alpha": 0.5}, 0.627690947069),
        ({"beta": 0.1, "divergence": "alpha", "alpha": 0.7}, 0.629424873342),
    ],
    "vpo": [
        ({"beta": 0.1, "alpha": 0.01, "mode": "online", "calibration": "given"}, 0.621357047790),
        ({"beta": 0.1, "alpha": 0.01, "mode": "offline", "calibration": "given"}, 0.620557047790),
        ({"beta": 0.1, "alpha": 0.01}, 0.6199570477895),  # chosen: dpo - 0.01 * 0.1 * 1
    ],
    "inpo": [({"eta": 0.5, "tau": 0.2}, 0.0004)],  # h = 2 - 0.4 * 0.5 - 0.6 * 1.3 = 1.02
    "sppo": [({"eta": 2.0}, 0.225), ({}, 24750.625)],  # ((1 - 0.4)^2 + (-0.5 + 0.2)^2)/2, (199^2 + 99.5^2)/2
    "gpo": [({"eta": 2.0}, 0.425), ({}, 498900.625)],  # ((1 - 1.6)^2 + (-0.5 + 1.2)^2)/2, (799^2 + 599.5^2)/2
    "simpo": [({"beta": 2.0, "gamma": 1.0}, 1.4632824673)],  # log(1 + e^1.2): 2 * -0.5 - 2 * -0.4 - 1 = -1.2
    "orpo": [({"lam": 0.1}, 0.5841139999)],  # 0.5 + 0.1 log(1 + 2.0332448730/1.5414940825)
    "cpo": [({}, 10.5981388694), ({"form": "mean"}, 1.0981388694)],  # log(1 + e^-0.2) + 10, or + 0.5
    "dpop": [({"beta": 0.1, "lam": 50.0}, _DPO)],  # z_w = 1 > 0: no penalty
    "spo": [  # L_deg = -log(1/2 * 3/4 * 1/3)/3 = log(8)/3 = log 2
        ({"beta": 0.1, "label_smoothing": 0.1}, 0.7052717658455),  # 0.6359570477895 + 0.1 log 2
        ({"base": "ipo", "tau": 0.1, "gamma": 1.0}, 12.9431471805599),
        ({"base": "simpo", "beta": 2.0, "base_gamma": 1.0, "gamma": 0.5}, 1.8098560576),
    ],
}
GOLDEN_TOLERANCE = 1e-9  # the numbers above carry 10 digits or more


def golden(cls: type[Objective]) -> str:
    """The loss of the hand-checkable pair."""
    cases = GOLDEN[cls.card.name]
    for keywords, expected in cases:
        got = cls.build(**keywords).loss(golden_batch())
        close(got, torch.tensor([expected], dtype=DOUBLE), f"golden {keywords}", rtol=0, atol=GOLDEN_TOLERANCE)
    return f"{len(cases)} fixed numbers"


def has_golden(cls: type[Objective]) -> bool:
    return cls.card.name in GOLDEN


def paper(cls: type[Objective]) -> str:
    """Values and slopes by chosen, rejected and calibration equal the paper's formula at 50 digits."""
    points = 0
    for objective in settings_of(cls):
        joined = {
            name: torch.cat([value, random_batch(5, seed=31).columns()[name]])
            for name, value in golden_batch().columns().items()
        }
        batch = PairLogps(**joined)
        rows = [evaluate(cls.card.name, _row(joined, index), objective.hyperparameters) for index in range(6)]
        points += len(rows)
        what = f"{objective.hyperparameters}: "
        expected = torch.tensor([float(value) for value, _ in rows], dtype=DOUBLE)
        close(objective.loss(batch), expected, f"{what}loss", rtol=1e-10, atol=1e-12)
        for column, slope in slopes(objective, batch).items():
            expected = torch.tensor([float(derivatives[column]) for _, derivatives in rows], dtype=DOUBLE)
            close(slope, expected, f"{what}slope by {column}", rtol=1e-9, atol=1e-13)
    return f"{points} pairs, values and three slopes each"


def has_paper(cls: type[Objective]) -> bool:
    return cls.card.name in FORMULAS


def _row(columns: dict[str, torch.Tensor], index: int) -> dict[str, Any]:
    """One pair's numbers: a float per column, nested lists for the degree columns."""
    return {name: value[index].tolist() for name, value in columns.items()}
