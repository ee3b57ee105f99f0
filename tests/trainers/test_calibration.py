"""Calibration of implicit rewards by hand: bins, both orders, soft labels, processes, and which objectives have it."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.objectives import get_objective, list_objectives
from alignment.objectives.batch import PairLogps
from alignment.trainers.calibration import Calibration, label_probability
from tests.trainers.building import config, logged, preferences, trainer_for

CPU = torch.device("cpu")


def logit(p: list[float]) -> torch.Tensor:
    return torch.tensor(p, dtype=torch.float64).logit()


def measured(
    margins: torch.Tensor, label: list[float] | None = None, parts: int = 1, objective=None
) -> dict[str, float]:
    calibration = Calibration(objective)
    labels = None if label is None else torch.tensor(label)
    for part in range(parts):
        calibration.add(margins[part::parts], None if labels is None else labels[part::parts])
    return calibration.reduce(lambda total: total, CPU)


def test_by_hand():
    """Confidences .92, .93 | .72 | .61 (of a wrong pair): gaps .15/4 | .28/4 | .61/4 of their bins."""
    found = measured(logit([0.92, 0.93, 0.72, 0.39]))
    assert found["calibration/ece"] == pytest.approx((0.15 + 0.28 + 0.61) / 4, abs=1e-6)
    assert found["calibration/overconfidence"] == pytest.approx((-0.15 - 0.28 + 0.61) / 4, abs=1e-6)
    variances = [0.92 * 0.08 + 0.93 * 0.07, 0.72 * 0.28, 0.61 * 0.39]
    assert found["calibration/noise"] == pytest.approx(
        sum(math.sqrt(2 / math.pi * v) for v in variances) / 4, abs=1e-6
    )


def test_there_are_ten_bins_from_one_half_to_one():
    """.52 always right and .57 always wrong are two errors that must not cancel."""
    found = measured(logit([0.52] * 6 + [0.43] * 5))
    assert found["calibration/ece"] == pytest.approx((6 * 0.48 + 5 * 0.57) / 11, abs=1e-6)


def test_right_as_often_as_said_is_calibrated():
    """Ten pairs at .75 of which 7.5 are right: with soft labels exactly, and in either direction."""
    assert measured(logit([0.75] * 10), [0.75] * 10)["calibration/ece"] == pytest.approx(0, abs=1e-6)
    mixed = measured(logit([0.75, 0.25] * 4), [1, 0, 1, 0, 1, 1, 0, 0])
    assert mixed["calibration/ece"] == pytest.approx(0, abs=1e-6)  # 6 of 8 on the side that was said


def test_order_of_the_two_responses_says_nothing():
    """Chosen first in every row, or half of the rows turned round: the same error; and near 1 always is no merit."""
    margins = logit([0.95, 0.9, 0.8, 0.3, 0.55])
    turned = margins * torch.tensor([1, -1, 1, -1, 1])
    expected = measured(margins)
    assert measured(turned, [1, 0, 1, 0, 1]) == pytest.approx(expected)
    assert measured(margins, [1.0] * 5) == pytest.approx(expected)
    blind = logit([0.99, 0.01] * 50)  # sure of itself, and right half of the time
    assert measured(blind)["calibration/ece"] == pytest.approx(0.49, abs=1e-6)


def test_no_preference_is_no_error_and_extremes_have_a_bin():
    assert measured(torch.zeros(6))["calibration/ece"] == 0
    assert measured(torch.tensor([800.0, -800.0]))["calibration/ece"] == pytest.approx(0.5)
    assert Calibration().reduce(lambda total: total, CPU) == {}


def test_batches_and_processes_add_up():
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(300, generator=generator) * 2
    whole = measured(margins)
    assert measured(margins, parts=7) == pytest.approx(whole)
    halves = [Calibration(), Calibration()]
    for half, part in zip(halves, (margins[:100], margins[100:]), strict=True):
        half.add(part)
    others = halves[1].sums.float()
    assert halves[0].reduce(lambda total: total + others, CPU) == pytest.approx(whole, rel=1e-5)


def test_noise_is_what_a_calibrated_model_shows():
    """Labels drawn from the model's own probabilities: the ECE is near `noise`, not near 0."""
    generator = torch.Generator().manual_seed(0)
    errors, noises = [], []
    for _ in range(200):
        margins = torch.randn(200, generator=generator, dtype=torch.float64)
        label = (torch.rand(200, generator=generator) < margins.sigmoid()).double()
        found = measured(margins, label.tolist())
        errors.append(found["calibration/ece"])
        noises.append(found["calibration/noise"])
    assert sum(errors) / sum(noises) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", ["robust", "spo"])
def test_robust_speaks_of_labels_before_they_were_flipped(name):
    """Truth .8 and .3 flipped with probability .1: given labels are .9·.8 + .1·.2 = .74 and .34."""
    settings = {"label_smoothing": 0.1} | ({"base": "robust"} if name == "spo" else {})
    margins = logit([0.8, 0.3] * 5)
    found = measured(margins, [0.74, 0.34] * 5, objective=get_objective(name, **settings))
    assert found["calibration/ece"] == pytest.approx(0, abs=1e-6)
    # Without the translation: .8 for .74 and .7 for .66.
    assert measured(margins, [0.74, 0.34] * 5)["calibration/ece"] == pytest.approx(0.05, abs=1e-6)
    # 0/1 labels, always right: 1 - .74 is still to be learned, and a margin without bound says .9.
    robust = get_objective(name, **settings)
    assert measured(logit([0.8] * 4), objective=robust)["calibration/overconfidence"] == pytest.approx(-0.26)
    assert measured(torch.full((4,), 50.0), objective=robust)["calibration/ece"] == pytest.approx(0.1)


def test_smoothed_labels_are_translated_back():
    """cDPO, e = .2: fitted to .2 + .6 P, so .65 means .75, and everything from .8 on means 1."""
    objective = get_objective("dpo", label_smoothing=0.2)
    found = measured(logit([0.65, 0.35] * 4), [0.75, 0.25] * 4, objective=objective)
    assert found["calibration/ece"] == pytest.approx(0, abs=1e-6)
    assert measured(logit([0.8, 0.95, 0.1]), [1, 1, 0], objective=objective)["calibration/ece"] == pytest.approx(0)
    assert measured(logit([0.65]), objective=get_objective("dpo"))["calibration/ece"] == pytest.approx(0.35)


SETTINGS = [
    ("cpo", {"nll_weight": 0.0}), ("dpo", {}), ("dpo", {"label_smoothing": 0.2}), ("f_dpo", {}), ("robust", {}),
    ("robust", {"label_smoothing": 0.3}), ("rpo", {"eta": 0.0}), ("vpo", {"alpha": 0.0}),
]  # fmt: skip


def test_cards_say_where_sigmoid_of_the_margin_is_fitted_to_labels():
    """There the expected loss of a soft label is least where the label is what is said of it (extra terms apart)."""
    flagged = {card.name for card in list_objectives() if card.bradley_terry}
    assert flagged == {"cpo", "dpo", "f_dpo", "orpo", "robust", "rpo", "vpo"}
    assert flagged - {name for name, _ in SETTINGS} == {"orpo"}  # its likelihood term has weight 1
    for name, settings in SETTINGS:
        objective = get_objective(name, **settings)
        chosen = torch.tensor([-3.0, -5.0], dtype=torch.float64, requires_grad=True)
        columns = {"rejected": torch.tensor([-9.0, -2.0], dtype=torch.float64), "calibration": torch.zeros(2)}
        columns |= {"ref_chosen": columns["rejected"] + 1, "ref_rejected": columns["rejected"] - 1}
        columns["ref_calibration"] = columns["calibration"]
        batch = PairLogps(chosen=chosen, **columns)
        rewards = objective.rewards(batch)
        label = label_probability(objective, (rewards[0] - rewards[1]).detach().sigmoid())
        loss = objective.loss(PairLogps(chosen=chosen, **columns, label=label)).sum()
        (slope,) = torch.autograd.grad(loss, chosen)
        assert float(slope.abs().max()) < 1e-9, (name, settings)
    spo = get_objective("spo", base="dpo"), get_objective("spo", base="ipo")
    assert [objective.card.bradley_terry for objective in spo] == [True, False]


def test_logged_in_training_and_evaluation_where_it_means_something(tiny, tmp_path):
    data = preferences(40)
    settings = {"train_dataset": data.select(range(32)), "eval_dataset": data.select(range(32, 40))}
    trainer = trainer_for(tiny, tmp_path, args=config(tmp_path, learning_rate=1e-3), **settings)
    assert trainer.evaluate()["eval_calibration/ece"] == pytest.approx(0, abs=1e-4)  # at the start all margins are 0
    trainer.train()
    assert len(logged(trainer, "calibration/ece")) == 5
    found = trainer.evaluate()
    batch = trainer.collator(list(trainer.eval_dataset))
    with torch.no_grad():
        expected = measured(trainer.objective.beta * trainer.pair_logps(trainer.model, batch).margin)
    for key, value in expected.items():
        assert found[f"eval_{key}"] == pytest.approx(value, abs=1e-5)
    for name in ("ipo", "simpo"):
        other = trainer_for(tiny, tmp_path, name, **settings)
        assert not [key for key in other.evaluate() if "calibration" in key]
