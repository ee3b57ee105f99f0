"""The files of a run directory that training writes: manifest.json, metrics.jsonl, preferences.jsonl.

Each file appears whole or, for metrics.jsonl, grows by whole lines. Not the report and
not the win rate: `evaluation` adds those.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from alignment.errors import UserError
from alignment.files import (
    file_digest,
    iterate_json_lines,
    jsonable,
    read_json_object,
    write_json,
    write_json_lines,
)
from alignment.recipes import AnyRecipe, Recipe

CHECKPOINT_FILES = "files.json"
PACKAGES = ("alignment", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "tokenizers")


def move_aside(run: Path) -> Path | None:
    """Make room for a fresh run: an earlier run in the same folder is kept under the next free number."""
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return None
    if not (run / "manifest.json").is_file():
        raise UserError(f"training.output_dir: {run} exists and is not a run of ours; give another folder")
    number = 1
    while (aside := run.with_name(f"{run.name}.{number}")).exists():
        number += 1
    run.rename(aside)
    return aside


def undo_unless_begun(run: Path, aside: Path | None) -> None:
    """After a mistake stopped a fresh run: remove what it wrote and put the earlier run back.

    Once there are metrics, a checkpoint or the trained model the run has begun, and it is kept.
    """
    if any(path.exists() for path in (run / "metrics.jsonl", run / "final", *run.glob("checkpoint-*"))):
        return
    shutil.rmtree(run)
    if aside is not None:
        aside.rename(run)
        print(f"{run} is the earlier run again", flush=True)


def last_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint to resume from: a process may have been killed while it wrote the last one.

    Raises:
        UserError: there is none.
    """
    found = _checkpoints(run)
    if not found:
        raise UserError(f"--resume: {run} holds no checkpoint; set training.save_strategy=steps, or start afresh")
    problems = [_what_is_missing(checkpoint) for checkpoint in found]
    whole = next((c for c, problem in zip(found, problems, strict=True) if problem is None), None)
    if whole is None:
        raise UserError(f"--resume: no checkpoint of {run} is whole: {found[0].name} {problems[0]}; start afresh")
    if whole != found[0] and PartialState().is_main_process:
        print(f"{found[0].name} {problems[0]}: resuming from {whole.name}", flush=True)
    return whole


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint; None where there is none."""
    return next((c for c in _checkpoints(run) if _what_is_missing(c) is None), None)


def _checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def _what_is_missing(checkpoint: Path) -> str | None:
    """What `CheckpointFiles` listed and is not there, whole; None where all of it is."""
    listed = checkpoint / CHECKPOINT_FILES
    if not listed.is_file():
        return f"has no {CHECKPOINT_FILES}, which is written last"
    for name, size in read_json_object(listed).items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            return f"lacks {name}" if not file.is_file() else f"has a damaged {name}"
    return None


def objective_digest(recipe: Recipe) -> str | None:
    """SHA-256 of the user's objective file; None for a built-in objective."""
    return None if recipe.objective.file is None else file_digest(Path(recipe.objective.file))


def refuse_other_recipe(run: Path, recipe: AnyRecipe) -> None:
    """Resuming under another recipe would be neither run; keys that change no result may differ.

    Raises:
        UserError: naming the first key whose value differs from the manifest's.
    """
    manifest = read_json_object(run / "manifest.json")
    before = manifest["recipe"]
    if isinstance(recipe, Recipe) and manifest.get("objective_file_sha256") != objective_digest(recipe):
        raise UserError(f"--resume: {recipe.objective.file} is not the file that {run} began with")
    # Where evaluations steer the run (best model, plateau schedule), so does when they happen.
    free = frozenset() if recipe.training.what_needs_evaluation() else recipe.training.NO_EFFECT_ON_RESULT
    resolved = json.loads(json.dumps(recipe.resolved()))
    for section in sorted(set(before) | set(resolved)):
        old, new = before.get(section) or {}, resolved.get(section) or {}
        for key in sorted(set(old) | set(new)):
            found = _difference(f"{section}.{key}", old.get(key), new.get(key))
            if found is not None and not (section == "training" and key in free):
                where, was, now = found
                raise UserError(f"--resume: {where} is {now!r} but {run} began with {was!r}")


def _difference(where: str, old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """The first place inside where two values differ, and both values there; an absent key is None."""
    if isinstance(old, dict) and isinstance(new, dict):
        inner = [(f"{where}.{key}", old.get(key), new.get(key)) for key in sorted(set(old) | set(new))]
    elif isinstance(old, list) and isinstance(new, list):
        inner = [(f"{where}[{i}]", was, now) for i, (was, now) in enumerate(itertools.zip_longest(old, new))]
    else:
        return None if old == new else (where, old, new)
    return next(filter(None, (_difference(*item) for item in inner)), None)


def refuse_other_data(run: Path, fingerprint: str) -> None:
    """Resuming on other rows would be neither run.

    Raises:
        UserError: the data's fingerprint is not the manifest's.
    """
    if read_json_object(run / "manifest.json").get("data_fingerprint", fingerprint) != fingerprint:
        raise UserError(f"--resume: the rows are not those {run} began with: other data, or other recorded samples")


def refuse_other_weights(run: Path, digests: dict[str, str]) -> None:
    """Resuming against other frozen weights would be neither run.

    Raises:
        UserError: a frozen model's weights are not the manifest's.
    """
    before = read_json_object(run / "manifest.json").get("frozen_weights", digests)
    for name, digest in digests.items():
        if before.get(name, digest) != digest:
            raise UserError(f"--resume: the weights of the {name} model are not those that {run} began with")


def refuse_other_sharding(run: Path, sharding: str, world: int) -> None:
    """A checkpoint fits the sharding that wrote it: a plain launch finds no optimiser in one of DeepSpeed's, and would
    quietly begin with a fresh one; DeepSpeed's is split over so many processes. (Plain runs and FSDP's may change
    their number of processes.)

    Args:
        run: the run directory.
        sharding: of this launch: none, fsdp, zero1, zero2 or zero3.
        world: processes of this launch.

    Raises:
        UserError: the run began otherwise.
    """
    manifest = read_json_object(run / "manifest.json")
    before, processes = manifest.get("sharding", sharding), manifest["hardware"]["processes"]
    if before != sharding:
        raise UserError(f"--resume: {run} began with sharding {before}, this launch has {sharding}; launch as before")
    if sharding.startswith("zero") and processes != world:
        raise UserError(f"--resume: {run} is split over {processes} processes, this launch has {world}")


def hardware(world: int) -> dict[str, Any]:
    """What this runs on, for the manifest."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "processes": world,
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide the numbers."""
    return {name: version(name) for name in PACKAGES}


class MetricsFile(TrainerCallback):
    """Appends every logged line to metrics.jsonl; on resume, lines of steps that will be repeated are removed.

    A line is logged with every checkpoint, too: the sums since the last line are not in it, so that a resumed run's
    next line would otherwise leave out the steps before.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102 - transformers' hook
        # A checkpoint brings its own intervals; those of the recipe, which may have changed, count.
        state.compute_steps(args, state.max_steps)
        if not state.is_world_process_zero or not self.path.is_file():
            return
        # A killed process may have left half a line; it belongs to a step that is repeated.
        rows = iterate_json_lines(self.path, skip_unfinished=True)
        kept = [row for _, row in rows if row["step"] <= state.global_step]
        write_json_lines(self.path, kept if state.global_step else [])

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        # `best` decides on saving only after it has evaluated.
        best = args.save_strategy == SaveStrategy.BEST and control.should_evaluate
        control.should_log |= control.should_save or best

    def on_epoch_end(self, args, state, control, **kwargs):  # noqa: D102
        self.on_step_end(args, state, control)

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: D102
        if state.is_world_process_zero and logs and "total_flos" not in logs:
            numbers = {name: float(value) for name, value in logs.items()}
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(jsonable({"step": state.global_step, **numbers})) + "\n")


class MissedEvaluation(TrainerCallback):
    """Makes up for an epoch's evaluation that a run was stopped in: its step's checkpoint is written before it.

    To be added after `MetricsFile`, which keeps the lines that count.
    """

    def __init__(self, trainer: Any, metrics: Path):
        self.trainer, self.metrics = trainer, metrics

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102 - transformers' hook
        ended = float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
        if not state.global_step or args.eval_strategy != IntervalStrategy.EPOCH or not ended:
            return
        if args.eval_delay <= state.epoch and not self._is_there(state):
            self.trainer.evaluate()

    def _is_there(self, state: Any) -> bool:
        """What the main process reads; the folder of another machine may not have the file."""
        there = [False]
        if state.is_world_process_zero and self.metrics.is_file():
            rows = (row for _, row in iterate_json_lines(self.metrics))
            there = [any(row["step"] == state.global_step and "eval_loss" in row for row in rows)]
        if PartialState().num_processes > 1:
            broadcast_object_list(there, from_process=0)
        return there[0]


class AllDone(Exception):
    """Training is resumed at its last step: there is nothing left to do."""


class StopWhenDone(TrainerCallback):
    """Raises `AllDone` before the first step of a run whose checkpoint is its last: transformers looks at max_steps
    only after a step, and would train one too many."""

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102 - transformers' hook
        if 0 < state.max_steps <= state.global_step:
            raise AllDone


class CheckpointFiles(TrainerCallback):
    """Ends every checkpoint with a list of its files and their sizes, when all processes have written theirs: resuming
    without an optimizer state, say, would silently begin with a fresh one."""

    def on_save(self, args, state, control, **kwargs):  # noqa: D102 - transformers' hook
        PartialState().wait_for_everyone()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            write_json(folder / CHECKPOINT_FILES, {str(f.relative_to(folder)): f.stat().st_size for f in files})


class CompactProgress(ProgressCallback):
    """transformers' progress bar, with the four numbers worth watching beside it instead of a dictionary a step."""

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: D102 - transformers' hook
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        names = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
        shown = {short: f"{float(logs[name]):.3f}" for short, name in names.items() if name in logs}
        if "displacement/chosen" in logs:
            shown["chosen"] = f"{float(logs['displacement/chosen']):+.2f} nats"
        self.training_bar.set_postfix(shown)
