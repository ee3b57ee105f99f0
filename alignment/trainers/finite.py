"""Numbers that are not finite, and runs that no longer learn: what stops a step before the optimizer takes it.

    watch                          per-row losses and log-probs of a forward pass; a bad row makes the whole loss NaN
    `_get_grad_norm`, engine.step  where all processes decide together: the global norm is one number on all of them

A row's loss that is not finite is multiplied into the batch's loss, and so into every process's gradient norm: the
reduce that training has anyway tells all of them. `on_nan="stop"` raises `UserError` with step, rows and the last
whole checkpoint; `"skip"` drops the gradients of the global step and counts it. A gradient norm of exactly 0 at a
learning rate above 0, three steps in a row, stops the run where the loss still asks for a change, or where the model
has left the range in which losses are computed; a loss that is flat by its own formula (ties, hinge behind its
margin), or down to rounding, may go on. Three skipped steps in a row without any sound row stop it, too: the model is
at fault. Held-out rows are watched at each evaluation, weights before each save.

Not here: what a loss is (`alignment.objectives`), the step-0 check (`checks.py`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import DistributedType, gather_object
from transformers import Trainer, TrainerCallback

from alignment.errors import UserError
from alignment.trainers import checkpoints

OnNan = Literal["stop", "skip"]
DEAD_STEPS = 3  # steps in a row without any gradient
PUSH = 1e-12  # |dL/dlog pi| below which a gradient may vanish by rounding: its square leaves float32 from 1e-22 down
OVERFLOWS = 30  # steps in a row that float16's loss scaling may leave out: it halves its factor each time, from 2^16
NAMED = 8  # rows that a message names
NATS_PER_TOKEN = 100.0  # a uniform choice among a million tokens costs 13.8: beyond this nothing is a language model
LOGIT_RANGE = 100.0  # float32's sigmoid(-104) is 0: a margin beyond has no gradient whatever the label


class Pass(NamedTuple):
    """What is remembered of one forward pass until the step is decided.

    Attributes:
        good: `[B]` bool, rows whose numbers are all finite.
        inputs: the batch, as `_micro_batch` wants it back.
    """

    good: torch.Tensor
    inputs: Any


class StepWatch:
    """The forward passes of the step under way, and what came of the last steps without gradient."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self.pushes: list[torch.Tensor] = []  # largest |dL/dlog pi| of each backward pass since the last gradient
        self.extreme: list[torch.Tensor] = []  # of each pass since then: whether a row has left the range
        self.still = self.overflows = self.unsound = 0  # steps in a row
        self.still_at = self.failed_at = -1  # the last step without gradient, and the last that was left out

    def alive(self) -> None:
        """A step had a gradient."""
        self.pushes, self.extreme, self.still = [], [], 0


class FiniteTrainer(Trainer):
    """Stops, or leaves out, steps whose numbers are not finite, and stops dead runs; for every kind of trainer.

    Args:
        on_nan: "stop" or "skip".
        more: as in TRL; `logging_nan_inf_filter` is switched off, which would log a NaN as the mean of other losses.

    Attributes:
        row_name, held_out_name: how messages call a row of the training or held-out data, by its number from 0.
        skipped_steps: global steps left out, those before a resume included.
        skipped_here: those since training began or was resumed.
    """

    model: Any
    row_name: Callable[[int], str] | None = None
    held_out_name: Callable[[int], str] | None = None
    skipped_steps = 0

    def __init__(self, *args: Any, on_nan: OnNan = "stop", **more: Any):
        self.on_nan = on_nan
        self._watch = StepWatch()
        self.skipped_here = 0
        self._damaged_before: dict[str, int] = {}
        self._held_out: list[torch.Tensor] = []  # of each pass of the evaluation under way: `_finite_rows`
        super().__init__(*args, **more)
        self.args.logging_nan_inf_filter = False
        self.add_callback(_FiniteStart(self))

    # --- during a forward pass ------------------------------------------------------------------------------------

    def watch(
        self,
        loss: torch.Tensor,
        rows: Sequence[torch.Tensor],
        inputs: Any,
        pushed: Sequence[torch.Tensor] = (),
        extreme: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The training loss to go on with: `loss`, or NaN where a number of a row is not finite.

        Args:
            loss: scalar, of this forward pass.
            rows: losses, log-probs, scores: `[B]` or `[B, k]` each.
            inputs: the batch, for naming its rows.
            pushed: tensors whose gradients say whether the loss asks for a change.
            extreme: whether a row has left the range in which the loss can be computed (scalar bool).
        """
        good = _finite_rows(rows)
        self._watch.passes.append(Pass(good, inputs))
        for tensor in pushed:
            if tensor.requires_grad:
                tensor.register_hook(self._pushed)
        if extreme is not None:
            self._watch.extreme.append(extreme.detach())
        return loss * torch.where(good.all(), 1.0, math.nan).to(loss.dtype)

    def _pushed(self, gradient: torch.Tensor) -> None:
        self._watch.pushes.append(gradient.detach().abs().amax().double())

    # --- between the gradient and the optimizer's step ------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As transformers'; DeepSpeed takes its step inside the backward pass, and is asked to wait for a decision."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self._guard(self.accelerator.deepspeed_engine_wrapped.engine)
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model, grad_norm=None):
        """transformers' last call before the optimizer's step, with a number that all processes share."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            if norm is not None and math.isfinite(norm):  # infinite: the step was left out, and that is counted
                self._refuse_dead(float(norm))
            return norm
        if not self.may_step(float(norm)):
            for parameter in model.parameters():
                parameter.grad = None  # an optimizer leaves alone what has no gradient, its moments included
        return norm

    def may_step(self, norm: float, scaled: bool | None = None) -> bool:
        """Whether the optimizer may take the step; every process calls this with the same norm.

        Args:
            norm: of the whole gradient, before clipping; NaN or infinite where one of its numbers is.
            scaled: whether a loss scaling may still repair an overflow; by default that of accelerate.

        Raises:
            UserError: it may not, and the run stops.
        """
        scaled = self.accelerator.scaler is not None if scaled is None else scaled
        if self._watch.failed_at == self.state.global_step:  # a look-ahead failed: all of its step is left out
            self._watch.passes = []
            return False
        if math.isfinite(norm):
            self._watch.passes, self._watch.overflows, self._watch.unsound = [], 0, 0
            if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
                self._refuse_dead(norm)
            return True
        rows, sound = self._bad_rows()
        if scaled and not rows and self._watch.overflows < OVERFLOWS:
            self._watch.passes, self._watch.overflows = [], self._watch.overflows + 1
            return True  # the scaling leaves the step out by itself, and tries a smaller factor
        self._watch.passes = []
        step = self.state.global_step + 1
        what = f"the loss of {listed(rows)} is not a finite number" if rows else "the gradient is not finite"
        if self.on_nan == "stop":
            raise UserError(f"step {step}: {what}; training stopped before the optimizer's step. {self.remedy()}")
        self._watch.alive()
        self._watch.unsound = 0 if rows and sound else self._watch.unsound + 1
        if self._watch.unsound == DEAD_STEPS:
            raise UserError(
                f"step {step}: {what}. No row of the last {DEAD_STEPS} steps was sound: the model is damaged or has "
                f"diverged. Lower training.learning_rate. {self._kept_so_far()}"
            )
        self._watch.failed_at = self.state.global_step
        self.skipped_steps += 1
        self.skipped_here += 1
        if self.accelerator.is_main_process:
            print(f"warning: step {step} is skipped: {what}", file=sys.stderr, flush=True)
        return False

    def remedy(self) -> str:
        """What the user can do, and where a resumed run would go on."""
        checkpoint = checkpoints.newest_checkpoint(Path(str(self.args.output_dir)))
        mend = "Mend or remove the row, lower training.learning_rate, or set training.on_nan=skip"
        if checkpoint is None:
            return f"There is no whole checkpoint. {mend}"
        return f"{mend}; --resume goes on from {checkpoint}"

    def _bad_rows(self) -> tuple[list[str], bool]:
        """Names of the step's rows, of all processes, whose numbers are not finite; whether there are others."""
        good = [self._good_rows(one.good, one.inputs) for one in self._watch.passes]
        own = [self._named(i, place) for i, rows in enumerate(good) for place in (~rows).nonzero().flatten().tolist()]
        sound = gather_object([any(bool(rows.any()) for rows in good)])
        return list(dict.fromkeys(gather_object(own))), any(sound)

    def _good_rows(self, good: torch.Tensor, inputs: Any) -> torch.Tensor:
        """`[B]` bool of a forward pass; for trainers whose losses come in one number (all processes call this)."""
        return good

    def _named(self, number: int, place: int) -> str:
        """How a message calls the row at `place` of this process's forward pass `number` of the step.

        Our samplers deal whole micro-batches round the processes, in the order of the epoch.
        """
        sampler: Any = vars(self).get("sampler")
        size, world = self.args.per_device_train_batch_size, self.accelerator.num_processes
        order = [] if sampler is None else list(sampler)
        whole = size * world * self.args.gradient_accumulation_steps
        begin = self.state.global_step * whole % max(len(order), 1)
        at = begin + (number * world + self.accelerator.process_index) * size + place
        if at >= len(order):
            return "a row"
        return f"row {order[at] + 1} of the training data" if self.row_name is None else self.row_name(order[at])

    # --- held-out rows --------------------------------------------------------------------------------------------

    def watch_held_out(self, rows: Sequence[torch.Tensor]) -> None:
        """Notes which rows of an evaluation's pass are sound; `rows` as of `watch`."""
        self._held_out.append(_finite_rows(rows))

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """As transformers'.

        Raises:
            UserError: a row's loss is not finite, and their mean would be no number.
        """
        self._held_out = []
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        bad = {  # accelerate deals whole batches round the processes, and repeats the first rows at the end
            ((number * world + rank) * self.args.eval_batch_size + place) % len(dataloader.dataset)
            for number, good in enumerate(self._held_out)
            for place in (~good).nonzero().flatten().tolist()
        }
        rows = sorted(set(gather_object(sorted(bad))))
        if rows:
            name = self.held_out_name or (lambda i: f"row {i + 1} of the held-out data")
            raise UserError(
                f"step {self.state.global_step}: the loss of {listed([*map(name, rows)])} is not a finite number, and "
                "neither is the evaluation's. Mend or remove the row, or lower training.learning_rate. "
                f"{self._kept_so_far()}"
            )
        return output

    # --- runs that no longer learn --------------------------------------------------------------------------------

    def _refuse_dead(self, norm: float) -> None:
        """Stop after three steps without any gradient, unless the loss itself is flat there."""
        watch = self._watch
        if norm != 0 or float(self._get_learning_rate()) == 0:
            watch.alive()
            return
        if watch.still_at != self.state.global_step:  # a look-ahead's step counts with its own
            watch.still, watch.still_at = watch.still + 1, self.state.global_step
        if watch.still < DEAD_STEPS:
            return
        device = self.accelerator.device
        pushes = [value.to(device) for value in watch.pushes] or [torch.zeros((), device=device)]
        extreme = [value.to(device) for value in watch.extreme] or [torch.zeros((), device=device, dtype=torch.bool)]
        flags = torch.stack([torch.stack(pushes).max() > PUSH, torch.stack(extreme).all()]).float()
        pushed, beyond = self.accelerator.reduce(flags, reduction="sum").tolist()
        reason = ""
        if pushed or not self._says_pushes():
            reason = "although the loss asks for a change: the model's outputs no longer depend on its weights"
        elif beyond == self.accelerator.num_processes:
            reason = f"and {self._out_of_range()}"
        if reason:
            raise UserError(
                f"step {self.state.global_step + 1}: the gradient has been exactly 0 for {DEAD_STEPS} steps, {reason}"
                ". Training has diverged, or a weight of the model is damaged: lower training.learning_rate, or look "
                "at model.name_or_path, and start afresh"
            )
        watch.alive()

    def _says_pushes(self) -> bool:
        """Whether `watch` is given what the loss pushes; a likelihood pushes everywhere."""
        return True

    def _out_of_range(self) -> str:
        return f"log-probabilities lie beyond {NATS_PER_TOKEN:g} nats per token"

    # --- DeepSpeed ------------------------------------------------------------------------------------------------

    def _guard(self, engine: Any) -> None:
        """Let DeepSpeed's engine ask before it steps."""
        if "step" in vars(engine):
            return
        take = engine.step

        def step(*args: Any, **kwargs: Any) -> None:
            zero = _zero_optimizer(engine)
            if zero is None:
                norm = _local_norm(self.model, self.accelerator)
            else:
                norm = math.nan if zero.has_overflow() else 1.0
            scaled = bool(engine.fp16_enabled())
            if self.may_step(norm, scaled):
                take(*args, **kwargs)
                return
            if zero is None:
                raise UserError("training.on_nan: skip knows DeepSpeed's ZeRO stages only; set stop")
            checked = vars(zero).get("check_grad_overflow")
            zero.check_grad_overflow = True  # ZeRO then clears its buffers, and leaves the step out
            take(*args, **kwargs)
            zero.check_grad_overflow, zero.overflow = checked, False  # the schedule goes on, as in other launches

        engine.step = step

    # --- logging and weights --------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        """Adds how many steps were left out so far; their loss is in no other line than this."""
        if "loss" in logs and not math.isfinite(float(logs["loss"])):
            self._tr_loss.zero_()  # transformers subtracts it from itself, and NaN would stay
        self.add_skipped(logs)
        super().log(logs, start_time)

    def add_skipped(self, logs: dict[str, float]) -> None:
        """To a log line of training, in place; evaluations name their metrics otherwise."""
        if self.skipped_steps and self.model.training:
            logs["skipped_steps"] = self.skipped_steps

    def save_model(self, output_dir=None, _internal_call=False):
        """As TRL's, unless a weight is not finite any more: a checkpoint or `final/` with it would replace a good one.

        Raises:
            UserError: one is.
        """
        counts = non_finite(self.model, trainable=True)
        damaged = sorted(name for name, count in counts.items() if count > self._damaged_before.get(name, 0))
        names = sorted(set(gather_object(damaged)))
        if names:
            raise UserError(
                f"step {self.state.global_step}: {names[0]} has weights that are not finite; nothing is saved. "
                f"Training has diverged: lower training.learning_rate. {self._kept_so_far()}"
            )
        super().save_model(output_dir, _internal_call)

    def _kept_so_far(self) -> str:
        checkpoint = checkpoints.newest_checkpoint(Path(str(self.args.output_dir)))
        return "There is no whole checkpoint" if checkpoint is None else f"The last whole checkpoint is {checkpoint}"


class _FiniteStart(TrainerCallback):
    """Before the first step: what is not finite already, and how many steps were left out before a resume. At the end:
    whether any step was taken."""

    def __init__(self, trainer: FiniteTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102 - transformers' hook
        trainer = self.trainer
        trainer._watch = StepWatch()
        counts = [row["skipped_steps"] for row in state.log_history if "skipped_steps" in row]
        trainer.skipped_steps, trainer.skipped_here = (int(counts[-1]) if counts else 0), 0
        damaged = non_finite(trainer.model)
        trainer._damaged_before = damaged
        for name, count in list(damaged.items())[:1]:
            print(
                f"warning: {name} has {count} weights that are not finite before training begins; is the model's "
                "file damaged?",
                file=sys.stderr,
                flush=True,
            )

    def on_train_end(self, args, state, control, **kwargs):  # noqa: D102
        if state.global_step and self.trainer.skipped_steps == state.global_step:
            raise UserError(
                f"step {state.global_step}: every step was skipped, and nothing was learned; mend or remove the rows "
                "that the warnings name"
            )


def _finite_rows(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """`[B]` bool: whether all numbers of a row are finite, in tensors `[B, ...]`."""
    return torch.stack([values.detach().isfinite().reshape(len(values), -1).all(1) for values in rows]).all(0)


def non_finite(model: Any, trainable: bool = False) -> dict[str, int]:
    """Parameter name → how many of its numbers, as this process holds them, are not finite; only names with some."""
    counts = {}
    for name, values in _held(model, trainable):
        low, high = values.aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            counts[name] = int((~values.isfinite()).sum())
    return counts


def _held(model: Any, trainable: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of a model as this process holds them: ZeRO-3's and FSDP's shards, whole ones elsewhere."""
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        values = vars(parameter).get("ds_tensor", parameter)
        values = values.to_local() if isinstance(values, DTensor) else values
        values = values.detach()
        if (parameter.requires_grad or not trainable) and values.is_floating_point() and values.numel():
            yield name, values


def _zero_optimizer(engine: Any) -> Any | None:
    """DeepSpeed's ZeRO optimizer of stages 1 to 3; None for another."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    kinds = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    return engine.optimizer if isinstance(engine.optimizer, kinds) else None


def _local_norm(model: Any, accelerator: Any) -> float:
    """1 where the gradients of all processes are finite, else NaN."""
    bad = any(not bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    flag = torch.tensor(float(bad), device=accelerator.device)
    return math.nan if float(accelerator.reduce(flag, reduction="sum")) else 1.0


def listed(rows: Sequence[str]) -> str:
    """Up to eight rows in words."""
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return ", ".join(rows[:NAMED]) + more
