"""Real launches of `scripts/train.py`: one process and two agree, nothing is overwritten, a killed run resumes.

The order of the launches is this file's order: each takes ten seconds, so each serves several tests.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.data.preferences import read_rows
from tests.e2e.conftest import Grammar, finished, launched, series

RECIPE = "recipes/quickstart/dpo.yaml"
NUMBERS = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "displacement/chosen")
SETTINGS = ["training.learning_rate=1e-3"]  # one epoch; the pairs do not fill the last of its batches of 8
CHECKPOINTS = ["training.save_strategy=steps", "training.save_steps=4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(root: Path, grammar: Grammar, runs: Path) -> Path:
    """One process, with checkpoints, undisturbed."""
    given = grammar.overrides(runs / "one", *SETTINGS, *CHECKPOINTS)
    printed = finished(launched(root, ["--num_processes", "1"], RECIPE, given))
    assert f"report: {runs / 'one' / 'report.html'}" in printed
    return runs / "one"


def test_run_directory_is_complete(one: Path):
    manifest = json.loads((one / "manifest.json").read_text())
    pairs = read_rows(one / "preferences.jsonl")
    steps = math.ceil(len(pairs) / 8)
    assert manifest["pairs"] == len(pairs) and len(pairs) % 8 and manifest["steps"] == steps > 10
    assert manifest["hardware"]["processes"] == 1 and manifest["versions"]["trl"].startswith("1.16")
    assert manifest["recipe"]["training"]["global_batch_size"] == 8
    assert [row[0] for row in series(one, "loss")] == list(range(1, steps + 1))
    assert "<html" in (one / "report.html").read_text()
    assert "alignment" in (one / "final" / "README.md").read_text()  # the model card
    AutoTokenizer.from_pretrained(one / "final")
    AutoModelForCausalLM.from_pretrained(one / "final")
    assert not [path.name for path in one.iterdir() if path.name.startswith(".")]  # nothing half-written


@pytest.mark.slow  # test_modes.py has two processes, of many objectives
def test_two_processes_train_the_same(root, grammar, runs, one):
    """The declared batch is the batch, so the number of processes changes nothing."""
    given = grammar.overrides(runs / "two", *SETTINGS)
    options = ["--config_file", "recipes/accelerate/cpu2.yaml"]
    printed = finished(launched(root, options, RECIPE, given))
    assert printed.count("report: ") == 1  # one process writes
    manifest = json.loads((runs / "two" / "manifest.json").read_text())
    assert manifest["hardware"]["processes"] == 2 and manifest["batch"] == {"per_device": 4, "accumulation": 1}
    assert (runs / "two" / "preferences.jsonl").read_text() == (one / "preferences.jsonl").read_text()
    for found, expected in zip(series(runs / "two", *NUMBERS), series(one, *NUMBERS), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_killed_run_resumes_as_if_nothing_had_happened(root, grammar, runs, one):
    """Same recipe, same folder: the earlier run is moved aside, not touched. Then kill -9 after a checkpoint."""
    before = {path.name: path.stat().st_mtime_ns for path in one.iterdir()}
    given = grammar.overrides(one, *SETTINGS, *CHECKPOINTS)
    process = launched(root, ["--num_processes", "1"], RECIPE, given)
    aside = one.with_name("one.1")
    deadline = time.monotonic() + 120
    while not (aside.is_dir() and (one / "checkpoint-4" / "files.json").is_file()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert {path.name: path.stat().st_mtime_ns for path in aside.iterdir()} == before
    assert not (one / "final").exists()  # it was killed in the middle
    (one / "checkpoint-99").mkdir()  # what a kill during a checkpoint leaves: no files.json
    with (one / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 11, "lo')  # and during a log line

    printed = finished(launched(root, ["--num_processes", "1"], RECIPE, [*given, "--resume"]))
    assert "[3/3]" in printed
    assert series(one, *NUMBERS) == [pytest.approx(row, abs=1e-6) for row in series(aside, *NUMBERS)]
    weights = [AutoModelForCausalLM.from_pretrained(run / "final").state_dict() for run in (one, aside)]
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])


@pytest.mark.slow
def test_alignment_train_launches_the_same(root, grammar, runs):
    given = grammar.overrides(runs / "cli", "training.max_steps=1", "training.cpu_threads=1")
    program = str(Path(sys.executable).with_name("alignment"))
    done = subprocess.run([program, "train", RECIPE, *given], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (runs / "cli" / "final" / "config.json").is_file()
    assert (runs / "cli" / "report.html").is_file()
