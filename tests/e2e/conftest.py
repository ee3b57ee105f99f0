"""The quick start on the tiny language model: a recipe's real file, with model, prompts and judge of the grammar."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import pytest

from alignment.data.preferences import read_rows
from tests import tiny_lm

TRAINED_ON = 112  # openings; the other 68 are held out. 14 steps of 8 pairs, if no prompt ties


@dataclass(frozen=True)
class Grammar:
    """Where the tiny model and its prompts lie; `overrides` puts them into a quick-start recipe."""

    model: Path
    prompts: Path
    held_out: Path

    def overrides(self, run: Path, *more: str) -> list[str]:
        """Overrides with which a quick-start recipe trains into `run`; `more` wins over those of the same key."""
        given = [
            f"model.name_or_path={self.model}",
            f"data.sample.prompts={self.prompts}",
            "data.sample.limit=null",
            "generation.max_new_tokens=12",
            "reward.name=regex",
            f"reward.pattern='{tiny_lm.KIND_PATTERN}'",
            f"evaluation.prompts={self.held_out}",
            "evaluation.limit=null",
            f"training.output_dir={run}",
        ]
        keys = [override.partition("=")[0] for override in more]
        return [g for g in given if not any(f"{g.partition('=')[0]}.".startswith(f"{key}.") for key in keys)] + [*more]


@pytest.fixture(scope="session")
def grammar(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Grammar:
    """Disjoint openings to train on and to judge by."""
    folder, openings = tmp_path_factory.mktemp("grammar"), tiny_lm.openings()
    files = folder / "openings.txt", folder / "held_out.txt"
    for file, part in zip(files, (openings[:TRAINED_ON], openings[TRAINED_ON:]), strict=True):
        file.write_text("".join(f"{opening}\n" for opening in part))
    return Grammar(tiny, *files)


def free_port() -> str:
    """A port that nothing listens on; each launch needs its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def launched(
    root: Path,
    options: list[str],
    recipe: str,
    overrides: list[str],
    program: str = "scripts/train.py",
    **environment: str,
) -> Popen[str]:
    """`accelerate launch OPTIONS PROGRAM RECIPE OVERRIDES`, started, in a process group of its own."""
    return launch(root, options, [program, recipe, "training.cpu_threads=1", *overrides], **environment)


def launch(root: Path, options: list[str], words: list[str], **environment: str) -> Popen[str]:
    """`accelerate launch OPTIONS WORDS`, started, in a process group of its own."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", free_port(), *options]
    return Popen(
        [*command, *words],
        cwd=root,
        env={**os.environ, **environment},
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: Popen[str], timeout: float = 300) -> str:
    """What the launch printed; it must have ended well, within `timeout` seconds."""
    printed, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, printed
    return printed


def series(run: Path, *names: str) -> list[list[float]]:
    """The named metrics of every logged training step, `step` first."""
    return [[row[name] for name in ("step", *names)] for row in read_rows(run / "metrics.jsonl") if "loss" in row]
