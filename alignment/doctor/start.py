"""Step 0 for real: the recipe's own trainer scores its first batch, checks it, and says what it found. No update.

Reads the first rows of each source only, and writes nothing but into a temporary folder.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from alignment.errors import UserError
from alignment.models.scoring import ROW_KEYS, relative_gap, repaired, sequence_logps
from alignment.objectives import PairLogps
from alignment.objectives.base import Objective
from alignment.objectives.spo import degree_loss
from alignment.recipes import Recipe
from alignment.runs.preferences import build_trainer, run_arguments
from alignment.trainers.checks import losses_and_slopes
from alignment.trainers.collation import BRANCHES
from alignment.trainers.degree import cut_copies
from alignment.trainers.offline import PreferenceTrainer

# A run's doings beside its steps, none of which belongs into a look at the first batch.
QUIET = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "push_to_hub": False,
    "load_best_model_at_end": False,
    "eval_on_start": False,
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class StepZero:
    """Facts of the first batch before any update; means over its pairs, in nats where they are log-probabilities.

    Attributes:
        pairs: in the batch.
        layout: in which it is computed.
        layout_gap: largest relative difference of log-probs between the two layouts; None where there is only one.
        reward_chosen, reward_rejected: largest absolute implicit rewards.
        loss: the objective's.
        expected: the objective's value at the starting model, from an independent scoring of the same rows.
        logp_chosen, logp_rejected: of the responses, summed over tokens.
        per_token_chosen, per_token_rejected: the same per token.
        degrees: of spo: which copies there are, and the degree loss of the first batch.
        warnings: what the trainer said while it was set up.
        problem: what the trainer's step-0 check says, or that the degree loss is wrong; None where all is well.
    """

    pairs: int
    layout: str
    layout_gap: float | None
    tolerance: float
    reward_chosen: float
    reward_rejected: float
    loss: float
    expected: float
    logp_chosen: float
    logp_rejected: float
    per_token_chosen: float
    per_token_rejected: float
    degrees: tuple[str, ...]
    warnings: tuple[str, ...]
    problem: str | None

    def lines(self) -> list[str]:
        """The facts in words."""
        gap = "" if self.layout_gap is None else f" (layouts differ by a relative {self.layout_gap:.1e}, allowed "
        found = [
            f"first batch: {self.pairs} pairs, layout {self.layout}{gap and f'{gap}{self.tolerance:.0e})'}",
            f"loss {self.loss:.6g}; the objective's value at the starting model: {self.expected:.6g}",
            f"largest implicit rewards: chosen {self.reward_chosen:.3g}, rejected {self.reward_rejected:.3g}",
            f"log-prob of a response: chosen {self.logp_chosen:.2f} nats, {self.per_token_chosen:.3f} a token; "
            f"rejected {self.logp_rejected:.2f}, {self.per_token_rejected:.3f} a token",
        ]
        return [*found, *self.degrees, *(f"said: {text}" for text in self.warnings)]


def step_zero(recipe: Recipe, data: Dataset, tokenizer: Any) -> StepZero:
    """Build the recipe's trainer on `data`, in this one process, and run the first batch.

    Raises:
        UserError: the model cannot be had, or the recipe's training cannot be set up.
    """
    training = recipe.training.model_copy(update=QUIET)
    quiet = recipe.model_copy(
        # Log-probs kept in the cache are for whole data sets: here the frozen model is asked itself.
        update={"training": training, "reference": recipe.reference.model_copy(update={"precompute": False})}
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        args = run_arguments(quiet, Path(folder), 1)
        try:
            trainer = build_trainer(quiet, args, data, None, tokenizer)
        except (ValueError, ImportError, RuntimeError) as error:
            raise UserError(f"cannot set up training: {' '.join(str(error).split())[:400]}") from error
        trainer.model.train()
        batch: Any = next(iter(trainer.get_train_dataloader()))
        inputs = trainer._prepare_inputs(batch)
        problem = None
        try:
            trainer.compute_loss(trainer.model, inputs)
        except UserError as error:
            problem = str(error)
        ours = [str(w.message) for w in said if issubclass(w.category, UserWarning) and "layout" in str(w.message)]
        return _facts(trainer, inputs, tuple(dict.fromkeys(ours)), problem)


def _facts(
    trainer: PreferenceTrainer, inputs: dict[str, torch.Tensor], said: tuple[str, ...], problem: str | None
) -> StepZero:
    model, objective = trainer.model, trainer.objective
    rows = {key: inputs[key] for key in ROW_KEYS}
    branches = 3 if "calibration" in objective.needs else 2

    def scored(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return sequence_logps(model, model.config, model.dtype, given, branches)

    with torch.no_grad(), trainer.accelerator.autocast():
        batch = trainer.pair_logps(model, inputs)
        shared = int(rows["row_segments"].max()) > 1
        paired = repaired(rows, branches, trainer.collator.pad_token_id) if shared else rows
        model.eval()
        start = scored(paired)
        gap = relative_gap(scored(rows), start) if shared and trainer.collator.layout == "shared_prefix" else None
    chosen, rejected = (r.detach().abs().max() for r in objective.rewards(batch))
    logps = torch.stack([batch.chosen, batch.rejected], 1).mean(0)
    started = replace(batch, **{name: start[:, j] for j, name in enumerate(BRANCHES[:branches])})
    tokens = torch.stack([inputs["chosen_length"], inputs["rejected_length"]], 1).sum(0)
    each = logps * len(start) / tokens
    degrees, wrong = _degrees(trainer, batch)
    return StepZero(
        pairs=len(start),
        layout=trainer.collator.layout,
        layout_gap=gap,
        tolerance=trainer.tolerance,
        reward_chosen=float(chosen),
        reward_rejected=float(rejected),
        loss=_mean_loss(objective, batch),
        expected=_mean_loss(objective, started),
        logp_chosen=float(logps[0]),
        logp_rejected=float(logps[1]),
        per_token_chosen=float(each[0]),
        per_token_rejected=float(each[1]),
        degrees=degrees,
        warnings=said,
        problem=problem or wrong,
    )


def _degrees(trainer: PreferenceTrainer, batch: PairLogps) -> tuple[tuple[str, ...], str | None]:
    """What spo finds to learn from, and what is wrong with it: the zero head knows no degree, so L_deg is log N."""
    if batch.degree_logits is None or batch.degree_labels is None:
        return (), None
    rows: Any = trainer.train_dataset
    cut = trainer.collator.max_length
    labels = [cut_copies(row, cut, len(trainer.copied))[1] for row in rows]
    copies, pairs = sum(n > 0 for row in labels for n in row), sum(max(row) > 0 for row in labels)
    lines = [f"degraded copies: {copies}; {pairs} of {len(labels)} pairs have some ({pairs / len(labels):.0%})"]
    real = (batch.degree_labels >= 0).any(1)
    if not bool(real.any()):
        return (*lines, "degree loss: no pair of the first batch has copies"), None
    found = float(degree_loss(batch.degree_logits.float(), batch.degree_labels)[real].mean())
    expected = math.log(batch.degree_logits.size(-1))
    lines.append(f"degree loss {found:.6g}; at a zero head, log {batch.degree_logits.size(-1)} = {expected:.6g}")
    wrong = abs(found - expected) > 1e-5
    return tuple(lines), f"the degree loss is {found:.6g}, not {expected:.6g}: the head is not zero" if wrong else None


def _mean_loss(objective: Objective, batch: PairLogps) -> float:
    return float(losses_and_slopes(objective, batch)[0].mean())
