"""Train from a recipe: what `accelerate launch` starts, as `scripts/train.py` or as `-m alignment.runs.program`.

    accelerate launch scripts/train.py recipes/quickstart/dpo.yaml
    accelerate launch --config_file recipes/accelerate/zero3.yaml scripts/train.py recipes/rpo/zephyr-7b.yaml \
        training.learning_rate=5e-7
    accelerate launch scripts/train.py recipes/quickstart/dpo.yaml --resume

`scripts/sft.py` starts `main_sft`, `scripts/train_reward_model.py` `main_reward_model`. Not a library: see
`alignment.runs.preferences`, `supervised` and `reward_model`.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from alignment.errors import UserError, run_or_exit
from alignment.recipes import AnyRecipe, RecipeError, load_recipe, load_reward_model_recipe, load_sft_recipe
from alignment.recipes.inspection import what_is_missing

SFT_HELP = """Supervised fine-tuning from a recipe with an `sft` section, the step before preference training.

    accelerate launch scripts/sft.py recipes/quickstart/sft.yaml
    accelerate launch scripts/sft.py recipes/quickstart/sft.yaml training.learning_rate=1e-5
    accelerate launch scripts/sft.py recipes/quickstart/sft.yaml --resume
"""


REWARD_MODEL_HELP = """Train a reward model, or an ensemble, from a recipe with a `reward_model` section.

    accelerate launch scripts/train_reward_model.py recipes/quickstart/reward_model.yaml
    accelerate launch scripts/train_reward_model.py recipes/quickstart/reward_model.yaml reward_model.members=5
    accelerate launch scripts/train_reward_model.py recipes/quickstart/reward_model.yaml --resume
"""


def main(argv: Sequence[str] | None = None, report: bool = True) -> None:
    """Words (argv unless given): RECIPE [section.key=value …] [--resume]. Without `report` there is no page."""
    _launch(argv, load_recipe, "alignment.runs.preferences", str(__doc__), report)


def main_sft(argv: Sequence[str] | None = None) -> None:
    """`main` for recipes of supervised fine-tuning."""
    _launch(argv, load_sft_recipe, "alignment.runs.supervised", SFT_HELP)


def main_reward_model(argv: Sequence[str] | None = None) -> None:
    """`main` for recipes of reward models."""
    _launch(argv, load_reward_model_recipe, "alignment.runs.reward_model", REWARD_MODEL_HELP)


def _launch(
    argv: Sequence[str] | None, load: Callable[..., AnyRecipe], trainer: str, text: str, report: bool = True
) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    resume = "--resume" in words
    words = [w for w in words if w != "--resume"]
    if not words or words[0] in ("-h", "--help"):
        print(text)
        raise SystemExit(0 if words else 2)
    if unknown := [w for w in words[1:] if w.startswith("-") or "=" not in w]:
        raise UserError(f"{unknown[0]!r}: expected section.key=value or --resume after the recipe")
    recipe = load(words[0], words[1:])  # before torch: a mistake in the recipe takes no time
    if problems := what_is_missing(recipe):
        raise RecipeError(problems)
    if resume and recipe.training.trl_arguments().get("save_only_model"):
        raise UserError("--resume: checkpoints under training.save_only_model hold no optimiser to resume")
    # Libraries deprecate each other's names; that is not the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # what DeepSpeed calls
    from accelerate import PartialState

    run = importlib.import_module(trainer).train(recipe, resume=resume)
    # Left to the interpreter's end, gloo's threads now and then abort a process that has done all its work.
    PartialState().destroy_process_group()
    if report and PartialState().is_main_process:
        _report(run)


def _report(run: Path) -> None:
    """Pages of a finished run: of every member where it is an ensemble's; held-out accuracy where it was measured."""
    from evaluation.held_out import write_held_out
    from evaluation.report import write_report

    lines = write_held_out(run)  # before the pages, which show it
    members = sorted(run.glob("member-*"))
    for each in members or [run]:
        print(f"report: {write_report(each)}")
    for line in lines:
        print(line)


if __name__ == "__main__":
    run_or_exit(main)
