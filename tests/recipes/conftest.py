"""A small complete recipe that the tests of this folder vary line by line."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SMALL = """\
objective:
  name: dpo
  beta: 0.2
model:
  name_or_path: some/model
data:
  train: pairs.jsonl
training:
  global_batch_size: 16
  learning_rate: 5e-7
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A function that writes SMALL with one piece of text exchanged, in an otherwise empty current folder."""
    monkeypatch.chdir(tmp_path)

    def write(old: str = "", new: str = "", name: str = "r.yaml") -> str:
        assert old in SMALL
        Path(name).write_text(SMALL.replace(old, new, 1) if old else SMALL + new)
        return name

    return write
