"""`alignment iterate`: goes through the stages of every iteration, each once; what is complete is skipped.

Imports nothing heavy: what loads models runs in the processes of `processes.run_stage`. Killed at any moment and
started again, it ends with the files that an undisturbed run has.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from alignment.errors import UserError
from alignment.files import file_digest, iterate_json_lines, read_json_object, write_json_lines, write_text
from alignment.locks import alone, is_leftover, make_folder, remove_unfinished
from alignment.models.card import write_card
from alignment.pipeline.ledger import Ledger, unfinished
from alignment.pipeline.processes import PATIENCE, run_stage
from alignment.processes import plan_batches
from alignment.recipes import IterateRecipe
from alignment.recipes.inspection import flatten
from alignment.recipes.iterate import iteration_folder, iteration_sections
from alignment.recipes.launch import read_launch

PACKAGES = ("alignment", "torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "tokenizers")
SINGLE = ("prompts", "judged", "pairs")  # stages that one process does, whatever the launch


def stages(recipe: IterateRecipe) -> Iterator[tuple[int, str]]:
    """(iteration, stage) in order; `prompts` belongs to none, which is 0."""
    from alignment.objectives import get_objective
    from alignment.objectives.base import reads_reference

    objective = get_objective(recipe.objective.name, **recipe.objective.hyperparameters)
    yield 0, "prompts"
    for iteration in range(1, recipe.iterate.iterations + 1):
        yield iteration, "samples"
        if "calibration" in objective.needs:
            yield iteration, "calibration"
        yield iteration, "judged"
        yield iteration, "pairs"
        if reads_reference(objective):
            yield iteration, "logps"
        yield iteration, "train"


def run(recipe: IterateRecipe, accelerate_config: Path | None = None) -> Path:
    """Carry out what is not there yet; returns the run's folder.

    Args:
        recipe: the whole.
        accelerate_config: of the stages that sample, score and train; None: one plain process each.

    Raises:
        UserError: the folder holds something else, or a run that began otherwise; what a stage said, or what
            stopped it.
        SystemExit: it was interrupted.
    """
    folder = Path(recipe.training.output_dir)
    world = 1 if accelerate_config is None else read_launch(accelerate_config).num_processes
    plan_batches(recipe.training.global_batch_size, 1, world)  # not after hours of sampling
    _refuse_others(folder, recipe)
    make_folder(folder)
    with alone(folder, patience=1.0):
        remove_unfinished(folder)
        ledger = Ledger(folder, {"recipe": recipe.resolved(), "recipe_path": str(recipe.path), **_facts(recipe)})
        write_text(folder / "recipe.yaml", yaml.safe_dump(recipe.resolved(), sort_keys=False))
        for iteration, stage in stages(recipe):
            name = stage if iteration == 0 else f"{iteration_folder('', iteration)}/{stage}"
            if not ledger.done(name):
                _say(recipe, iteration, stage)
                began = time.perf_counter()
                _carry_out(recipe, folder, iteration, stage, accelerate_config)
                ledger.complete(name, time.perf_counter() - began)
            if stage == "train":
                write_json_lines(folder / "metrics.jsonl", [_summary(folder, t) for t in range(1, iteration + 1)])
        ledger.note(chat=_chat(folder), steps=_steps(folder, recipe.iterate.iterations))
        _point_to_last(folder, recipe.iterate.iterations)
        write_card(folder, folder)
        for work in (*folder.glob("unfinished"), *folder.glob("iteration-*/unfinished")):
            work.rmdir()
    return folder


def _carry_out(recipe: IterateRecipe, folder: Path, iteration: int, stage: str, config: Path | None) -> None:
    """One stage, into its unfinished folder."""
    place = folder if iteration == 0 else iteration_folder(folder, iteration)
    work = unfinished(place / stage)
    work.parent.mkdir(parents=True, exist_ok=True)
    with alone(work.parent, PATIENCE):
        pass  # what a killed driver had started has ended
    words = [stage, str(folder), str(iteration)]
    if stage in ("logps", "train"):
        text = yaml.safe_dump(iteration_sections(recipe, folder, iteration), sort_keys=False)
        write_text(place / "recipe.yaml", text)
    if stage == "train":
        return _train(work, words, config)
    if stage in ("prompts", "pairs", "logps"):
        shutil.rmtree(work, ignore_errors=True)  # these are not resumed: a fresh folder
    run_stage(words, None if stage in SINGLE else config)


def _train(work: Path, words: list[str], config: Path | None) -> None:
    """Train, or go on from the newest checkpoint; a run that was complete when the driver was killed is left alone."""
    if not _trained(work):
        if any(work.glob("checkpoint-*/files.json")):
            words = [*words, "--resume"]
        elif work.exists():  # killed before its first checkpoint: nothing to go on from
            shutil.rmtree(work)
        run_stage(words, config)
    manifest = work / "manifest.json"  # it says where it is: where it will be
    write_text(manifest, manifest.read_text(encoding="utf-8").replace(str(work), str(work.parents[1] / work.name)))


def _trained(run: Path) -> bool:
    """Whether a training run has done everything; the number of its steps is written last."""
    manifest = run / "manifest.json"
    return manifest.is_file() and "steps" in read_json_object(manifest)


def _say(recipe: IterateRecipe, iteration: int, stage: str) -> None:
    where = "all iterations" if iteration == 0 else f"iteration {iteration} of {recipe.iterate.iterations}"
    print(f"== {where}: {stage}", flush=True)


def _facts(recipe: IterateRecipe) -> dict[str, Any]:
    from alignment.objectives import get_objective

    card = get_objective(recipe.objective.name, **recipe.objective.hyperparameters).card
    return {
        "method": {"title": card.title, "paper": card.paper},
        "seed": recipe.training.seed,
        "versions": {name: version(name) for name in PACKAGES},
        "objective_file_sha256": _objective_digest(recipe),
    }


def _objective_digest(recipe: IterateRecipe) -> str | None:
    return None if recipe.objective.file is None else file_digest(Path(recipe.objective.file))


def _refuse_others(folder: Path, recipe: IterateRecipe) -> None:
    """UserError unless the folder is empty, or holds a run of this recipe (apart from what changes no result)."""
    if not folder.exists() or (folder.is_dir() and all(is_leftover(file) for file in folder.iterdir())):
        return
    manifest = read_json_object(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
    if "stages" not in manifest:
        raise UserError(f"training.output_dir: {folder} exists and is not an iterative run; give another folder")
    before, now = dict(flatten(manifest["recipe"])), dict(flatten(recipe.resolved()))
    # The prompts of the evaluation were compared with those of the training when the run began.
    free = {f"training.{key}" for key in recipe.training.NO_EFFECT_ON_RESULT}
    free |= {f"evaluation.{key}" for key in ("samples_per_prompt", "bootstrap", "seed")}
    differences = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key) and key not in free
    ]
    if differences:
        raise UserError(
            f"{folder} began with another recipe: {'; '.join(differences)}; go back to that, or give another "
            "training.output_dir"
        )
    if manifest.get("objective_file_sha256") != _objective_digest(recipe):
        raise UserError(f"{folder}: {recipe.objective.file} is not the file that the run began with")
    for name, was in manifest.get("versions", {}).items():
        if was != version(name):
            print(f"warning: {folder} began with {name} {was}, this is {version(name)}", flush=True)


def _chat(folder: Path) -> bool:
    _, row = next(iterate_json_lines(folder / "prompts" / "prompts.jsonl"))
    return not isinstance(row["prompt"], str)


def _summary(folder: Path, iteration: int) -> dict[str, Any]:
    """A line of RUN/metrics.jsonl: of the samples of pi_t, and of the training that made pi_{t+1} of them."""
    place = iteration_folder(folder, iteration)
    counts = read_json_object(place / "pairs" / "counts.json")
    lines = [row for _, row in iterate_json_lines(place / "train" / "metrics.jsonl")]
    trained: dict[str, Any] = next((row for row in reversed(lines) if "loss" in row), {})
    found: dict[str, Any] = {
        "step": iteration,
        "pairs": counts["pairs"],
        "samples/finished": 1 - counts["unfinished"] / counts["samples"],
        "samples/different": counts["different"],
        "samples/tokens": counts["mean_tokens"],
        **{key: trained[key] for key in ("loss", "rewards/accuracies", "rewards/margins", "kl") if key in trained},
    }
    return found | ({"reward": counts["mean_reward"]} if "mean_reward" in counts else {})


def _steps(folder: Path, iterations: int) -> int:
    """Optimiser steps of all iterations together."""
    files = [iteration_folder(folder, t) / "train" / "manifest.json" for t in range(1, iterations + 1)]
    return sum(int(read_json_object(file)["steps"]) for file in files)


def _point_to_last(folder: Path, iterations: int) -> None:
    """RUN/final is the last iterate."""
    link, beside = folder / "final", folder / ".final"
    beside.unlink(missing_ok=True)
    beside.symlink_to(iteration_folder("", iterations) / "train" / "final")
    os.replace(beside, link)
