"""What an on-policy trainer logs: its rollouts and steps in numbers, the time of each stage, and VPO's drift.

Not a trainer by itself: `online.py` is, and sets the attributes below. The numbers of a rollout are `rollout_numbers`.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from alignment.models.scoring import scored_tokens
from alignment.trainers.metrics import Totals
from alignment.trainers.rollout import Record, Rollouts
from alignment.trainers.rollout_numbers import judgement, rollout_numbers
from alignment.trainers.rollout_scoring import RolloutScoringTrainer

STAGES = ("sample", "score", "train")


class RolloutLogTrainer(RolloutScoringTrainer):
    """The log."""

    rollouts: Rollouts
    _seconds: dict[str, float]
    _totals: dict[str, Totals]

    def _spent(self, stage: str, began: float, tokens: int) -> None:
        self._seconds[stage] += time.perf_counter() - began
        self._tokens[stage] += tokens

    def _describe(self, records: list[Record], prefix: str = "") -> None:
        """A rollout's numbers, of all processes, and the table of completions that TRL shows."""
        for name, value in rollout_numbers(records, self.rollouts.sampler.plain).items():
            if math.isfinite(value):  # n-grams of responses shorter than n
                self._metrics["train"][prefix + name].append(value)
        shown: Any = self._logs
        for record in records:
            for i, text in enumerate(record.texts):
                shown["prompt"].append(self.columns["prompt"][record.row])
                shown["completion"].append(text)
                shown["rewards"]["judgement"].append(judgement(record, i))
                shown["advantages"].append(math.nan)  # TRL's column; not every objective here has advantages

    def _record(self, inputs: dict[str, torch.Tensor], batch: Any, losses: torch.Tensor, policy: torch.Tensor) -> None:
        segments = inputs["row_segments"]
        values = {"real_tokens": scored_tokens(segments), "padded_tokens": torch.ones_like(segments)}
        kept = inputs["learned"] > 0  # every process adds every name: an empty value counts nothing
        values |= {name: self._kept(value, kept) for name, value in self._statistics(batch).items()}
        values["logps/policy"] = policy.detach()[kept]
        self._totals["train"].add(values)

    @staticmethod
    def _kept(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return values[kept] if len(values) == len(kept) else values

    def _statistics(self, batch: Any) -> dict[str, torch.Tensor]:
        if self.kind != "pairs":
            found: dict[str, torch.Tensor] = self.objective.statistics(batch)  # type: ignore[attr-defined]
            return {f"objective/{name}": value for name, value in found.items()}
        chosen, rejected = (r.detach() for r in self.objective.rewards(batch))
        agrees = torch.where(batch.label > 0.5, chosen > rejected, rejected > chosen).double()
        found = {"rewards/margins": (chosen - rejected) * (2 * batch.label - 1).sign(), "rewards/accuracies": agrees}
        if batch.calibration is not None and batch.ref_calibration is not None:
            found["calibration/drift"] = (batch.calibration - batch.ref_calibration).detach()
        return found

    def log(self, logs, start_time=None):
        """Adds the metrics since the last line, over all processes, to what transformers logs."""
        mode = "train" if self.model.training else "eval"
        found = self._totals[mode].reduce(lambda total: self.accelerator.reduce(total, reduction="sum"))
        if found:
            found.pop("tokens_per_second", None)
            for stage in STAGES:
                found[f"seconds/{stage}"] = self._seconds[stage]
                if self._tokens[stage]:
                    total = torch.tensor(float(self._tokens[stage]), device=self.accelerator.device)
                    tokens = float(self.accelerator.reduce(total, reduction="sum"))
                    found[f"tokens_per_second/{stage}"] = tokens / max(self._seconds[stage], 1e-9)
            self._seconds, self._tokens = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0)
            self._stop_if_drifted(found.get("calibration/drift"))
        self._metrics[mode].update({name: [value] for name, value in found.items()})
        super().log(logs, start_time)

    def _stop_if_drifted(self, drift: float | None) -> None:
        """VPO's optimistic term has no lower bound: stop before the policy is spent on it."""
        limit = self.rollouts.drift
        if drift is None or limit is None or not drift <= -limit:
            return
        self.control.should_training_stop = True
        if self.accelerator.is_main_process:
            print(
                f"step {self.state.global_step}: calibration responses are {-drift:.1f} nats less likely than under "
                f"the reference (rollout.drift {limit:g}): vpo's optimistic term runs away. Training stops here; "
                "lower objective.alpha",
                flush=True,
            )
