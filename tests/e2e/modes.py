"""Many trainings, one after another, in one launch: starting Python with torch and DeepSpeed costs more than they do.

    accelerate launch … tests/e2e/modes.py PLAN.json

PLAN.json is a list of `{"recipe": FILE, "overrides": […]}`. With `"resume": STEP` the finished run in that recipe's
folder is moved to `RUN-straight`, its folder is made what a run leaves that was killed after checkpoint STEP, and
training is resumed there. Launched by test_modes.py; not a test itself.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from accelerate import PartialState

from alignment.recipes import Recipe, RewardModelRecipe, load_any
from alignment.runs.preferences import train
from alignment.runs.reward_model import train as train_reward_model

AT_THE_END = ("final", "README.md")  # what training writes when it is done


def interrupt(run: Path, step: int) -> None:
    """Move `run` to `RUN-straight` and copy it back without what is newer than its checkpoint of `step`.

    metrics.jsonl is kept whole: a killed run has logged steps that it must repeat. Of an ensemble's members the last
    is the one that was killed; its own manifest, which is written last, is then not there.
    """
    straight = run.with_name(f"{run.name}-straight")
    run.rename(straight)
    members = sorted(straight.glob("member-*"))
    killed = members[-1] if members else straight
    gone = {straight: ("manifest.json",), killed: AT_THE_END} if members else {straight: AT_THE_END}
    shutil.copytree(straight, run, ignore=lambda folder, _: gone.get(Path(folder), ()))
    for checkpoint in (run / killed.relative_to(straight)).glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)


def carry_out(plan: list[dict[str, Any]]) -> None:
    """Train everything that the plan names, in its order."""
    for job in plan:
        began = time.perf_counter()
        recipe = load_any(job["recipe"], job["overrides"])
        run = Path(recipe.training.output_dir)
        if "resume" in job:
            if PartialState().is_main_process:
                interrupt(run, job["resume"])
            PartialState().wait_for_everyone()
        if isinstance(recipe, RewardModelRecipe):
            train_reward_model(recipe, resume="resume" in job)
        else:
            assert isinstance(recipe, Recipe)
            train(recipe, resume="resume" in job)
        if PartialState().is_main_process:
            print(f"{run.name}: {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    gc.freeze()  # libraries collect garbage between trainings: not among all that was imported, a second each time
    carry_out(json.loads(Path(sys.argv[1]).read_text()))
    PartialState().destroy_process_group()  # as alignment.runs.program
