"""Relations of `spo`: with its base, with a head that knows nothing, among the copies of a pair."""

from __future__ import annotations

from collections.abc import Callable

import torch

from alignment.objectives.base import Objective
from alignment.objectives.batch import PairLogps
from alignment.objectives.conformance.batches import (
    DOUBLE,
    Make,
    close,
    pairs,
    random_batch,
    require,
    same,
    with_columns,
)
from alignment.objectives.registry import get_objective, list_objectives

SPO_OWN = {"base", "gamma", "degrees", "responses", "removal", "head_learning_rate"}


def spo_without_weight(cls: Make) -> None:
    """gamma = 0 is the base, to the last bit, with soft labels and without: every base, every setting of its card."""
    batch = pairs()
    soft = with_columns(batch, label=torch.linspace(0, 1, len(batch.chosen), dtype=DOUBLE))
    for card in list_objectives():
        for keywords in ({}, *card.settings) if card.name != "spo" and card.batch == "pairs" else ():
            base = get_objective(card.name, **keywords)
            given = {f"base_{name}" if name in SPO_OWN else name: value for name, value in keywords.items()}
            objective = cls(base=card.name, gamma=0.0, **given)
            for case in (batch, soft):
                same(objective, base, case, rtol=0, atol=0)
            for got, expected in zip(objective.rewards(batch), base.rewards(batch), strict=True):
                close(got, expected, f"reward against {card.name}", rtol=0, atol=0)
            require(objective.needs == (*base.needs, "degree"), f"needs {objective.needs} on {card.name}")
            require(objective.card.start == base.card.start, f"start {objective.card.start!r} on {card.name}")
            for flags in ("saturated", "capped"):
                marked, wanted = getattr(objective, flags)(batch), getattr(base, flags)(batch)
                alike = torch.equal(marked, wanted) if torch.is_tensor(wanted) else marked is wanted
                require(alike, f"{flags} is not that of {card.name}")


def spo_zero_head(cls: Make) -> None:
    """A zero head knows nothing: L_deg = log N, and its bias is pulled by 1/N minus the share of each degree."""
    for degrees, expected in ((2, 0.6931471805599453), (3, 1.0986122886681098), (5, 1.6094379124341003)):
        batch = random_batch(3, seed=46)
        logits = torch.zeros(3, 5, degrees, dtype=DOUBLE, requires_grad=True)
        labels = torch.tensor([[0, 1, 0, -1, -1], [1, 1, 1, 1, 0], [0, -1, -1, -1, -1]])
        batch = with_columns(batch, degree_logits=logits, degree_labels=labels)
        plain = get_objective("dpo").loss(batch)
        got = cls(gamma=0.7, degrees=degrees).loss(batch)
        close(got.detach(), plain + 0.7 * expected, f"log {degrees}", rtol=1e-14)
        (slope,) = torch.autograd.grad(got.sum(), logits)
        share = torch.zeros(3, degrees, dtype=DOUBLE)
        share[:, :2] = torch.tensor([[2 / 3, 1 / 3], [1 / 5, 4 / 5], [1.0, 0.0]], dtype=DOUBLE)
        close(slope.sum(1), 0.7 * (1 / degrees - share), f"slope by the bias of {degrees} degrees")


def _degree_slope(objective: Objective, batch: PairLogps) -> torch.Tensor:
    """dL/d(degree logits), `[B, K, N]`."""
    logits = batch.column("degree_logits").clone().requires_grad_()
    return torch.autograd.grad(objective.loss(with_columns(batch, degree_logits=logits)).sum(), logits)[0]


def spo_logits(cls: Make) -> None:
    """dL/dc = gamma (softmax(c) - onehot)/copies, in size at most gamma/copies; 0 for a copy that does not exist."""
    batch = random_batch(7, seed=47)
    weights, labels = batch.column("degree_logits").exp(), batch.column("degree_labels")
    expected = torch.zeros_like(weights)
    for pair, copy in (labels >= 0).nonzero().tolist():
        copies = int((labels[pair] >= 0).sum())
        expected[pair, copy] = weights[pair, copy] / weights[pair, copy].sum() / copies
        expected[pair, copy, labels[pair, copy]] -= 1 / copies
    got = _degree_slope(cls(gamma=0.3), batch)
    close(got, 0.3 * expected, "slope by the degree logits")
    soft = with_columns(batch, label=torch.full_like(batch.chosen, 0.3))
    close(_degree_slope(cls(gamma=0.3), soft), 0.3 * expected, "slope by the degree logits with soft labels")


def spo_missing(cls: Make) -> None:
    """Copies labelled -1 count for nothing, whatever their logits, and a pair without copies has the base's loss."""
    batch = random_batch(7, seed=48)
    logits, labels = batch.column("degree_logits"), batch.column("degree_labels")
    filler = torch.full_like(logits, 800.0) * torch.tensor([1.0, -1.0, 0.0], dtype=DOUBLE)
    longer = with_columns(
        batch,
        degree_logits=torch.cat([filler, logits], dim=1),
        degree_labels=torch.cat([torch.full_like(labels, -1), labels], dim=1),
    )
    objective = cls(gamma=2.0)
    close(objective.loss(longer), objective.loss(batch), "loss with further copies that do not exist", rtol=1e-14)
    none = with_columns(batch, degree_labels=torch.full_like(labels, -1))
    close(objective.loss(none), get_objective("dpo").loss(batch), "loss without copies", rtol=0, atol=0)


def spo_order(cls: Make) -> None:
    """The order of a pair's copies does not matter."""
    batch, order = random_batch(7, seed=49), torch.tensor([2, 0, 3, 1])
    columns = {name: batch.column(name)[:, order] for name in ("degree_logits", "degree_labels")}
    close(cls().loss(with_columns(batch, **columns)), cls().loss(batch), "loss after reordering copies", rtol=1e-13)


def spo_linear(cls: Make) -> None:
    """The loss is linear in gamma: L(0.25) - L(0) is a quarter of L(1) - L(0)."""
    batch = pairs()
    none, some, whole = (cls(gamma=gamma).loss(batch) for gamma in (0.0, 0.25, 1.0))
    close(some - none, (whole - none) / 4, "a quarter of the weight", rtol=1e-9)
    require(bool((whole - none).abs().max() > 0.1), "gamma does nothing")


DEGREE_RELATIONS: dict[str, Callable[[Make], None]] = {
    "gamma 0 = base": spo_without_weight,
    "zero head": spo_zero_head,
    "slope by the logits": spo_logits,
    "missing copies": spo_missing,
    "order of copies": spo_order,
    "linear in gamma": spo_linear,
}
