"""Checks that hold for every objective, a user's own included: none needs data about a particular formula."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from alignment.objectives.base import Objective, literal_choices, number_type
from alignment.objectives.batch import NEEDS, POLICY_COLUMNS, PairLogps
from alignment.objectives.conformance.batches import (
    DOUBLE,
    CheckFailed,
    cast,
    close,
    grid_batch,
    only_needed,
    random_batch,
    require,
    settings_of,
    slopes,
    start_batch,
    with_columns,
)
from alignment.objectives.registry import objective_signature


def shapes(cls: type[Objective]) -> str:
    """Loss and rewards are `[B]` for B = 1, 2, 7; float64 stays, float32 stays, half precision is computed in fp32."""
    for objective in settings_of(cls):
        for rows in (1, 2, 7):
            for dtype in (DOUBLE, torch.float32):
                batch = random_batch(rows, seed=rows, dtype=dtype)
                outputs = (objective.loss(batch), *objective.rewards(batch))
                for output in outputs:
                    require(list(output.shape) == [rows], f"shape {list(output.shape)} for {rows} pairs")
                    require(output.dtype == dtype, f"{dtype} in, {output.dtype} out")
        for dtype in (torch.bfloat16, torch.float16):
            batch = random_batch(7, seed=7, dtype=dtype)  # float32 by now, of numbers that half precision holds
            got = objective.loss(batch)
            require(got.dtype == torch.float32, f"{dtype} in, {got.dtype} out")
            full = objective.loss(cast(batch.columns(), DOUBLE))
            close(got.double(), full, f"{dtype} columns in float32", rtol=1e-4, atol=1e-5)
    return "B = 1, 2, 7; float64, float32, bfloat16, float16"


def permutation(cls: type[Objective]) -> str:
    """Reordering the pairs reorders the losses and changes nothing else."""
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    for objective in settings_of(cls):
        batch = random_batch(7, seed=21)
        shuffled = batch.map(lambda column: column[order])
        close(objective.loss(shuffled), objective.loss(batch)[order], "permuted loss", rtol=1e-13)
        close(slopes(objective, shuffled)["chosen"], slopes(objective, batch)["chosen"][order], "permuted slope")
    return "7 pairs"


def split(cls: type[Objective]) -> str:
    """Micro-batches give the same losses and slopes as one batch: no term mixes pairs."""
    for objective in settings_of(cls):
        batch = random_batch(7, seed=22)
        cut = {name: value.split([1, 2, 4]) for name, value in batch.columns().items()}
        parts = [PairLogps(**{name: pieces[index] for name, pieces in cut.items()}) for index in range(3)]
        close(torch.cat([objective.loss(part) for part in parts]), objective.loss(batch), "split loss", rtol=1e-13)
        for name, whole in slopes(objective, batch).items():
            close(torch.cat([slopes(objective, part)[name] for part in parts]), whole, f"split slope of {name}")
    return "7 = 1 + 2 + 4 pairs"


def padding(cls: type[Objective]) -> str:
    """Rows appended to fill a batch, however extreme, leave the other rows' losses and slopes alone."""
    for objective in settings_of(cls):
        batch, filler = random_batch(3, seed=23), grid_batch((-800.0, 800.0))
        columns = filler.columns()
        longer = PairLogps(**{name: torch.cat([value, columns[name]]) for name, value in batch.columns().items()})
        close(objective.loss(longer)[:3], objective.loss(batch), "loss beside filler rows", rtol=1e-13)
        for name, alone in slopes(objective, batch).items():
            close(slopes(objective, longer)[name][:3], alone, f"slope of {name} beside filler rows")
    return "3 pairs beside 8 filler rows"


def columns(cls: type[Objective]) -> str:
    """The card's needs are exact: they suffice, and a missing one is a ValueError that names the column."""
    for objective in settings_of(cls):
        full = random_batch(3, seed=24)
        reduced = only_needed(objective, full)
        close(objective.loss(reduced), objective.loss(full), "loss from the needed columns alone", rtol=1e-13)
        objective.rewards(reduced)
        for need in objective.needs:
            kept = {name: value for name, value in reduced.columns().items() if name not in NEEDS[need]}
            try:
                objective.loss(PairLogps(**kept))
            except ValueError as error:
                named = any(repr(column) in str(error) for column in NEEDS[need])
                require(named and cls.card.name in str(error), f"message without column or objective: {error}")
            else:
                raise CheckFailed(f"says it needs {need!r}, but works without {NEEDS[need]}")
    return ", ".join(cls.build().needs) or "policy log-probabilities only"


def start(cls: type[Objective]) -> str:
    """At the start of training all is finite, rewards are 0 where the card says so, and there is a gradient."""
    for objective in settings_of(cls):
        batch = start_batch(objective)
        rewards = objective.rewards(batch)
        for tensor in (objective.loss(batch), *rewards, *slopes(objective, batch).values()):
            require(bool(tensor.isfinite().all()), "not finite at policy == reference")
        if objective.card.start != "none":
            for reward in rewards:
                close(reward, torch.zeros_like(reward), "implicit reward at the start", atol=1e-12)
        size = sum(slope.abs() for slope in slopes(objective, batch).values())
        require(bool(torch.as_tensor(size > 0).all()), "zero gradient at the start: training would not begin")
    return f"rewards are 0 at: {cls.card.start}"


def direction(cls: type[Objective]) -> str:
    """At the start, raising log pi(chosen) and lowering log pi(rejected) lowers the loss, and rewards agree."""
    for objective in settings_of(cls):
        batch = start_batch(objective)
        slope = slopes(objective, batch)
        along = slope["chosen"] - slope["rejected"]
        require(bool((along < 0).all()), f"moving towards the chosen response changes the loss by {along.tolist()}")
        moved = with_columns(batch, chosen=batch.chosen + 0.5, rejected=batch.rejected - 0.5)
        chosen, rejected = objective.rewards(moved)
        require(bool((chosen > rejected).all()), "the reward of chosen is not above that of rejected after the move")
    return "towards chosen"


def extremes(cls: type[Objective]) -> str:
    """Loss, rewards and slopes stay finite at |log-ratio| = 800 in every sign combination, in both precisions."""
    for objective in settings_of(cls):
        for dtype in (DOUBLE, torch.float32):
            for reference in (-1000.0, -810.0, -10.0):  # the last makes impossible log-probabilities: still finite
                batch = grid_batch((-800.0, 0.0, 800.0), dtype, reference)
                certain = with_columns(batch, chosen=torch.zeros_like(batch.chosen))
                for case in (batch, certain, with_columns(batch, rejected=torch.zeros_like(batch.chosen))):
                    tensors = (objective.loss(case), *objective.rewards(case), *slopes(objective, case).values())
                    finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
                    require(finite, f"{objective.hyperparameters}: not finite at log-ratios of +-800 in {dtype}")
    return "+-800 for chosen, rejected and calibration; probability 1"


def finite_differences(cls: type[Objective]) -> str:
    """Autograd's slopes are those of the loss: nothing is detached, clamped or rounded on the way."""
    step = 1e-5
    for objective in settings_of(cls):
        batch = random_batch(7, seed=25)
        for name, slope in slopes(objective, batch).items():
            above = objective.loss(with_columns(batch, **{name: batch.columns()[name] + step}))
            below = objective.loss(with_columns(batch, **{name: batch.columns()[name] - step}))
            scale = 1e-9 * float(objective.loss(batch).abs().max())
            close(slope, (above - below) / (2 * step), f"slope of {name}", rtol=1e-6, atol=1e-8 + scale)
    return f"central differences in {', '.join(POLICY_COLUMNS)}"


def saturation(cls: type[Objective]) -> str:
    """`saturated` is `[B]` bool, needs no gradient mode, and nothing is saturated at the start."""
    for objective in settings_of(cls):
        with torch.no_grad():
            flags = objective.saturated(start_batch(objective))
        require(flags.dtype == torch.bool and list(flags.shape) == [3], f"{flags.dtype} of shape {list(flags.shape)}")
        require(not bool(flags.any()), "pairs count as saturated before training")
    return "no pair at the start"


OTHER = {  # by hand, not by PairLogps.swapped
    "chosen": "rejected", "ref_chosen": "ref_rejected", "prev_chosen": "prev_rejected",
    "chosen_length": "rejected_length", "reward_chosen": "reward_rejected",
    "preference_chosen": "preference_rejected", "log_odds_chosen": "log_odds_rejected",
}  # fmt: skip


def labels(cls: type[Objective]) -> str:
    """A soft label is the expected loss of a label that is right with that probability; rewards do not read it."""
    for objective in settings_of(cls):
        batch = random_batch(7, seed=26)
        columns = batch.columns()
        swap = {one: columns[other] for pair in OTHER.items() for one, other in (pair, pair[::-1])}
        swapped = with_columns(batch, **swap)
        kept, lost = objective.loss(batch), objective.loss(swapped)
        kept_slope, lost_slope = slopes(objective, batch), slopes(objective, swapped)
        mirrored = lost_slope | {"chosen": lost_slope["rejected"], "rejected": lost_slope["chosen"]}
        one = torch.ones_like(kept)
        varied = torch.tensor([1.0, 0.0, 0.5, 0.25, 0.9, 0.0, 1.0], dtype=kept.dtype)
        for label, what in ((one, "label 1"), (0 * one, "label 0"), (one / 2, "label 1/2"), (varied, "soft labels")):
            soft = with_columns(batch, label=label)
            close(objective.loss(soft), label * kept + (1 - label) * lost, f"loss with {what}", rtol=1e-13)
            for name, slope in slopes(objective, soft).items():
                expected = label * kept_slope[name] + (1 - label) * mirrored[name]
                close(slope, expected, f"slope by {name} with {what}", rtol=1e-12)
            other = with_columns(swapped, label=1 - label)
            close(objective.loss(other), objective.loss(soft), f"the pair the other way round, {what}", rtol=1e-13)
            for got, plain in zip(objective.rewards(soft), objective.rewards(batch), strict=True):
                close(got, plain, f"reward with {what}", rtol=0, atol=0)
        for name, slope in slopes(objective, with_columns(batch, label=one)).items():
            close(slope, kept_slope[name], f"slope by {name} with label 1, exactly", rtol=0, atol=0)
    return "labels 1, 0, 1/2 and mixed: losses, slopes, the swapped pair"


def _bad_values(annotation: Any, bounds: dict[str, float | None]) -> list[Any]:
    """Values that a hyper-parameter must refuse: wrong type, not finite, on or beyond an open or closed limit."""
    if literal_choices(annotation):
        return ["no such choice", 3, True]
    if annotation is bool:
        return ["on", 1, 0.0, None]
    if number_type(annotation) is None:
        return []
    bad: list[Any] = ["0.1", True, math.nan, math.inf, -math.inf, [0.1]]
    for key, limit in bounds.items():
        if limit is not None:
            outside = {"gt": limit, "lt": limit, "ge": math.nextafter(limit, -math.inf)}
            bad += [outside.get(key, math.nextafter(limit, math.inf)), limit - 1e3 if key[0] == "g" else limit + 1e3]
    return bad


def hyperparameters(cls: type[Objective]) -> str:
    """Every hyper-parameter refuses values outside its stated range, with its name, range and the value."""
    cls = cls.variant({})
    signature, tried = objective_signature(cls), 0
    for field in dataclasses.fields(cls):
        for value in _bad_values(signature[field.name].annotation, field.metadata["bounds"]):
            tried += 1
            try:
                cls(**{field.name: value})
            except ValueError as error:
                named = field.name in str(error) and repr(value) in str(error)
                require(named, f"message without name or value: {error}")
            else:
                raise CheckFailed(f"{field.name}={value!r} was accepted")
    return f"{tried} bad values refused"
