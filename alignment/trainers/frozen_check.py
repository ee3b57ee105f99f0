"""Whether what is called frozen is frozen: shown before training, and once more after the first update.

    check.show(model, rows)            # before the first step: the frozen models do not read the policy's weights
    check.begin(model, rows, start)    # start.json: the first rows under the start and under the frozen models
    check.resume(model, …)             # of a resumed run: its frozen models are those that it began with
    trainer.add_callback(check)        # after the first update: the frozen models have not moved

A copy of a model can compute with the original's weights (a `forward` that a trainer has put on it is copied with its
closure). At step 0 both are equal, so that no comparison of numbers shows it: weights have to be changed.

FSDP splits weights in a form that cannot be changed from outside: there only the second look, after the update, is
taken. Log-probs that were precomputed are constants, and there is nothing to look at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from alignment.errors import UserError
from alignment.models.digest import gathered_parameter
from alignment.models.scoring import relative_gap
from alignment.trainers.checks import read_start, write_start

CHANGED = 2**22  # weights that are changed at once, at most: their copies are held meanwhile
NAMES = {"ref": "reference", "prev": "previous iterate"}

Rows = dict[str, torch.Tensor]


class FrozenCheck(TrainerCallback):
    """Looks at the frozen models of a trainer; every process calls each method, with rows of one shape.

    Attributes:
        start: `[B, k]` log-probs of the run's first rows under the starting model, and those rows; None before.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.start: tuple[Rows, torch.Tensor] | None = None
        self._rate = 0.0
        self._before: dict[str, torch.Tensor] = {}

    def show(self, model: Any, rows: Rows) -> None:
        """Change weights of the policy, and demand that its log-probs move and the frozen models' do not.

        Args:
            model: the policy as it is trained, wrapped.
            rows: `paired`, the first of each branch is scored.

        Raises:
            UserError: a frozen model computes with the policy's weights, or the policy with those of another.
        """
        trainer = self.trainer
        if trainer.is_fsdp_enabled:
            return
        size = len(rows["row_ids"]) // trainer._branches
        row = {key: value[::size] for key, value in rows.items()}
        training = model.training
        model.eval()
        before = self._scored(model, row)
        if len(before) == 1:  # nothing is frozen
            model.train(training)
            return
        if trainer._any_process(not all(bool(values.isfinite().all()) for values in before.values())):
            model.train(training)
            return  # nothing to see on this row; training stops at it, or skips its step and shows the next one
        again = self._scored(model, row)
        weights = some_weights([p for p in trainer.model.parameters() if p.requires_grad])
        with changed(weights):
            during = self._scored(model, row)
        model.train(training)
        moved = {name: _moved(during[name], before[name], again[name]) for name in before}
        if trainer._any_process(bool(weights) and not moved.pop("policy", False)):
            raise UserError(
                "model: its log-probs do not change with its weights: its forward is another model's, as that of a "
                "copy of a model that a trainer has had (load it from disk), or its adapter is of a kind that starts "
                "at a standstill (HRA) or does not touch these rows (TrainableTokens)"
            )
        for name, gap in moved.items():
            if trainer._any_process(bool(gap)):
                raise UserError(
                    f"{NAMES[name]}: its log-probs change with the policy's weights by a relative {gap:.2g}, so that "
                    "it is not frozen: give `ref_model`, or load the model from disk"
                )

    def _scored(self, model: Any, row: Rows) -> dict[str, torch.Tensor]:
        trainer = self.trainer
        with torch.no_grad(), trainer.accelerator.autocast():
            policy = trainer._score(model, row)
        return {"policy": policy} | trainer.frozen_scores(model, row)

    def begin(self, model: Any, rows: Rows, start: torch.Tensor) -> None:
        """A fresh run: keep its first rows (of the main process) with their log-probs in start.json."""
        trainer = self.trainer
        frozen = trainer.frozen_scores(model, rows)
        if trainer.accelerator.is_main_process:
            write_start(self._file, rows, start, frozen)
        trainer.accelerator.wait_for_everyone()
        self._read(model)

    def resume(self, model: Any, starts_at_reference: bool) -> None:
        """A resumed run: its frozen models must be those that it began with.

        Raises:
            UserError: they score the first rows otherwise.
        """
        trainer = self.trainer
        kept = self._read(model)
        if self.start is not None and starts_at_reference:  # files of earlier versions have nothing else
            kept = {"ref": self.start[1]} | kept
        for name, now in self._before.items():
            gap = relative_gap(now, kept[name]) if name in kept else 0.0
            if trainer._any_process(gap > trainer.tolerance):
                raise UserError(
                    f"--resume: the {NAMES[name]}'s log-probs are off by a relative {gap:.2g} from the model that "
                    f"this run began with: the weights behind {trainer.model.config._name_or_path!r} have changed"
                )

    @property
    def _file(self) -> Path:
        return Path(str(self.trainer.args.output_dir)) / "start.json"

    def _read(self, model: Any) -> dict[str, torch.Tensor]:
        """The frozen log-probs that start.json keeps. What the main process reads: the folder of another machine may
        not have the file."""
        accelerator = self.trainer.accelerator
        kept = read_start(self._file, torch.device("cpu")) if accelerator.is_main_process else None
        if accelerator.num_processes > 1:
            (kept,) = broadcast_object_list([kept], from_process=0)
        if kept is None:
            return {}
        rows, start, frozen = kept
        rows = {key: value.to(accelerator.device) for key, value in rows.items()}
        self.start = rows, start.to(accelerator.device)
        self._before = self.trainer.frozen_scores(model, rows)
        return {name: value.to(accelerator.device) for name, value in frozen.items()}

    # --- after the first update ---------------------------------------------------------------------------------

    def on_step_begin(self, args, state, control, **kwargs):  # noqa: D102 - transformers' hook
        self._rate = float(self.trainer._get_learning_rate())

    def on_step_end(self, args, state, control, **kwargs):
        """Score the first rows again, after the first step that has moved the policy.

        Raises:
            UserError: a frozen model has moved with it.
        """
        trainer = self.trainer
        if not self._before or self.start is None or not self._rate or trainer.accelerator.optimizer_step_was_skipped:
            return
        now, again = (trainer.frozen_scores(trainer.model_wrapped, self.start[0]) for _ in range(2))
        before, self._before = self._before, {}
        for name in before:
            gap = _moved(now[name], before[name], again[name], repeated=now[name])
            if trainer._any_process(bool(gap)):
                raise UserError(
                    f"{NAMES[name]}: its log-probs moved by a relative {gap:.2g} with the first update, so that it is "
                    "not frozen: give `ref_model`, or load the model from disk"
                )


def _moved(
    now: torch.Tensor, before: torch.Tensor, again: torch.Tensor, repeated: torch.Tensor | None = None
) -> float:
    """The relative change, or 0 where repeating the same computation (`again`, of `before` or of `repeated`) explains
    it: sums over experts may come in any order."""
    noise = relative_gap(again, before if repeated is None else repeated)
    gap = relative_gap(now, before)
    return gap if gap > 1e-6 + 5 * noise else 0.0


def some_weights(parameters: Sequence[Any]) -> list[Any]:
    """Parameters of at most `CHANGED` numbers together: the last ones, then small ones; the smallest, where none fits.

    The last ones hold both factors of an adapter; small ones are norms and biases of all layers.
    """
    sizes = [int(vars(p).get("ds_numel", p.numel())) for p in parameters]
    found: dict[int, None] = {}
    left = CHANGED // 2
    for i in reversed(range(len(sizes))):
        if sizes[i] <= left:
            found[i], left = None, left - sizes[i]
    left += CHANGED // 2
    by_size = sorted(range(len(sizes)), key=lambda i: sizes[i])
    for i in by_size:
        if i not in found and sizes[i] <= left:
            found[i], left = None, left - sizes[i]
    return [parameters[i] for i in found or dict.fromkeys(by_size[:1])]


@contextlib.contextmanager
def changed(parameters: Sequence[Any]) -> Iterator[None]:
    """These parameters larger by a tenth and 0.1, as long as the block lasts; then what they were, to the bit."""
    sharded = [p for p in parameters if "ds_id" in vars(p)] or None
    with torch.no_grad(), gathered_parameter(sharded, writing=True):
        kept = [p.data.clone() for p in parameters]
        for parameter in parameters:
            parameter.data.mul_(1.1).add_(0.1)
    try:
        yield
    finally:
        with torch.no_grad(), gathered_parameter(sharded, writing=True):
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.data.copy_(value)
