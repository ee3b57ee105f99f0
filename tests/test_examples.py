"""examples/: every file runs as it is shown."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
from typer.testing import CliRunner

from alignment.cli import app
from alignment.files import write_json_lines
from tests.pages import ROOT


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_examples_are_run_here():
    assert {path.name for path in (ROOT / "examples").iterdir() if path.is_file()} == {
        "own_objective.py",
        "own_objective.yaml",
        "own_reward.py",
        "preference_trainer.py",
        "win_rate_of_files.py",
    }


def test_a_trainer_on_a_list_of_dicts(tiny):
    rows = example("preference_trainer").main(str(tiny))
    assert len(rows) == 4
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)  # the reference is the start
    assert rows[3]["rewards/margins"] > 0


@pytest.mark.parametrize(
    "words",
    [
        ["objectives", "check", "squared_hinge", "--file", "examples/own_objective.py"],
        ["recipe", "check", "examples/own_objective.yaml"],
    ],
    ids=["proofs", "recipe"],
)
def test_own_objective(monkeypatch, words):
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output


def test_own_reward():
    # Different words: 2 > 1, 3 > 2, 4 > 3 (red, and, blue), 1 = 1, 1 = 1.
    assert example("own_reward").main().result["win_rate"] == pytest.approx(0.8)


def test_win_rate_of_two_files(tmp_path):
    prompts = [f"prompt {i}" for i in range(4)]
    for name, words in (("ours", "a lovely day"), ("theirs", "a terrible day")):
        write_json_lines(tmp_path / f"{name}.jsonl", [{"prompt": p, "response": words} for p in prompts])
    rate = example("win_rate_of_files").main(str(tmp_path / "ours.jsonl"), str(tmp_path / "theirs.jsonl"))
    assert rate["win rate"] == 1
