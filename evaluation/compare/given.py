"""Preferences that are given (`data.train`) in place of drawn ones: prepared once, and every run trains on that file.

FOLDER/pairs.jsonl has the rows that can be used, with their token ids; FOLDER/rejected_rows.jsonl the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignment.errors import UserError
from alignment.files import iterate_json_lines, read_text, write_json_lines
from evaluation.compare.plan import GIVEN, Arm, Prompts
from evaluation.compare.recipe import CompareRecipe


def write_given(recipe: CompareRecipe, arms: Sequence[Arm], prompts: Prompts) -> Path:
    """FOLDER/pairs.jsonl from `data.train`.

    Args:
        recipe: with `data.train`.
        arms: if one needs calibration responses, rows without are no pairs of any arm.
        prompts: that judge; `data.overlap` says what becomes of pairs with such a prompt.

    Raises:
        UserError: the data cannot be used, share prompts with those, or are not those that the folder's runs began on.
    """
    from alignment.data import overlap
    from alignment.data.messages import TextRules
    from alignment.data.pipeline import prepare, write_rejected
    from alignment.models import load_tokenizer
    from alignment.objectives.base import row_columns

    model, data, file = recipe.model, recipe.data, recipe.folder / GIVEN
    assert data.train is not None
    prepared = prepare(
        data.train,
        load_tokenizer(model.name_or_path, **model.tokenizing),
        max_length=data.max_length,
        role="train",
        max_rejected_share=data.max_rejected_share,
        calibration=any("calibration" in arm.objective(arm.points[0]).needs for arm in arms),
        seed=recipe.training.seed,
        rules=TextRules.of(data),
        reads=row_columns(*(arm.objective(point) for arm in arms for point in arm.points)),
    )
    for part, where in ((prompts.validation, "compare.validation"), (prompts.test, "evaluation.prompts")):
        judged = overlap.judged_on(None, part, where)
        if data.overlap == "refuse":
            overlap.refuse(prepared.dataset["prompt"], judged)
        elif data.overlap == "drop":
            prepared = overlap.without(prepared, judged)
    for line in prepared.summary():
        print(f"  {line}", flush=True)
    write_rejected(recipe.folder, prepared)
    scored = "reward_chosen" in prepared.dataset.column_names
    reading = [arm.label for arm in arms if "reward" in arm.objective(arm.points[0]).needs and not scored]
    if reading:
        raise UserError(
            f"data.train: {reading[0]} reads reward_chosen and reward_rejected, which the rows do not have: add them, "
            "or leave it out of compare.objectives"
        )
    rows = [{key: value for key, value in row.items() if value is not None} for row in prepared.dataset]
    new = file.with_suffix(".new")
    write_json_lines(new, rows)
    if file.is_file() and read_text(file) != read_text(new):
        new.unlink()
        raise UserError(f"{file}: data.train now gives other pairs; give another training.output_dir")
    new.replace(file)
    return file


def as_pairs(prompts: Prompts, file: Path) -> Prompts:
    """The prompts in the pairs' form: where those are chats, each is what a user says."""
    _, first = next(iter(iterate_json_lines(file)))
    if isinstance(first["prompt"], str):
        return prompts
    asked = [
        [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in part]
        for part in (prompts.validation, prompts.test)
    ]
    return Prompts(*asked)
