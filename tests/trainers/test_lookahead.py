"""EGPO's look-ahead: what it changes is put back to the bit, and the step that follows is the paper's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignment.errors import UserError
from alignment.models import load_model
from tests.trainers.building import LORA, logged
from tests.trainers.building_online import OPENINGS, Preference, online, record, samples, token_logps


def test_half_precision_with_loss_scaling_has_no_look_ahead(tiny, tmp_path, monkeypatch):
    trainer = online(tiny, tmp_path, "egpo", {"opponent": 0.0, "look_ahead": True}, oracle=Preference())
    monkeypatch.setattr(trainer.args, "fp16", True)
    with pytest.raises(UserError, match="training.fp16"):
        trainer._refuse_unfit()


@pytest.mark.parametrize(
    ("args", "adapter"),
    [
        ({"optim": "adamw_torch", "max_grad_norm": 0.5}, None),
        ({"optim": "adamw_torch", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, None),
        ({"optim": "adamw_torch", "learning_rate": 1e-2}, LORA),
        ({"optim": "adafactor"}, None),
        ({"optim": "rmsprop"}, None),
    ],
    ids=["adamw", "accumulation", "lora", "adafactor", "rmsprop"],
)
def test_what_the_look_ahead_changes_is_put_back_to_the_bit(tiny, tokenizer, tmp_path, args, adapter):
    """theta_{t+1} depends on the look-ahead through its samples alone. With those recorded, EGPO is Online IPO 1 on
    the second phase's samples: same losses, schedule and weights, whatever step was taken in between."""
    schedule = {"max_steps": 4, "lr_scheduler_type": "linear", "warmup_steps": 1} | args
    egpo = record(tokenizer, tmp_path / "egpo.jsonl", 4, {0: 1, 1: 2})
    other = record(tokenizer, tmp_path / "other.jsonl", 4, {0: 3, 1: 2})
    ipo = record(tokenizer, tmp_path / "ipo.jsonl", 4, {0: 2})
    runs = {}
    for name, objective, file, ahead in (
        ("egpo", "egpo", egpo, True),
        ("other", "egpo", other, True),
        ("ipo", "online_ipo1", ipo, False),
    ):
        torch.manual_seed(0)  # of a fresh adapter
        runs[name] = online(
            tiny,
            tmp_path / name,
            objective,
            {"opponent": 0.0, "look_ahead": ahead, "replay": file},
            oracle=Preference(),
            args=schedule,
            peft_config=adapter,
        )
        runs[name].train()
    plain_weights = runs["ipo"].model.state_dict()
    assert len({round(loss, 4) for loss in logged(runs["ipo"])}) == 4
    for name in ("egpo", "other"):
        assert logged(runs[name]) == logged(runs["ipo"])
        assert logged(runs[name], "learning_rate") == logged(runs["ipo"], "learning_rate")
        assert logged(runs[name], "grad_norm") == logged(runs["ipo"], "grad_norm")
        weights = runs[name].model.state_dict()
        assert all(torch.equal(weights[key], value) for key, value in plain_weights.items())
        moved = logged(runs[name], "look_ahead/changed")
        assert len(moved) == 4 and moved[0] == 0 and min(moved[1:]) > 0.4  # the first rate is 0; B of LoRA begins at 0


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("clip", [0.0, 5.0])
def test_the_second_rollout_is_scored_at_the_half_step(tiny, tokenizer, tmp_path, passes, clip):
    """behaviour_* of phase 1 are the half-step policy's: neither the start's nor those after the step. One step of
    SGD by hand: theta - rate * gradient of the mean of (z1 - z2 - (P1 - P2)/beta)^2."""
    file, rate, beta = record(tokenizer, tmp_path / "egpo.jsonl", 1, {0: 1, 1: 2}), 1e-3, 0.5
    args = {"optim": "sgd", "learning_rate": rate, "max_grad_norm": clip}
    args |= {"per_device_train_batch_size": 4 // passes, "gradient_accumulation_steps": passes}
    how = {"opponent": 0.0, "look_ahead": True, "replay": file}
    trainer = online(tiny, tmp_path / "run", "egpo", how, {"beta": beta}, oracle=Preference(), args=args)
    trainer.train()
    first, second = samples(tmp_path / "run")[:4], samples(tmp_path / "run")[4:]
    assert [row["phase"] for row in (*first, *second)] == [0] * 4 + [1] * 4
    by_hand = AutoModelForCausalLM.from_pretrained(tiny)
    start = [p.detach().clone() for p in by_hand.parameters()]

    def step(rows: list[dict[str, Any]]) -> None:
        losses = []
        for row in rows:
            prompt = tokenizer(OPENINGS[row["row"]]).input_ids
            s1, s2 = (token_logps(by_hand, prompt, ids).sum() for ids in row["responses"])
            p1, p2 = Preference().probability([None] * 2, row["texts"], [row["opponent_text"]] * 2)
            losses.append((s1 - s2 - (s1 - s2).detach() - (p1 - p2) / beta) ** 2)  # z = 0 at the start
        gradients = torch.autograd.grad(torch.stack(losses).mean(), list(by_hand.parameters()))
        norm = float(torch.stack([g.norm() for g in gradients]).norm())
        assert norm > 10  # so that clipping at 5 clips
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter -= rate * gradient * (clip / norm if clip else 1)

    step(first)
    for row in second:
        prompt = tokenizer(OPENINGS[row["row"]]).input_ids
        for name, ids in zip(("first", "second"), row["responses"], strict=True):
            half = float(token_logps(by_hand, prompt, ids).sum().detach())
            assert row["numbers"][f"behaviour_{name}"] == pytest.approx(half, abs=2e-4)
            assert abs(row["numbers"][f"behaviour_{name}"] - row["numbers"][f"ref_{name}"]) > 1e-3
    with torch.no_grad():
        for parameter, kept in zip(by_hand.parameters(), start, strict=True):
            parameter.copy_(kept)
    step(second)  # from the start again
    gaps = zip(trainer.model.parameters(), by_hand.parameters(), start, strict=True)
    assert all((a - b).detach().abs().max() < 1e-5 + 1e-3 * (b - s).detach().abs().max() for a, b, s in gaps)


@pytest.mark.parametrize(("dtype", "lost"), [(torch.bfloat16, True), (torch.float32, False)])
def test_a_half_step_lost_to_rounding_is_said(tiny, tmp_path, recwarn, dtype, lost):
    args = {"learning_rate": 1e-7, "max_steps": 2}
    how = {"opponent": 0.0, "look_ahead": True}
    model = load_model(str(tiny)).to(dtype)
    trainer = online(tiny, tmp_path, "egpo", how, oracle=Preference(), args=args, model=model)
    trainer.train()
    said = [str(w.message) for w in recwarn if "lost to rounding" in str(w.message)]
    assert len(said) == lost  # once, not at every step
    assert (max(logged(trainer, "look_ahead/changed")) < 0.01) == lost
