"""One stage of an iterative run, in its own process (`processes`) or in those of an `accelerate launch`.

    python -m alignment.pipeline.stage NAME RUN ITERATION [--resume]

Reads RUN/recipe.yaml, and what earlier stages left; writes RUN/iteration-ITERATION/unfinished/NAME. Started by
`driver`, which renames that folder.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignment.files import read_json_object
from alignment.locks import alone
from alignment.pipeline.ledger import unfinished
from alignment.pipeline.processes import PATIENCE, complaining, die_with_parent
from alignment.recipes import IterateRecipe, load_iterate_recipe, load_recipe
from alignment.recipes.iterate import iterate_model, iteration_folder, reference_model

SAMPLES_PER_SHARD = 512  # drawn or judged anew after a kill, at most


def main(words: Sequence[str]) -> None:
    """Words: NAME RUN ITERATION [--resume]."""
    name, run, iteration = words[0], Path(words[1]), int(words[2])
    place = run if iteration == 0 else iteration_folder(run, iteration)
    out = unfinished(place / name)
    if name == "train":
        from alignment.runs.program import main as launched

        with _main_process_alone(out.parent):
            # The report comes when the run is where it stays.
            return launched([str(place / "recipe.yaml"), f"training.output_dir={out}", *words[3:]], report=False)
    recipe = load_iterate_recipe(run / "recipe.yaml")
    stages: dict[str, Callable[..., None]] = {
        "prompts": _prompts,
        "samples": _samples,
        "calibration": _calibration,
        "judged": _judged,
        "pairs": _pairs,
        "logps": _logps,
    }
    with _main_process_alone(out.parent):
        stages[name](recipe, run, iteration, out)


def run(words: list[str]) -> None:
    """`main` as a child of the driver."""
    die_with_parent()
    driver = multiprocessing.parent_process()
    if driver is not None and not driver.is_alive():  # it was killed before this could ask to be told
        return
    try:
        complaining(words, lambda: main(words))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _main_process_alone(work: Path) -> contextlib.AbstractContextManager[None]:
    """Processes of a killed driver may still be ending: they are waited for. Of a launch one holds the lock."""
    return alone(work, PATIENCE) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext()


def _prompts(recipe: IterateRecipe, run: Path, iteration: int, out: Path) -> None:
    from alignment.pipeline.prompts import write_prompts

    write_prompts(recipe, out)


def _samples(recipe: IterateRecipe, run: Path, iteration: int, out: Path) -> None:
    _draw(recipe, run, iteration, out, iterate_model(recipe, run, iteration), recipe.iterate.samples, "samples")


def _calibration(recipe: IterateRecipe, run: Path, iteration: int, out: Path) -> None:
    _draw(recipe, run, iteration, out, reference_model(recipe, run, iteration), 1, "calibration")


def _draw(
    recipe: IterateRecipe, run: Path, iteration: int, out: Path, model: dict[str, Any], n: int, role: str
) -> None:
    """n samples of a model for every prompt of the iteration, by all processes of the launch."""
    from accelerate import PartialState

    from alignment.models import load_tokenizer
    from alignment.models.chat import DATE, pin_date
    from alignment.models.pools import sample_pool
    from alignment.models.sampling import Generation
    from alignment.pipeline.prompts import read_prompts, seed_of
    from alignment.runs.lifecycle import begin, tokenizer_arguments

    state = begin(recipe)
    tokenizer = load_tokenizer(recipe.model.name_or_path, **tokenizer_arguments(recipe))
    pin_date(tokenizer, read_json_object(run / "prompts" / "counts.json").get(DATE))
    prompts = [row["prompt"] for row in read_prompts(run, iteration)]
    load = {key: value for key, value in model.items() if key != "end_of_turn"}  # the tokenizer has it
    settings = {k: v for k, v in recipe.generation.drawing.items() if k != "seed"}
    pool = sample_pool(
        load,
        tokenizer,
        prompts,
        out,
        n,
        generation=Generation(**settings),
        seed=seed_of(recipe.generation.seed, iteration, role),
        prompts_per_shard=max(1, SAMPLES_PER_SHARD // n),
        progress=f"  {role}",
    )
    if state.is_main_process:
        print(f"  {pool.prompts} prompts, {pool.prompts * pool.n} responses", flush=True)
    PartialState().destroy_process_group()


def _judged(recipe: IterateRecipe, run: Path, iteration: int, out: Path) -> None:
    from alignment.pipeline.judging import judge_samples
    from alignment.pipeline.prompts import judge_at_the_start

    judge_samples(recipe, iteration_folder(run, iteration) / "samples", out, judge_at_the_start(run))


def _pairs(recipe: IterateRecipe, run: Path, iteration: int, out: Path) -> None:
    from alignment.pipeline.pairing import write_pairs

    write_pairs(recipe, iteration_folder(run, iteration), iteration, out)


def _logps(recipe: IterateRecipe, run: Path, iteration: int, out: Path) -> None:
    from alignment.pipeline.logps import write_logps

    write_logps(load_recipe(iteration_folder(run, iteration) / "recipe.yaml"), out)


if __name__ == "__main__":
    die_with_parent()
    complaining(sys.argv[1:], lambda: main(sys.argv[1:]))
