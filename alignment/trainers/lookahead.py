"""EGPO's look-ahead: an optimizer step apart, and everything that it changes kept and put back exactly.

    half = Snapshot(trainer); half.save(); …one optimizer step…; half.changed(); half.restore()

Works on this process's shard: of one process, DDP, ZeRO-2 (fp32 masters), ZeRO-3 (parameters and masters). The copy
lies in the memory of the host. Not for FSDP (untested: refused by the recipe's launch) and not a checkpoint.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType

from alignment.errors import UserError
from alignment.trainers.drawing import DrawingTrainer
from alignment.trainers.metrics import Totals


class Snapshot:
    """A copy of trainable weights and optimizer state, as they are on this process.

    Restoring weights without the optimizer's moments and step counters would be another algorithm.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.weights: list[torch.Tensor] = []
        self.state: dict[Any, dict[str, Any]] = {}
        self.groups: list[dict[str, Any]] = []

    def _live(self) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
        """(weights that the forward pass reads, masters that the optimizer updates, the optimizer itself)."""
        trainer = self.trainer
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        sharded = any(hasattr(p, "ds_tensor") for p in parameters)
        weights = [p.ds_tensor.data if sharded else p.data for p in parameters]
        if not trainer.is_deepspeed_enabled:
            optimizer = trainer.optimizer
            return weights, [], getattr(optimizer, "optimizer", optimizer)
        zero = trainer.model_wrapped.optimizer
        masters = getattr(zero, "fp32_partitioned_groups_flat", None) or getattr(
            zero, "single_partition_of_fp32_groups", None
        )
        if not masters:
            raise UserError(
                f"objective egpo: its look-ahead knows DeepSpeed's stages 2 and 3, not {type(zero).__name__}: launch "
                "with recipes/accelerate/zero2.yaml or zero3.yaml, or without DeepSpeed"
            )
        return weights, list(masters), getattr(zero, "optimizer", zero)

    @torch.no_grad()
    def save(self) -> None:
        """Copy everything."""
        weights, masters, optimizer = self._live()
        self.weights = [tensor.detach().to("cpu", copy=True) for tensor in (*weights, *masters)]
        self.state = {
            parameter: {k: v.to("cpu", copy=True) if torch.is_tensor(v) else v for k, v in state.items()}
            for parameter, state in optimizer.state.items()
        }
        # Some optimizers count their steps there.
        self.groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    @torch.no_grad()
    def changed(self) -> tuple[int, int]:
        """(weights that differ from the copy, all weights), as the forward pass reads them, of this process."""
        weights, _, _ = self._live()
        pairs = list(zip(weights, self.weights, strict=False))
        return sum(int((now.cpu() != kept).sum()) for now, kept in pairs), sum(now.numel() for now, _ in pairs)

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        weights, masters, optimizer = self._live()
        for tensor, kept in zip((*weights, *masters), self.weights, strict=True):
            tensor.copy_(kept)
        for parameter in self.trainer.model.parameters():
            # ZeRO-3 keeps small parameters gathered: the full copy would be the half-step's.
            gathered = hasattr(parameter, "ds_tensor") and parameter.ds_status.name == "AVAILABLE"
            if gathered and parameter.requires_grad and parameter.data.numel():
                parameter.partition()
        for group, settings in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(settings)
        for parameter in list(optimizer.state):
            if parameter not in self.state:  # its first step: the optimizer begins it again
                del optimizer.state[parameter]
                continue
            state, kept_state = optimizer.state[parameter], self.state[parameter]
            for key in list(state):
                if key not in kept_state:
                    del state[key]
                elif torch.is_tensor(state[key]) and torch.is_tensor(kept_state[key]):
                    state[key].copy_(kept_state[key])
                else:
                    state[key] = kept_state[key]
        self.weights, self.state, self.groups = [], {}, []


class LookAheadTrainer(DrawingTrainer):
    """EGPO's look-ahead before a step; the attributes are set by `OnlinePreferenceTrainer`."""

    _micro_batches: list[Any]
    _totals: dict[str, Totals]
    _seconds: dict[str, float]
    _said_lost: bool

    def _share_out(self, places: list[int]) -> None:
        """This process's forward passes of a step."""
        raise NotImplementedError

    def _roll_out(self, rollout: int, phase: int) -> None:
        """Sample, judge and score a rollout under the policy as it is."""
        raise NotImplementedError

    def _look_ahead(self, rollout: int, places: list[int]) -> None:
        """theta_t -> theta_{t+1/2} on this rollout, a rollout of theta_{t+1/2}, and back: weights and optimizer state.

        The step that follows trains theta_t on the second rollout: y'' is the half-step policy's (EGPO, step 4).
        """
        self._share_out(places)
        half = Snapshot(self)
        half.save()
        rate = float(self._get_learning_rate())
        began, before = time.perf_counter(), self._seconds["train"]
        with self._own_totals():
            self._step_apart()
        self._seconds["train"] = before + time.perf_counter() - began
        self._say_if_lost(half, rate)
        self._last_loaded_step = -1  # vLLM gets weights where TRL sees another step, and this is none of its
        self._roll_out(rollout, 1)
        half.restore()
        self._last_loaded_step = -1

    def _step_apart(self) -> None:
        """One optimizer step outside transformers' loop; no schedule moves, nothing is logged."""
        model, last = self.model_wrapped, len(self._micro_batches) - 1
        state, deepspeed = (
            self.accelerator.gradient_state,
            self.accelerator.distributed_type == DistributedType.DEEPSPEED,
        )
        kept = state.sync_gradients
        for i in range(last + 1):
            state._set_sync_gradients(i == last)
            alone = not deepspeed and i < last
            with self.accelerator.no_sync(model) if alone else contextlib.nullcontext():
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, self._prepare_inputs(None)) / (last + 1)
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))
        if not deepspeed:
            norm = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
            self._get_grad_norm(model, grad_norm=norm)  # asks whether the step may be taken
            self.optimizer.step()  # type: ignore[union-attr]
            model.zero_grad()
        state._set_sync_gradients(kept)

    @contextlib.contextmanager
    def _own_totals(self) -> Iterator[None]:
        """What the look-ahead's loss records is not the step's."""
        kept, self._totals["train"] = self._totals["train"], Totals()
        try:
            yield
        finally:
            self._totals["train"] = kept

    def _say_if_lost(self, half: Snapshot, rate: float) -> None:
        changed, count = half.changed()
        both = torch.tensor([changed, count], dtype=torch.float32, device=self.accelerator.device)
        changed, count = self.accelerator.reduce(both, reduction="sum").tolist()
        self._metrics["train"]["look_ahead/changed"].append(changed / count)
        if rate > 0 and changed < 0.01 * count and not self._said_lost:
            self._said_lost = True
            warnings.warn(
                f"step {self.state.global_step}: the look-ahead changed {changed / count:.2%} of the weights at "
                f"learning rate {rate:.1e}: they are lost to rounding ({self.model.dtype}), and egpo is online_ipo1 "
                "then; keep the weights in float32 (model.dtype), or raise the rate",
                stacklevel=2,
            )
