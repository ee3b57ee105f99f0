"""Checks that hold for every on-policy objective, a user's own included: none needs data about a formula.

What the built-in ones compute is proved by enumeration: in tests/games, and in tests/objectives (test_p3o, test_games,
test_likelihood).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alignment.objectives.base import Objective
from alignment.objectives.conformance.batches import DOUBLE, CheckFailed, close, require, settings_of
from alignment.objectives.on_policy import GroupObjective, SampleObjective
from alignment.objectives.samples import NEEDS_OF, GroupLogps, SamplePairs

Batch = SamplePairs | GroupLogps
POLICY = ("first", "second", "cot", "answer")  # the columns that carry a gradient
SIZE, TOKENS = 4, 3  # of a group and of its answer


def sampled(kind: str, rows: int, seed: int, dtype: torch.dtype = DOUBLE, spread: float = 1.0) -> Batch:
    """A batch of the kind with every column; log-ratios of size `spread`, some samples not valid."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    if kind == "groups":
        valid = torch.rand(rows, SIZE, generator=generator) > 0.2
        mask = torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (rows, 1, 1), generator=generator)
        columns = {
            "cot": -20 - spread * draw(rows, SIZE).abs(),
            "answer": -spread * draw(rows, SIZE, TOKENS).abs(),
            "verified": draw(rows, SIZE).gt(0).to(DOUBLE),
        }
        return GroupLogps(**{name: c.to(dtype) for name, c in columns.items()}, answer_mask=mask, valid=valid)
    base = {"first": -20 - draw(rows).abs(), "second": -20 - draw(rows).abs()}
    columns = base | {
        f"{other}_{which}": base[which] + spread * draw(rows)
        for other in ("behaviour", "ref")
        for which in ("first", "second")
    }
    columns |= {f"{which}_length": draw(rows).abs().mul(9).round() + 1 for which in ("first", "second")}
    columns |= {f"reward_{which}": draw(rows) for which in ("first", "second")}
    columns |= {name: draw(rows).sigmoid() for name in ("preference_first", "preference_second", "preference")}
    return SamplePairs(**{name: column.to(dtype) for name, column in columns.items()})


def _call(objective: Objective, batch: Batch) -> Tensor:
    loss: Callable[[Any], Tensor] = objective.loss
    return loss(batch)


def _statistics(objective: Objective, batch: Any) -> dict[str, Tensor]:
    require(isinstance(objective, SampleObjective | GroupObjective), "is neither SampleObjective nor GroupObjective")
    return objective.statistics(batch)  # type: ignore[attr-defined]


def _slopes(objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """dL/d(column) for the policy's columns, 0 where the loss does not read one."""
    leaves = {name: column.clone().requires_grad_() for name, column in batch.columns().items() if name in POLICY}
    total = _call(objective, type(batch)(**(batch.columns() | leaves))).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if slope is None else slope for (name, leaf), slope in pairs}


def precision(cls: type[Objective]) -> str:
    """Loss is `[B]`; float64 and float32 stay, half precision is computed in float32; what is logged is detached."""
    for objective in settings_of(cls):
        for dtype, wide in ((DOUBLE, DOUBLE), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
            for rows in (1, 2, 7):
                batch = sampled(cls.batch_kind, rows, rows, dtype)
                loss = _call(objective, batch)
                require(list(loss.shape) == [rows], f"shape {list(loss.shape)} for {rows} rows")
                require(loss.dtype == wide, f"{dtype} in, {loss.dtype} out")
                for name, value in _statistics(objective, batch).items():
                    require(value.dim() == 1 and not value.requires_grad, f"{name} is not a detached vector")
    return "B = 1, 2, 7; float64, float32, bfloat16"


def rows(cls: type[Objective]) -> str:
    """Rows do not mix: each alone, in any order, has the loss and slopes that it has in the batch."""
    for objective in settings_of(cls):
        batch = sampled(cls.batch_kind, 7, seed=21)
        whole, slopes = _call(objective, batch), _slopes(objective, batch)
        for row in range(7):
            alone = batch.map(lambda column, row=row: column[[row]])  # type: ignore[misc]
            close(_call(objective, alone), whole[[row]], "loss of a row alone", rtol=1e-12, atol=1e-12)
            for name, slope in _slopes(objective, alone).items():
                close(slope, slopes[name][[row]], f"slope of {name} of a row alone", rtol=1e-12, atol=1e-12)
    return "7 rows"


def columns(cls: type[Objective]) -> str:
    """The needs are exact: they suffice, and a missing column is a ValueError that names it."""
    known = NEEDS_OF[cls.batch_kind]
    always = {"pairs": (), "samples": ("first", "second"), "groups": ("cot", "valid")}[cls.batch_kind]
    for objective in settings_of(cls):
        full = sampled(cls.batch_kind, 3, seed=24)
        needed = [column for need in objective.needs for column in known[need]]
        kept = {name: value for name, value in full.columns().items() if name in (*always, *needed)}
        _call(objective, type(full)(**kept))
        _statistics(objective, type(full)(**kept))
        for column in needed:
            try:
                _call(objective, type(full)(**{name: value for name, value in kept.items() if name != column}))
            except ValueError as error:
                named = repr(column) in str(error) and cls.card.name in str(error)
                require(named, f"message without column or objective: {error}")
            else:
                raise CheckFailed(f"works without {column!r}")
    return ", ".join(cls.build().needs) or "policy log-probabilities only"


def extremes(cls: type[Objective]) -> str:
    """Loss, slopes and statistics stay finite at log-ratios of hundreds of nats, in both precisions."""
    for objective in settings_of(cls):
        for dtype in (DOUBLE, torch.float32):
            batch = sampled(cls.batch_kind, 50, seed=25, dtype=dtype, spread=400.0)
            found = {"loss": _call(objective, batch)} | _slopes(objective, batch) | _statistics(objective, batch)
            for name, value in found.items():
                require(bool(value.isfinite().all()), f"{name} is not finite")
    return "log-ratios of 400 and more"


CHECKS: tuple[Callable[[type[Objective]], str], ...] = (precision, rows, columns, extremes)
