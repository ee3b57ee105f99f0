"""What scoring adds to an on-policy trainer: a rollout's frozen columns, and the checks of layout and reference.

Not a trainer by itself: `online.py` is, and sets the attributes below. How a row is scored is `scoring.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from trl.models.utils import disable_gradient_checkpointing

from alignment.errors import UserError
from alignment.models.scoring import relative_gap, scored_tokens
from alignment.trainers.batches import RolloutCollator
from alignment.trainers.frozen_check import FrozenCheck
from alignment.trainers.lookahead import LookAheadTrainer
from alignment.trainers.rollout import Record
from alignment.trainers.unpadded import extremes, width


class RolloutScoringTrainer(LookAheadTrainer):
    """Scores rollouts; `kind` is the objective's `card.batch`, `columns` those of the prompts."""

    kind: str
    columns: Any
    collator: RolloutCollator
    _check: FrozenCheck
    _begun: bool
    _checked: bool
    _records: list[Record]
    _tokens: dict[str, int]

    def _on_device(self, records: Sequence[Record]) -> dict[str, torch.Tensor]:
        return {key: value.to(self.accelerator.device) for key, value in self.collator(records).items()}

    def _begin(self) -> None:
        """Before the first update: the reference is frozen; in a resumed run it is also the one of its start."""
        sound = [record for record in self._records if _is_finite(record)]
        if not sound:
            return  # the step stops, or is skipped
        self._begun = True
        self._compare_if_wider(self._records)  # those of a checkpoint have not been
        inputs = self._on_device(sound[: self.args.per_device_train_batch_size])  # on all processes the same
        model, rows = self.model_wrapped, self._paired(inputs)
        self._check.show(model, rows)
        if self.state.global_step:
            self._check.resume(model, starts_at_reference=False)
            return
        model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            start = self._score(model, rows)
        model.train()
        self._check.begin(model, rows, start)

    def _compare_if_wider(self, records: Sequence[Record]) -> None:
        """Compare the layouts where this rollout has a wider or longer row than any that they were compared on.

        What is compared is the rollout's extremes over all processes; a rollout costs far more than that to draw.
        """
        groups = [(self.columns["prompt_ids"][r.row], self.collator.responses(r)) for r in records]
        gathered = gather_object([groups[i] for i in extremes([width(group) for group in groups])])
        widths = [width(group) for group in gathered]
        if any(max(new) > old for new, old in zip(zip(*widths, strict=True), self.compared, strict=True)):
            chosen = [gathered[i] for i in extremes(widths)]
            self._compare(self.model_wrapped, chosen)
            if self._ref_config is not None and self.ref_model is not None:
                self._compare(self.ref_model, chosen, self._ref_config)  # a model of its own

    @torch.no_grad()
    def _score_frozen_columns(self, records: list[Record]) -> None:
        """`behaviour_*` and `ref_*` of every record, under the policy as it is and the reference."""
        wanted = [] if self.kind == "groups" else ["behaviour"]
        wanted += ["ref"] * self._needs_reference * (self.kind != "groups")
        names = ("first", "second", "calibration")[: self._branches]
        size = self.args.per_device_train_batch_size
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)  # type: ignore[arg-type]
        with checkpointing, self.accelerator.autocast():
            for start in range(0, len(records), size):
                part = records[start : start + size]
                inputs = self._on_device(part)
                found = {}
                for name in wanted:
                    found[name] = (
                        self._score(self.model_wrapped, inputs)
                        if name == "behaviour"
                        else self._score_frozen("ref", self.model_wrapped, inputs)
                    )
                    self._tokens["score"] += int(scored_tokens(inputs["row_segments"]).sum())
                    for record, values in zip(part, found[name].tolist(), strict=True):
                        record.numbers |= {f"{name}_{n}": v for n, v in zip(names, values, strict=True)}
                self._check_start(found)

    def _check_start(self, found: dict[str, torch.Tensor]) -> None:
        """Before the first update policy and reference are one model, where the recipe says so."""
        if self._checked or "ref" not in found or not self.start_is_reference or self.state.global_step:
            return
        self._checked = True
        sound = (found["behaviour"].isfinite() & found["ref"].isfinite()).all(1)
        gap = relative_gap(found["behaviour"][sound], found["ref"][sound]) if bool(sound.any()) else 0.0
        # Both have just scored the same rows in the same layout: see `step_zero_problem`.
        if self._any_process(5 * gap > self.tolerance):
            raise UserError(
                f"step-0 check: policy and reference differ by a relative {gap:.2g} in log-prob, so that implicit "
                "rewards do not start at 0: the reference is another model, has another dtype, dropout is active, or "
                "a fresh adapter does not start at zero (PEFT's init_lora_weights or init_weights)"
            )


def _is_finite(record: Record) -> bool:
    """Whether its log-probs under the policy that drew it are."""
    return all(math.isfinite(value) for name, value in record.numbers.items() if name.startswith("behaviour_"))
