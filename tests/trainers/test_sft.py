"""Supervised fine-tuning: which tokens are learned, that learning happens, and that a run is a run like any other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from alignment.cli import app
from alignment.data.preferences import read_rows
from alignment.data.supervised import IGNORED, marking_template, prepare_supervised
from alignment.errors import UserError
from alignment.files import write_json_lines
from alignment.models import load_model, load_tokenizer
from alignment.recipes import RecipeError, load_any, load_recipe, load_sft_recipe
from alignment.recipes.rows import SourceSection
from alignment.recipes.supervised import SFT_PASSED_THROUGH, SFT_REFUSED, SftTrainingSection
from alignment.runs.program import main, main_sft
from alignment.runs.supervised import train
from tests import tiny_lm

QUICK = "recipes/quickstart/sft.yaml"
USER, ASSISTANT = ({"role": role} for role in ("user", "assistant"))
# The tiny model's template, saying what the assistant's own words are: content and end.
MARKED = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


def prepared(tmp_path: Path, tokenizer, rows: list[dict], **more):
    write_json_lines(tmp_path / "rows.jsonl", rows)
    source = SourceSection(name=str(tmp_path / "rows.jsonl"), **more.pop("source", {}))
    return prepare_supervised([source], tokenizer, **{"max_length": 64, "role": "train"} | more)


def learned(tokenizer, row: dict) -> tuple[str, str]:
    """(all text of a row, the text that is learned): every learned label is its own token."""
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    assert all(label in (IGNORED, token) for token, label in pairs)
    return tokenizer.decode(row["input_ids"]), tokenizer.decode([i for i, label in pairs if label != IGNORED])


def said(role: dict, content: str) -> dict:
    return role | {"content": content}


CHAT = "<|start|>user\nmy dog is<|end|>\n<|start|>assistant\nwarm .<|end|>"
TURNS = [said(USER, "my dog is"), said(ASSISTANT, "warm ."), said(USER, "our cat is"), said(ASSISTANT, "nice .")]
TWO = CHAT + "\n<|start|>user\nour cat is<|end|>\n<|start|>assistant\nnice .<|end|>"


SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in TURNS]
SYSTEM = "<|start|>system\nmy dog is<|end|>\n<|start|>assistant\nwarm .<|end|>"
ASKED = "<|start|>user\nmy dog\n\nis<|end|>\n<|start|>assistant\nwarm .<|end|>"
PAIR = {"response1": "warm .", "response2": "cold ."}


@pytest.mark.parametrize(
    ("row", "whole", "own"),
    [
        ({"prompt": "my dog is", "completion": " warm ."}, "my dog is warm .<|end|>", " warm .<|end|>"),
        ({"prompt": "my dog is", "completion": " warm .<|end|>"}, "my dog is warm .<|end|>", " warm .<|end|>"),
        (
            {"prompt": "my dog is", "chosen": " warm .", "rejected": " cold ."},
            "my dog is warm .<|end|>",
            " warm .<|end|>",
        ),
        ({"prompt": [TURNS[0]], "completion": [TURNS[1]]}, CHAT, "warm .<|end|>"),
        ({"chosen": TURNS[:2], "rejected": [TURNS[0], said(ASSISTANT, "cold .")]}, CHAT, "warm .<|end|>"),
        ({"messages": TURNS[:2]}, CHAT, "warm .<|end|>"),
        ({"messages": TURNS}, TWO, "nice .<|end|>"),  # the template marks nothing: the last turn
        ({"conversations": SHAREGPT}, TWO, "nice .<|end|>"),
        ({"conversations": SHAREGPT[1:2], "system": "my dog is"}, SYSTEM, "warm .<|end|>"),
        ({"instruction": "my dog", "input": "is", "output": "warm ."}, ASKED, "warm .<|end|>"),
        ({"instruction": "my dog is", "input": "", "output": "warm .", "text": "framed"}, CHAT, "warm .<|end|>"),
        ({"prompt": "my dog is"} | PAIR | {"label": 1}, CHAT, "warm .<|end|>"),
        ({"instruction": "my dog is"} | PAIR | {"preference": "A"}, CHAT, "warm .<|end|>"),
        ({"instruction": "my dog is", "output": ["warm .", "cold ."]}, CHAT, "warm .<|end|>"),
        (
            {c: f"\n\nHuman: my dog is\n\nAssistant: {w} ." for c, w in (("chosen", "warm"), ("rejected", "cold"))},
            CHAT,
            "warm .<|end|>",
        ),
        (
            {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "cold ."}},
            CHAT,
            "warm .<|end|>",
        ),
    ],
)
def test_only_the_completion_is_learned_and_ends_once(tmp_path, tokenizer, row, whole, own):
    found = prepared(tmp_path, tokenizer, [row])
    assert learned(tokenizer, found.dataset[0]) == (whole, own) and not found.rejected


def test_columns_and_forms_are_those_of_fine_tuning(tmp_path, tokenizer):
    row = {"question": "my dog is", "answer": " warm .", "prompt": "not this"}
    columns = {"prompt": "question", "completion": "answer"}
    found = prepared(tmp_path, tokenizer, [row], source={"columns": columns})
    assert learned(tokenizer, found.dataset[0]) == ("my dog is warm .<|end|>", " warm .<|end|>")
    with pytest.raises(UserError, match=r"columns\.completion: no column 'anwser'; did you mean 'answer'"):
        prepared(tmp_path, tokenizer, [row], source={"columns": columns | {"completion": "anwser"}})
    alpaca = {"instruction": "my dog is", "output": "warm ."}
    framed = prepared(tmp_path, tokenizer, [alpaca], max_length=999, source={"chat": False, "format": "alpaca"})
    whole, own = learned(tokenizer, framed.dataset[0])
    assert own == "warm .<|end|>" and "dog is" in whole and "Response:" in whole.replace(" ", "")
    with pytest.raises(UserError, match=r"format sharegpt is not that of these rows \(instruction\): leave it out"):
        prepared(tmp_path, tokenizer, [alpaca], source={"format": "sharegpt"})
    with pytest.raises(RecipeError, match=r"columns\.completion is for supervised fine-tuning"):
        load_recipe("recipes/quickstart/dpo.yaml", ["data.sample=null", f"data.train={{name: a, columns: {columns}}}"])


def test_plain_text_is_learned_but_for_what_nothing_predicts(tmp_path, tokenizer):
    (row,) = prepared(tmp_path, tokenizer, [{"text": "my dog is warm ."}]).dataset
    ids = tokenizer("my dog is warm .<|end|>").input_ids
    assert (row["input_ids"], row["labels"]) == (ids, [IGNORED, *ids[1:]])


def test_every_turn_is_learned_where_the_template_marks_them(tmp_path, tiny):
    marking = load_tokenizer(tiny)
    marking.chat_template = MARKED
    found = prepared(tmp_path, marking, [{"messages": TURNS}])
    assert learned(marking, found.dataset[0]) == (TWO, "warm .<|end|>nice .<|end|>") and not found.notes
    last = prepared(tmp_path, marking, [{"messages": TURNS}], turns="last")
    assert learned(marking, last.dataset[0]) == (TWO, "nice .<|end|>")


def test_a_template_that_leaves_the_end_out_of_its_marks_is_not_used(tiny):
    marking = load_tokenizer(tiny)
    marking.chat_template = MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
    assert marking_template(marking) is None  # else the model would never be taught to stop
    marking.chat_template = MARKED
    assert marking_template(marking) == MARKED


def test_each_learned_turn_has_its_prompt(tmp_path, tiny, tokenizer):
    marked = load_tokenizer(tiny)
    marked.chat_template = MARKED
    first, both, text = (
        hashlib.sha256(said.encode()).hexdigest() for said in ("my dog is", "my dog is\nour cat is", "our cat is")
    )
    assert prepared(tmp_path, marked, [{"messages": TURNS}]).prompts == {first, both}
    assert prepared(tmp_path, tokenizer, [{"messages": TURNS}]).prompts == {both}  # only the last turn is learned
    assert prepared(tmp_path, tokenizer, [{"prompt": "our cat is", "completion": " warm ."}]).prompts == {text}
    assert prepared(tmp_path, tokenizer, [{"text": "our cat is warm ."}]).prompts == frozenset()


def test_a_fallback_is_said_and_token_ids_are_used_as_they_are(tmp_path, tokenizer):
    assert "only the last turn is learned" in prepared(tmp_path, tokenizer, [{"messages": TURNS}]).notes[0]
    given = {
        "prompt": "a",
        "chosen": "b",
        "rejected": "c",
        "prompt_ids": [5],
        "chosen_ids": [6, 7],
        "rejected_ids": [8],
    }
    assert prepared(tmp_path, tokenizer, [given]).dataset[0] == {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}


def test_long_rows_are_cut_and_prompts_that_leave_no_room_are_rejected(tmp_path, tokenizer):
    rows = [{"prompt": "my dog is", "completion": " warm and nice ."}]
    whole = prepared(tmp_path, tokenizer, rows).dataset[0]
    prompt = len(tokenizer("my dog is").input_ids)
    cut = prepared(tmp_path, tokenizer, rows, max_length=prompt + 1)
    assert cut.dataset[0] == {name: ids[: prompt + 1] for name, ids in whole.items()} and not cut.rejected
    none = prepared(tmp_path, tokenizer, rows, max_length=prompt)
    assert none.counts == {"prompt_too_long": 1} and len(none.dataset) == 0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "my dog is"}, "missing_field"),
        ({"prompt": "my dog is", "completion": "  "}, "empty"),
        ({"prompt": "my dog is", "completion": 3}, "not_text"),
        ({"prompt": "my dog is", "completion": " warm .<|end|> .<|end|>"}, "control_token"),
        ({"prompt": "my dog is", "completion": [TURNS[1]]}, "unknown_form"),
        ({"prompt": [TURNS[0]], "completion": TURNS[1:3]}, "different_prompts"),
        ({"prompt": "my dog is", "completion": str(TURNS[1:2])}, "unknown_form"),
    ],
)
def test_bad_rows_are_kept_apart_by_number(tmp_path, tokenizer, row, reason):
    good = {"prompt": "my dog is", "completion": " warm ."}
    found = prepared(tmp_path, tokenizer, [good, row, good])
    assert [(bad.row, bad.reason) for bad in found.rejected] == [(2, reason)] and len(found.dataset) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": TURNS[:3]}, "missing_field"),
        ({"messages": [TURNS[1]]}, "missing_field"),
        ({"messages": "my dog"}, "not_text"),
        ({"messages": [TURNS[0], said(ASSISTANT, "")]}, "empty"),
        ({"messages": [TURNS[0], {"role": [ASSISTANT], "content": "a"}]}, "not_text"),
    ],
)
def test_bad_conversations(tmp_path, tokenizer, row, reason):
    found = prepared(tmp_path, tokenizer, [{"messages": TURNS}, row])
    assert [(bad.row, bad.reason) for bad in found.rejected] == [(2, reason)]


@pytest.mark.parametrize(
    ("good", "row", "reason"),
    [
        ({"conversations": SHAREGPT}, {"conversations": None}, "missing_field"),
        ({"conversations": SHAREGPT}, {"conversations": str(SHAREGPT)}, "unknown_form"),
        ({"conversations": SHAREGPT}, {"conversations": SHAREGPT[:3]}, "missing_field"),
        ({"conversations": SHAREGPT}, {"conversations": [{"from": "narrator", "value": "a"}]}, "unknown_form"),
        ({"conversations": SHAREGPT}, {"conversations": [{"from": ["human"], "value": "a"}]}, "unknown_form"),
        ({"conversations": SHAREGPT}, {"conversations": [{"from": {"a": 1}, "value": "a"}]}, "unknown_form"),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": " "}, "empty"),
        ({"instruction": "a", "output": "b"}, {"instruction": " ", "output": "b"}, "empty"),
        ({"instruction": "a", "output": "b"}, {"instruction": "a"}, "missing_field"),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": TURNS[1:2]}, "not_text"),
    ],
)
def test_bad_rows_of_other_forms(tmp_path, tokenizer, good, row, reason):
    found = prepared(tmp_path, tokenizer, [good, good, row])
    assert [(bad.row, bad.reason) for bad in found.rejected] == [(3, reason)]


def test_a_conversation_that_the_template_refuses(tmp_path, tiny):
    marking = load_tokenizer(tiny)
    marking.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + MARKED
    )
    rows = [{"messages": TURNS}, {"messages": [{"role": "system", "content": "brief"}, *TURNS]}]
    (bad,) = prepared(tmp_path, marking, rows).rejected
    assert (bad.row, bad.reason) == (2, "unknown_form") and "no system" in bad.detail


@pytest.mark.parametrize("columns", [("question", "answer"), ("chosen", "rejected"), ("instruction", "answer")])
def test_rows_without_anything_to_learn(tmp_path, tokenizer, columns):
    accepted = "accepted: messages; prompt and completion; conversations"
    with pytest.raises(UserError, match=f"nothing to learn in columns {', '.join(columns)}; {accepted}"):
        prepared(tmp_path, tokenizer, [dict(zip(columns, "ab", strict=True))])


# --- training ---------------------------------------------------------------------------------------------------


def rows(seed: int, count: int, openings: list[str]) -> list[dict]:
    """Kind continuations only: half of what the tiny model says is harsh, so there is much to learn."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        words = " and ".join(rng.choice(tiny_lm.KIND) for _ in range(rng.randint(1, 4)))
        found.append({"prompt": openings[i % len(openings)], "completion": f" {words} ."})
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder, openings = tmp_path_factory.mktemp("sft"), tiny_lm.openings()
    for name, part in (("train", rows(0, 60, openings[:112])), ("eval", rows(1, 40, openings[112:]))):
        write_json_lines(folder / f"{name}.jsonl", part)
    return folder / "train.jsonl", folder / "eval.jsonl"


@pytest.fixture
def recipe(root, tiny, files, monkeypatch):
    """A function: the shipped recipe, with model and rows of the grammar."""
    monkeypatch.chdir(root)

    def build(run: Path, *more: str):
        given = {
            "model.name_or_path": tiny,
            "data.train": files[0],
            "data.eval": files[1],
            "training.output_dir": run,
            "training.learning_rate": "1e-3",
            "training.num_train_epochs": 2,
            "training.cpu_threads": 1,
        }
        keys = {override.partition("=")[0] for override in more}
        return load_sft_recipe(QUICK, [*(f"{k}={v}" for k, v in given.items() if k not in keys), *more])

    return build


def held_out_nll(model, tokenizer, file: Path) -> torch.Tensor:
    """Mean nats per token of each held-out completion, by plain logits."""
    found = []
    for row in read_rows(file):
        prompt, whole = (
            tokenizer(t).input_ids for t in (row["prompt"], row["prompt"] + row["completion"] + "<|end|>")
        )
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
        own = [float(logps[i - 1, whole[i]]) for i in range(len(prompt), len(whole))]
        found.append((-sum(own), len(own)))
    return torch.tensor(found, dtype=torch.float64)


def series(run: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in read_rows(run / "metrics.jsonl") if name in row]


def test_learning_lowers_the_held_out_nll_beyond_noise(recipe, tiny, tokenizer, files, tmp_path):
    run = train(recipe(tmp_path / "run", "training.eval_on_start=true"))
    before, after = (held_out_nll(load_model(f), tokenizer, files[1]) for f in (tiny, run / "final"))
    change = (before[:, 0] - after[:, 0]) / before[:, 1]
    assert float(change.mean()) > 4 * float(change.std()) / math.sqrt(len(change)) and float(change.mean()) > 0.1
    # and the logged eval_loss is the mean over all held-out tokens, to the letter
    logged = series(run, "eval_loss")
    totals = [float(n[:, 0].sum() / n[:, 1].sum()) for n in (before, after)]
    assert [logged[0], logged[-1]] == pytest.approx(totals, rel=1e-4)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["steps"] == 16 and manifest["repeated_rows"] == 4 and manifest["rows"]["train"]["used"] == 60
    assert manifest["recipe"]["sft"] == {"turns": "all"}
    assert not [p.name for p in run.iterdir() if p.name.startswith(".")]
    assert "sft" in (run / "final" / "README.md").read_text()


def test_the_loss_is_the_mean_over_the_learned_tokens_of_the_global_batch(recipe, tiny, tokenizer, files, tmp_path):
    """Whatever part of the batch is computed at a time: TRL's and transformers' classic trap."""
    plans = ("training.per_device_train_batch_size=8", "training.per_device_train_batch_size=2")
    runs = [train(recipe(tmp_path / f"run{i}", plan, "training.max_steps=3")) for i, plan in enumerate(plans)]
    assert series(runs[0]) == pytest.approx(series(runs[1]), rel=1e-4)
    whole = train(recipe(tmp_path / "all", "training.global_batch_size=60", "training.max_steps=1"))
    nll = held_out_nll(load_model(tiny), tokenizer, files[0])
    assert series(whole) == pytest.approx([float(nll[:, 0].sum() / nll[:, 1].sum())], rel=1e-4)


@pytest.mark.parametrize("lora", [[], ["lora={r: 4, target_modules: [q_proj, v_proj]}"]], ids=["full", "lora"])
def test_n_steps_resumed_for_n_are_2n(recipe, tmp_path, lora):
    settings = [*lora, "training.save_strategy=steps", "training.save_steps=4", "training.max_steps=8"]
    whole = train(recipe(tmp_path / "whole", *settings))
    part = train(recipe(tmp_path / "part", *settings))
    for late in ("checkpoint-8", "final"):
        (part / late).rename(tmp_path / f"gone-{late}")
    train(recipe(part, *settings), resume=True)
    assert series(part) == series(whole) and len(series(whole)) == 8
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (part / "final" / name).read_bytes() == (whole / "final" / name).read_bytes()
    with pytest.raises(UserError, match=r"--resume: training\.learning_rate is 0\.002 but .* began with 0\.001"):
        train(recipe(part, *settings, "training.learning_rate=2e-3"), resume=True)


def test_a_run_killed_after_its_last_checkpoint_trains_no_step_more(recipe, tmp_path):
    """transformers alone would take step 4: it looks at max_steps only after a step."""
    settings = ["training.save_strategy=steps", "training.save_steps=3", "training.max_steps=3"]
    run = train(recipe(tmp_path / "run", *settings))
    (run / "final").rename(tmp_path / "whole")
    train(recipe(run, *settings), resume=True)
    assert len(series(run)) == 3
    assert (run / "final" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_preference_training_starts_from_it(recipe, root, tmp_path, monkeypatch):
    sft = train(recipe(tmp_path / "sft", "training.max_steps=2"))
    pair = {"prompt": "my dog is", "chosen": " warm .", "rejected": " cold ."}
    write_json_lines(tmp_path / "pairs.jsonl", [pair | {"prompt": o} for o in tiny_lm.openings()[:8]])
    monkeypatch.chdir(root)
    start = ["data.sample=null", f"data.train={tmp_path / 'pairs.jsonl'}", f"model.name_or_path={sft / 'final'}"]
    main(["recipes/quickstart/dpo.yaml", *start, f"training.output_dir={tmp_path / 'dpo'}", "evaluation=null"])
    (margin,) = series(tmp_path / "dpo", "rewards/margins")
    assert margin == pytest.approx(0, abs=1e-5)  # step 0: policy and reference are what fine-tuning left


def test_the_program(recipe, root, files, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(root)
    words = [QUICK, f"model.name_or_path={tiny}", f"data.train={files[0]}", "data.eval=null", "training.cpu_threads=1"]
    run = tmp_path / "run"
    main_sft([*words, "training.max_steps=1", f"training.output_dir={run}"])
    assert (run / "report.html").is_file() and "60 of 60 rows" in capsys.readouterr().out
    asked = [" ".join(row["prompt"].split()) for row in read_rows(files[0])]
    hashes = {hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in asked}
    assert (run / "training_prompts.txt").read_text().split() == sorted(hashes)  # what win rates are kept apart from
    main_sft([*words, "training.max_steps=1", f"training.output_dir={run}"])
    assert (tmp_path / "run.1" / "final").is_dir()  # moved aside, not overwritten
    for wrong, message in (
        ("data.train=none.jsonl", "none.jsonl: no such file"),
        (f"data.eval={files[0]}", "usable row 1 is also in data.train"),
        ("model.name_or_path=./none", "no such folder"),
    ):
        key = wrong.partition("=")[0]
        rest = [w for w in words if not w.startswith(f"{key}=")]
        with pytest.raises(UserError, match=message):
            main_sft([*rest, wrong, f"training.output_dir={tmp_path / 'other'}"])
    assert not (tmp_path / "other").exists()


# --- recipes ----------------------------------------------------------------------------------------------------


def test_each_kind_of_recipe_goes_to_its_program(root, monkeypatch):
    monkeypatch.chdir(root)
    assert CliRunner().invoke(app, ["recipe", "check", QUICK]).stdout == f"ok: {QUICK}\n"
    assert "training.learning_rate" in CliRunner().invoke(app, ["recipe", "explain", QUICK]).stdout
    with pytest.raises(RecipeError, match=r"sft\.yaml:\d+: sft: .*python scripts/sft\.py"):
        load_recipe(QUICK)
    with pytest.raises(RecipeError, match=r"dpo\.yaml:\d+: objective: .*scripts/train\.py"):
        load_sft_recipe("recipes/quickstart/dpo.yaml")


def problems(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "r.yaml"
    file.write_text(f"sft:\nmodel: {{name_or_path: a/b}}\ndata: {{train: x.jsonl}}\ntraining:\n  {text}\n")
    try:
        load_any(file)
    except RecipeError as error:
        return [str(problem).removeprefix(f"{file}:") for problem in error.problems]
    return []


def test_recipes_are_strict(tmp_path):
    batch = "global_batch_size: 8"
    assert problems(tmp_path, batch) == []
    assert problems(tmp_path, "seed: 1") == [
        "4: training.global_batch_size: required key is missing: "
        + ("Rows per optimiser step over all processes; accumulation is derived from it")
    ]
    found = problems(tmp_path, f"{batch}\n  learning_rat: 1.0\n  beta: 0.1\n  packing: true\nobjective: {{name: dpo}}")
    assert found[0] == "6: training.learning_rat: unknown key; did you mean 'learning_rate'?"
    assert found[1].startswith("7: training.beta: not accepted: belongs to preference training")
    assert found[2].startswith("8: training.packing: not accepted: every row stands alone")
    assert found[3].startswith("9: objective: unknown key")


def test_every_field_of_trls_sft_config_is_listed_once():
    from trl import SFTConfig

    names = {field.name for field in dataclasses.fields(SFTConfig)}
    own = set(SftTrainingSection.model_fields) - set(SftTrainingSection.ours)
    assert not own & set(SFT_PASSED_THROUGH) and not (own | set(SFT_PASSED_THROUGH)) & set(SFT_REFUSED)
    assert own | set(SFT_PASSED_THROUGH) <= names
    assert names <= own | set(SFT_PASSED_THROUGH) | set(SFT_REFUSED)
    defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    for name, field in SftTrainingSection.model_fields.items():
        if "Default: TRL 1.16" in (field.description or ""):
            assert field.default == defaults[name], name
