"""What the row layouts add to a trainer: one scoring call, and the comparison of the layouts on the first batch.

Not the forward pass itself (`scoring.py`) and not a trainer by itself (`offline.py`).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, Trainer

from alignment.errors import UserError
from alignment.trainers.scoring import (
    ROW_KEYS,
    TOLERANCE,
    Layout,
    relative_gap,
    repaired,
    sequence_logps,
    why_not_shared,
)


class LayoutTrainer(Trainer):
    """Scores batches in the collator's layout; the attributes are set by the trainers that build on it."""

    model: Any
    collator: Any
    _branches: int
    _layout_settled: bool

    @property
    def _compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, dtype)

    def _score(self, model: Any, inputs: dict[str, torch.Tensor], config: Any = None) -> torch.Tensor:
        """`[B, k]` log-probs, in nats; shared rows are taken apart where the model turned out not to take them."""
        rows = {key: inputs[key] for key in ROW_KEYS}
        if self.collator.layout == "paired" and int(rows["row_segments"].max()) > 1:
            rows = self._paired(rows)  # collated ahead, or in a worker, before the layout was settled
        return sequence_logps(model, config or self.model.config, self.model.dtype, rows, self._branches)

    def _paired(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows = {key: inputs[key] for key in ROW_KEYS}
        if int(rows["row_segments"].max()) <= 1:
            return rows
        return repaired(rows, self._branches, self.collator.pad_token_id)

    def _settle_layout(self, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        """Compare the layouts on the first batch rather than trust a list of architectures."""
        self._layout_settled = True
        if self.collator.layout == "paired":
            return
        with torch.no_grad(), self.accelerator.autocast():
            expected = self._score(model, self._paired(inputs))
            try:
                gap = relative_gap(self._score(model, inputs), expected)
                reason = f"gives log-probs that are off by a relative {gap:.2g}"
                differ = gap > TOLERANCE[self._compute_dtype]
            except (TypeError, ValueError, AttributeError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                differ, reason = True, f"fails ({' '.join(str(error).split())[:120]})"
        if self._any_process(differ):
            self.collator.layout = "paired"
            warnings.warn(f"layout shared_prefix {reason} on this model; using paired", stacklevel=2)

    def _any_process(self, flag: bool) -> bool:
        count = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, reduction="sum") > 0)

    def _refuse_other_precision(self) -> None:
        asked = "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "no"
        if self.accelerator.mixed_precision != asked:
            raise UserError(
                f"training: the launcher's mixed precision is {self.accelerator.mixed_precision!r}, the recipe's is "
                f"{asked!r}: set training.bf16 or training.fp16, or launch with --mixed_precision {asked}"
            )


def possible_layout(layout: Layout, model: PreTrainedModel, peft_config: Any) -> Layout:
    """`layout`, or `paired`, with a warning, where this model is known not to take shared rows."""
    if layout == "paired":
        return layout
    configs = list(model.peft_config.values()) if is_peft_model(model) else []
    learned = [c for c in (*configs, peft_config) if c is not None and c.is_prompt_learning]
    reason = why_not_shared(model.config)
    if learned:
        reason = f"{learned[0].peft_type.value} puts virtual tokens before the prompt"
    if reason is None:
        return layout
    warnings.warn(f"layout shared_prefix is not possible ({reason}); using paired", stacklevel=3)
    return "paired"
