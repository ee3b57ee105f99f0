"""`make train` judges the run that it trained, whichever recipe and folder are asked for. Nothing is trained here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.recipes import load_recipe


@pytest.fixture
def make_train(root: Path, tmp_path: Path):
    """`make train` in an environment whose launcher and evaluation only say what they were given."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "installed").touch()
    python, accelerate = tmp_path / "bin" / "python", tmp_path / "bin" / "accelerate"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\necho judged: "$@"\n')
    accelerate.write_text('#!/bin/sh\necho launched: "$@"\n')
    for program in (python, accelerate):
        program.chmod(0o755)

    def run(*words: str) -> list[str]:
        command = ["make", "--no-print-directory", "train", f"VENV={tmp_path}", *words]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("name", [None, "ipo", "f_dpo"])
@pytest.mark.parametrize("place", [None, "runs/mine"])
def test_the_run_that_is_judged_is_the_run_that_was_trained(make_train, root, name, place):
    recipe = f"recipes/quickstart/{name or 'dpo'}.yaml"
    lines = make_train(*([f"RECIPE={recipe}"] if name else []), *([f"RUN={place}"] if place else []))
    expected = place or load_recipe(root / recipe).training.output_dir
    launched = next(line for line in lines if line.startswith("launched:"))
    assert launched.endswith(f"scripts/train.py {recipe}" + (f" training.output_dir={place}" if place else ""))
    assert f"judged: evaluation/win_rate.py {expected}" in lines
    assert lines[-1] == f"report: {expected}/report.html"
