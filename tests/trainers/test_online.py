"""The on-policy trainer in one process: what it samples, scores, learns from and restores. Launch modes: e2e."""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed as transformers_deepspeed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import RLOOConfig, RLOOTrainer
from trl.models.utils import unwrap_model_for_generation

from alignment.errors import UserError
from alignment.files import read_json_object
from alignment.models import load_model, load_tokenizer
from alignment.objectives import get_objective
from alignment.trainers import chains, drawing, judging
from alignment.trainers.drawing import GeometricMixture, Sampler
from alignment.trainers.online import OnlinePreferenceTrainer, Rollouts
from alignment.trainers.rollout import PromptOrder, Record, Replay, append_rollout
from alignment.trainers.scoring import branch_sums, branch_tokens, build_rows, forward_rows, repaired
from tests import tiny_lm
from tests.trainers.building import LORA, logged
from tests.trainers.test_scoring import make, pairs, plain

OPENINGS = tiny_lm.openings()[:8]
KIND = set(tiny_lm.KIND)


class Kindness:
    """Kind words of a response; NaN for the prompts in `silent`."""

    name = "kindness"

    def __init__(self, *silent: str):
        self.silent = silent

    def score(self, prompts, responses):
        return [
            math.nan if prompt in self.silent else float(len([w for w in response.split() if w in KIND]))
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def describe(self):
        return "kind words"


class Length(Kindness):
    """Characters of a response, in tens."""

    name = "length in tens"

    def score(self, prompts, responses):
        told = super().score(prompts, responses)
        return [len(said) / 10 + 0 * kind for said, kind in zip(responses, told, strict=True)]


class Preference:
    """A logistic preference for kind words."""

    name = "preference"

    def probability(self, prompts, first, second):
        one, two = (Kindness().score(prompts, side) for side in (first, second))
        return [1 / (1 + math.exp(b - a)) for a, b in zip(one, two, strict=True)]

    def describe(self):
        return "kind words, compared"


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return load_tokenizer(str(tiny))


def settings(folder: Path, **more: Any) -> RLOOConfig:
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_generations": 2,
        "max_completion_length": 8,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    } | more
    return RLOOConfig(**given, generation_batch_size=2 * given["per_device_train_batch_size"])


def online(
    tiny: Path, folder: Path, objective: str, how: dict[str, Any] | None = None, given: Any = None, **more: Any
) -> OnlinePreferenceTrainer:
    """A trainer on the tiny model; `how` makes `Rollouts`, `given` the objective, `args` the arguments."""
    kind = more.pop("kind", OnlinePreferenceTrainer)
    tokenizer, args = load_tokenizer(str(tiny)), more.pop("args", {})
    rows = more.pop("rows", None) or [{"prompt": opening} for opening in OPENINGS]
    rows = [row | {"prompt_ids": tokenizer(row["prompt"]).input_ids} for row in rows]
    model = more.pop("model", None)
    model = load_model(str(tiny)) if model is None else model
    folder.mkdir(exist_ok=True)
    how = {"per_rollout": 4} | (how or {})
    built = get_objective(objective, **(given or {}))
    return kind(model, built, settings(folder, **args), Dataset.from_list(rows), tokenizer, Rollouts(**how), **more)


def scrambled(tiny: Path, size: float = 0.1):
    """The tiny model with noise on its weights: it babbles."""
    model, generator = load_model(str(tiny)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def token_logps(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log π of every token of a response: one unpadded row, differentiable, in float64 from the logits on."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
    steps = range(len(prompt), len(prompt) + len(response))
    text = prompt + response
    return torch.stack([logits[t - 1, text[t]] - torch.logsumexp(logits[t - 1], 0) for t in steps])


# --- recorded samples ---------------------------------------------------------------------------------------------


def says(tokenizer, row: int, texts: list[str], opponent: str | None = None) -> Record:
    """A recorded prompt: these texts as token ids, each with its end token."""

    def ids(text: str) -> list[int]:
        return [*tokenizer(text).input_ids, tokenizer.eos_token_id]

    prompt = tokenizer.decode(tokenizer(OPENINGS[row]).input_ids)
    record = Record(row, [ids(t) for t in texts], texts, [True] * len(texts), prompt)
    if opponent is not None:
        record.opponent, record.opponent_text = ids(opponent), opponent
    return record


def text(seed: int) -> str:
    """A continuation of the grammar."""
    words = [*tiny_lm.KIND, *tiny_lm.HARSH]
    return " " + " and ".join(words[(seed * 7 + j * 3) % 10] for j in range(1 + seed % 3)) + " ."


def record(tokenizer, file: Path, rollouts: int, phases: dict[int, int], per_rollout: int = 4) -> Path:
    """A file of samples for `rollouts` rollouts; phase → which texts (the same number, the same texts)."""
    order = PromptOrder(len(OPENINGS), per_rollout, per_rollout, 1, 42)
    for rollout in range(rollouts):
        for phase, which in phases.items():
            seeds = [1000 * which + 31 * rollout + 5 * i for i in range(per_rollout)]
            rows = order.rows(rollout)
            told = [
                says(tokenizer, row, [text(s), text(s + 1)], text(s + 2)) for row, s in zip(rows, seeds, strict=True)
            ]
            append_rollout(file, rollout, phase, told)
    return file


# --- EGPO ---------------------------------------------------------------------------------------------------------


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


# --- what is learned from ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", [0, 1, 3])
@pytest.mark.parametrize("version", ["unclipped", "v1", "v2"])
def test_first_step_of_p3o_is_its_gradient_over_prompts_that_have_a_score(tiny, tokenizer, tmp_path, version, silent):
    """One step of SGD moves the weights by rate * mean of (r1 - r2) grad(s1 - s2)/2 over the prompts that could be
    scored, although two passes hold unequal numbers of them."""
    rows = PromptOrder(len(OPENINGS), 4, 4, 1, 42).rows(0)
    unscored = [OPENINGS[row] for row in rows[:silent]]
    args = {
        "optim": "sgd",
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    trainer = online(
        tiny, tmp_path, "p3o", given={"version": version, "beta": 0.3}, reward=Length(*unscored), args=args
    )
    trainer.train()
    assert logged(trainer, "skipped/unscored") == [silent / 4]
    found = samples(tmp_path)
    assert [bool(row["skipped"]) for row in found] == [row["row"] in rows[:silent] for row in found]
    model, terms = AutoModelForCausalLM.from_pretrained(tiny), []
    for row in found[silent:]:
        prompt = tokenizer(OPENINGS[row["row"]]).input_ids
        s1, s2 = (token_logps(model, prompt, ids).sum() for ids in row["responses"])
        r1, r2 = (len(said) / 10 for said in row["texts"])
        terms.append((r1 - r2) * (s1 - s2) / 2)
    gradients = torch.autograd.grad(torch.stack(terms).mean(), list(model.parameters()))
    scale = max(float(g.abs().max()) for g in gradients)
    assert scale > 1e-2
    for after, before, gradient in zip(trainer.model.parameters(), model.parameters(), gradients, strict=True):
        assert float(((after - before).detach() / 1e-2 - gradient).abs().max()) < 1e-3 * scale


def test_nothing_that_can_be_judged_is_an_error(tiny, tmp_path):
    with pytest.raises(UserError, match="none of 4 prompts can be learned from .unscored."):
        online(tiny, tmp_path / "p3o", "p3o", reward=Kindness(*OPENINGS)).train()
    with pytest.raises(UserError, match="none of 4 prompts can be learned from .tie."):
        online(tiny, tmp_path / "dpo", "dpo", reward=Flat()).train()


class Flat(Kindness):
    """The same score for all, from the second call on where `once`."""

    def __init__(self, once: bool = False):
        super().__init__()
        self.once = once

    def score(self, prompts, responses):
        told, self.once = [float(len(said) if self.once else 1) for said in responses], False
        return told


def test_a_later_rollout_of_ties_changes_nothing(tiny, tmp_path):
    """A policy that has learned may tie everywhere: no error, no gradient, and the share is logged."""
    args = {"max_steps": 2, "optim": "sgd", "save_strategy": "steps", "save_steps": 1}
    trainer = online(tiny, tmp_path, "dpo", reward=Flat(once=True), args=args)
    trainer.train()
    assert logged(trainer, "skipped/tie")[0] < 1 == logged(trainer, "skipped/tie")[1]
    assert logged(trainer)[1] == logged(trainer, "grad_norm")[1] == 0 < logged(trainer, "grad_norm")[0]
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1").state_dict()
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_log_probs_of_samples_are_those_of_a_plain_forward(tiny, tokenizer, tmp_path):
    """Under the policy that drew them (of the rollout's beginning, not its end) and under the start."""
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 3e-3}
    how = {"inner_epochs": 2}
    trainer = online(tiny, tmp_path, "p3o", how, reward=Kindness(), args=args)
    trainer.train()
    start, middle = (AutoModelForCausalLM.from_pretrained(f) for f in (tiny, tmp_path / "checkpoint-2"))
    found, gaps = samples(tmp_path), []
    assert [row["rollout"] for row in found] == [0] * 4 + [1] * 4
    for row in found:
        prompt = tokenizer(OPENINGS[row["row"]]).input_ids
        for name, ids in zip(("first", "second"), row["responses"], strict=True):
            reference, policy = (
                float(token_logps(m, prompt, ids).sum()) for m in (start, middle if row["rollout"] else start)
            )
            assert row["numbers"][f"ref_{name}"] == pytest.approx(reference, abs=1e-3)
            assert row["numbers"][f"behaviour_{name}"] == pytest.approx(policy, abs=1e-3)
            gaps.append((row["rollout"], policy - reference))
        for ids, said, ended in zip(row["responses"], row["texts"], row["finished"], strict=True):
            assert ended == (ids[-1] == tokenizer.eos_token_id) and tokenizer.eos_token_id not in ids[:-1]
            assert said == tokenizer.decode(ids, skip_special_tokens=True)
    later = [gap for rollout, gap in gaps if rollout]
    assert max(map(abs, later)) > 1e-2
    assert logged(trainer, "samples/kl")[1] == pytest.approx(sum(later) / len(later), abs=1e-3)


def test_numbers_of_a_log_line_are_numbers(tiny, tmp_path):
    """One-token responses have no pairs of tokens; a missing number would end training where lines are written."""
    trainer = online(tiny, tmp_path, "p3o", reward=Kindness(), args={"max_completion_length": 1})
    trainer.train()
    assert all(len(ids) == 1 for row in samples(tmp_path) for ids in row["responses"])
    (line,) = [row for row in trainer.state.log_history if "loss" in row]
    assert all(isinstance(value, float | int) for value in line.values())


class Mute(OnlinePreferenceTrainer):
    """A back-end that gives a response without a token, as one with stop words may."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        return [[], *super()._generate_single_turn(prompt_ids, images, multimodal_fields)[1:]]


def test_an_empty_response_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="the model gave an empty response"):
        online(tiny, tmp_path, "p3o", reward=Kindness(), kind=Mute).train()


def test_another_model_is_not_taken_for_the_start(tiny, tmp_path):
    for says_so, folder in ((True, "one"), (None, "two"), (False, "three")):
        trainer = online(
            tiny,
            tmp_path / folder,
            "p3o",
            reward=Kindness(),
            ref_model=scrambled(tiny, 0.02),
            start_is_reference=says_so,
        )
        if says_so:
            with pytest.raises(UserError, match="step-0 check"):
                trainer.train()
        else:
            trainer.train()


def test_a_checkpoint_inside_a_rollout_must_hold_it(tiny, tmp_path):
    """Drawing it again, from weights that have moved on, would be another run."""
    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    how = {"per_rollout": 8}
    online(tiny, tmp_path, "p3o", how, reward=Kindness(), args=args).train()
    (tmp_path / "checkpoint-1" / "rollout.jsonl").unlink()
    with pytest.raises(UserError, match="falls inside rollout 0 and does not hold it"):
        online(tiny, tmp_path, "p3o", how, reward=Kindness(), args=args).train(str(tmp_path / "checkpoint-1"))


# --- which prompts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "batch", "per_rollout", "inner"),
    [(10, 4, 8, 2), (8, 4, 4, 1), (3, 4, 8, 3), (1, 2, 4, 1), (64, 8, 16, 4), (9, 3, 9, 1)],
)
def test_every_prompt_once_an_epoch_and_every_place_once_a_pass(prompts, batch, per_rollout, inner):
    order = PromptOrder(prompts, batch, per_rollout, inner, seed=7)
    rollouts = -(-prompts // per_rollout)
    epochs = []
    for epoch in range(3):
        visits = [row for r in range(rollouts) for row in order.rows(epoch * rollouts + r)]
        assert len(visits) == rollouts * per_rollout and set(visits) == set(range(prompts))
        assert sum(Counter(visits).values()) - prompts == order.repeated
        assert visits[:prompts] != list(range(prompts)) or prompts < 4
        assert len(set(visits[:prompts])) == prompts  # repeats come last
        epochs.append(visits[:prompts])
    assert prompts < 4 or epochs[0] != epochs[1] != epochs[2] != epochs[0]
    per_pass = per_rollout // batch
    step = 0
    for rollout in range(2 * rollouts):
        passes = []
        for _ in range(inner):
            found = [order.step(step + i) for i in range(per_pass)]
            step += per_pass
            assert {number for number, _ in found} == {rollout} and all(len(places) == batch for _, places in found)
            passes.append([place for _, places in found for place in places])
            assert sorted(passes[-1]) == list(range(per_rollout))
        assert passes[0] == list(range(per_rollout))
        assert per_rollout < 8 or len({tuple(p) for p in passes}) == inner
    assert step == 2 * order.steps_per_epoch
    assert PromptOrder(prompts, batch, per_rollout, inner, 7).rows(1) == order.rows(1)
    assert prompts < 8 or PromptOrder(prompts, batch, per_rollout, inner, 8).rows(0) != order.rows(0)


def test_trained_prompts_are_those_of_the_order(tiny, tmp_path):
    """Steps train on the places that the order says, whatever the passes they are cut into."""
    args = {"max_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    seen: list[list[int]] = []

    class Watching(OnlinePreferenceTrainer):
        def _prepare_inputs(self, generation_batch):
            seen[-1].append([r.row for r in self._micro_batches[self._micro]])
            return super()._prepare_inputs(generation_batch)

        def begin_step(self):
            seen.append([])
            super().begin_step()

    how = {"per_rollout": 8, "inner_epochs": 2}
    trainer = online(tiny, tmp_path, "p3o", how, reward=Kindness(), args=args, kind=Watching)
    trainer.train()
    rows = [row["row"] for row in samples(tmp_path)]
    assert len(seen) == 4 and all(len(step) == 4 and all(len(part) == 1 for part in step) for step in seen)
    trained = [[row for part in step for row in part] for step in seen]
    assert [*trained[0], *trained[1]] == rows and sorted([*trained[2], *trained[3]]) == sorted(rows)
    assert [*trained[2], *trained[3]] != rows


# --- replay -------------------------------------------------------------------------------------------------------


def test_samples_of_another_run_are_refused(tiny, tokenizer, tmp_path):
    def attempt(file: Path, how: dict[str, Any] | None = None, **more: Any) -> str:
        with pytest.raises(UserError) as refused:
            online(
                tiny,
                tmp_path / "run",
                more.pop("objective", "egpo"),
                {"opponent": 0.0, "replay": file} | (how or {}),
                oracle=Preference(),
                **more,
            ).train()
        return str(refused.value)

    file = record(tokenizer, tmp_path / "good.jsonl", 1, {0: 1})
    assert "has not the prompts of rollout 0" in attempt(file, args={"seed": 1})
    assert "has not the prompts of rollout 1" in attempt(file, args={"max_steps": 2})
    assert "has not the prompts of rollout 0" in attempt(file, {"look_ahead": True})  # no second phase
    assert "2 responses a prompt" in attempt(file, {"opponent": None}, objective="online_ipo2")
    assert "and the objective needs 3 and an opponent" in attempt(file, {"samples": 3})
    lines = [json.loads(line) for line in file.read_text().splitlines()]

    def written(change) -> Path:
        edited = tmp_path / "edited.jsonl"
        changed = [json.loads(json.dumps(line)) for line in lines]
        change(changed[1])
        edited.write_text("".join(json.dumps(line) + "\n" for line in changed))
        return edited

    other = "the file is of other prompts or another tokenizer"
    assert other in attempt(written(lambda row: row.update(prompt="another question")))
    assert other in attempt(written(lambda row: row["responses"].__setitem__(0, [5, 6, 7])))
    assert other in attempt(written(lambda row: row["responses"].__setitem__(1, [10**6])))
    assert other in attempt(written(lambda row: row.update(opponent=[5])))
    for change in (
        lambda row: row.pop("responses"),
        lambda row: row.update(extra=1),
        lambda row: row.update(rollout="first"),
        lambda row: row.update(spans=[[1, 2]]),
        lambda row: row["responses"].__setitem__(0, ["kind"]),
        lambda row: row["responses"].__setitem__(0, 5),
    ):
        assert "edited.jsonl:2: is no line of a rollouts.jsonl" in attempt(written(change))
    assert "a response is empty" in attempt(written(lambda row: row["responses"].__setitem__(0, [])))
    assert "a response is empty" in attempt(written(lambda row: row.update(opponent=[])))
    assert Replay(file).records(0, 0, [r["row"] for r in lines], 2, True)[0].numbers == {}


# --- drawing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("share", "absolute"), [(0.0, False), (0.3, False), (1.0, False), (0.3, True)])
def test_the_mixture_is_the_normalised_geometric_mean(tiny, tokenizer, share, cached, absolute):
    """At every token of left-padded prompts, against plain forward passes of both models without padding or cache;
    also where positions are counted from the left (gpt2), which padding would shift."""
    policy, reference = scrambled(tiny, 0.05), load_model(str(tiny))
    prompts = [tokenizer(p).input_ids for p in ("my dog", "the garden seems kind and", "book")]
    if absolute:
        policy, reference, prompts = make("gpt2"), make("gpt2"), [[5, 9], [4, 8, 15, 16, 23, 42], [7]]
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter *= 0.7
    width, pad = max(map(len, prompts)), tokenizer.pad_token_id
    torch.manual_seed(0)
    drawn = policy.generate(
        input_ids=torch.tensor([[pad] * (width - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        logits_processor=[GeometricMixture(reference, [len(p) for p in prompts], share)],
        max_new_tokens=5,
        do_sample=True,
        top_k=0,
        use_cache=cached,
        output_scores=True,
        return_dict_in_generate=True,
    )
    compared = 0
    for row, prompt in enumerate(prompts):
        for t, scores in enumerate(drawn.scores):
            before = drawn.sequences[row, width : width + t].tolist()
            if tokenizer.eos_token_id in before:
                break
            with torch.no_grad():
                both = [
                    m(input_ids=torch.tensor([prompt + before])).logits[0, -1].double() for m in (policy, reference)
                ]
            p, q = (logits.softmax(-1) for logits in both)
            mixed = p ** (1 - share) * q**share
            gap = (scores[row].double().softmax(-1) - mixed / mixed.sum()).abs().max()
            assert float(gap) < 1e-5
            assert 0 < share < 1 or float((p - q).abs().max()) > 1e-2
            compared += 1
    assert compared > 8


def per_token(model, trainer: OnlinePreferenceTrainer, drawn: list[list[list[int]]]) -> float:
    """Mean log-probability of a token of the responses."""
    ids = trainer.columns["prompt_ids"]
    with torch.no_grad():
        found = [token_logps(model, ids[i], r) for i, group in enumerate(drawn) for r in group]
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("adapter", [False, True])
def test_each_source_is_drawn_from_itself(tiny, tmp_path, adapter):
    """Where the policy babbles and the reference speaks the grammar, one sees who spoke. After each draw the trainer
    generates from the policy again."""
    grammar = load_model(str(tiny))
    if adapter:  # the policy is the base with an adapter that makes it babble; the reference the base
        trainer = online(tiny, tmp_path, "vpo", {"calibration": True}, VPO, reward=Kindness(), peft_config=LORA)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora" in name:
                    parameter.copy_(0.7 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    else:
        given = {"reward": Kindness(), "ref_model": grammar, "start_is_reference": False}
        trainer = online(tiny, tmp_path, "vpo", {"calibration": True}, VPO, model=scrambled(tiny), **given)
    trainer.model.train()
    prompts, found = trainer.columns["prompt_ids"], {}
    with drawing._seeded(trainer.accelerator.device, 3):
        for name, how in {
            "policy": {},
            "reference": {"source": "reference"},
            "no share": {"source": "mixture", "share": 0.0},
            "mixture": {"source": "mixture", "share": 1.0},
            "policy again": {},
        }.items():
            found[name] = per_token(load_model(str(tiny)), trainer, trainer._draw(prompts, 4, Sampler(), **how))
    assert min(found["reference"], found["mixture"]) > -1.5 and abs(found["reference"] - found["mixture"]) < 0.4
    assert max(found["policy"], found["no share"], found["policy again"]) < -3


VPO = {"mode": "online", "calibration": "given", "beta": 0.1, "alpha": 1e-3}


def test_calibration_responses_are_the_references(tiny, tokenizer, tmp_path):
    """Those that training uses, and what is recorded of them: ref_calibration, by a plain forward."""
    grammar = load_model(str(tiny))
    how = {"calibration": True}
    given = {"reward": Length(), "ref_model": grammar, "start_is_reference": False}
    trainer = online(tiny, tmp_path, "vpo", how, VPO, model=scrambled(tiny), args={"max_steps": 2}, **given)
    trainer.train()
    found = samples(tmp_path)
    said = [r["opponent_text"] for r in found]
    grammatical = {*tiny_lm.KIND, *tiny_lm.HARSH, "and", "."}
    assert sum(set(t.split()) <= grammatical for t in said) > 0.7 * len(said)
    assert not any(set(t.split()) <= grammatical for r in found for t in r["texts"] if len(t.split()) > 2)
    for row in found:
        prompt = tokenizer(OPENINGS[row["row"]]).input_ids
        plainly = float(token_logps(grammar, prompt, row["opponent"]).sum())
        assert row["numbers"]["ref_calibration"] == pytest.approx(plainly, abs=1e-3)


def next_token(logits: torch.Tensor, sampler: Sampler) -> torch.Tensor:
    """Probabilities by the definition of temperature, the k likeliest, and the smallest set that holds top_p."""
    found = (logits / sampler.temperature).softmax(-1)
    ordered, total, kept = found.argsort(descending=True).tolist(), 0.0, set()
    for place, token in enumerate(ordered):
        if total >= sampler.top_p or (sampler.top_k and place >= sampler.top_k):
            break
        kept.add(token)
        total += float(found[token])
    found = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(found.tolist())])
    return found / found.sum()


def test_samplers_change_the_distribution_of_y_and_leave_the_opponent_alone(tiny, tokenizer, tmp_path):
    greedy = []
    for prompt in (tokenizer(o).input_ids for o in OPENINGS[:4]):
        ids: list[int] = []
        while len(ids) < 8 and tokenizer.eos_token_id not in ids:
            with torch.no_grad():
                ids.append(int(load_model(str(tiny))(input_ids=torch.tensor([prompt + ids])).logits[0, -1].argmax()))
        greedy.append(ids)
    trainer = online(tiny, tmp_path, "egpo", {"opponent": 0.0}, oracle=Preference())
    trainer.model.train()
    prompts = trainer.columns["prompt_ids"][:4]

    before = trainer.generation_config, trainer.generation_kwargs, trainer.num_generations

    def drawn(sampler: Sampler, *seed: int, n: int = 16) -> list[list[list[int]]]:
        with trainer._seeded(*seed):
            return trainer._draw(prompts, n, sampler)

    assert [group == [ids] * 16 for group, ids in zip(drawn(Sampler(top_k=1), 0, 0), greedy, strict=True)] == [
        True
    ] * 4
    with torch.no_grad():
        logits = trainer.model(input_ids=torch.tensor([prompts[0]])).logits[0, -1].double()
    for sampler in (Sampler(), Sampler(3.0, top_k=20), Sampler(0.2), Sampler(top_p=0.4), Sampler(top_k=3)):
        expected, n = next_token(logits, sampler), 2000
        with trainer._seeded(0, 0):
            counts = Counter(ids[0] for ids in trainer._draw(prompts[:1], n, sampler)[0])
        assert set(counts) <= set(expected.nonzero().flatten().tolist())
        found = torch.tensor([counts[token] / n for token in range(len(expected))])
        off = float((found - expected).abs().sum()) / 2
        assert off < 0.06
        if not sampler.plain:  # nearer to its own distribution than to the policy's
            assert 2 * off < float((found - next_token(logits, Sampler())).abs().sum()) / 2
    assert (trainer.generation_config, trainer.generation_kwargs, trainer.num_generations) == before
    # What a stage draws depends on (rollout, phase) and is repeated; nothing else's random numbers move.
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = drawn(Sampler(), 4, 0)
    assert torch.equal(torch.rand(3), expected)
    torch.rand(7)
    assert drawn(Sampler(), 4, 0) == one
    assert drawn(Sampler(), 4, 1) != one and drawn(Sampler(), 5, 0) != one
    # In small batches, too, every prompt gets its own responses, up to its first end token.
    trainer.draw_batch = 3
    parts = drawn(Sampler(top_k=1), 0, 0, n=2)
    assert parts == [[ids] * 2 for ids in greedy]


def test_y_is_explored_and_y2_is_not(tiny, tmp_path):
    """Greedy y and y' are one text; the opponent's are as many as the policy has."""
    how = {"opponent": 0.0, "sampler": Sampler(top_k=1), "per_rollout": 8}
    args = {"max_steps": 1, "per_device_train_batch_size": 8}
    trainer = online(tiny, tmp_path, "online_ipo1", how, oracle=Preference(), args=args)
    trainer.train()
    found = samples(tmp_path)
    assert all(row["responses"][0] == row["responses"][1] for row in found)
    assert sum(row["opponent"] != row["responses"][0] for row in found) >= 5
    assert logged(trainer, "samples/identical") == [1.0]


def test_processes_draw_by_seeds_of_their_own():
    def numbers(*seed: int) -> list[float]:
        with drawing._seeded(torch.device("cpu"), *seed):
            return torch.rand(4).tolist()

    seeds = [(s, r, phase, p) for s in (0, 42) for r in range(5) for phase in (0, 1) for p in range(4)]
    assert len({tuple(numbers(*seed)) for seed in seeds}) == len(seeds)
    assert numbers(42, 3, 1, 2) == numbers(42, 3, 1, 2)


# --- judging ------------------------------------------------------------------------------------------------------


def told(*groups: tuple[str, str]) -> list[Record]:
    return [Record(i, [[1], [2]], list(texts), [True, True]) for i, texts in enumerate(groups)]


def test_labels_ties_and_what_cannot_be_judged():
    records = told((" kind", " cold"), (" cold", " kind"), (" kind", " kind"), (" warm", " kind"), (" a", " kind"))
    prompts = ["p", "p", "p", "p", "silent"]
    judging.label_pairs(records, prompts, Kindness("silent"), None)
    assert [r.skipped for r in records] == ["", "", judging.TIE, judging.TIE, judging.UNSCORED]
    assert [r.numbers["label"] for r in records[:2]] == [1.0, 0.0]
    assert [r.numbers["reward_first"] for r in records[:4]] == [1.0, 0.0, 1.0, 1.0]
    records = told((" kind", " cold"), (" cold", " cold"))
    judging.label_pairs(records, ["p", "p"], None, Preference())
    assert records[0].numbers["label"] == pytest.approx(1 / (1 + math.exp(-1)))
    assert [r.skipped for r in records] == ["", judging.TIE]


def test_label_noise_turns_labels_round_by_place():
    n = 2000

    def labels(noise: float, part: slice = slice(None), seed: int = 0) -> list[float]:
        records, places = told(*[(" kind", " cold")] * n)[part], list(range(n))[part]
        judging.label_pairs(records, ["p"] * len(records), Kindness(), None, noise, places, seed)
        assert not any(r.skipped for r in records)
        return [r.numbers["label"] for r in records]

    assert labels(0.0) == [1.0] * n and labels(1.0) == [0.0] * n
    some = labels(0.3)
    assert set(some) == {0.0, 1.0}
    assert abs(some.count(0.0) - 0.3 * n) < 5 * math.sqrt(n * 0.3 * 0.7)
    assert labels(0.3, slice(0, 700)) + labels(0.3, slice(700, n)) == some  # however processes share them
    assert labels(0.3, seed=1) != some


def test_preferences_are_against_the_opponent_and_duels_against_each_other():
    records = told((" kind warm", " cold"))
    records[0].opponent_text = " kind"
    judging.judge_samples(records, ["p"], ("preference",), None, Preference())
    judging.judge_samples(records, ["p"], ("duel",), None, Preference())
    sigmoid = [1 / (1 + math.exp(-x)) for x in (1, -1, 2)]
    names = ("preference_first", "preference_second", "preference")
    assert [records[0].numbers[n] for n in names] == pytest.approx(sigmoid)


def test_a_wrong_number_of_scores_is_said():
    class Short(Kindness):
        def score(self, prompts, responses):
            return [0.0]

    with pytest.raises(UserError, match="reward kindness: 2 responses but 1 scores"):
        judging.judge_samples(told((" a", " b")), ["p"], ("reward",), Short(), None)


def test_judges_load_whole_models_under_zero3():
    """transformers shards what is loaded while it knows of a ZeRO-3 configuration; within a judge it must not."""
    configuration = transformers_deepspeed.HfDeepSpeedConfig(
        {"zero_optimization": {"stage": 3}, "train_batch_size": 1}
    )
    try:
        assert is_deepspeed_zero3_enabled()
        with judging._unsharded():
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled()
        with pytest.raises(RuntimeError), judging._unsharded():
            raise RuntimeError
        assert is_deepspeed_zero3_enabled()
    finally:
        transformers_deepspeed.unset_hf_deepspeed_config()
        del configuration


def test_drift_of_the_calibration_responses_stops_training(tiny, tmp_path, capsys):
    """alpha so large that the optimistic term pushes the reference's responses away; the limit says how far."""
    given, args = VPO | {"alpha": 50.0}, {"max_steps": 12, "learning_rate": 1e-3}
    how = {"calibration": True}
    free = online(tiny, tmp_path / "free", "vpo", how, given, reward=Length(), args=args)
    free.train()
    drifts = logged(free, "calibration/drift")
    assert free.state.global_step == 12 and drifts[0] == pytest.approx(0, abs=1e-4) and drifts[-1] < -2
    assert "calibration responses" not in capsys.readouterr().out
    held = online(tiny, tmp_path / "held", "vpo", how | {"drift": 1.0}, given, reward=Length(), args=args)
    held.train()
    assert held.state.global_step == next(i for i, d in enumerate(drifts, start=1) if d < -1) < 12
    assert "rollout.drift 1" in capsys.readouterr().out


# --- chains of thought --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marker", [" and", "and", " ki", " kind", "nd", "d an", " .", "k"])
@pytest.mark.parametrize(
    "said", [" kind and warm .", " cold and kind and nice .", " bright and nasty and kind .", " ."]
)
@pytest.mark.parametrize("separator", ["", " ", ": "])
def test_chains_end_at_the_first_marker_and_the_answer_stands_behind_it(tokenizer, said, marker, separator):
    """Whatever tokens span marker, separator and answer: the text is chain + separator + answer, and its chain is what
    was drawn."""
    ids = [*tokenizer(said).input_ids, tokenizer.eos_token_id]
    cut = chains.cut_chain(ids, marker, tokenizer)
    if marker not in said:
        assert cut is None
        return
    chain, between = cut
    assert ids[: len(chain)] == chain
    upto = said[: said.index(marker) + len(marker)]
    assert tokenizer.decode(chain) + between == upto
    # All of the chain that was drawn is kept: one token more would pass the marker's end.
    longer = tokenizer.decode(ids[: len(chain) + 1])
    assert len(longer) > len(upto)
    tail, before = chains.forced_answer(tokenizer, between, separator, "warm .")
    assert tail[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in tail[:-1]
    assert tokenizer.decode(chain + tail[:-1]) == upto + separator + "warm ."
    scored = tokenizer.decode(tail[before:-1])
    assert scored.endswith("warm .")  # all of the answer
    assert not tokenizer.decode(tail[before + 1 : -1]).endswith("warm .")  # and nothing more than a token's share


def test_a_token_across_marker_and_answer_is_seen(tokenizer):
    assert tokenizer.tokenize(" kind") == ["Ġkind"]
    with pytest.raises(UserError, match="rollout.answer: the tokenizer joins"):
        chains.check_marker(tokenizer, " ki", "", "nd .")
    for marker, separator, answer in ((" and", " ", "kind ."), ("Answer:", " ", "46"), (" ki", " ", "nd")):
        chains.check_marker(tokenizer, marker, separator, answer)


def test_sampled_answers():
    assert chains.sampled_answer("2+2=4 Answer: 4 ", "Answer:") == "4"
    assert chains.sampled_answer("Answer: 4 Answer: 5", "Answer:") == "4 Answer: 5"
    assert chains.sampled_answer("2+2=4", "Answer:") is None


@pytest.mark.parametrize("layout", ["shared_prefix", "paired"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_token_log_probs_in_both_layouts(name, layout):
    model, (prompts, responses) = make(name), pairs(4, 3)
    rows = build_rows(prompts, responses, 0, layout)
    with torch.no_grad():
        logits = forward_rows(model, model.config, model.dtype, rows).logits
        tokens = branch_tokens(logits, rows, 3)
        assert torch.allclose(tokens.sum(-1), branch_sums(logits, rows, 3), atol=1e-4)
        apart = repaired(build_rows(prompts, responses, 0, "shared_prefix"), 3, 0)
        again = branch_tokens(forward_rows(model, model.config, model.dtype, apart).logits, apart, 3)
        assert torch.allclose(again, tokens, atol=1e-4)
        for i, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
            for j, response in enumerate(group):
                n = len(response)
                single = [float(plain(model, prompt + response[:t], response[t : t + 1])) for t in range(n)]
                assert tokens[i, j, :n].tolist() == pytest.approx(single, abs=1e-4)
                assert not tokens[i, j, n:].any()


ANSWERS = [{"prompt": o, "answer": f"{tiny_lm.KIND[i % 5]} ."} for i, o in enumerate(OPENINGS)]
CHAINS = {"samples": 3, "marker": " and", "separator": " "}
# What the three samples of each prompt say. Of the second's only one has the format, of the third's none.
TOLD = [
    [" cold and warm .", " kind and good and nice .", " dull and kind ."],
    [" kind .", " cold and warm .", " warm ."],
    [" kind .", " cold .", " warm ."],
    [" bad and bad and bad .", " nice .", " good and good ."],
]


def expected_loss(model, tokenizer, row: int, texts: list[str]) -> float:
    """Of `logprob`: -(1/n) sum over samples with a marker of (R_i - mean of the others' R) lz_i + R_i."""
    prompt, answer = tokenizer(OPENINGS[row]).input_ids, ANSWERS[row]["answer"]
    values = []
    for said in texts:
        if " and" not in said:
            continue
        chain = tokenizer(said[: said.index(" and") + 4]).input_ids
        forced = [*tokenizer(f" {answer}").input_ids, tokenizer.eos_token_id]
        logps = token_logps(model, prompt, chain + forced)
        values.append((float(logps[: len(chain)].sum()), float(logps[len(chain) :].sum())))
    if len(values) < 2:
        return 0.0
    total, n = 0.0, len(values)
    for i, (cot, reward) in enumerate(values):
        others = [r for j, (_, r) in enumerate(values) if j != i]
        total += (reward - sum(others) / len(others)) * cot + reward
    return -total / n


@pytest.mark.parametrize("layout", ["shared_prefix", "paired"])
@pytest.mark.parametrize("per_device", [4, 1])
def test_likelihood_scores_the_reference_answer_behind_each_chain(tiny, tokenizer, tmp_path, per_device, layout):
    """The loss of recorded samples by plain forward passes; samples and whole passes without a marker are left out."""
    rows = PromptOrder(len(OPENINGS), 4, 4, 1, 42).rows(0)
    file = tmp_path / "told.jsonl"
    append_rollout(file, 0, 0, [says(tokenizer, row, texts) for row, texts in zip(rows, TOLD, strict=True)])
    args = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": 4 // per_device}
    how = CHAINS | {"replay": file}

    def start():
        return scrambled(tiny, 0.1)  # after whose chains the answers differ by nats

    trainer = online(tiny, tmp_path / "run", "likelihood", how, args=args, rows=ANSWERS, layout=layout, model=start())
    trainer.train()
    model = start()
    losses = [expected_loss(model, tokenizer, row, texts) for row, texts in zip(rows, TOLD, strict=True)]
    assert losses[1] == losses[2] == 0 and losses[0] * losses[3]
    assert logged(trainer) == pytest.approx([sum(losses) / 4], rel=1e-5)
    assert logged(trainer, "samples/valid") == [6 / 12]
    assert logged(trainer, "objective/valid") == [6 / 12] and logged(trainer, "objective/skipped") == [2 / 4]
    found = samples(tmp_path / "run")
    assert [row["responses"] for row in found] == [says(tokenizer, 0, texts).responses for texts in TOLD]  # as drawn
    right = [
        float(" and" in t and t.partition(" and")[2].strip() == ANSWERS[row]["answer"])
        for row, texts in zip(rows, TOLD, strict=True)
        for t in texts
    ]
    assert [v for row in found for v in row["verified"]] == right
    # A rollouts.jsonl of this run, replayed, is the same run: forced answers are not taken for samples.
    again = online(
        tiny, tmp_path / "again", "likelihood", how | {"replay": tmp_path / "run" / "rollouts.jsonl"}, args=args,
        rows=ANSWERS, layout=layout, model=start(),
    )  # fmt: skip
    again.train()
    assert logged(again) == logged(trainer)
    assert (tmp_path / "again" / "rollouts.jsonl").read_text() == (tmp_path / "run" / "rollouts.jsonl").read_text()


def test_a_marker_that_no_sample_has_is_said(tiny, tokenizer, tmp_path):
    """In the first rollout an error, since nothing would ever be learned; later a warning, once."""
    with pytest.raises(UserError, match="rollout 0: no sample has the marker '####'"):
        online(tiny, tmp_path / "never", "likelihood", CHAINS | {"marker": "####"}, rows=ANSWERS).train()
    file, order = tmp_path / "told.jsonl", PromptOrder(len(OPENINGS), 4, 4, 1, 42)
    for rollout, texts in enumerate([TOLD[0], TOLD[2], TOLD[2]]):
        append_rollout(file, rollout, 0, [says(tokenizer, row, texts) for row in order.rows(rollout)])
    args = {"max_steps": 3, "optim": "sgd"}
    trainer = online(tiny, tmp_path / "run", "likelihood", CHAINS | {"replay": file}, args=args, rows=ANSWERS)
    with pytest.warns(UserWarning, match="rollout 1: no sample has the marker ' and'") as said:
        trainer.train()
    assert len([w for w in said if "no sample has the marker" in str(w.message)]) == 1
    assert logged(trainer)[0] > 0 and logged(trainer)[1:] == [0.0, 0.0]


def test_a_verifier_reads_the_sample_and_nothing_is_forced(tiny, tokenizer, tmp_path):
    """`base`: R is 1 where the sampled answer is the reference answer, and the whole sample is the action."""
    rows = PromptOrder(len(OPENINGS), 4, 4, 1, 42).rows(0)
    told = [[f" kind and {ANSWERS[row]['answer']}", " kind and bad .", " cold and dull ."] for row in rows]
    file = tmp_path / "told.jsonl"
    append_rollout(file, 0, 0, [says(tokenizer, row, texts) for row, texts in zip(rows, told, strict=True)])
    trainer = online(tiny, tmp_path / "run", "likelihood", CHAINS | {"replay": file}, {"reward": "base"}, rows=ANSWERS)
    trainer.train()
    model, losses = AutoModelForCausalLM.from_pretrained(tiny), []
    for row, texts in zip(rows, told, strict=True):
        prompt = tokenizer(OPENINGS[row]).input_ids
        whole = [token_logps(model, prompt, [*tokenizer(t).input_ids, tokenizer.eos_token_id]).sum() for t in texts]
        losses.append(-float(whole[0] - (whole[1] + whole[2]) / 2) / 3)  # advantages 1, -1/2, -1/2
    assert logged(trainer) == pytest.approx([sum(losses) / 4], rel=1e-3, abs=1e-4)
    assert logged(trainer, "samples/accuracy") == pytest.approx([1 / 3])


def test_chains_that_are_drawn_are_scored_where_they_end(tiny, tokenizer, tmp_path):
    """Real samples: the recorded spans cut each row into a chain up to the marker and the reference answer."""
    trainer = online(tiny, tmp_path, "likelihood", CHAINS | {"per_rollout": 4}, args={"max_steps": 2}, rows=ANSWERS)
    trainer.train()
    seen = 0
    for row in samples(tmp_path):
        for ids, said, scored, (end, first, last), valid in zip(
            row["responses"], row["texts"], row["scored"], row["spans"], row["valid"], strict=True
        ):
            assert valid == float(" and" in said)
            if not valid:
                assert scored == ids and (end, first, last) == (len(ids),) * 3
                continue
            seen += 1
            assert tokenizer.decode(scored[:end]) == said[: said.index(" and") + 4]
            assert scored[:end] == ids[:end] and last == len(scored)
            answer = tokenizer.decode(scored[first:last], skip_special_tokens=True)
            assert answer.strip() == ANSWERS[row["row"]]["answer"] and scored[-1] == tokenizer.eos_token_id
    assert seen >= 6


def test_a_marker_that_merges_with_the_answer_is_refused_before_training(tiny, tmp_path):
    with pytest.raises(UserError, match="rollout.answer: the tokenizer joins"):
        online(
            tiny, tmp_path, "likelihood", CHAINS | {"marker": " ki", "separator": ""},
            rows=[{"prompt": OPENINGS[0], "answer": "nd ."}] * 4,
        )  # fmt: skip


# --- what cannot be, and what is relied on --------------------------------------------------------------------------


def test_half_precision_with_loss_scaling_has_no_look_ahead(tiny, tmp_path, monkeypatch):
    trainer = online(tiny, tmp_path, "egpo", {"opponent": 0.0, "look_ahead": True}, oracle=Preference())
    monkeypatch.setattr(trainer.args, "fp16", True)
    with pytest.raises(UserError, match="training.fp16"):
        trainer._refuse_unfit()


def test_trl_still_has_what_on_policy_training_relies_on(tiny, tmp_path):
    """Contract with TRL 1.16's RLOOTrainer and transformers: methods by their arguments, attributes on a trainer."""
    relied_on = {
        "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields"),
        "_prepare_inputs": ("generation_batch",),
        "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
        "training_step": ("model", "inputs", "num_items_in_batch"),
        "_save_checkpoint": ("model", "trial"),
        "_get_learning_rate": (),
        "_clip_grad_norm": ("model",),
        "log": ("logs", "start_time"),
    }
    for name, arguments in relied_on.items():
        found = inspect.signature(getattr(RLOOTrainer, name)).parameters
        assert tuple(found)[1:] == arguments, f"RLOOTrainer.{name} now takes {tuple(found)}"
    # What drawing exchanges for a while is what generation reads.
    reads = inspect.getsource(RLOOTrainer._generate_single_turn)
    for name in ("model_wrapped", "generation_config", "generation_kwargs", "num_generations", "_last_loaded_step"):
        assert f"self.{name}" in reads, name
    trainer = online(tiny, tmp_path, "p3o", reward=Kindness())
    assert trainer.num_generations == 2 and trainer.eos_token_ids == [trainer.processing_class.eos_token_id]
    assert trainer.generation_config.max_new_tokens == 8 and trainer.generation_kwargs["do_sample"] is True
    assert set(trainer._metrics) == {"train", "eval"} and isinstance(trainer._metrics["train"]["any"], list)
    for column in (trainer._logs["prompt"], trainer._logs["completion"], trainer._logs["rewards"]["any"]):
        column.append("")
    assert list(inspect.signature(unwrap_model_for_generation).parameters)[:2] == ["model", "accelerator"]
    assert hasattr(transformers_deepspeed, "_hf_deepspeed_config_weak_ref")
    assert read_json_object(tiny / "config.json")["eos_token_id"] == trainer.processing_class.eos_token_id


# --- one policy samples, scores and learns -------------------------------------------------------------------------


def test_dropout_of_the_model_and_of_an_adapter_is_off(tiny, tmp_path):
    """RLOOConfig leaves it on: the samples would be one policy's and their log-probs another's."""
    model = get_peft_model(
        load_model(str(tiny)), LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    )
    trainer = online(tiny, tmp_path, "p3o", reward=Kindness(), model=model)
    assert {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    trainer.train()
    assert logged(trainer, "objective/log_ratio")[0] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(
    "shipped", [{"no_repeat_ngram_size": 1}, {"min_p": 0.9}, {"num_beams": 3}, {"min_new_tokens": 8}], ids=str
)
def test_generation_settings_that_come_with_the_model_are_not_sampled_with(tiny, tmp_path, shipped):
    """`generate` fills what TRL leaves open from the model's file."""

    def drawn(name: str, **file: Any) -> list[list[list[int]]]:
        model = load_model(str(tiny))
        model.generation_config.update(**file)
        trainer = online(tiny, tmp_path / name, "p3o", reward=Kindness(), model=model)
        trainer.train()
        assert {k: getattr(trainer.model.generation_config, k) for k in file} == file
        return [row["responses"] for row in samples(tmp_path / name)]

    assert drawn("settings", **shipped) == drawn("plain")


def test_tables_of_completions_show_each_responses_own_judgement(tiny, tmp_path):
    trainer = online(tiny, tmp_path, "p3o", reward=Kindness(), args={"log_completions": False})
    trainer.train()
    shown = dict(zip(trainer._logs["completion"], trainer._logs["rewards"]["judgement"], strict=True))
    texts = [text for row in samples(tmp_path) for text in row["texts"]]
    assert set(shown) <= set(texts) and len(set(shown.values())) > 1
    assert list(shown.values()) == Kindness().score(["" for _ in shown], list(shown))
