"""docs/pitfalls.md names tests that exist; and the traps that no other file has a test for."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from alignment.errors import UserError
from alignment.recipes import load_recipe
from alignment.runs.preferences import train
from tests.trainers.building import preferences


def test_every_trap_has_a_test_that_exists(root):
    rows = [line for line in (root / "docs" / "pitfalls.md").read_text().splitlines() if line.startswith("| ")][2:]
    named = [re.findall(r"`(test_\w+)`", row.split("|")[3]) for row in rows]
    assert len(rows) >= 15 and all(named)
    written = "".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", written, flags=re.MULTILINE))
    assert {name for names in named for name in names} <= defined


@pytest.fixture
def chat(tmp_path) -> Path:
    file = tmp_path / "pairs.jsonl"
    preferences(8, chat=True).select_columns(["prompt", "chosen", "rejected"]).to_json(file)
    return file


def trained(root: Path, model: Path, rows: Path, run: Path, *more: str, resume: bool = False) -> dict:
    given = [
        f"model.name_or_path={model}",
        "data.sample=null",
        f"data.train={rows}",
        "evaluation=null",
        "reward=null",
        "training.use_cpu=true",
        "training.save_strategy=steps",
        "training.save_steps=1",
        f"training.output_dir={run}",
        *more,
    ]
    train(load_recipe(root / "recipes/quickstart/dpo.yaml", given), resume=resume)
    return json.loads((run / "manifest.json").read_text())


def test_an_edited_template_is_seen(root, tiny, tmp_path, chat):
    """In the manifest, and by a run that would go on with other tokens."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    template = (model / "chat_template.jinja").read_text()
    before = trained(root, model, chat, tmp_path / "run")
    assert before["template_hash"] == hashlib.sha256(template.encode()).hexdigest()
    (model / "chat_template.jinja").write_text(template.replace("assistant\n", "helper\n"))
    with pytest.raises(UserError, match="--resume: the rows are not those"):
        trained(root, model, chat, tmp_path / "run", resume=True)


def test_an_adapter_brings_its_own_template(root, tiny, tmp_path, chat):
    trained(root, tiny, chat, tmp_path / "sft", "lora.r=2")
    adapter = tmp_path / "sft" / "final"
    template = (adapter / "chat_template.jinja").read_text().replace("assistant\n", "helper\n")
    (adapter / "chat_template.jinja").write_text(template)
    manifest = trained(root, tiny, chat, tmp_path / "run", f"model.adapter={adapter}")
    assert manifest["template_hash"] == hashlib.sha256(template.encode()).hexdigest()
    assert (tmp_path / "run" / "final" / "chat_template.jinja").read_text() == template
