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


