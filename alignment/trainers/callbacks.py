"""Callbacks of every trainer: the metrics file, a missed evaluation, the end of a finished run, the progress bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from alignment.files import iterate_json_lines, jsonable, write_json_lines


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
