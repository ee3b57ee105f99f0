"""Remedies of gradient entanglement: the normalised gradient, and dpo, dpop and rpo on near-identical pairs."""

from __future__ import annotations

import random

import pytest
import torch
from datasets import Dataset

from alignment.errors import UserError
from alignment.objectives import get_objective, list_objectives
from alignment.objectives.margin import is_margin_loss
from alignment.trainers.entanglement import (
    Entanglement,
    GradientProbe,
    ResponseGradients,
)
from tests import tiny_lm
from tests.trainers.building import config, preferences, trainer_for
from tests.trainers.test_entanglement import other_reference

# --- the normalised gradient ----------------------------------------------------------------------------------------


def test_which_objectives_are_losses_of_the_margin():
    pairs = [card.name for card in list_objectives() if card.batch == "pairs"]
    found = {name for name in pairs if is_margin_loss(get_objective(name))}
    assert found == {"dpo", "f_dpo", "hinge", "inpo", "ipo", "reward_aware_rpo", "robust"}
    assert not is_margin_loss(get_objective("f_dpo", divergence="jsd"))
    assert not is_margin_loss(get_objective("ipo", normalization="mean"))


@pytest.mark.parametrize("layout", ["shared_prefix", "paired"])
def test_normalised_gradient_is_that_of_the_formula(tiny, tmp_path, layout):
    """sqrt(|g_w||g_l|) c (g_l/|g_l| - g_w/|g_w|) summed over pairs, with c = beta/2 at the start; the loss stays."""
    trainer = trainer_for(tiny, tmp_path, layout=layout, normalized_gradient=True)
    inputs = trainer.collator([trainer.train_dataset[i] for i in range(3)])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    assert float(loss.detach()) == pytest.approx(0.693147, abs=1e-6)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters)
    expected = [torch.zeros_like(p) for p in parameters]
    gradients = ResponseGradients(trainer, "all", "test")
    rows = trainer._paired(inputs)
    for i in range(3):
        (_, w), (_, r) = gradients(rows, i), gradients(rows, 3 + i)
        sizes = [sum(float(g.square().sum()) for g in part) ** 0.5 for part in (w, r)]
        scale = 0.05 / 3 * (sizes[0] * sizes[1]) ** 0.5
        expected = [e + scale * (b / sizes[1] - a / sizes[0]) for e, a, b in zip(expected, w, r, strict=True)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("tau", "sign"), [(10.0, -1), (0.01, 1)])
def test_the_normalised_step_keeps_its_promise_only_while_a_larger_margin_is_asked_for(tiny, tmp_path, tau, sign):
    """Reference and start differ, margins of 0.3 to 5: past ipo's target 0.05 chosen falls and rejected rises; below
    its target 50 it is the other way round. Foretold to first order, the rescaling included."""
    objective = get_objective("ipo", tau=tau)
    more = {"ref_model": other_reference(tiny).float(), "normalized_gradient": True}
    trainer = trainer_for(tiny, tmp_path, objective, **more)
    with torch.no_grad():
        batch = trainer.pair_logps(trainer.model, trainer.collator(list(trainer.train_dataset)))
    most = int(batch.margin.argmax())
    assert 0.3 < float(batch.margin[most]) < 5
    probe = GradientProbe(trainer, every=1, pairs=32, parameters="all")
    probe.pairs, probe.inputs = 1, [probe.inputs[most]]
    (row,) = probe.measure().tolist()
    found = Entanglement(*row[2:])
    assert found.weight_chosen * found.chosen**0.5 == pytest.approx(found.weight_rejected * found.rejected**0.5)
    assert found.verdict == ("parted" if sign > 0 else "pulled back")
    trainer.model.train()
    trainer.compute_loss(trainer.model, trainer.collator([trainer.train_dataset[most]])).backward()
    rate = 1e-2 / max(map(abs, found.changes))
    torch.optim.SGD(trainer.model.parameters(), lr=rate).step()
    moved = [after - before for after, before in zip(probe.measure()[0, :2].tolist(), row[:2], strict=True)]
    assert sign * moved[0] > 0 > sign * moved[1]
    assert moved == pytest.approx([rate * change for change in found.changes], abs=5e-4)


def test_objectives_that_push_unequally_are_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="training.normalized_gradient: objective 'rpo' is no function of the margin"):
        trainer_for(tiny, tmp_path, "rpo", normalized_gradient=True)


# --- near-identical pairs -------------------------------------------------------------------------------------------


def near_identical(seed: int, count: int = 32) -> Dataset:
    """Four adjectives each; the two responses differ in the first one only."""
    rng, rows = random.Random(seed), []
    for opening in rng.sample(tiny_lm.openings(), count):
        words = tiny_lm.KIND + tiny_lm.HARSH
        (first, other), rest = rng.sample(words, 2), rng.choices(words, k=3)
        texts = {"chosen": [first, *rest], "rejected": [other, *rest]}
        rows.append({"prompt": opening} | {k: f" {' and '.join(words)} ." for k, words in texts.items()})
    return Dataset.from_list(rows)


def test_gradients_of_near_identical_pairs_are_alike_and_most_are_parted_all_the_same(tiny, tmp_path):
    """All 32 pairs of each data at the start; docs/diagnostics.md has the numbers that this prints."""

    def probed(data: Dataset, which: str) -> list[Entanglement]:
        trainer = trainer_for(tiny, tmp_path, train_dataset=data)
        return [Entanglement(*row[2:]) for row in GradientProbe(trainer, 1, 32, which).measure().tolist()]

    sources = {"different words": preferences(), "one word of four": near_identical(0)}
    for which in ("all", "last_layer"):
        found = {name: probed(data, which) for name, data in sources.items()}
        cosines = {name: sum(pair.cosine for pair in pairs) / 32 for name, pairs in found.items()}
        parted = {name: sum(pair.verdict == "parted" for pair in pairs) for name, pairs in found.items()}
        print(which, {name: (round(cosines[name], 2), parted[name]) for name in sources})
        assert cosines["different words"] < 0.2 and cosines["one word of four"] > 0.7
        assert parted["different words"] == 32 and 16 < parted["one word of four"] < 32


REMEDIES = {
    "dpo": (get_objective("dpo"), False),
    "normalised": (get_objective("dpo"), True),
    "dpop": (get_objective("dpop"), False),
    "rpo": (get_objective("rpo", beta=0.1, eta=1.0), False),
}


def displacement(tiny, folder, data: Dataset, remedy: str, **arguments) -> tuple[float, float]:
    """By how many nats training moves chosen and rejected of its own pairs, in the mean."""
    objective, normalized = REMEDIES[remedy]
    args = config(folder, logging_steps=100, **arguments)
    trainer = trainer_for(tiny, folder, objective, args=args, train_dataset=data, normalized_gradient=normalized)
    trainer.train()
    batch = trainer.collator(list(trainer.train_dataset))
    with torch.no_grad():
        chosen, rejected = (trainer._score(trainer.model, batch) - trainer._score_frozen("ref", None, batch)).mean(0)
    return float(chosen), float(rejected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_pair_that_is_said_to_fall_falls_under_dpo_and_not_under_the_remedies(tiny, tmp_path, seed):
    """One pair alone under SGD: here theory promises it."""
    data = near_identical(seed)
    table = GradientProbe(trainer_for(tiny, tmp_path, train_dataset=data), 1, 32, "all").measure()
    entangled = max(range(32), key=lambda i: float(table[i, 2] / table[i, 3]))
    assert Entanglement(*table[entangled, 2:].tolist()).verdict == "both fall"
    sgd = {"optim": "sgd", "learning_rate": 1e-2, "max_steps": 30, "per_device_train_batch_size": 1}
    moved = {name: displacement(tiny, tmp_path, data.select([entangled]), name, **sgd) for name in REMEDIES}
    print(seed, {name: tuple(round(value, 3) for value in found) for name, found in moved.items()})
    assert moved["dpo"][0] < -0.5 and moved["dpo"][1] < moved["dpo"][0]
    assert moved["normalised"][0] > 0.3 and moved["normalised"][1] < 0
    assert min(moved["dpop"][0], moved["rpo"][0]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_near_identical_pairs_displace_chosen_under_dpo_and_not_under_dpop_and_rpo(tiny, tmp_path, seed):
    """Batches of pairs under AdamW, where the normalised step promises nothing."""
    adam = {"learning_rate": 1e-3, "max_steps": 32, "per_device_train_batch_size": 8, "seed": seed}
    moved = {name: displacement(tiny, tmp_path, near_identical(seed), name, **adam) for name in REMEDIES}
    print(seed, {name: tuple(round(value, 2) for value in found) for name, found in moved.items()})
    assert moved["dpo"][0] < -3 and moved["dpo"][1] < moved["dpo"][0]
    assert min(moved["dpop"][0], moved["rpo"][0]) > 0
