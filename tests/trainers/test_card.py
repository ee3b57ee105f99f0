"""The card beside every saved model: our own, true, readable by the hub, and silent about this machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from peft import PromptTuningConfig
from trl import RewardConfig, SFTConfig

from alignment.errors import UserError
from alignment.files import write_json, write_json_lines
from alignment.models import load_model, load_tokenizer
from alignment.models.card import Card, measured, refresh
from alignment.models.public_names import hub_base, public_name, public_text, run_name
from alignment.models.reward_model import Facts, load_reward_model, settle_padding
from alignment.pipeline.ledger import digest
from alignment.recipes import load_recipe
from alignment.rewards import get_reward
from alignment.rewards.losses import RewardLoss
from alignment.runs.preferences import train
from alignment.trainers.reward_model import RewardModelTrainer
from alignment.trainers.supervised import SupervisedTrainer
from evaluation.plans import plan_of_run
from evaluation.report import report_content
from tests.trainers.building import LORA, arguments, config, preferences, trainer_for
from tests.trainers.building_online import Kindness, online

SAVING = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
SAID_BY_OTHERS = ("None", "trl.", "@article", "@software", "Cite", "More Information Needed", "placeholder")


def offline(tiny: Path, folder: Path):
    return trainer_for(tiny, folder, "ipo", args=config(folder, **SAVING), peft_config=LORA)


def on_policy(tiny: Path, folder: Path):
    return online(tiny, folder, "p3o", args=SAVING, reward=Kindness())


def supervised(tiny: Path, folder: Path):
    tokenizer = load_tokenizer(str(tiny))
    ids = tokenizer("my dog is warm .").input_ids
    return SupervisedTrainer(
        model=load_model(str(tiny)),
        args=SFTConfig(**arguments(folder, **SAVING), dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_list([{"input_ids": ids, "labels": ids}] * 8),
        processing_class=tokenizer,
    )


def scoring(tiny: Path, folder: Path):
    tokenizer = load_tokenizer(str(tiny))
    model = load_reward_model(str(tiny), outputs=1, fresh_head=True)
    settle_padding(model, tokenizer, None)
    ids = {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}
    return RewardModelTrainer(
        model,
        Facts("scalar", 1, False, 16),
        RewardLoss(kind="bradley_terry"),
        args=RewardConfig(**arguments(folder, **SAVING), max_length=16),
        train_dataset=Dataset.from_list([ids] * 8),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize(
    ("build", "tags", "library"),
    [
        (offline, ["alignment", "ipo", "arxiv:2310.12036"], "peft"),
        (on_policy, ["alignment", "p3o", "arxiv:2310.00212"], "transformers"),
        (supervised, ["alignment", "sft"], "transformers"),
        (scoring, ["alignment", "reward-model"], "transformers"),
    ],
)
def test_every_trainer_writes_our_card_wherever_it_saves(tiny, tmp_path, build, tags, library):
    trainer = build(tiny, tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    folders = [tmp_path / "run", tmp_path / "run" / "checkpoint-1", tmp_path / "saved"]
    for text in ((folder / "README.md").read_text() for folder in folders):
        card = ModelCard(text, ignore_metadata_errors=False)
        assert card.data.tags == tags and card.data.library_name == library
        assert "base_model" not in card.data.to_dict()  # a folder of this machine is no model of the hub
        assert f"| Base model | {tiny.name} |" in text and "Not evaluated." in text
        assert str(tiny.parent) not in text and str(tmp_path) not in text
        assert not [word for word in SAID_BY_OTHERS if word in text]


def run_from_recipe(tiny: Path, folder: Path, *more: str) -> Path:
    rows = preferences(12).to_list()
    write_json_lines(folder / "pairs.jsonl", [*rows, {"prompt": "no answers"}])
    overrides = [
        *(f"model.name_or_path={tiny}", f"data.train={folder / 'pairs.jsonl'}", "training.max_steps=1"),
        *("training.global_batch_size=4", "training.use_cpu=true", f"training.output_dir={folder / 'run'}"),
        *("data.overlap=allow", "data.sample=null", "objective.name=rpo", *more),
    ]
    return train(load_recipe("recipes/quickstart/dpo.yaml", overrides))


def test_a_run_s_card_has_its_start_its_rows_and_later_its_win_rate(tiny, tmp_path):
    run = run_from_recipe(tiny, tmp_path)
    text = (run / "final" / "README.md").read_text()
    weights = hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest()
    assert f"| SHA-256 of {tiny.name} | {weights} |" in text
    assert "pairs.jsonl (train): 12 of 13 rows used; rejected: 1 missing_field" in text
    assert "rpo" in text and "[arXiv:2405.16436](https://arxiv.org/abs/2405.16436)" in text and "| steps | 1 |" in text
    assert str(tmp_path) not in text and str(tiny.parent) not in text and "Not evaluated." in text
    write_json(run / "win_rate.json", {"summary": [f"Win rate 51.0 % against {tiny}"]})
    refresh(run)
    for folder in (run, run / "final"):
        card = (folder / "README.md").read_text()
        assert f"- Win rate 51.0 % against {tiny.name}\n" in card and "Not evaluated" not in card
    # Weights that are saved later were not those that were measured.
    later = (run / "final" / "model.safetensors").stat().st_mtime + 5
    os.utime(run / "final" / "model.safetensors", (later, later))
    assert measured(run) == []


def test_a_run_keeps_its_prompts_and_later_prompts_are_compared_with_them(tiny, tmp_path):
    run = run_from_recipe(tiny, tmp_path)
    asked = [row["prompt"] for row in preferences(12)]
    hashes = {hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in asked}
    assert (run / "training_prompts.txt").read_text().split() == sorted(hashes)
    for name, prompts in (("new", ["a question"]), ("shared", ["a question", f"  {asked[3]} "])):
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts))
    judge = get_reward("length")
    notes = plan_of_run(run, judge=judge, prompts=tmp_path / "new.txt").notes
    assert notes["overlap_note"] == f"none of these prompts is among the {len(hashes)} that this run was trained on"
    shared = plan_of_run(run, judge=judge, prompts=tmp_path / "shared.txt").notes["overlap_note"]
    assert shared == "1 of these 2 prompts were trained on (data.overlap: allow)"
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["recipe"]["data"]["overlap"] = "refuse"
    write_json(run / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"shared.txt:2: prompt .* was trained on; 1 of 2 evaluation prompts were"):
        plan_of_run(run, judge=judge, prompts=tmp_path / "shared.txt")


def test_a_card_that_somebody_has_written_stays(tiny, tmp_path):
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    write_json(run / "manifest.json", {"recipe": {"model": {"name_or_path": "org/base"}}})
    (run / "final" / "README.md").write_text("my own words")
    refresh(run)
    assert (run / "final" / "README.md").read_text() == "my own words"
    assert "org/base" in (run / "README.md").read_text()


def manifest_of(name: str, **more) -> dict:
    return {"recipe": {"model": {"name_or_path": name}, "objective": {"name": "dpo", "beta": 0.1}, **more}}


def test_the_front_matter_is_what_the_hub_takes(tmp_path):
    data = {"train": [{"name": "org/pairs"}, {"name": str(tmp_path / "own.jsonl")}, {"name": "gone/own.jsonl"}]}
    adapter = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "org/base"}
    text = Card("x", manifest_of("org/base", data=data), adapter=adapter).text()
    head = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    assert head["base_model"] == "org/base" and head["base_model_relation"] == "adapter"
    assert head["datasets"] == ["org/pairs"] and "license" not in head
    for name in (head["base_model"], *head["datasets"]):
        validate_repo_id(name)
    merged = ModelCard(Card("x", manifest_of("org/base"), adapter=adapter, merged=True).text()).data.to_dict()
    assert merged["base_model_relation"] == "finetune" and merged["library_name"] == "transformers"


def test_the_base_of_a_chain_of_runs_is_its_first_model_and_its_licence(tmp_path):
    first, second = tmp_path / "sft", tmp_path / "dpo"
    for run, start in ((first, "org/base"), (second, str(first / "final"))):
        (run / "final").mkdir(parents=True)
        write_json(run / "manifest.json", manifest_of(start))
    (first / "final" / "README.md").write_text("---\nlicense: apache-2.0\n---\nwords")
    assert hub_base(str(second / "final")) == "org/base" and public_name(str(second / "final")) == "dpo (final)"
    refresh(second)
    head = yaml.safe_load((second / "README.md").read_text().split("---")[1])
    assert head["base_model"] == "org/base" and head["license"] == "apache-2.0"


def test_adapters_are_called_what_they_are_and_starts_have_both_names(tmp_path):
    start = {"name_or_path": "org/base", "adapter": str(tmp_path / "sft-lora")}
    (tmp_path / "sft-lora").mkdir()
    adapter = json.loads(json.dumps(PromptTuningConfig(num_virtual_tokens=4).to_dict(), default=str))
    text = Card("x", {"recipe": {"model": start, "objective": {"name": "dpo"}}}, adapter=adapter).text()
    assert "A PROMPT_TUNING adapter of org/base, trained with the objective `dpo`" in text
    assert "training started from org/base + sft-lora" in text and "num_virtual_tokens 4" in text


def test_a_start_that_is_an_adapter_is_base_and_adapter_in_card_report_and_win_rate(tmp_path):
    lora = tmp_path / "sft-lora"
    lora.mkdir()
    write_json(lora / "adapter_config.json", {"base_model_name_or_path": "org/base", "peft_type": "LORA", "r": 4})
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    (tmp_path / "new.txt").write_text("a question")
    for start in ({"name_or_path": str(lora)}, {"name_or_path": "org/base", "adapter": str(lora)}):
        write_json(run / "manifest.json", {"recipe": {"model": start, "objective": {"name": "dpo", "beta": 0.1}}})
        plan = plan_of_run(run, judge=get_reward("length"), prompts=tmp_path / "new.txt")
        assert plan.baseline.name == f"org/base + {lora}" == report_content(run)["model_name"]
        refresh(run)
        text = (run / "README.md").read_text()
        assert "training started from org/base + sft-lora" in text
        assert "| Base model | org/base |\n" in text and "| Adapter at the start | sft-lora |\n" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("judge table=/home/me/t.json, again", "judge table=t.json, again"),
        ("https://me:word@host/v1 and hf_abcdefghijk", "https://host/v1 and [hidden]"),
        ("key sk-proj-0123456789", "key [hidden]"),
        ("org/base, 1/2 and a/b ratios", "org/base, 1/2 and a/b ratios"),
        ("~/models/x and C:/Users/me/x", "x and x"),
    ],
)
def test_no_folder_and_no_secret_is_shown(text, shown):
    assert public_text(text) == shown


def test_an_iteration_is_called_by_its_run_and_a_rewritten_card_changes_no_stage(tmp_path):
    stage = tmp_path / "inpo" / "iteration-2" / "train"
    (stage / "final").mkdir(parents=True)
    assert run_name(stage) == run_name(stage.parent / "unfinished" / "train") == "inpo, iteration 2"
    (stage / "metrics.jsonl").write_text("{}\n")
    (stage / "final" / "model.safetensors").write_text("weights")
    before = digest(stage)
    (stage / "final" / "README.md").write_text("a card")
    assert digest(stage) == before
    (stage / "final" / "model.safetensors").write_text("others")
    assert digest(stage) != before
