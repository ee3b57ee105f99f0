"""Two runs on a model with a damaged word, in one launch: one that skips the step, then one that stops at it.

    accelerate launch … tests/e2e/finite_modes.py MODEL FOLDER ROW WORD

Each process writes what it was told into FOLDER/PROCESS.txt. Launched by test_finite_modes.py; not a test itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate import PartialState

from alignment.errors import UserError
from tests.runs.building_runs import recipe, rows, train


def carry_out(model: str, folder: Path, row: int, word: str) -> None:
    """Both runs; `skip` is in FOLDER/run, `stop` in FOLDER/stopped."""
    given, more = rows(row, word), ["training.global_batch_size=4", "training.cpu_threads=1"]
    train(recipe("dpo", Path(model), folder, "training.on_nan=skip", *more, given=given))
    try:
        train(recipe("dpo", Path(model), folder, f"training.output_dir={folder / 'stopped'}", *more, given=given))
        told = "nothing"
    except UserError as error:
        told = str(error)
    (folder / f"{PartialState().process_index}.txt").write_text(told)


if __name__ == "__main__":
    carry_out(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    PartialState().destroy_process_group()
