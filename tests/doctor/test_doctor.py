"""`alignment doctor` on the tiny model: step 0 for real, the parts in order, what cannot be had, exit codes."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from alignment.cli import app
from alignment.doctor import examination
from alignment.doctor.examination import Options, examine, mean_lengths
from alignment.doctor.setting import from_recipe
from alignment.doctor.start import step_zero
from alignment.errors import UserError
from alignment.models import load_model, load_tokenizer
from alignment.recipes import load_recipe
from alignment.runs.preferences import given_rows
from tests.doctor.conftest import made_up_rows


def examined(recipe, **options) -> tuple[bool, str]:
    out = io.StringIO()
    ok = examine(recipe, Options(**options), Console(file=out, width=150))
    return ok, out.getvalue()


def test_the_first_batch_starts_where_dpo_starts(recipe):
    """DPO at the reference: implicit rewards 0, loss log 2; log-probs as the bare model gives them, row by row."""
    tokenizer = load_tokenizer(recipe.model.name_or_path)
    rows = given_rows(recipe, "train", tokenizer)
    data = rows.dataset.select(range(4))  # one batch
    facts = step_zero(recipe, data, tokenizer)
    assert facts.problem is None and facts.layout == "shared_prefix" and facts.pairs == 4
    assert facts.loss == pytest.approx(math.log(2), abs=1e-6) and facts.expected == pytest.approx(
        math.log(2), abs=1e-6
    )
    assert (facts.reward_chosen, facts.reward_rejected) == pytest.approx((0, 0), abs=1e-6)
    assert facts.layout_gap is not None and facts.layout_gap < 1e-5
    model, sums, tokens = load_model(recipe.model.name_or_path), [], 0
    for row in data:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :]
        sums.append(float(logps.detach().sum()))
        tokens += len(row["chosen_ids"])
    assert facts.logp_chosen == pytest.approx(sum(sums) / 4, rel=1e-5)
    assert facts.per_token_chosen == pytest.approx(sum(sums) / tokens, rel=1e-5)


def test_another_reference_is_told_from_the_start(recipe_file, tiny, tmp_path):
    """Rewards are not 0 where the reference is another model, and the doctor says by how much."""
    other = load_model(str(tiny))
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    recipe = load_recipe(recipe_file, [f"reference.name_or_path={tmp_path / 'other'}"])
    tokenizer = load_tokenizer(recipe.model.name_or_path)
    facts = step_zero(recipe, given_rows(recipe, "train", tokenizer).dataset, tokenizer)
    assert facts.reward_chosen > 0.01 and facts.problem is None  # it is asked for: no mistake


def test_spo_starts_at_log_n_and_says_which_pairs_have_copies(recipe_file, tmp_path, monkeypatch):
    """Rows with several key phrases have three degrees for both responses; a one-word response has no copies."""
    long = {"chosen": " kind and gentle and warm and sweet .", "rejected": " cold and rude and mean and harsh ."}
    rows = [{"prompt": row["prompt"], **long} for row in made_up_rows(4)]
    rows[0] |= {"chosen": " kind .", "rejected": " rude ."}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(recipe_file, ["objective.name=spo"])
    tokenizer = load_tokenizer(recipe.model.name_or_path)
    data = given_rows(recipe, "train", tokenizer).dataset
    facts = step_zero(recipe, data, tokenizer)
    assert facts.problem is None
    assert facts.degrees == (
        "degraded copies: 12; 3 of 4 pairs have some (75%)",  # 3 pairs, 2 responses, 2 copies
        "degree loss 1.09861; at a zero head, log 3 = 1.09861",
    )
    monkeypatch.setattr(torch.nn.init, "zeros_", torch.nn.init.normal_)
    assert "the head is not zero" in str(step_zero(recipe, data, tokenizer).problem)


def test_everything_in_order_and_nothing_left_behind(recipe, tmp_path):
    ok, told = examined(recipe)
    assert ok
    places = [
        told.index(part) for part in ("Environment", "Data, as the model", "Step 0, really run", "Plan (formulas")
    ]
    assert places == sorted(places)
    for part in ("template: sha256", "step-0 check passes", "loss 0.693147", "memory per device", "a step"):
        assert part in told
    assert not (tmp_path / "run").exists()


def test_without_the_model_there_is_no_step_zero(recipe):
    ok, told = examined(recipe, with_model=False)
    assert ok and "Step 0" not in told and "memory per device" in told and "chosen (scored)" in told


def test_a_failed_check_fails(recipe, monkeypatch):
    bad = replace(examined_facts(recipe), problem="step-0 check: something is off")
    monkeypatch.setattr("alignment.doctor.start.step_zero", lambda *arguments: bad)
    ok, told = examined(recipe)
    assert not ok and "FAIL step-0 check: something is off" in told


def examined_facts(recipe):
    tokenizer = load_tokenizer(recipe.model.name_or_path)
    return step_zero(recipe, given_rows(recipe, "train", tokenizer).dataset, tokenizer)


def test_more_weights_than_memory_are_not_loaded(recipe, monkeypatch):
    monkeypatch.setattr(examination, "plan_alone", lambda found: 2.0**60)
    ok, told = examined(recipe)
    assert ok and "not run: weights and one batch take about" in told and "memory per device" in told


def test_a_hub_model_that_cannot_be_had_still_gets_a_plan(recipe_file, tiny):
    recipe = load_recipe(recipe_file, ["model.name_or_path=nobody/no-such-model"])
    ok, told = examined(recipe)
    assert ok and "not looked at, for want of the tokenizer" in told and "--config-json" in told
    ok, told = examined(recipe, config_json=tiny / "config.json")
    assert ok and "memory per device" in told and "LlamaForCausalLM: " in told


def test_the_plan_is_for_the_launch_that_is_asked_for(recipe_file, tmp_path):
    launch = tmp_path / "launch.yaml"
    launch.write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}\nnum_processes: 2\n")
    recipe = load_recipe(recipe_file)
    _, told = examined(recipe, with_model=False, accelerate_config=launch)
    assert "2 devices, ZeRO-3" in told and "pairs a pass: 2, passes a step: 1" in told
    with pytest.raises(UserError, match="cannot be split evenly over 3 processes"):
        examined(recipe, with_model=False, accelerate_config=launch, world=3)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "copy"),
        (["objective.name=simpo"], "none"),
        (["reference.precompute=true"], "precomputed"),
        (["lora.r=4"], "adapter_off"),
    ],
)
def test_the_reference_of_a_recipe(recipe_file, overrides, expected):
    setting = from_recipe(load_recipe(recipe_file, overrides))
    assert setting.reference == expected
    assert (setting.prompt, setting.responses, setting.pairs, setting.accumulation) == (32, (32, 32), 4, 1)


def test_mean_lengths_count_what_is_left_after_the_cut(recipe):
    tokenizer = load_tokenizer(recipe.model.name_or_path)
    rows = given_rows(recipe, "train", tokenizer)
    prompts = [len(row["prompt_ids"]) for row in rows.dataset]
    cut = max(prompts) + 2  # room for two tokens, and a few more where the prompt is shorter
    chosen = [min(len(row["chosen_ids"]), cut - len(row["prompt_ids"])) for row in rows.dataset]
    found = mean_lengths(rows, cut, 2)
    assert found[:2] == (math.ceil(sum(prompts) / 12), math.ceil(sum(chosen) / 12))


def test_mistakes_of_the_user_are_one_line(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    with pytest.raises(UserError, match="--row 99: there are 12 usable rows"):
        examined(recipe, row=99, with_model=False)
    with pytest.raises(UserError, match="no such file"):
        examined(recipe, accelerate_config=tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "no_such_type"},
        {"model_type": "llama", "hidden_size": "big"},
        {"model_type": "llama", "num_attention_heads": 0},
    ],
    ids=str,
)
def test_a_config_that_is_none_is_one_line(recipe_file, tmp_path, keys):
    wrong = tmp_path / "config.json"
    wrong.write_text(json.dumps(keys))
    with pytest.raises(UserError, match="config.json: ") as refused:
        examined(load_recipe(recipe_file), config_json=wrong, with_model=False)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "adapter_config.json:1: not valid JSON"),
        ('{"peft_type": "IA3", "target_modules": ["q_proj"]}', "peft_type 'IA3'"),
        ('{"peft_type": "LORA", "r": 4, "target_modules": null}', "target_modules None"),
        ('{"peft_type": "LORA", "r": "four", "target_modules": ["q_proj"]}', "r 'four'"),
    ],
)
def test_an_adapter_without_a_plan_is_one_line(recipe_file, tmp_path, text, said):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=said):
        from_recipe(load_recipe(recipe_file, [f"model.adapter={tmp_path / 'adapter'}"]))


def test_the_command_and_its_exit_codes(recipe_file, monkeypatch):
    runner = CliRunner()
    fine = runner.invoke(app, ["doctor", str(recipe_file), "--no-model"])
    assert fine.exit_code == 0 and "memory per device" in fine.stdout
    monkeypatch.setattr(examination, "examine", lambda *arguments: False)
    assert runner.invoke(app, ["doctor", str(recipe_file)]).exit_code == 1
    refused = runner.invoke(app, ["doctor", str(recipe_file), "data.train=nowhere.jsonl"])
    assert isinstance(refused.exception, UserError)


def test_the_launch_that_training_refuses_fails(recipe_file, tmp_path):
    launch = tmp_path / "launch.yaml"
    launch.write_text("distributed_type: DEEPSPEED\nnum_processes: 2\nmixed_precision: bf16\n")
    for overrides, fine in (([], False), (["training.bf16=true"], True)):
        ok, told = examined(load_recipe(recipe_file, overrides), with_model=False, accelerate_config=launch)
        assert ok is fine and ("FAIL mixed precision" not in told) is fine


def test_a_kernel_that_is_not_here_is_planned_for_another_machine(recipe_file):
    runner, words = CliRunner(), ["doctor", str(recipe_file), "model.attn_implementation=flash_attention_2"]
    assert isinstance(runner.invoke(app, words).exception, UserError)
    found = runner.invoke(app, [*words, "--no-model"])
    assert found.exit_code == 0 and "memory per device" in found.stdout and "layout paired" in found.stdout


def test_drawn_rows_are_said_to_be_drawn(recipe_file, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"{row['prompt']}\n" for row in made_up_rows()))
    sample = f"data.sample={{prompts: {tmp_path / 'prompts.txt'}}}"
    recipe = load_recipe(recipe_file, ["data.train=null", sample, "reward.name=vader"])
    _, told = examined(recipe)
    assert "pairs, drawn from the starting model just now" in told and "of each source" not in told


def test_help_needs_no_torch():
    code = "import sys, alignment.cli; sys.exit('torch' in sys.modules or 'rich.console' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.parametrize(
    ("responses", "copied", "copies"), [("both", (0, 1), 4), ("chosen", (0,), 2), ("rejected", (1,), 2)]
)
def test_the_copies_of_a_recipe_are_planned(recipe_file, responses, copied, copies):
    recipe = load_recipe(recipe_file, ["objective.name=spo", f"objective.responses={responses}"])
    setting = from_recipe(recipe)
    assert (setting.copied, setting.degrees, setting.width) == (copied, 3, 31 + 64 + copies * 32)
    _, told = examined(recipe, with_model=False)
    assert f"{copies} degraded copies" in told and "not counted" not in told


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["reference.name_or_path=other"], ("copy", "copy")),
        (["reference.name_or_path=other", "lora.r=4"], ("copy", "adapter_off")),
        (["reference.name_or_path=other", "reference.precompute=true"], ("precomputed", "precomputed")),
        ([], ("copy", "none")),
    ],
)
def test_inpo_with_another_reference_has_a_second_frozen_model(recipe_file, overrides, expected):
    setting = from_recipe(load_recipe(recipe_file, ["objective.name=inpo", *overrides]))
    assert (setting.reference, setting.previous) == expected
