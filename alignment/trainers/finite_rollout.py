"""What `FiniteTrainer` watches in on-policy training: the prompts of a step, and prompts that cannot be sampled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object

from alignment.errors import UserError
from alignment.trainers.finite import NATS_PER_TOKEN, FiniteTrainer, listed
from alignment.trainers.rollout import Record


class FiniteRolloutTrainer(FiniteTrainer):
    """Attributes set by `OnlinePreferenceTrainer`: `_micro_batches` are the records of the step's forward passes."""

    _micro: int
    _micro_batches: list[list[Record]]
    undrawable: set[int]

    def watch_prompts(
        self, loss: torch.Tensor, batch: Any, losses: torch.Tensor, policy: torch.Tensor, inputs: dict[str, Any]
    ) -> torch.Tensor:
        """The loss, with what `FiniteTrainer` wants to know of the prompts that are learned from."""
        learned = inputs["learned"] > 0
        frozen = [value for name, value in inputs.items() if name.startswith(("ref_", "behaviour_"))]
        scored = policy.detach()[learned]
        beyond = (scored.abs() / inputs["lengths"][learned].clamp(min=1) > NATS_PER_TOKEN).any()
        certain = (scored == 0).all() & learned.any()  # every sample has probability 1
        rows = [
            torch.where(learned.view(-1, *[1] * (values.dim() - 1)), values, 0) for values in (losses, policy, *frozen)
        ]
        pushed = [value for value in vars(batch).values() if torch.is_tensor(value)]
        return self.watch(loss, rows, self._micro_batches[self._micro - 1], pushed, beyond | certain)

    def _named(self, number: int, place: int) -> str:
        return self._prompt_name(self._watch.passes[number].inputs[place].row)

    def _prompt_name(self, row: int) -> str:
        return f"prompt {row + 1}" if self.row_name is None else self.row_name(row)

    def _out_of_range(self) -> str:
        return f"log-probabilities lie beyond {NATS_PER_TOKEN:g} nats per token, or every sample has probability 1"

    def refuse_undrawable(self, records: Sequence[Record]) -> None:
        """Prompts behind which the model's scores are no numbers: a stop, or with `skip` a word.

        Their log-probs are no numbers either, so that the steps that they are in are skipped.

        Args:
            records: of this process, in the order of `undrawable`'s numbers.

        Raises:
            UserError: there are some, on any process.
        """
        names = [self._prompt_name(records[i].row) for i in sorted(self.undrawable)]
        names = list(dict.fromkeys(gather_object(names)))
        if not names:
            return
        what = f"the model's next-token scores behind {listed(names)} are not finite"
        if self.on_nan == "stop":
            raise UserError(f"step {self.state.global_step + 1}: {what}; training stopped. {self.remedy()}")
        if self.accelerator.is_main_process:
            print(
                f"warning: step {self.state.global_step + 1}: {what}; their steps are skipped",
                file=sys.stderr,
                flush=True,
            )
