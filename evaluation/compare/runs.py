"""The training runs of a comparison, one by one, each in processes of its own; what is complete is left as it is.

A run is a normal run directory, whose page `alignment report RUN` writes, and FOLDER/recipes has its recipe. Killed
anywhere, the same command goes on: an iterative run at its last stage, another one at its last whole checkpoint where
its recipe writes any, else from its start.
"""

from __future__ import annotations

import multiprocessing
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from alignment.data.prompt_files import read_prompts
from alignment.errors import UserError, run_or_exit
from alignment.files import (
    PACKAGE_SCHEME,
    file_digest,
    iterate_json_lines,
    json_digest,
    package_file,
    read_json_object,
    write_json,
    write_text,
)
from alignment.pipeline.processes import PRELOADED, die_with_parent
from alignment.recipes import IterateRecipe
from alignment.recipes.inspection import flatten
from alignment.recipes.iterate import iteration_folder
from evaluation.compare.plan import Run, point_name
from evaluation.compare.recipe import CompareRecipe

COST = "cost.json"  # of the run, beside its manifest
EVERY = 0.2  # seconds between two looks at memory


def done(run: Run) -> bool:
    """Whether everything of a run is there; the number of its steps is written last."""
    manifest = run.folder / "manifest.json"
    return (run.folder / "final").is_dir() and "steps" in read_json_object(manifest)


def refuse_changes(runs: Sequence[Run]) -> None:
    """UserError where a run directory began with another recipe, naming the differences.

    What changes no result may differ; so may what measures policies, since that is measured anew.
    """
    for run in runs:
        manifest = run.folder / "manifest.json"
        if not manifest.is_file():
            continue
        before = dict(flatten(read_json_object(manifest).get("recipe") or {}))
        now = dict(flatten(run.recipe.resolved()))
        free = {f"training.{key}" for key in run.recipe.training.NO_EFFECT_ON_RESULT}
        found = [
            f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
            for key in sorted(before | now)
            if before.get(key) != now.get(key) and key not in free and not key.startswith("evaluation")
        ]
        if found:
            raise UserError(
                f"{run.folder} began with another recipe: {'; '.join(found)}; go back to that, or give another "
                "training.output_dir"
            )


def refuse_other_start(recipe: CompareRecipe) -> None:
    """UserError where the start's files, or the prompts that pairs are drawn for, are not those that runs began with.

    FOLDER/begun.json has what the first command with runs found. A model of the hub has no files here; its revision is
    the recipe's. Given pairs are compared by themselves (`given`).
    """
    sample, other = recipe.data.sample, "go back to that, or give another training.output_dir"
    prompts = [] if sample is None else read_prompts(sample.prompts, sample.limit)
    now = {**_files_of(recipe), "data.sample.prompts": json_digest(prompts)}
    kept = recipe.folder / "begun.json"
    before = read_json_object(kept) if kept.is_file() and (recipe.folder / "runs").is_dir() else now
    for name in sorted(before | now):
        if before.get(name) != now.get(name):
            raise UserError(f"{name} is not what the runs in {recipe.folder} began with; {other}")
    write_json(kept, now)


def _files_of(recipe: CompareRecipe) -> dict[str, str]:
    """Digest of every file of the start, adapters' bases included: what decides weights, tokens and template."""
    from alignment.models.loading import adapter_base

    def local(name: str) -> Path:
        return package_file(name) if name.startswith(PACKAGE_SCHEME) else Path(name).expanduser()

    given = {"model.name_or_path": recipe.model.name_or_path, "model.adapter": recipe.model.adapter}
    bases = {f"base of {key}": adapter_base(str(local(name))) for key, name in given.items() if name is not None}
    found: dict[str, str] = {}
    for key, name in {**given, **bases}.items():
        place = None if name is None else local(name)
        files = [] if place is None else sorted(place.iterdir()) if place.is_dir() else [place]
        kept = (file for file in files if file.is_file() and file.suffix != ".md" and not file.name.startswith("."))
        found |= {f"{key}: {file.name}": file_digest(file) for file in kept}
    return found


def carry_out(runs: Sequence[Run], folder: Path, what: str) -> None:
    """Train what is not complete.

    Args:
        runs: in order.
        folder: of the comparison.
        what: said of them on the terminal.

    Raises:
        UserError: a run was stopped by something that it did not say itself.
        SystemExit: it has said itself what is wrong.
    """
    for number, run in enumerate(runs, start=1):
        where = f"== {what} {number} of {len(runs)}: {run}"
        if done(run):
            print(f"{where}: complete", flush=True)
            continue
        print(where, flush=True)
        began = time.perf_counter()
        with Memory() as memory:
            whole = _train(run, folder)
        seconds = time.perf_counter() - began
        if whole:  # of a run that goes on the time before is not known
            write_json(run.folder / COST, {"seconds": round(seconds, 2), "peak_memory": memory.peak})
        print(f"   {seconds:.1f} s", flush=True)


def _train(run: Run, folder: Path) -> bool:
    """Train a run, or go on with it; whether all of it was done now."""
    if isinstance(run.recipe, IterateRecipe):
        from alignment.pipeline.driver import run as iterate

        whole = not run.folder.exists()
        run.recipe._document.source = str(_written(run, folder))
        iterate(run.recipe)
        return whole
    words = [str(_written(run, folder))]
    if any(run.folder.glob("checkpoint-*/files.json")):
        words.append("--resume")
    elif run.folder.exists():  # killed before its first checkpoint: nothing to go on from
        shutil.rmtree(run.folder)
    context = multiprocessing.get_context("forkserver")  # imports once; the same one that iterations use
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_child, args=(words,))
    process.start()
    process.join()
    if process.exitcode in (2, 130):
        raise SystemExit(process.exitcode)
    if process.exitcode:
        raise UserError(f"{run}: training ended with code {process.exitcode}; the same command goes on from there")
    return "--resume" not in words


def _child(words: list[str]) -> None:
    from alignment.runs.program import main as launched

    die_with_parent()
    try:
        run_or_exit(lambda: launched(words, report=False))  # half of a tiny run's time; `alignment report` writes it
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _written(run: Run, folder: Path) -> Path:
    """The run's recipe as a file that `alignment train`, or `iterate`, takes."""
    name = f"{run.arm.label}-{point_name(run.arm, run.value)}-seed-{run.seed}.yaml"
    file = folder / "recipes" / name
    write_text(file, yaml.safe_dump(run.recipe.resolved(), sort_keys=False))
    return file


class Memory:
    """The largest resident set of any process that this one started, in bytes, looked at every EVERY seconds.

    It holds the libraries, too (some 0.6 GB), and nothing of a GPU's memory.
    """

    def __init__(self) -> None:
        self.peak, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._over.wait(EVERY):
            try:
                sizes = [child.memory_info().rss for child in me.children(recursive=True)]
            except psutil.Error:  # one has just ended
                continue
            self.peak = max(self.peak, *sizes, 0)


# --- what a complete run says of itself ------------------------------------------------------------------------------


def _trainings(run: Run) -> list[dict[str, Any]]:
    """The manifest of each training of a complete run: one, or one for each iteration."""
    if not isinstance(run.recipe, IterateRecipe):
        return [read_json_object(run.folder / "manifest.json")]
    numbers = range(1, run.recipe.iterate.iterations + 1)
    return [read_json_object(iteration_folder(run.folder, t) / "train" / "manifest.json") for t in numbers]


def pairs_files(run: Run) -> list[Path]:
    """The preferences that a run trained on; of an iterative run those of each iteration."""
    if isinstance(run.recipe, IterateRecipe):
        numbers = range(1, run.recipe.iterate.iterations + 1)
        return [iteration_folder(run.folder, t) / "pairs" / "pairs.jsonl" for t in numbers]
    if run.recipe.data.train is not None:
        return [Path(run.recipe.data.train[0].name)]
    return [run.folder / "preferences.jsonl"]


def facts_of(run: Run) -> dict[str, Any]:
    """Of a complete run: what it cost, and what must be equal for all of a seed.

    Returns:
        steps, batch; start_sha256 (None where the start is no reference); pairs, pairs_sha256 (None where the run
        samples again); trained_tokens = steps x batch x mean tokens of a pair, prompt twice; training_seconds, without
        sampling, judging, loading and saving; seconds and peak_memory of everything. The last three are None for a run
        that was stopped and gone on with.
    """
    manifest, files = read_json_object(run.folder / "manifest.json"), pairs_files(run)
    rows = [row for file in files for _, row in iterate_json_lines(file)]
    lengths = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows]
    batch, steps = run.recipe.training.global_batch_size, int(manifest["steps"])
    cost = read_json_object(run.folder / COST) if (run.folder / COST).is_file() else {}
    digest = file_digest(files[0]) if len(files) == 1 else None
    return {
        "steps": steps,
        "batch": batch,
        "pairs": len(rows),
        "start_sha256": (manifest.get("frozen_weights") or {}).get("start"),
        "pairs_sha256": None if isinstance(run.recipe, IterateRecipe) else digest,
        "trained_tokens": round(steps * batch * sum(lengths) / len(lengths)),
        "training_seconds": sum(one["wall_seconds"]["training"] for one in _trainings(run)) if cost else None,
        "seconds": cost.get("seconds"),
        "peak_memory": cost.get("peak_memory") or None,
    }


def refuse_unequal(facts: Sequence[tuple[Run, dict[str, Any]]]) -> None:
    """UserError unless all runs made as many updates of as many pairs, on the same pairs within a seed."""
    for key in ("steps", "batch"):
        if len({one[key] for _, one in facts}) > 1:
            shown = ", ".join(f"{run}: {one[key]}" for run, one in facts)
            raise UserError(f"the runs differ in {key} ({shown}), and would not be compared fairly")
    starts = {one["start_sha256"]: run for run, one in facts if one["start_sha256"] is not None}
    if len(starts) > 1:
        shown = " and ".join(str(run.folder) for run in starts.values())
        raise UserError(f"{shown} started from different weights, and would not be compared fairly")
    by_seed: dict[int, dict[str, Run]] = {}
    for run, one in facts:
        if one["pairs_sha256"] is not None:
            by_seed.setdefault(run.seed, {})[one["pairs_sha256"]] = run
    for different in by_seed.values():
        if len(different) > 1:
            shown = " and ".join(str(run.folder) for run in different.values())
            raise UserError(f"{shown} trained on different pairs, and would not be compared fairly")
