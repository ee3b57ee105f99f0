"""Gradient entanglement: the condition on toys, its prediction on a model, a probe that changes nothing, remedies."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from alignment.errors import UserError
from alignment.models import load_model
from alignment.objectives import get_objective, list_objectives
from alignment.objectives.margin import is_margin_loss
from alignment.trainers.entanglement import FILE, Entanglement, GradientProbe, ResponseGradients, entangle, summary
from tests import tiny_lm
from tests.trainers.building import LORA, config, logged, preferences, trainer_for


def of(chosen, rejected) -> Entanglement:
    """As if each gradient had one parameter tensor."""
    return entangle([torch.tensor(chosen)], [torch.tensor(rejected)])


# --- the condition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "changes", "verdict"),
    [
        ((1.0, 0.0), (2.0, 1.0), (-1.0, -3.0), "both fall"),
        ((2.0, 1.0), (1.0, 0.0), (3.0, 1.0), "both rise"),
        ((2.0, 0.0), (0.0, 3.0), (4.0, -9.0), "parted"),
    ],
)
def test_the_three_cases(chosen, rejected, changes, verdict):
    found = of(chosen, rejected)
    assert found.changes == changes and found.verdict == verdict
    assert (found.ratio > 1) == (verdict != "parted")
    # The margin grows by |g_w - g_l|^2 whatever the case.
    assert changes[0] - changes[1] == pytest.approx(sum((w - r) ** 2 for w, r in zip(chosen, rejected, strict=True)))


def test_sums_are_float64_and_absent_gradients_count_nothing():
    big, small = torch.tensor([1e4]), torch.full((1000,), 1e-2)
    found = entangle([big, small, None], [big, small, torch.ones(3)])
    assert found.inner == pytest.approx(1e8 + 0.1, rel=1e-12)  # in float32 the small ones would be lost
    assert found.rejected == pytest.approx(1e8 + 0.1 + 3, rel=1e-12)
    assert entangle([None], [torch.ones(1)]).cosine == 0


def test_two_tokens_of_one_softmax_push_apart_unless_others_carry_mass():
    """<g_w, g_l> = -p_w - p_l + |p|^2 in logit space: the token-level claim."""
    for logits in (torch.zeros(8), torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.tensor([0.0, 0.0, 5.0])):
        p = logits.double().softmax(0)
        w, r = torch.eye(len(p), dtype=torch.float64)[:2] - p
        found = entangle([w], [r])
        assert found.inner == pytest.approx(float(-p[0] - p[1] + p @ p), abs=1e-6)
        assert (found.inner > 0) == (float(p[2:].max()) > 0.9)


def test_normalised_step_never_lowers_chosen_nor_raises_rejected():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        w, r = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        step = w / w.norm() - r / r.norm()
        assert w @ step >= -1e-12 and r @ step <= 1e-12
    assert float((w / w.norm() - w / w.norm()).norm()) == 0


# --- on a model -----------------------------------------------------------------------------------------------------


def plain_logps(model, rows: list[dict], branch: str) -> torch.Tensor:
    """log π of each response in the model's own precision, one plain pass each."""
    found = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row[f"{branch}_ids"]])
        logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        found.append(logps[len(row["prompt_ids"]) - 1 :].sum())
    return torch.stack(found)


def test_first_order_prediction_is_what_a_small_sgd_step_does(tiny, tmp_path):
    """Float64; transformers' norms and softmax stay in float32, so that a step of 1e-6 is off by 0.15 %."""
    trainer = trainer_for(tiny, tmp_path, model=load_model(tiny).double())
    probe = GradientProbe(trainer, every=1, pairs=1, parameters="all")
    row = trainer.train_dataset.select(range(1)).to_list()
    found = Entanglement(*probe.measure()[0, 2:].tolist())
    model = trainer.model
    before = [plain_logps(model, row, b).detach() for b in ("chosen", "rejected")]
    loss = -(plain_logps(model, row, "chosen") - plain_logps(model, row, "rejected")).sum()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-5).step()
    for branch, then, predicted in zip(("chosen", "rejected"), before, found.changes, strict=True):
        moved = float(plain_logps(model, row, branch).detach() - then)
        assert moved == pytest.approx(1e-5 * predicted, rel=1e-3)


def measured(trainer, **more) -> torch.Tensor:
    return GradientProbe(trainer, every=1, parameters="all", **more).measure()


def test_layouts_and_checkpointing_give_the_same_gradients(tiny, tmp_path):
    expected = measured(trainer_for(tiny, tmp_path))
    args = config(tmp_path, gradient_checkpointing=True)
    torch.testing.assert_close(measured(trainer_for(tiny, tmp_path, args=args)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(measured(trainer_for(tiny, tmp_path, layout="paired")), expected, rtol=0, atol=0)
    held_out = preferences(40).select(range(36, 40))
    other = measured(trainer_for(tiny, tmp_path, eval_dataset=held_out), pairs=9)
    assert other.shape == (4, 5) and not torch.equal(other, expected)  # the held-out pairs, of which there are 4


def test_with_lora_gradients_are_of_the_adapters(tiny, tmp_path):
    trainer = trainer_for(tiny, tmp_path, peft_config=LORA)
    everything = ResponseGradients(trainer, "all", "test").trained()
    last = ResponseGradients(trainer, "last_layer", "test").trained()
    assert len(everything) == 2 * len(last) == 8  # two layers, q and v, A and B
    assert measured(trainer)[:, 3:].min() > 0
    first = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="last layer has no trained parameter; take `parameters: all`"):
        GradientProbe(trainer_for(tiny, tmp_path, peft_config=first), every=1)


def test_refused_where_no_process_has_the_gradient(tiny, tmp_path):
    trainer = trainer_for(tiny, tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(UserError, match="ZeRO-3 and FSDP split every weight .* launch with ddp.yaml"):
        GradientProbe(trainer, every=1)
    trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = False, True
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    fake = SimpleNamespace(accelerator=SimpleNamespace(state=state), model=trainer.model, args=trainer.args)
    fake.is_fsdp_enabled, fake.is_deepspeed_enabled = False, True
    with pytest.raises(UserError, match="training.diagnostics: ZeRO-3 and FSDP"):
        ResponseGradients(fake, "all", "training.diagnostics")
    state.deepspeed_plugin.zero_stage = 2
    assert ResponseGradients(fake, "all", "training.diagnostics").trained()
    args = config(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(UserError, match="use_reentrant: false"):
        GradientProbe(trainer_for(tiny, tmp_path, args=args), every=1)


# --- the probe looks and does not touch -----------------------------------------------------------------------------


SETUPS = {
    "accumulating, rarely logged": (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3}, {},
    ),
    "checkpointing, paired": ({"gradient_checkpointing": True}, {"layout": "paired"}),
    "lora": ({}, {"peft_config": LORA}),
}  # fmt: skip


@pytest.mark.parametrize("setup", SETUPS)
def test_training_is_the_same_to_the_bit(tiny, tmp_path, setup):
    arguments, more = SETUPS[setup]

    def run(probed: bool):
        torch.manual_seed(1)
        args = config(tmp_path / str(probed), max_steps=4, learning_rate=1e-3, **arguments)
        trainer = trainer_for(tiny, tmp_path, args=args, **more)
        if probed:
            trainer.add_callback(GradientProbe(trainer, every=2, pairs=3, parameters="all"))
        trainer.train()
        states = (torch.get_rng_state(), random.getstate())
        weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        return trainer, states, weights

    off, on = run(False), run(True)
    for key in ("loss", "rewards/margins", "grad_norm", "calibration/ece"):
        assert logged(on[0], key) == logged(off[0], key), key
    assert torch.equal(on[1][0], off[1][0]) and on[1][1] == off[1][1]
    assert all(torch.equal(on[2][name], value) for name, value in off[2].items())
    assert len(logged(on[0], "entanglement/inner")) == 3  # before the first step, and after steps 2 and 4


def test_lines_have_counts_changes_and_survive_resuming(tiny, tmp_path):
    def run(folder: str, checkpoint=None, steps=4):
        args = config(tmp_path / folder, max_steps=steps, learning_rate=1e-3, save_strategy="steps", save_steps=3)
        trainer = trainer_for(tiny, tmp_path, args=args)
        trainer.add_callback(GradientProbe(trainer, every=2, pairs=3))
        trainer.train(resume_from_checkpoint=checkpoint)
        rows = [json.loads(line) for line in (tmp_path / folder / FILE).read_text().splitlines()]
        return rows, [row for row in trainer.state.log_history if "entanglement/inner" in row]

    rows, lines = run("run")
    assert [row["step"] for row in rows] == [row["step"] for row in lines] == [0, 2, 4]
    assert all(sum(line[f"entanglement/{v}"] for v in ("both_fall", "both_rise", "parted")) == 3 for line in lines)
    assert "entanglement/moved_chosen" not in lines[0]
    moved = sum(now - then for now, then in zip(rows[1]["logp_chosen"], rows[0]["logp_chosen"], strict=True)) / 3
    assert lines[1]["entanglement/moved_chosen"] == pytest.approx(moved)
    again, resumed = run("run", str(tmp_path / "run" / "checkpoint-3"))
    assert again == rows  # the line of step 4 was removed, and is the same
    assert resumed[-1] == lines[-1]


def test_foretold_is_the_share_of_pairs_that_moved_as_the_verdict_said():
    def row(verdicts, chosen, rejected):
        flat = {key: [0.0] * 3 for key in ("inner", "norm_chosen", "norm_rejected", "cosine", "ratio")}
        return flat | {"verdict": verdicts, "logp_chosen": chosen, "logp_rejected": rejected}

    before = row(["both fall", "parted", "both rise"], [-5.0, -5.0, -5.0], [-9.0, -9.0, -9.0])
    found = summary(row(["parted"] * 3, [-6.0, -4.0, -4.0], [-10.0, -8.0, -8.5]), before)
    assert found["entanglement/foretold"] == pytest.approx(2 / 3)  # the second pair's rejected rose
    assert found["entanglement/moved_chosen"] == pytest.approx(1 / 3)
    assert found["entanglement/parted"] == 3


def test_a_run_stopped_by_the_step_zero_check_leaves_no_line(tiny, tmp_path):
    other = load_model(tiny)
    with torch.no_grad():
        other.lm_head.weight *= 1.2
    trainer = trainer_for(tiny, tmp_path, ref_model=other, start_is_reference=True)
    trainer.add_callback(GradientProbe(trainer, every=2))
    with pytest.raises(UserError, match="step-0 check"):
        trainer.train()
    assert not (tmp_path / FILE).exists() and trainer.state.log_history == []


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
