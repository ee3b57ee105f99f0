"""Stage `logps`: log-probs of an iteration's pairs under the frozen models, before the optimiser needs the memory.

The numbers go to the cache of `alignment.trainers.frozen`, under a key of everything that decides them; training
finds them there, looks at a few, and holds no frozen model. They also stand in logps/logps.jsonl, a row for each pair,
as a record: nothing reads them back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState

from alignment.errors import UserError
from alignment.files import write_json_lines
from alignment.models import load_tokenizer
from alignment.recipes import Recipe
from alignment.runs.lifecycle import begin, setting_up, tokenizer_arguments
from alignment.runs.preferences import build_trainer, given_rows, run_arguments
from alignment.trainers.collation import FROZEN_COLUMNS


def write_logps(recipe: Recipe, out: Path) -> None:
    """Score the pairs of `data.train` as the trainer of this recipe would, by all processes of the launch."""
    state = begin(recipe)
    tokenizer = load_tokenizer(recipe.model.name_or_path, **tokenizer_arguments(recipe))
    rows = given_rows(recipe, "train", tokenizer)
    if rows is None:
        raise UserError(f"{recipe.path}: data.train is missing")
    args = run_arguments(recipe, out, state.num_processes)
    with setting_up():
        trainer = build_trainer(recipe, args, rows.dataset, None, tokenizer)
    scored: Any = trainer.train_dataset
    columns = [name for name in FROZEN_COLUMNS if name in scored.column_names]
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        write_json_lines(out / "logps.jsonl", (dict(row) for row in scored.select_columns(columns)))
    state.wait_for_everyone()
    PartialState().destroy_process_group()
