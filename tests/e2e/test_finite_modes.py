"""A row that is no number, on several processes: all stop, or skip the step, together, and name the row of one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignment.data.preferences import read_rows
from alignment.files import read_json_object
from alignment.models import load_model, load_tokenizer
from tests.e2e import finite_modes
from tests.e2e.conftest import finished, launch
from tests.e2e.test_modes import LAUNCHES

pytestmark = pytest.mark.slow

BAD, WORD = 11, "purple"


def trained(run: Path) -> dict[str, torch.Tensor]:
    """All weights but the damaged word's."""
    found = load_file(run / "final" / "model.safetensors")
    found["model.embed_tokens.weight"] = found["model.embed_tokens.weight"][:-1]
    return found


@pytest.fixture(scope="module")
def damaged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    model, tokenizer = load_model(str(tiny)), load_tokenizer(str(tiny))
    tokenizer.add_tokens([WORD])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.get_input_embeddings().weight.data[-1] = math.nan
    model.get_output_embeddings().weight.data[-1] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both runs in one process."""
    folder = tmp_path_factory.mktemp("alone")
    finite_modes.carry_out(str(damaged), folder, BAD, WORD)
    return folder


@pytest.mark.parametrize("mode", list(LAUNCHES))
def test_all_processes_stop_or_skip_together(root, damaged, alone, tmp_path, mode):
    words = ["tests/e2e/finite_modes.py", str(damaged), str(tmp_path), str(BAD), WORD]
    finished(launch(root, list(LAUNCHES[mode]), words, PYTHONPATH=str(root)))
    told = [(tmp_path / f"{process}.txt").read_text() for process in (0, 1)]
    one = (alone / "0.txt").read_text()
    assert told == [one.replace(str(alone), str(tmp_path))] * 2
    assert f"the loss of {tmp_path / 'rows.jsonl'}: row {BAD + 1} is not a finite number" in told[0]
    assert not (tmp_path / "stopped" / "final").exists()
    assert read_json_object(tmp_path / "run" / "manifest.json")["skipped_steps"] == 1
    lost = [
        [row["step"] for row in read_rows(f / "run" / "metrics.jsonl") if row["loss"] is None]
        for f in (alone, tmp_path)
    ]
    assert lost[0] == lost[1]
    mine, theirs = trained(tmp_path / "run"), trained(alone / "run")
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)
