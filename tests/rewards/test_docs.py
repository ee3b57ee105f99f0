"""docs/rewards.md: names every judge and every key, and its examples run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alignment.recipes import load_recipe
from alignment.rewards import list_oracles, list_rewards, oracle_keys, reward_keys
from alignment.rewards.registry import _CLASSES

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "rewards.md").read_text()
JUDGES = [("reward", name) for name in list_rewards()] + [("oracle", name) for name in list_oracles()]
BASE = {
    "objective": {"name": "dpo"},
    "model": {"name_or_path": "some/model"},
    "data": {"train": "pairs.jsonl"},
    "training": {"global_batch_size": 4, "learning_rate": 1e-6},
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def of(kind: str, name: str) -> str:
    """The part of a judge, without its heading; `recorded` is both."""
    heading = f"{name} {kind}" if name in list_rewards() and name in list_oracles() else name
    (found,) = re.findall(rf"^### {heading}\n(.*?)(?=^##|\Z)", TEXT, flags=re.MULTILINE | re.DOTALL)
    return found


def written(kind: str, name: str) -> bool:
    """Whether the judge's module is there."""
    return importlib.util.find_spec(_CLASSES[kind][name].partition(":")[0]) is not None


@pytest.mark.parametrize(("kind", "name"), JUDGES)
def test_every_judge_is_there_with_all_its_keys(kind, name):
    part = of(kind, name)
    if not written(kind, name):
        pytest.skip("its module is not written yet")
    keys = reward_keys(name) if kind == "reward" else oracle_keys(name)
    assert {key for key in keys if f"`{key}`" not in part} == set()
    tabled = {
        key for row in re.findall(r"^\| (`.*?) \|", part, flags=re.MULTILINE) for key in re.findall(r"`(\w+)`", row)
    }
    assert tabled <= keys
    assert (f"name: {name}" in part) or not part.count("```yaml")


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_recipe_example_is_a_recipe(tmp_path, monkeypatch, block):
    monkeypatch.chdir(tmp_path)
    example = yaml.safe_load(block)
    (kind,) = {"reward", "oracle"} & set(example)
    if not written(kind, example[kind]["name"]):
        pytest.skip("its module is not written yet")
    Path("r.yaml").write_text(yaml.safe_dump({**BASE, **example}))
    recipe = load_recipe("r.yaml")
    assert recipe.resolved()[kind] == example[kind]


def test_the_python_example_runs():
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Bradley–Terry with temperature 2" in done.stdout


def test_the_commands_run(tmp_path):
    """paper beats rock at .9; the pattern is in paper alone; VADER finds nothing in either."""
    (script,) = blocks("sh")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-e", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    rates = re.findall(r"^Win rate  ([\d.]+) %", done.stdout, flags=re.MULTILINE)
    assert rates == ["90.0", "100.0", "50.0"]
