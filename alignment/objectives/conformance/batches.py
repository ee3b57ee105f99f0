"""Batches that the checks share, and the two-line vocabulary of a check: `require` and `settings_of`.

Not random test data in the usual sense: log-probabilities are <= 0 and lengths are counts, so that every batch could
have come from a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from alignment.objectives.base import Objective
from alignment.objectives.batch import NEEDS, POLICY_COLUMNS, PairLogps

DOUBLE = torch.float64
Make = Callable[..., Objective]  # an objective's class, called with its hyper-parameters


class CheckFailed(AssertionError):
    """A check's finding; its text says what was expected and what came."""


def require(condition: bool, message: str) -> None:
    """Raise `CheckFailed(message)` unless the condition holds (a plain assert would vanish under python -O)."""
    if not condition:
        raise CheckFailed(message)


def close(got: Tensor, expected: Tensor, what: str, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """Require equality up to rounding, elementwise, naming the worst element."""
    require(got.shape == expected.shape, f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}")
    excess = (got - expected).abs() - (atol + rtol * expected.abs())
    if not bool((excess <= 0).all()):  # also catches nan
        worst = int(torch.where(excess.isnan(), torch.full_like(excess, torch.inf), excess).argmax())
        row, found, wanted = worst * len(got) // got.numel(), got.flatten()[worst], expected.flatten()[worst]
        raise CheckFailed(f"{what}: row {row} is {found.item():.15g}, expected {wanted.item():.15g}")


def settings_of(cls: type[Objective]) -> Iterator[Objective]:
    """The default instance and one per `card.settings`."""
    for keywords in ({}, *cls.card.settings):
        yield cls.build(**keywords)


COPIES, DEGREES = 4, 3  # of the degree columns below


def golden_batch() -> PairLogps:
    """One hand-checkable pair: z_w = 1, z_l = -0.5, m = 1.5, with every column but `label` filled.

    Degree logits are logarithms of whole numbers: the right degrees have probabilities 1/2, 3/4 and 1/3, and the
    fourth copy does not exist.
    """
    numbers = {
        "chosen": -10.0, "rejected": -12.0, "ref_chosen": -11.0, "ref_rejected": -11.5,
        "chosen_length": 20.0, "rejected_length": 30.0, "prev_chosen": -10.5, "prev_rejected": -11.8,
        "calibration": -9.0, "ref_calibration": -9.4, "calibration_length": 15.0,
        "reward_chosen": 1.2, "reward_rejected": 0.3, "preference_chosen": 0.7, "preference_rejected": 0.4,
        "log_odds_chosen": 0.8, "log_odds_rejected": -0.6,
    }  # fmt: skip
    columns = {name: torch.tensor([value], dtype=DOUBLE) for name, value in numbers.items()}
    weights = torch.tensor([[[1.0, 2.0, 1.0], [6.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 2.0, 4.0]]], dtype=DOUBLE)
    columns |= {"degree_logits": weights.log(), "degree_labels": torch.tensor([[1, 0, 2, -1]])}
    return PairLogps(**columns)


def random_batch(rows: int, seed: int, dtype: torch.dtype = DOUBLE) -> PairLogps:
    """Pairs with every column but `label`: reference sums in [-60, -12], log-ratios of about +-2 nats, 5 to 40 tokens.

    About a quarter of the degraded copies is missing.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, generator=generator, dtype=DOUBLE)

    def near(base: Tensor) -> Tensor:
        return (base + 2 * torch.randn(rows, generator=generator, dtype=DOUBLE)).clamp(max=-0.5)

    columns: dict[str, Tensor] = {}
    for response in ("chosen", "rejected"):
        columns[f"ref_{response}"] = uniform(-60, -12)
        columns[response] = near(columns[f"ref_{response}"])
        columns[f"prev_{response}"] = near(columns[f"ref_{response}"])
        columns[f"{response}_length"] = uniform(5, 40).round()
        columns[f"reward_{response}"] = uniform(-1, 1)
        columns[f"preference_{response}"] = uniform(0, 1)
    columns["ref_calibration"] = uniform(-60, -12)
    columns["calibration"] = near(columns["ref_calibration"])
    columns["calibration_length"] = uniform(5, 40).round()
    columns["degree_logits"] = 2 * torch.randn(rows, COPIES, DEGREES, generator=generator, dtype=DOUBLE)
    columns["degree_labels"] = torch.randint(-1, DEGREES, (rows, COPIES), generator=generator)
    columns |= {f"log_odds_{response}": uniform(-2, 2) for response in ("chosen", "rejected")}
    return cast(columns, dtype)


def cast(columns: dict[str, Tensor], dtype: torch.dtype) -> PairLogps:
    """A batch with the columns in another precision; degree labels stay integers."""
    return PairLogps(
        **{name: value.to(dtype) if value.is_floating_point() else value for name, value in columns.items()}
    )


def start_batch(objective: Objective, rows: int = 3, seed: int = 11) -> PairLogps:
    """The start of training: policy == previous == reference, chosen is judged the better one, a zero degree head.

    Without a reference: both responses equally likely and equally long.
    """
    columns = random_batch(rows, seed).columns()
    columns["degree_logits"] = torch.zeros_like(columns["degree_logits"])
    columns["degree_labels"][:, 0] = 1  # at least one copy each
    for judged in ("reward", "preference", "log_odds"):
        pair = torch.stack([columns[f"{judged}_{response}"] for response in ("rejected", "chosen")]).sort(0).values
        columns[f"{judged}_rejected"], columns[f"{judged}_chosen"] = pair
    for response in ("chosen", "rejected"):
        columns[f"prev_{response}"] = columns[f"ref_{response}"].clone()
    if "reference" in objective.needs:
        for response in POLICY_COLUMNS:
            columns[response] = columns[f"ref_{response}"].clone()
    else:
        columns |= {"rejected": columns["chosen"].clone(), "rejected_length": columns["chosen_length"].clone()}
    return PairLogps(**columns)


def grid_batch(ratios: tuple[float, ...], dtype: torch.dtype = DOUBLE, reference: float = -1000.0) -> PairLogps:
    """Every combination of the log-ratios z_w, z_l, z_cal in `ratios`, from one reference log-probability.

    The same three numbers are the logits of every degraded copy: equal ones make a degree loss of log 3.
    """
    grid = torch.tensor(list(product(ratios, repeat=3)), dtype=dtype)
    base = torch.full((len(grid),), reference, dtype=dtype)
    columns = {f"ref_{name}": base for name in POLICY_COLUMNS}
    columns |= {name: reference + grid[:, index] for index, name in enumerate(POLICY_COLUMNS)}
    columns |= {"prev_chosen": base + 0.5, "prev_rejected": base - 0.5}
    lengths = {"chosen": 7, "rejected": 13, "calibration": 5}
    columns |= {f"{name}_length": torch.full_like(base, lengths[name]) for name in POLICY_COLUMNS}
    columns |= {"reward_chosen": torch.full_like(base, 0.9), "reward_rejected": torch.full_like(base, -0.4)}
    columns |= {"preference_chosen": torch.full_like(base, 0.7), "preference_rejected": torch.full_like(base, 0.4)}
    columns |= {"log_odds_chosen": torch.full_like(base, 0.8), "log_odds_rejected": torch.full_like(base, -0.6)}
    columns["degree_logits"] = grid[:, None, :].repeat(1, COPIES, 1)
    columns["degree_labels"] = torch.tensor([0, 1, 2, -1]).repeat(len(grid), 1)
    return PairLogps(**columns)


def with_columns(batch: PairLogps, **columns: Tensor) -> PairLogps:
    """The batch with some columns replaced or added."""
    return PairLogps(**(batch.columns() | columns))


def only_needed(objective: Objective, batch: PairLogps) -> PairLogps:
    """The batch reduced to what the objective says it reads."""
    kept = {"chosen", "rejected"} | {column for need in objective.needs for column in NEEDS[need]}
    return PairLogps(**{name: value for name, value in batch.columns().items() if name in kept})


def slopes(objective: Objective, batch: PairLogps) -> dict[str, Tensor]:
    """dL/d(column) per pair, `[B]`, for chosen, rejected and calibration; 0 where the loss does not read it."""
    columns = batch.columns()
    present = [name for name in POLICY_COLUMNS if name in columns]
    leaves = {name: columns[name].detach().clone().requires_grad_() for name in present}
    total = objective.loss(with_columns(batch, **leaves)).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    pairs = zip(present, gradients, strict=True)
    return {name: torch.zeros_like(columns[name]) if value is None else value for name, value in pairs}


def pairs() -> PairLogps:
    """Random pairs and, below, the corners of the log-ratio square."""
    parts = random_batch(7, seed=41), grid_batch((-30.0, 0.5, 30.0))
    columns = parts[1].columns()
    return PairLogps(**{name: torch.cat([value, columns[name]]) for name, value in parts[0].columns().items()})


def same(
    one: Objective, other: Objective, batch: PairLogps, constant: torch.Tensor | float = 0.0, rtol: float = 1e-9,
    atol: float = 1e-11, other_batch: PairLogps | None = None,
) -> None:  # fmt: skip
    """Equal losses up to `constant` (one - other) and equal slopes."""
    partner = other_batch or batch
    close(one.loss(batch), other.loss(partner) + constant, f"loss against {other.card.name}", rtol, atol)
    expected = slopes(other, partner)
    for column, slope in slopes(one, batch).items():
        close(slope, expected[column], f"slope by {column} against {other.card.name}", rtol, atol)
