"""Mistakes in on-policy training, through its program: one line, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignment.errors import run_or_exit
from alignment.runs import lifecycle
from alignment.runs.program import main
from tests import tiny_lm
from tests.e2e.test_bad_input import left, said
from tests.e2e.test_bad_input import refused as refused  # the fixture

OPENINGS = tiny_lm.openings()[:12]
P3O = "recipes/quickstart/p3o.yaml"
LONG = "my dog is kind and " * 40


def overrides(prompts: Path, *more: str) -> list[str]:
    given = [
        f"data.prompts={{name: {prompts}}}",
        "evaluation=null",
        "training.use_cpu=true",
        "training.global_batch_size=4",
        "training.max_steps=1",
        "rollout.prompts_per_rollout=4",
        "rollout.inner_epochs=1",
    ]
    replaced = [override.partition("=")[0] for override in more]
    return [g for g in given if g.partition("=")[0] not in replaced] + [*more]


@pytest.fixture
def attempt(refused, grammar, tmp_path):
    """Prompts and overrides of the quick start with P3O that must be refused; its last line."""

    def attempt(rows: list, *more: str) -> str:
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        # `refused` puts the grammar into a recipe that samples before training
        return refused("data.sample=null", *overrides(file, *more), recipe=P3O)

    return attempt


GOOD = [{"prompt": opening} for opening in OPENINGS]
ANSWERED = [row | {"answer": "kind ."} for row in GOOD]
CHAINS = ("objective={name: likelihood}", "reward=null", "rollout.answer={marker: ' and'}")


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"prompt": LONG}], (), "none of 1 prompts can be used: row 1: "),
        ([*GOOD, {"prompt": LONG}, {"prompt": LONG}], (), "and data.max_length less generation.max_new_tokens leaves"),
        ([*GOOD, {"question": "a"}, {"prompt": 5}], (), "missing_field"),
        ([{"prompt": ""}, {"prompt": None}], (), "prompts.jsonl:1: prompt is empty"),
        ([*GOOD, {"prompt": [{"role": "user", "content": "a"}]}], (), "some prompts are texts and others chat"),
        ([*GOOD, "{not json"], (), "prompts.jsonl:13: not valid JSON"),
        ([], (), "prompts.jsonl: no rows"),
        (GOOD, ("data.prompts={name: FILE, limit: 99}",), "12 prompts, but 99 are asked for"),
        (GOOD, ("data.prompts={name: nowhere.jsonl}",), "nowhere.jsonl: no such file"),
        (GOOD, CHAINS, "none of 12 prompts can be used: row 1: answer must be a text, got null"),
        ([*ANSWERED, GOOD[0], {**GOOD[0], "answer": " "}], CHAINS, "missing_field"),
        (GOOD, ("generation.replay=nowhere.jsonl",), "nowhere.jsonl: no such file"),
        (
            [{"prompt": "my dog is", "answer": "nd ."}],
            (*CHAINS[:2], "rollout.answer={marker: ' ki', separator: ''}"),
            "rollout.answer: the tokenizer joins",
        ),
        (GOOD, ("reference.name_or_path=./no-such-folder",), "reference.name_or_path: "),
        (GOOD, ("rollout.prompts_per_rollout=6",), "must be a multiple of training.global_batch_size, 4, got 6"),
    ],
)
def test_one_line_and_nothing_written(attempt, tmp_path, rows, more, message):
    more = tuple(m.replace("FILE", str(tmp_path / "prompts.jsonl")) for m in more)
    assert message in attempt(rows, *more)


def test_a_text_file_has_no_answers(refused, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("my dog is\n")
    found = refused("data.sample=null", *overrides(file, *CHAINS), recipe=P3O)
    assert f"{file}: a reference answer is needed for every prompt: give a .jsonl" in found


def test_prompts_that_evaluation_asks_as_well(refused, grammar, tmp_path):
    given = [o for o in overrides(grammar.held_out) if not o.startswith("evaluation")]
    assert "are also judged on" in refused("data.sample=null", *given, recipe=P3O)


def test_a_batch_that_cannot_be_split_over_the_processes(attempt, monkeypatch):
    three = SimpleNamespace(num_processes=3, is_main_process=True)
    monkeypatch.setattr(lifecycle, "PartialState", lambda **settings: three)
    assert "cannot be split evenly over 3 processes" in attempt(GOOD)


def run(root: Path, monkeypatch, given: list[str], *flags: str) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["train.py", P3O, *given, *flags])
    main()


def test_long_prompts_are_set_aside_and_other_samples_refused(root, grammar, tmp_path, monkeypatch, capfd):
    """Some prompts too long: they are in rejected_rows.jsonl, the others are trained on. What this run has sampled
    does for itself, and not for another seed, other prompts or another number of responses."""
    file, other = tmp_path / "prompts.jsonl", tmp_path / "other.jsonl"
    rows = [*GOOD[:5], {"prompt": LONG}, *GOOD[5:]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other.write_text("".join(json.dumps({"prompt": f"our {row['prompt']}"}) + "\n" for row in GOOD))

    def given(name: str, prompts: Path = file, *more: str) -> list[str]:
        return grammar.overrides(tmp_path / name, "data.sample=null", *overrides(prompts, *more))

    run(root, monkeypatch, given("run"))
    (rejected,) = [json.loads(line) for line in (tmp_path / "run" / "rejected_rows.jsonl").read_text().splitlines()]
    assert (rejected["source"], rejected["row"], rejected["reason"]) == (str(file), 6, "prompt_too_long")
    assert LONG not in json.dumps(rejected)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["prompts"] == len(GOOD)
    recorded = f"generation.replay={tmp_path / 'run' / 'rollouts.jsonl'}"
    run(root, monkeypatch, given("again", file, recorded))
    texts = [(tmp_path / name / "rollouts.jsonl").read_text() for name in ("run", "again")]
    assert texts[0] == texts[1]
    before = left(tmp_path)
    for more, message in (
        (given("new", file, recorded, "training.seed=7"), "has not the prompts of rollout 0"),
        (given("new", other, recorded), "the file is of other prompts or another tokenizer"),
        (given("new", file, recorded, "training.max_steps=2"), "has not the prompts of rollout 1"),
    ):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_or_exit(lambda more=more: run(root, monkeypatch, more))
        assert stopped.value.code == 2 and message in said(capfd.readouterr().err)
        assert left(tmp_path) == before  # not even the step that the file would have had samples for


def test_a_run_is_not_resumed_on_other_recorded_samples(root, grammar, tmp_path, monkeypatch, capfd):
    prompts, kept = tmp_path / "prompts.jsonl", tmp_path / "kept.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    saving = ("training.save_strategy=steps", "training.save_steps=1")

    def given(name: str, *more: str) -> list[str]:
        return grammar.overrides(tmp_path / name, "data.sample=null", *overrides(prompts, *more))

    run(root, monkeypatch, given("first"))
    rows = [json.loads(line) for line in (tmp_path / "first" / "rollouts.jsonl").read_text().splitlines()]
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = given("run", f"generation.replay={kept}", *saving)
    run(root, monkeypatch, again)
    run(root, monkeypatch, [*again, "--resume"])  # nothing is left to do, and nothing is wrong
    rows[0]["responses"].reverse()
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_or_exit(lambda: run(root, monkeypatch, [*again, "--resume"]))
    assert stopped.value.code == 2 and "rows are not those" in said(capfd.readouterr().err)
