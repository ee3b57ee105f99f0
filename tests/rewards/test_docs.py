"""docs/rewards.md names every judge and every key; its examples run, and those of reward_models.md and best_of_n.md.

Those two with the tiny model in the place of what is too large for a test. judging.md: test_judge.py.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from alignment.recipes import load_recipe, load_reward_model_recipe
from alignment.rewards import list_oracles, list_rewards, oracle_keys, reward_keys
from alignment.runs.program import main_reward_model
from alignment.runs.reward_model import train
from evaluation import best_of_n, held_out
from tests.pages import ROOT, blocks, read

TEXT = read("docs/rewards.md")
JUDGES = [("reward", name) for name in list_rewards()] + [("oracle", name) for name in list_oracles()]
BASE = {
    "objective": {"name": "dpo"},
    "model": {"name_or_path": "some/model"},
    "data": {"train": "pairs.jsonl"},
    "training": {"global_batch_size": 4, "learning_rate": 1e-6},
}


def of(kind: str, name: str) -> str:
    """The part of a judge, without its heading; `recorded` is both."""
    heading = f"{name} {kind}" if name in list_rewards() and name in list_oracles() else name
    (found,) = re.findall(rf"^### {heading}\n(.*?)(?=^##|\Z)", TEXT, flags=re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.parametrize(("kind", "name"), JUDGES)
def test_every_judge_is_there_with_all_its_keys(kind, name):
    part = of(kind, name)
    keys = reward_keys(name) if kind == "reward" else oracle_keys(name)
    assert {key for key in keys if f"`{key}`" not in part} == set()
    tabled = {
        key for row in re.findall(r"^\| (`.*?) \|", part, flags=re.MULTILINE) for key in re.findall(r"`(\w+)`", row)
    }
    assert tabled <= keys
    assert (f"name: {name}" in part) or not part.count("```yaml")


@pytest.mark.parametrize("block", blocks(TEXT, "yaml"))
def test_every_recipe_example_is_a_recipe(tmp_path, monkeypatch, block):
    monkeypatch.chdir(tmp_path)
    example = yaml.safe_load(block)
    (kind,) = {"reward", "oracle"} & set(example)
    Path("r.yaml").write_text(yaml.safe_dump({**BASE, **example}))
    recipe = load_recipe("r.yaml")
    assert recipe.resolved()[kind] == example[kind]


def test_the_python_example_runs():
    (code,) = blocks(TEXT, "python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Bradley–Terry with temperature 2" in done.stdout


def test_the_commands_run(tmp_path):
    """paper beats rock at .9; the pattern is in paper alone; VADER finds nothing in either."""
    (script,) = blocks(TEXT, "sh")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-e", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    rates = re.findall(r"^Win rate  ([\d.]+) %", done.stdout, flags=re.MULTILINE)
    assert rates == ["90.0", "100.0", "50.0"]


# --- reward_models.md and best_of_n.md ------------------------------------------------------------------------------

SMALL = ("training.use_cpu=true", "training.cpu_threads=1")


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, where the shipped recipes are."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_for_reward_models_run(workplace, tiny, capsys):
    """All but the launch of two processes, of which the e2e tests have many."""
    (script,) = blocks(read("docs/reward_models.md"), "sh")
    done = []
    for words in map(shlex.split, script.splitlines()):
        program = next(word for word in words if word.endswith(".py"))
        given = words[words.index(program) + 1 :]
        assert (ROOT / program).is_file()
        done.append(program)
        if "--config_file" in words:
            assert Path(words[words.index("--config_file") + 1]).is_file()
            load_reward_model_recipe(given[0], given[1:])
        elif program == "scripts/train_reward_model.py":
            main_reward_model([*given, f"model.name_or_path={tiny}", *SMALL])
        else:
            assert program == "evaluation/held_out.py"
            held_out.main(*map(Path, given))
    assert len(done) == 4
    assert re.search(r"held out: \d+ pairs .*\n  member 0 +\d", capsys.readouterr().out)


def test_the_examples_of_best_of_n_run(workplace, tiny):
    """The commands, with two prompts; the Python, whose arrays the page does not make."""
    (workplace / "prompts.txt").write_text("my dog is\nthe cat was\n")
    for name, members in (("runs/ensemble", "3"), ("gold-model", "1")):
        given = [
            f"reward_model.members={members}",
            f"model.name_or_path={tiny}",
            f"training.output_dir={name}",
            *SMALL,
        ]
        given += ["reward_model.bootstrap=false", "reward_model.mode=independent"] if members == "1" else []
        train(load_reward_model_recipe("recipes/quickstart/reward_model.yaml", given))
    text = read("docs/best_of_n.md")
    (script,), (code,) = blocks(text, "bash"), blocks(text, "python")
    lines = re.sub(r"\\\n", " ", script).splitlines()
    for words in map(shlex.split, lines):
        assert words[:2] == ["python", "evaluation/best_of_n.py"]
        ran = CliRunner().invoke(best_of_n.app, [str(tiny) if word == "MODEL" else word for word in words[2:]])
        assert ran.exit_code == 0, (ran.output, ran.exception)
    assert len(lines) == 3
    for folder in ("pools/sft/curves", "runs/ensemble/as-they-are"):
        assert (workplace / folder / "best_of_n.html").is_file()
    rng = np.random.default_rng(0)
    arrays = {
        "proxy": rng.normal(size=(2, 16)),
        "gold": rng.normal(size=(2, 16)),
        "members": rng.normal(size=(3, 2, 16)),
    }
    exec(code, arrays | {"mean": [0.0] * 3, "std": [1.0] * 3})
