"""A recipe of the tiny model on a few made-up rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.recipes import load_recipe
from tests import tiny_lm


def made_up_rows(n: int = 12) -> list[dict[str, str]]:
    """Kind beats harsh; lengths mixed."""
    rows = []
    for i, opening in enumerate(tiny_lm.openings()[:n]):
        kind = " and ".join(tiny_lm.KIND[(i + j) % 5] for j in range(1 + i % 4))
        harsh = " and ".join(tiny_lm.HARSH[(i + j) % 5] for j in range(1 + (i // 2) % 4))
        rows.append({"prompt": opening, "chosen": f" {kind} .", "rejected": f" {harsh} ."})
    return rows


@pytest.fixture
def recipe_file(tiny: Path, tmp_path: Path) -> Path:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in made_up_rows()))
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"objective: {{name: dpo, beta: 0.1}}\nmodel: {{name_or_path: {tiny}}}\n"
        f"data: {{train: {rows}, max_length: 64}}\n"
        f"training: {{global_batch_size: 4, output_dir: {tmp_path / 'run'}, use_cpu: true}}\n"
    )
    return file


@pytest.fixture
def recipe(recipe_file: Path):
    return load_recipe(recipe_file)
