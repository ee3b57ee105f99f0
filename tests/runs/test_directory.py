"""Run directories: what a resumed run may change, and where an earlier run goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from alignment.errors import UserError
from alignment.files import read_json_object, write_json, write_text
from alignment.recipes import load_recipe
from alignment.runs import directory
from alignment.runs.preferences import begun
from alignment.trainers import checkpoints

RECIPE = "recipes/quickstart/dpo.yaml"
PLUGIN = """import torch.nn.functional as F
from alignment.objectives import Card, Objective, register


@register
class Resumed(Objective):
    card = Card("resumed", "For a test", "none", "none", "softplus(-m)")

    def pair_loss(self, batch):
        return F.softplus(-batch.margin)
"""


@pytest.fixture
def run(root, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(root)
    return tmp_path / "run"


def begin(run: Path, *overrides: str) -> None:
    write_json(run / "manifest.json", begun(load_recipe(RECIPE, overrides), world=1))


def test_changes_without_effect_on_the_result_may_be_resumed_with(run):
    begin(run)
    for change in ("training.logging_steps=3", "training.per_device_train_batch_size=2", "training.cpu_threads=1"):
        directory.refuse_other_recipe(run, load_recipe(RECIPE, [change]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.learning_rate=1e-5", "training.learning_rate is 1e-05 but .* began with 6e-05"),
        ("objective.beta=0.2", "objective.beta is 0.2"),
        ("model.dtype=bfloat16", "model.dtype is 'bfloat16'"),
        ("training.global_batch_size=16", "training.global_batch_size is 16"),
    ],
)
def test_other_changes_are_refused_by_name(run, change, said):
    begin(run)
    with pytest.raises(UserError, match=f"--resume: {said}"):
        directory.refuse_other_recipe(run, load_recipe(RECIPE, [change]))


def test_of_several_sources_the_one_that_changed_is_named(run):
    sample = "data.sample=null"
    begin(run, sample, "data.train=[a.jsonl, {name: b.jsonl, limit: 5}]")
    manifest = read_json_object(run / "manifest.json")
    del manifest["recipe"]["data"]["train"][0]["subset"]  # a key that came later is at its default
    write_json(run / "manifest.json", manifest)
    directory.refuse_other_recipe(
        run, load_recipe(RECIPE, [sample, "data.train=[a.jsonl, {name: b.jsonl, limit: 5}]"])
    )
    for sources, said in (
        ("[a.jsonl, {name: b.jsonl, limit: 7}]", r"data\.train\[1\]\.limit is 7 but .* began with 5"),
        ("[a.jsonl]", r"data\.train\[1\] is None but .* began with {'name': 'b.jsonl'"),
    ):
        with pytest.raises(UserError, match=f"--resume: {said}"):
            directory.refuse_other_recipe(run, load_recipe(RECIPE, [sample, f"data.train={sources}"]))


def test_an_edited_objective_file_is_another_objective(run, tmp_path):
    file = tmp_path / "resumed.py"
    file.write_text(PLUGIN)
    words = ["objective.name=resumed", f"objective.file={file}"]
    begin(run, *words)
    recipe = load_recipe(RECIPE, words)
    directory.refuse_other_recipe(run, recipe)
    file.write_text(PLUGIN.replace("-batch.margin", "-2 * batch.margin"))
    with pytest.raises(UserError, match=r"resumed\.py is not the file"):
        directory.refuse_other_recipe(run, recipe)


def test_other_rows_are_refused(run):
    write_json(run / "manifest.json", {"data_fingerprint": "a"})
    directory.refuse_other_data(run, "a")
    with pytest.raises(UserError, match="the rows are not those"):
        directory.refuse_other_data(run, "b")


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        (("zero2", 2), ("none", 2), "began with sharding zero2, this launch has none"),  # would lose the optimiser
        (("none", 2), ("zero2", 2), "began with sharding none, this launch has zero2"),
        (("zero3", 2), ("zero2", 2), "began with sharding zero3"),
        (("zero3", 2), ("zero3", 4), "split over 2 processes, this launch has 4"),
        (("zero3", 2), ("zero3", 2), None),
        (("none", 2), ("none", 1), None),
    ],
)
def test_checkpoints_fit_the_sharding_that_wrote_them(run, before, now, refused):
    write_json(run / "manifest.json", {"sharding": before[0], "hardware": {"processes": before[1]}})
    if refused is None:
        return directory.refuse_other_sharding(run, *now)
    with pytest.raises(UserError, match=refused):
        directory.refuse_other_sharding(run, *now)
    return None


def test_earlier_runs_are_kept_under_the_next_number(run):
    for seed in (1, 2, 3):
        directory.move_aside(run)
        write_json(run / "manifest.json", {"seed": seed})
    kept = {p.name: json.loads((p / "manifest.json").read_text())["seed"] for p in run.parent.glob("run*")}
    assert kept == {"run": 3, "run.1": 1, "run.2": 2}


def checkpoint(run: Path, step: int) -> Path:
    """As training leaves one: files, then their list."""
    folder = run / f"checkpoint-{step}"
    write_json(folder / "trainer_state.json", {"global_step": step})
    write_text(folder / "optimizer.pt", "moments")
    state = TrainerState(global_step=step, is_world_process_zero=True)
    checkpoints.CheckpointFiles().on_save(SimpleNamespace(output_dir=str(run)), state, None)
    return folder


def test_newest_whole_checkpoint_is_resumed_from(run, capsys):
    older, newer = checkpoint(run, 9), checkpoint(run, 10)
    assert checkpoints.last_checkpoint(run) == newer  # by number, not by name
    (run / "checkpoint-12").mkdir()  # killed while it was written
    write_json(run / "checkpoint-12" / "trainer_state.json", {})
    assert checkpoints.last_checkpoint(run) == newer
    assert "checkpoint-12 has no files.json" in capsys.readouterr().out
    write_text(newer / "optimizer.pt", "mom")  # a full disk
    assert checkpoints.last_checkpoint(run) == older
    (older / "optimizer.pt").unlink()  # resuming would begin with a fresh optimizer
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole: checkpoint-12 has no files.json"):
        checkpoints.last_checkpoint(run)
    shutil.rmtree(run / "checkpoint-12")
    with pytest.raises(UserError, match="checkpoint-10 has a damaged optimizer.pt"):
        checkpoints.last_checkpoint(run)
    shutil.rmtree(newer)
    with pytest.raises(UserError, match="checkpoint-9 lacks optimizer.pt"):
        checkpoints.last_checkpoint(run)
