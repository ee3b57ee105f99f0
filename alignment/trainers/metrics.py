"""What is logged: sums over every pair of every process since the last log line, and what watches training's steps.

Not averages of per-device averages: an accuracy is a share of pairs, whatever the batch layout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback


class Totals:
    """Running sums and counts of named per-pair values on this process; `reduce` adds the processes up."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Throughput counts from now."""
        self.started = time.perf_counter()

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add per-pair values, `[B]` each (any shape: what counts is their sum and number)."""
        for name, value in values.items():
            pair = torch.stack([value.detach().double().sum(), value.new_tensor(value.numel(), dtype=torch.float64)])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def reduce(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Means over all pairs of all processes, then start again. `*_tokens` become a rate and a share."""
        if not self.sums:
            return {}
        names = list(self.sums)
        # fp32 on the wire: some devices and back-ends have no fp64; the counts are small.
        total = reduce(torch.stack([self.sums[n] for n in names]).float()).tolist()
        sums = {n: s for n, (s, _) in zip(names, total, strict=True)}
        means = {n: s / c for n, (s, c) in zip(names, total, strict=True) if c and not n.endswith("_tokens")}
        real, padded = sums["real_tokens"], sums["padded_tokens"]
        means["tokens_per_second"] = real / (time.perf_counter() - self.started)
        means["padding"] = 1 - real / padded
        self.sums = {}
        self.restart()
        return means


class DisplacementAlarm(TrainerCallback):
    """Says in words, once, when log π(chosen) has fallen more than `threshold` nats below the starting model's."""

    def __init__(self, threshold: float):
        self.threshold, self.given = threshold, False

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: D102 - transformers' hook
        fallen = (logs or {}).get("displacement/chosen")
        if self.given or fallen is None or not float(fallen) <= -self.threshold:
            return
        self.given = True
        if state.is_world_process_zero:
            print(
                f"warning: step {state.global_step}: the chosen responses are now {-float(fallen):.1f} nats less "
                "likely than under the starting model, although margin and accuracy may look fine (likelihood "
                "displacement). Read samples; a lower learning rate, a larger beta, or an objective with an SFT term "
                "(rpo, dpop, vpo offline) counters it. `training.displacement_alarm` sets this threshold.",
                file=sys.stderr,
                flush=True,
            )


class EpochOrder(TrainerCallback):
    """Tells the sampler which epoch it is.

    Accelerate and transformers do so too, but not through the two wrappers of a resumed run on several processes,
    which would visit the first epoch's order instead.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102 - transformers' hook
        self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_epoch_begin(self, args, state, control, **kwargs):  # noqa: D102
        self.on_train_begin(args, state, control)


def agreement(chosen: torch.Tensor, rejected: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
    """1 where the scores put first whom the label puts first, 0 where not, 0.5 where either is a tie.

    Args:
        chosen, rejected: `[B]`, or `[B, k]` of k judges.
        label: `[B]`, probability that chosen is the better one; None: 1.

    Returns:
        The scores' shape.
    """
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected)
    if label is None:
        return right
    sign = torch.sign(label.double() - 0.5).to(right.device)
    return 0.5 + (sign if right.dim() == 1 else sign[:, None]) * (right - 0.5)
