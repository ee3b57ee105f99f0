"""EGPO's look-ahead: everything that an optimizer step changes, kept and put back exactly.

    half = Snapshot(trainer); half.save(); …one optimizer step…; half.changed(); half.restore()

Works on this process's shard: of one process, DDP, ZeRO-2 (fp32 masters), ZeRO-3 (parameters and masters). The copy
lies in the memory of the host. Not for FSDP (untested: refused by the recipe's launch) and not a checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch

from alignment.errors import UserError


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
