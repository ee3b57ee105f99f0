"""A run that was stopped anywhere and started again has the files of one that never was.

Stopped for real: SIGKILL to the whole process group at random moments, and to the driver alone. And by construction,
at every boundary between two stages and in the middle of the stages that are resumed, from copies of a finished run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from alignment.data.preferences import read_rows
from alignment.errors import UserError
from alignment.pipeline.driver import run, stages
from alignment.recipes import load_iterate_recipe
from tests.pipeline.conftest import QUICKSTART, content

# All stages: a calibration response of the reference, and its log-probs. Shards of 8 prompts at most.
EVERY_STAGE = ("objective={name: vpo, calibration: given, alpha: 0.01, mode: online}", "iterate.pairing=best_worst")
QUICK = (1,)  # boundaries that `make test` looks at; all are in `make test-all`


@pytest.fixture(scope="module")
def recipe_in(small):
    return lambda folder: load_iterate_recipe(QUICKSTART, small(folder, *EVERY_STAGE))


@pytest.fixture(scope="module")
def undisturbed(recipe_in, tmp_path_factory) -> Path:
    return run(recipe_in(tmp_path_factory.mktemp("undisturbed") / "run"))


@pytest.fixture(scope="module")
def names(recipe_in) -> list[str]:
    """Folders of all stages, in order."""
    order = stages(recipe_in(Path("x")))
    return [stage if iteration == 0 else f"iteration-{iteration}/{stage}" for iteration, stage in order]


def copied(undisturbed: Path, folder: Path, names: list[str], keep: int) -> Path:
    """What is left of a run that was killed when the first `keep` stages were complete."""
    shutil.copytree(undisturbed, folder, symlinks=True)
    (folder / "final").unlink()
    for name in names[keep:]:
        shutil.rmtree(folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"] = {name: manifest["stages"][name] for name in names[:keep]}
    del manifest["chat"], manifest["steps"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def same(one: Path, other: Path) -> None:
    mine, theirs = content(one), content(other)
    assert mine.keys() == theirs.keys()
    for name in ("prompts", "iteration-1/judged", "iteration-2/judged"):  # which name no folder
        noted = [json.loads((place / "manifest.json").read_text())["stages"][name]["sha256"] for place in (one, other)]
        assert noted[0] == noted[1], name
    for name, value in mine.items():
        assert strip(value, one, other) == strip(theirs[name], one, other), name
    assert (one / "final" / "model.safetensors").is_file()


def strip(value: Any, *folders: Path) -> Any:
    """Without the folders' names."""
    if isinstance(value, bytes):
        return value
    text = json.dumps(value)
    for folder in folders:
        text = text.replace(str(folder), "RUN")
    return json.loads(text)


def test_stages_and_what_the_manifest_says_of_them(undisturbed, names):
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    each = ["samples", "calibration", "judged", "pairs", "logps", "train"]
    assert names == ["prompts", *(f"iteration-{t}/{stage}" for t in (1, 2) for stage in each)]
    assert list(manifest["stages"]) == names
    assert all(len(entry["sha256"]) == 64 and entry["seconds"] >= 0 for entry in manifest["stages"].values())
    assert manifest["steps"] == sum(
        json.loads((undisturbed / f"iteration-{t}" / "train" / "manifest.json").read_text())["steps"] for t in (1, 2)
    )
    assert not list(undisturbed.rglob("unfinished"))
    lines = read_rows(undisturbed / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2] and all(line["pairs"] > 10 for line in lines)


def test_a_complete_run_does_nothing_again(undisturbed, recipe_in, capfd):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("iteration-*/*/*")}
    run(recipe_in(undisturbed))
    assert "==" not in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("iteration-*/*/*")} == before


@pytest.mark.parametrize(
    "keep", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in range(13)], ids=str
)
def test_killed_between_two_stages(undisturbed, recipe_in, names, tmp_path, keep):
    folder = copied(undisturbed, tmp_path / "run", names, keep)
    run(recipe_in(folder))
    same(folder, undisturbed)


def test_killed_after_a_stage_was_renamed_and_before_it_was_noted(undisturbed, recipe_in, names, tmp_path):
    folder = copied(undisturbed, tmp_path / "run", names, len(names))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["stages"][names[-1]]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run(recipe_in(folder))
    same(folder, undisturbed)
    assert list(json.loads((folder / "manifest.json").read_text())["stages"]) == names


@pytest.mark.parametrize("stage", ["samples", "judged", "train"])
def test_killed_in_the_middle_of_a_stage(undisturbed, recipe_in, names, tmp_path, stage):
    """Half of its shards; of training a checkpoint and lines of steps that must be repeated."""
    name = f"iteration-2/{stage}"
    folder = copied(undisturbed, tmp_path / "run", names, names.index(name))
    at_work = folder / "iteration-2" / "unfinished" / stage
    shutil.copytree(undisturbed / name, at_work)
    for file in at_work.glob("*.json"):  # what a killed run says of where it is
        moved = {str(undisturbed): str(folder), f"/iteration-2/{stage}": f"/iteration-2/unfinished/{stage}"}
        for old, new in moved.items():
            file.write_text(file.read_text().replace(old, new))
    if stage == "train":
        shutil.rmtree(at_work / "final")
        manifest = json.loads((at_work / "manifest.json").read_text())
        (at_work / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "steps"}))
        shutil.rmtree(at_work / "checkpoint-3")
        first = {path: path.stat().st_mtime_ns for path in (at_work / "checkpoint-2").iterdir()}
    else:
        shards = sorted(at_work.rglob("000*.jsonl"))
        shards[-1].unlink()
        (shards[-1].parent / f".{shards[-1].name}.123.tmp").write_text('{"half a li')
    run(recipe_in(folder))
    same(folder, undisturbed)
    assert not list(folder.rglob(".*.tmp"))
    if stage == "train":  # it went on from there, and did not begin again
        place = folder / "iteration-2" / "train" / "checkpoint-2"
        assert {place / path.name: time for path, time in first.items()} == {
            path: path.stat().st_mtime_ns for path in place.iterdir()
        }


def test_killed_before_the_first_checkpoint(undisturbed, recipe_in, names, tmp_path):
    folder = copied(undisturbed, tmp_path / "run", names, names.index("iteration-1/train"))
    at_work = folder / "iteration-1" / "unfinished" / "train"
    at_work.mkdir(parents=True)
    manifest = json.loads((undisturbed / "iteration-1" / "train" / "manifest.json").read_text())
    (at_work / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "steps"}))
    run(recipe_in(folder))
    same(folder, undisturbed)
    assert not list(folder.rglob("train*.1"))  # nothing was moved aside


def test_files_that_changed_are_refused(undisturbed, recipe_in, names, tmp_path):
    folder = copied(undisturbed, tmp_path / "run", names, 5)
    file = folder / "iteration-1" / "pairs" / "pairs.jsonl"
    file.write_text(file.read_text().replace("kind", "cold", 1))
    with pytest.raises(UserError, match=r"iteration-1/pairs: has changed since it was completed"):
        run(recipe_in(folder))
    shutil.rmtree(folder / "iteration-1" / "pairs")
    with pytest.raises(UserError, match=r"iteration-1/pairs: is gone, and what follows was made from it"):
        run(recipe_in(folder))


def test_another_recipe_is_refused_with_every_difference(undisturbed, small):
    other = EVERY_STAGE[0].replace("0.01", "0.02")
    changed = load_iterate_recipe(QUICKSTART, small(undisturbed, other, EVERY_STAGE[1], "iterate.samples=4"))
    with pytest.raises(UserError) as refused:
        run(changed)
    assert "iterate.samples was 8, is 4; objective.alpha was 0.01, is 0.02; go back to that" in str(refused.value)
    harmless = load_iterate_recipe(
        QUICKSTART, small(undisturbed, *EVERY_STAGE, "training.per_device_eval_batch_size=2")
    )
    assert run(harmless) == undisturbed


def test_a_folder_of_something_else_is_left_alone(recipe_in, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="exists and is not an iterative run; give another folder"):
        run(recipe_in(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_killed_while_it_wrote_its_first_file(recipe_in, undisturbed, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".manifest.json.123.tmp").write_text('{"recipe": ')
    assert run(recipe_in(tmp_path / "run")) == tmp_path / "run"
    same(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("stage", ["samples", "train"])
def test_a_run_may_be_moved_between_two_starts(undisturbed, recipe_in, names, tmp_path, stage):
    """Killed in the middle of a stage, moved, started again."""
    folder = copied(undisturbed, tmp_path / "moved", names, names.index(f"iteration-2/{stage}"))
    at_work = folder / "iteration-2" / "unfinished" / stage
    shutil.copytree(undisturbed / "iteration-2" / stage, at_work)
    if stage == "train":
        shutil.rmtree(at_work / "final")
        manifest = json.loads((at_work / "manifest.json").read_text())
        (at_work / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "steps"}))
    assert str(undisturbed) in (at_work / "manifest.json").read_text()
    run(recipe_in(folder))
    same(folder, undisturbed)


def test_what_each_iteration_draws_is_its_own(undisturbed):
    """Seeds differ by iteration and purpose; the calibration response is the reference's, and of the same prompt."""
    pools = {
        (t, role): json.loads((undisturbed / f"iteration-{t}" / role / "manifest.json").read_text())
        for t in (1, 2)
        for role in ("samples", "calibration")
    }
    assert len({pool["seed"] for pool in pools.values()}) == 4
    base = pools[1, "samples"]["model_sha256"]
    assert pools[1, "calibration"]["model_sha256"] == pools[2, "calibration"]["model_sha256"] == base
    assert pools[2, "samples"]["model_sha256"] != base
    for t in (1, 2):
        place = undisturbed / f"iteration-{t}"
        drawn = {row["prompt"]: row["ids"][0] for row in read_rows(place / "calibration" / "shards" / "00000.jsonl")}
        pairs = read_rows(place / "pairs" / "pairs.jsonl")
        assert all(row["calibration_ids"] == drawn[row["prompt"]] for row in pairs)
        samples = {row["prompt"]: row for row in read_rows(place / "samples" / "shards" / "00000.jsonl")}
        for row in pairs:
            mine = samples[row["prompt"]]
            assert row["chosen_ids"] == mine["ids"][row["sample_chosen"]]
            assert row["rejected_ids"] == mine["ids"][row["sample_rejected"]]
        counts = json.loads((place / "pairs" / "counts.json").read_text())
        assert counts["unfinished"] == sum(not done for row in samples.values() for done in row["finished"]) > 0
        assert counts["prompts"] == len(pairs) + sum(counts[k] for k in ("short", "unjudged", "ties", "identical"))


def test_two_drivers_do_not_work_on_one_run(undisturbed, recipe_in):
    import fcntl

    handle = os.open(undisturbed, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="another process is writing there"):
            run(recipe_in(undisturbed))
    finally:
        os.close(handle)


# --- killed for real -------------------------------------------------------------------------------------------------


def started(folder: Path, small) -> subprocess.Popen[bytes]:
    words = [sys.executable, "scripts/iterate.py", str(QUICKSTART), *small(folder, *EVERY_STAGE)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(words, cwd=QUICKSTART.parents[2], start_new_session=True, **quiet)


@pytest.mark.slow
def test_killed_at_random_moments(undisturbed, small, tmp_path, record_property):
    """SIGKILL of the whole group at least ten times, each a random while after something appeared that never was."""
    draws, folder, kills, seen, known = random.Random(0), tmp_path / "run", 0, set(), set()
    while True:
        process = started(folder, small)
        while listed(folder) <= known and process.poll() is None:
            time.sleep(0.005)
        known |= listed(folder)
        deadline = time.monotonic() + draws.random() * draws.choice((0.03, 0.3, 1.0))
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        if process.poll() is not None:
            break
        seen |= {path.name for path in folder.rglob("unfinished/*") if path.is_dir()}
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    print(f"{kills} kills; at work then: {sorted(seen)}")
    assert process.returncode == 0 and kills >= 10
    same(folder, undisturbed)


def listed(folder: Path) -> set[str]:
    """The shards, checkpoints and stages that are there, at work or complete."""
    return {
        str(p.relative_to(folder)) for p in folder.rglob("*") if not p.name.startswith((".", "recipe", "manifest"))
    }


@pytest.mark.slow
def test_killing_the_driver_alone_leaves_no_orphan_at_work(undisturbed, small, tmp_path):
    import psutil

    folder = tmp_path / "run"
    process = started(folder, small)
    while not (folder / "iteration-1" / "unfinished" / "train" / "manifest.json").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert started(folder, small).wait(timeout=300) == 0
    same(folder, undisturbed)
