"""Gradient entanglement: the condition on toys, its prediction on a model, a probe that changes nothing."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig

from alignment.errors import UserError
from alignment.models import load_model
from alignment.objectives import get_objective, list_objectives
from alignment.trainers.entanglement import (
    FILE,
    MEANS,
    VERDICTS,
    Entanglement,
    GradientProbe,
    ResponseGradients,
    entangle,
    in_words,
    summary,
)
from tests.trainers.building import LORA, config, logged, preferences, trainer_for


def of(chosen, rejected, *push) -> Entanglement:
    """As if each gradient had one parameter tensor."""
    return entangle([torch.tensor(chosen)], [torch.tensor(rejected)], *push)


# --- the condition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "changes", "verdict"),
    [
        ((1.0, 0.0), (2.0, 1.0), (-1.0, -3.0), "both fall"),
        ((2.0, 1.0), (1.0, 0.0), (3.0, 1.0), "both rise"),
        ((2.0, 0.0), (0.0, 3.0), (4.0, -9.0), "parted"),
        ((1.0, 2.0), (1.0, 2.0), (0.0, 0.0), "unmoved"),
    ],
)
def test_the_cases_of_a_loss_of_the_margin(chosen, rejected, changes, verdict):
    found = of(chosen, rejected)
    assert found.changes == changes and found.verdict == verdict
    assert (found.ratio > 1) == (verdict in ("both fall", "both rise"))
    # The margin grows by |g_w - g_l|^2 whatever the case.
    assert changes[0] - changes[1] == pytest.approx(sum((w - r) ** 2 for w, r in zip(chosen, rejected, strict=True)))


@pytest.mark.parametrize(
    ("push", "changes", "verdict"),
    [
        ((-1.0, 1.0), (1.0, 3.0), "both rise"),  # past the target of ipo: "both fall" turned round
        ((2.0, -1.0), (0.0, -1.0), "parted"),  # chosen is held up: 2·1 - 1·2, 2·2 - 1·5
        ((3.0, -1.0), (1.0, 1.0), "both rise"),
        ((0.0, 0.0), (0.0, 0.0), "unmoved"),  # hinge, done
        ((0.0, 0.5), (1.0, 2.5), "both rise"),
        ((-1.0, -0.25), (-1.5, -3.25), "both fall"),
    ],
)
def test_the_loss_s_own_weights_decide(push, changes, verdict):
    """g_w = (1, 0), g_l = (2, 1): the changes are <g_w, s> and <g_l, s> of the step s = push_w g_w + push_l g_l."""
    found = of((1.0, 0.0), (2.0, 1.0), push)
    assert found.changes == changes and found.verdict == verdict
    assert of((2.0, 0.0), (0.0, 3.0), (-1.0, 1.0)).verdict == "pulled back"
    third = of((1.0, 0.0), (2.0, 1.0), (*push, 3.0), [torch.tensor((0.0, 1.0))])
    assert third.changes == (changes[0], changes[1] + 3)


def small_step(logits: torch.Tensor, loss) -> tuple[Entanglement, list[float]]:
    """A policy of three responses, the first against the second: what is said of it, and changes per learning rate."""
    logits = logits.double().requires_grad_(True)
    w, r, _ = logits.log_softmax(0)
    pushed = torch.autograd.grad(loss(w, r), (w, r), retain_graph=True)
    gradients = [torch.autograd.grad(x, logits, retain_graph=True) for x in (w, r)]
    (slope,) = torch.autograd.grad(loss(w, r), logits)
    moved = ((logits - 1e-7 * slope).log_softmax(0) - logits.log_softmax(0)) / 1e-7
    return entangle(*gradients, [-float(p) for p in pushed]), moved[:2].tolist()


def test_past_its_target_ipo_takes_back_what_it_gave():
    """Two responses without mass under a third: <g_w, g_l> > 0. Margin 1, target 2 or 1/2; the reference is even."""
    logits = torch.tensor([1.0, 0.0, 6.0])
    below, moved_below = small_step(logits, lambda w, r: (w - r - 2) ** 2)
    past, moved_past = small_step(logits, lambda w, r: (w - r - 0.5) ** 2)
    for found, moved in ((below, moved_below), (past, moved_past)):
        assert found.changes == pytest.approx(moved, rel=1e-4)
    assert (below.weight_chosen, below.weight_rejected) == pytest.approx((2, 2))  # -2 (1 - 2)
    assert (past.weight_chosen, past.weight_rejected) == pytest.approx((-1, -1))  # -2 (1 - 1/2)
    assert [below.verdict, past.verdict] == ["parted", "pulled back"]
    liked, moved = small_step(torch.tensor([-4.0, -1.0, 3.0]), lambda w, r: 5 * (r - w) - 10 * w)
    assert liked.changes == pytest.approx(moved, rel=1e-4) and liked.weight_chosen == 3 * liked.weight_rejected


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


def other_reference(tiny):
    """Sharper than the start, so that margins are not 0."""
    model = load_model(tiny).double()
    with torch.no_grad():
        model.lm_head.weight *= 1.2
    return model


# name: objective, and its loss by hand of log π and log ref of chosen, rejected, a third response, and lengths of two
LOSSES = {
    "dpo": (get_objective("dpo"), lambda w, r, c, rw, rr, n: -F.logsigmoid(0.1 * (w - r - rw + rr))),
    "cdpo, past its label": (
        get_objective("dpo", beta=2.0, label_smoothing=0.4),
        lambda w, r, c, rw, rr, n: (
            -0.6 * F.logsigmoid(2 * (w - r - rw + rr)) - 0.4 * F.logsigmoid(-2 * (w - r - rw + rr))
        ),
    ),
    "ipo, past its target": (get_objective("ipo", tau=10.0), lambda w, r, c, rw, rr, n: (w - r - rw + rr - 0.05) ** 2),
    "rpo": (
        get_objective("rpo", beta=0.1, eta=1.0),
        lambda w, r, c, rw, rr, n: -F.logsigmoid(0.1 * (w - r - rw + rr)) - 0.1 * w,
    ),
    "rpo, given": (
        get_objective("rpo", beta=0.1, eta=1.0, baseline="given"),
        lambda w, r, c, rw, rr, n: -F.logsigmoid(0.1 * (w - r - rw + rr)) - 0.1 * c,
    ),
    "simpo": (
        get_objective("simpo", beta=2.0, gamma=0.5),
        lambda w, r, c, rw, rr, n: -F.logsigmoid(2 * (w / n[0] - r / n[1]) - 0.5),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_said_of_a_pair_is_what_a_small_sgd_step_on_its_loss_does(tiny, tmp_path, name):
    """Float64; transformers' norms and softmax stay in float32, hence 0.2 % of the larger change.

    The pair is the one with the largest margin, which lies past the small targets above.
    """
    objective, by_hand = LOSSES[name]
    data = preferences().add_column("calibration", [" dull ."] * 32)
    more = {"ref_model": other_reference(tiny)} if "reference" in objective.needs else {}
    trainer = trainer_for(tiny, tmp_path, objective, model=load_model(tiny).double(), train_dataset=data, **more)
    rows, model, ref = trainer.train_dataset.to_list(), trainer.model, other_reference(tiny)
    with torch.no_grad():
        start = {b: plain_logps(model, rows, b) for b in ("chosen", "rejected")}
        frozen = {b: plain_logps(ref, rows, b) for b in ("chosen", "rejected")}
    margins = start["chosen"] - start["rejected"] - frozen["chosen"] + frozen["rejected"]
    most = int(margins.argmax())
    assert float(margins[most]) > 0.3  # past ipo's 0.05, and cDPO's logit(0.6)/2 = 0.2
    probe = GradientProbe(trainer, every=1, pairs=32, parameters="all")
    probe.pairs, probe.inputs = 1, [probe.inputs[most]]
    found = Entanglement(*probe.measure()[0, 2:].tolist())
    row = [rows[most]]
    lengths = [len(row[0][f"{b}_ids"]) for b in ("chosen", "rejected")]
    now = [plain_logps(model, row, b) for b in ("chosen", "rejected")]
    third = plain_logps(model, row, "calibration") if "calibration_ids" in row[0] else None
    by_hand(*now, third, frozen["chosen"][most], frozen["rejected"][most], lengths).sum().backward()
    rate = 1e-3 / max(map(abs, found.changes))
    torch.optim.SGD(model.parameters(), lr=rate).step()
    moved = [float(plain_logps(model, row, b).detach() - start[b][most]) for b in ("chosen", "rejected")]
    assert moved == pytest.approx([rate * change for change in found.changes], rel=0, abs=2e-6)
    past = "past" in name
    assert (found.weight_chosen < 0) == (found.weight_rejected < 0) == past
    assert (moved[0] - moved[1] < 0) == past or name.startswith("rpo")


def test_every_offline_objective_can_be_probed(tiny, tmp_path):
    """With its own columns; a pair has a verdict, and each weight moves what it says."""
    data = preferences(4)
    columns = {"calibration": [" dull ."] * 4}
    for name, values in {"reward": (2.0, 1.0), "preference": (0.9, 0.2), "log_odds": (1.0, -1.0)}.items():
        columns |= {f"{name}_{b}": [value] * 4 for b, value in zip(("chosen", "rejected"), values, strict=True)}
    for column, values in columns.items():
        data = data.add_column(column, values)
    for card in list_objectives():
        if card.batch != "pairs":
            continue
        trainer = trainer_for(tiny, tmp_path / card.name, card.name, train_dataset=data)
        probe = GradientProbe(trainer, every=1, pairs=2)
        first, again = probe.measure(), probe.measure()
        assert torch.equal(first, again) and first.shape == (2, 9), card.name
        assert bool((first[:, 5:7].abs().sum(1) > 0).all()), card.name


@pytest.mark.parametrize("more", [{}, {"peft_config": LORA}], ids=["full", "lora"])
def test_last_layer_is_that_slice_of_all(tiny, tmp_path, more):
    trainer = trainer_for(tiny, tmp_path, **more)
    if more:
        for name, parameter in trainer.model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.1) if "lora_B" in name else None  # at 0 the gradients of A vanish
    rows = GradientProbe(trainer, every=1, pairs=1).inputs[0]
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    block = [i for i, name in enumerate(names) if ".layers.1." in name]  # the second of two
    assert 0 < len(block) < len(names) and not any(".layers.2." in name for name in names)
    found = {which: ResponseGradients(trainer, which, "test") for which in ("last_layer", "all")}
    slices = []
    for row in (0, 1):
        (logp, last), (same, everything) = found["last_layer"](rows, row), found["all"](rows, row)
        assert logp == same and len(last) == len(block)
        for mine, i in zip(last, block, strict=True):
            assert float(mine.abs().max()) > 0
            torch.testing.assert_close(mine, everything[i])
        slices.append(torch.cat([everything[i].flatten().double() for i in block]))
    w, r = slices
    table = GradientProbe(trainer, every=1, pairs=1, parameters="last_layer").measure()
    expected = [float(w @ r), float(w @ w), float(r @ r)]
    assert table[0, 2:5].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def measured(trainer, **more) -> torch.Tensor:
    return GradientProbe(trainer, every=1, parameters="all", **more).measure()


def test_layouts_and_checkpointing_give_the_same_gradients(tiny, tmp_path):
    expected = measured(trainer_for(tiny, tmp_path))
    args = config(tmp_path, gradient_checkpointing=True)
    torch.testing.assert_close(measured(trainer_for(tiny, tmp_path, args=args)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(measured(trainer_for(tiny, tmp_path, layout="paired")), expected, rtol=0, atol=0)
    held_out = preferences(40).select(range(36, 40))
    other = measured(trainer_for(tiny, tmp_path, eval_dataset=held_out), pairs=9)
    assert other.shape == (4, 9) and not torch.equal(other, expected)  # the held-out pairs, of which there are 4


def test_with_lora_gradients_are_of_the_adapters(tiny, tmp_path):
    trainer = trainer_for(tiny, tmp_path, peft_config=LORA)
    everything = ResponseGradients(trainer, "all", "test").trained()
    last = ResponseGradients(trainer, "last_layer", "test").trained()
    assert len(everything) == 2 * len(last) == 8  # two layers, q and v, A and B
    assert measured(trainer)[:, 3:5].min() > 0
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
    words = [word.replace(" ", "_") for word in VERDICTS]
    assert all(sum(line[f"entanglement/{word}"] for word in words) == 3 for line in lines)
    # At the start dpo pushes with beta/2 = 0.05 whatever the pair.
    assert rows[0]["weight_chosen"] == rows[0]["weight_rejected"] == pytest.approx([0.05] * 3)
    found = Entanglement(rows[0]["inner"][1], rows[0]["norm_chosen"][1] ** 2, rows[0]["norm_rejected"][1] ** 2)
    assert rows[0]["change_chosen"][1] == pytest.approx(0.05 * found.changes[0], rel=1e-3)
    assert "entanglement/moved_chosen" not in lines[0]
    moved = sum(now - then for now, then in zip(rows[1]["logp_chosen"], rows[0]["logp_chosen"], strict=True)) / 3
    assert lines[1]["entanglement/moved_chosen"] == pytest.approx(moved)
    again, resumed = run("run", str(tmp_path / "run" / "checkpoint-3"))
    assert again == rows  # the line of step 4 was removed, and is the same
    assert resumed[-1] == lines[-1]


def test_foretold_is_the_share_of_pairs_that_moved_as_the_verdict_said():
    def row(verdicts, chosen, rejected):
        flat = {key: [0.0] * len(verdicts) for key in MEANS}
        return flat | {"verdict": verdicts, "logp_chosen": chosen, "logp_rejected": rejected}

    before = row(["both fall", "parted", "both rise"], [-5.0, -5.0, -5.0], [-9.0, -9.0, -9.0])
    found = summary(row(["parted"] * 3, [-6.0, -4.0, -4.0], [-10.0, -8.0, -8.5]), before)
    assert found["entanglement/foretold"] == pytest.approx(2 / 3)  # the second pair's rejected rose
    assert found["entanglement/moved_chosen"] == pytest.approx(1 / 3)
    assert found["entanglement/parted"] == 3
    before = row(["pulled back", "unmoved", "unmoved"], [-5.0] * 3, [-9.0] * 3)
    found = summary(row(["unmoved"] * 3, [-6.0, -5.0, -5.0], [-8.0, -9.0, -8.0]), before)
    assert found["entanglement/foretold"] == pytest.approx(2 / 3)  # the third pair's rejected rose
    assert found["entanglement/unmoved"] == 3 and found["entanglement/pulled_back"] == 0
    said = in_words(row(["parted", "pulled back", "parted"], [0.0] * 3, [0.0] * 3) | {"parameters": "all"})
    assert said == "gradients of 3 probe pairs (all trained parameters): 2 parted, 1 pulled back; mean cosine 0.00"


def test_a_run_stopped_by_the_step_zero_check_leaves_no_line(tiny, tmp_path):
    other = load_model(tiny)
    with torch.no_grad():
        other.lm_head.weight *= 1.2
    trainer = trainer_for(tiny, tmp_path, ref_model=other, start_is_reference=True)
    trainer.add_callback(GradientProbe(trainer, every=2))
    with pytest.raises(UserError, match="step-0 check"):
        trainer.train()
    assert not (tmp_path / FILE).exists() and trainer.state.log_history == []
