"""Fixtures of several files of these tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Overrides that name three disjoint files of prompts in place of the task's."""
    for name, count in (("train", 20), ("validation", 4), ("test", 6)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} prompt {i}\n" for i in range(count)))
    (tmp_path / "model").mkdir()
    return [
        "compare.task=null",
        f"compare.validation={tmp_path / 'validation.txt'}",
        f"data.sample.prompts={tmp_path / 'train.txt'}",
        f"evaluation.prompts={tmp_path / 'test.txt'}",
        f"model.name_or_path={tmp_path / 'model'}",
        f"training.output_dir={tmp_path / 'out'}",
    ]
