"""Iterative runs of the quick start on the tiny language model, small enough for seconds; what two runs must share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.data.preferences import read_rows
from alignment.pipeline.driver import run
from alignment.recipes import load_iterate_recipe
from tests import tiny_lm

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart" / "iterate.yaml"
KIND_WORDS = f"{{name: regex, pattern: '{tiny_lm.KIND_PATTERN}'}}"
ORACLE = f"oracle={{name: bradley_terry, temperature: 0.5, reward: {KIND_WORDS}}}"
Iterate = Callable[..., Path]
# Of a metrics line, what the machine and its other work decide.
SPEEDS = ("tokens_per_second", "padding")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 openings: no number of iterations or processes divides them."""
    file = tmp_path_factory.mktemp("prompts") / "openings.txt"
    file.write_text("".join(f"{opening}\n" for opening in tiny_lm.openings()[:41]))
    return file


@pytest.fixture(scope="session")
def small(tiny: Path, prompts: Path) -> Callable[..., list[str]]:
    """`small(folder, *more)`: overrides of the quick start; `more` wins over those of the same key."""

    def overrides(folder: Path, *more: str) -> list[str]:
        given = [
            f"model.name_or_path={tiny}",
            f"data.prompts={prompts}",
            "iterate.iterations=2",
            "generation.max_new_tokens=12",
            "objective.eta=0.25",
            "objective.tau=0.1",
            ORACLE,
            "evaluation=null",
            f"training.output_dir={folder}",
            "training.learning_rate=1e-3",
            "training.save_steps=2",
            "training.save_total_limit=null",
            "training.cpu_threads=1",
            "training.use_cpu=true",
        ]
        keys = [override.partition("=")[0] for override in more]
        return [g for g in given if not any(f"{g.partition('=')[0]}.".startswith(f"{key}.") for key in keys)] + [*more]

    return overrides


@pytest.fixture
def iterate(small: Callable[..., list[str]], tmp_path: Path) -> Iterate:
    """`iterate(name, *more)` carries out a run in one process."""

    def carried_out(name: str, *more: str) -> Path:
        return run(load_iterate_recipe(QUICKSTART, small(tmp_path / name, *more)))

    return carried_out


def losses(folder: Path, iteration: int, *names: str) -> list[list[float]]:
    """`loss` and other metrics of every step of an iteration."""
    rows = read_rows(folder / f"iteration-{iteration}" / "train" / "metrics.jsonl")
    return [[row[name] for name in ("loss", *names)] for row in rows if "loss" in row]


def content(folder: Path) -> dict[str, Any]:
    """Everything in a run that does not depend on the clock: files by name, JSON read, models as bytes."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if "checkpoint-" in name or "unfinished/" in name or name.startswith("final"):
            continue
        if file.name == "metrics.jsonl":
            rows = read_rows(file)
            found[name] = [{k: v for k, v in row.items() if not k.startswith(SPEEDS)} for row in rows]
        elif file.suffix == ".jsonl" and "train" not in name:
            found[name] = read_rows(file)
        elif file.suffix == ".safetensors":
            found[name] = file.read_bytes()
        elif file.name in ("counts.json", "judge.json"):
            found[name] = json.loads(file.read_text())
    return found
