"""Gradient entanglement on a few fixed pairs while a run trains (Yuan et al. 2024, 2410.13828), and ∇log π(response).

    trainer.add_callback(GradientProbe(trainer, every=10))   # `training.diagnostics` of a recipe does this

A step on a pair's own loss L moves the weights along d_w g_w - d_l g_l, with d_w = -dL/dlog π(chosen) and
d_l = dL/dlog π(rejected), hence to first order

    log π(chosen) by d_w |g_w|² - d_l <g_w, g_l>,   log π(rejected) by d_w <g_w, g_l> - d_l |g_l|²

The d are the objective's own, by autograd at the pair's log-probabilities (`PreferenceTrainer.push`). For a loss of
the margin d_w = d_l = -L'(m): while it asks for a larger margin (L' < 0) both fall where <g_w, g_l> > |g_w|², both
rise where it is > |g_l|²; past its target (ipo, inpo …: L' > 0) everything is reversed.

The probe only looks: `torch.autograd.grad` touches no `.grad` and no hook of DDP or ZeRO-2, and nothing is drawn. Each
response is a row and a pass of its own, whatever the layout of training. Not here: the mean displacement of all
trained pairs (`offline.py`), the remedy (`normalized.py`), products of single tokens' gradients, spo's degree loss.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import is_peft_model
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from alignment.errors import UserError
from alignment.files import iterate_json_lines, jsonable, write_json_lines
from alignment.models.scoring import ROW_KEYS, sequence_logps
from alignment.trainers.collation import FROZEN_COLUMNS

FILE = "entanglement.jsonl"
Parameters = Literal["last_layer", "all"]
Gradient = Sequence[torch.Tensor | None]
# verdict → how (chosen, rejected) move
VERDICTS = {"parted": (1, -1), "both fall": (-1, -1), "both rise": (1, 1), "pulled back": (-1, 1), "unmoved": (0, 0)}
MEANS = ("inner", "norm_chosen", "norm_rejected", "cosine", "ratio", "weight_chosen", "weight_rejected")


# --- the condition --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entanglement:
    """The gradients of one pair, and how its loss weighs them.

    Attributes:
        inner, chosen, rejected: <g_w, g_l>, |g_w|², |g_l|², in nats² per unit of weights².
        weight_chosen, weight_rejected: d_w and d_l, loss per nat; 1 and 1 is a loss of the margin with L' = -1.
        third_chosen, third_rejected: d_c <g_w, g_c> and d_c <g_l, g_c>, where the loss pushes a calibration response.
    """

    inner: float
    chosen: float
    rejected: float
    weight_chosen: float = 1.0
    weight_rejected: float = 1.0
    third_chosen: float = 0.0
    third_rejected: float = 0.0

    @property
    def cosine(self) -> float:
        """Of the angle between the gradients; 0 where one of them vanishes."""
        size = math.sqrt(self.chosen * self.rejected)
        return self.inner / size if size else 0.0

    @property
    def ratio(self) -> float:
        """<g_w, g_l> / min(|g_w|², |g_l|²): above 1 a loss of the margin moves both together; 0 where one vanishes."""
        least = min(self.chosen, self.rejected)
        return self.inner / least if least else 0.0

    @property
    def changes(self) -> tuple[float, float]:
        """First-order changes of log π(chosen) and log π(rejected): nats per unit of plain descent's learning rate."""
        d_w, d_l = self.weight_chosen, self.weight_rejected
        chosen = d_w * self.chosen - d_l * self.inner + self.third_chosen
        return chosen, d_w * self.inner - d_l * self.rejected + self.third_rejected

    @property
    def verdict(self) -> str:
        """A key of `VERDICTS`; where one of the two stays, the other decides between parted and pulled back."""
        chosen, rejected = self.changes
        if min(chosen, rejected) > 0:
            return "both rise"
        if max(chosen, rejected) < 0:
            return "both fall"
        return "parted" if chosen > rejected else "pulled back" if chosen < rejected else "unmoved"


def dot(a: Gradient, b: Gradient) -> float:
    """Inner product of two gradients, given as one tensor per parameter (None: no dependence on it).

    Products in fp32, their sums within and over parameters in float64.
    """
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    parts = [(x.float() * y.float()).sum(dtype=torch.float64) for x, y in pairs]
    return float(torch.stack(parts).sum()) if parts else 0.0


def entangle(
    chosen: Gradient, rejected: Gradient, push: Sequence[float] = (1.0, -1.0), third: Gradient | None = None
) -> Entanglement:
    """The products of a pair's gradients g_w and g_l, and of g_c where there is one.

    Args:
        chosen, rejected, third: g_w, g_l, g_c.
        push: -dL/dlog π of each of them: d_w, -d_l, d_c.
    """
    further = (0.0, 0.0) if third is None else (push[2] * dot(chosen, third), push[2] * dot(rejected, third))
    products = dot(chosen, rejected), dot(chosen, chosen), dot(rejected, rejected)
    return Entanglement(*products, push[0], -push[1], *further)


# --- gradients of single responses ----------------------------------------------------------------------------------


class ResponseGradients:
    """∇log π(response) with respect to the policy's trained parameters, one response at a time.

    Args:
        trainer: a trainer that scores with `LayoutTrainer`.
        parameters: `last_layer` is the last decoder block; `all` is every trained parameter. With LoRA both are of
            the adapters only.
        key: of the recipe, for messages.

    Raises:
        UserError: weights are split over processes, checkpointing is reentrant, or the last layer is not trained.
    """

    def __init__(self, trainer: Any, parameters: Parameters, key: str):
        self.trainer, self.which = trainer, parameters
        plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
        if trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
            raise UserError(
                f"{key}: ZeRO-3 and FSDP split every weight over the processes, so that none has a response's "
                "gradient: launch with ddp.yaml or zero2.yaml, or leave it out"
            )
        if trainer.args.activation_checkpointing and (trainer.args.activation_checkpointing_kwargs or {}).get(
            "use_reentrant"
        ):
            raise UserError(
                f"{key}: reentrant checkpointing computes no gradient of a single response: set "
                "training.gradient_checkpointing_kwargs={use_reentrant: false}"
            )
        if not self.trained():
            raise UserError(f"{key}: the last layer has no trained parameter; take `parameters: all`")

    def trained(self) -> list[nn.Parameter]:
        """The parameters that gradients are taken of."""
        source = self.trainer.model if self.which == "all" else last_block(self.trainer.model)
        return [p for p in source.parameters() if p.requires_grad]

    def __call__(self, rows: dict[str, torch.Tensor], row: int) -> tuple[float, tuple[torch.Tensor | None, ...]]:
        """log π of row `row`, in nats, and its gradient, a tensor per parameter of `trained` (None: no dependence).

        Args:
            rows: from `scoring.build_rows`, `paired`.
            row: which of them.
        """
        model = self.trainer.model  # not wrapped: hooks of DDP would wait for the other processes
        one = {key: rows[key][row : row + 1] for key in ROW_KEYS}
        with torch.enable_grad(), self.trainer.accelerator.autocast():
            logp = sequence_logps(model, model.config, model.dtype, one, 1).sum()
            return float(logp.detach()), torch.autograd.grad(logp, self.trained(), allow_unused=True)


def last_block(model: Any) -> nn.Module:
    """The last of the decoder's layers; UserError where they are not found."""
    plain = model.get_base_model() if is_peft_model(model) else model
    depth = plain.config.get_text_config().num_hidden_layers
    for module in plain.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module[-1]
    raise UserError(
        f"training.diagnostics: no list of {depth} layers in {type(plain).__name__}; take `parameters: all`"
    )


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Training mode (where checkpointing acts; dropout is off), then mode and random states as they were."""
    training = model.training
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.train()
        try:
            yield
        finally:
            model.train(training)


# --- the probe ------------------------------------------------------------------------------------------------------


class GradientProbe(TrainerCallback):
    """Measures a few pairs at the start and after every so many steps; changes nothing of the training.

    A line of means and counts goes to the log (`entanglement/*`), a line per probe with every pair to
    `entanglement.jsonl`, a sentence to the terminal. The pairs are the first ones of the held-out rows, or of the
    training rows where there are none; under DDP the processes share them out.

    Args:
        trainer: a `PreferenceTrainer`.
        every: steps between probes.
        pairs: how many, at most all.
        parameters: see `ResponseGradients`. All gradients of a pair are in memory at once: two, or three where the
            loss pushes a calibration response.

    Raises:
        UserError: as `ResponseGradients`.
    """

    def __init__(self, trainer: Any, every: int, pairs: int = 4, parameters: Parameters = "last_layer"):
        self.trainer, self.every = trainer, every
        self.gradients = ResponseGradients(trainer, parameters, "training.diagnostics")
        data = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
        collator = replace(trainer.collator, layout="paired")
        self.pairs = min(pairs, len(data))
        self.inputs = [collator([row]) for row in data.select(range(self.pairs))]
        self.file = Path(str(trainer.args.output_dir)) / FILE
        self._start: torch.Tensor | None = None
        self._before: dict[str, Any] | None = None

    def measure(self) -> torch.Tensor:
        """`[pairs, 9]`, float64: log π of chosen and rejected (nats), then the fields of `Entanglement`."""
        accelerator = self.trainer.accelerator
        table = torch.zeros(self.pairs, 9, dtype=torch.float64)
        with _as_found(self.trainer.model):
            for i in range(accelerator.process_index, self.pairs, accelerator.num_processes):
                inputs = {key: value.to(accelerator.device) for key, value in self.inputs[i].items()}
                batch, push = self.trainer.push(inputs)
                frozen = {name: value.cpu() for name, value in batch.columns().items() if name in FROZEN_COLUMNS}
                self.inputs[i] |= frozen  # they never change: scored once
                (chosen, g_w), (rejected, g_l) = self.gradients(inputs, 0), self.gradients(inputs, 1)
                g_c = self.gradients(inputs, 2)[1] if push.size(1) > 2 else None
                found = entangle(g_w, g_l, push[0].tolist(), g_c)
                table[i] = torch.tensor([chosen, rejected, *astuple(found)])
        summed: torch.Tensor = accelerator.reduce(table.to(accelerator.device), reduction="sum")
        return summed.cpu()

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102 - transformers' hook
        self._start = self._before = None
        if not state.is_world_process_zero or not self.file.is_file():
            return
        rows = iterate_json_lines(self.file, skip_unfinished=True)  # steps that will be repeated go
        kept = [row for _, row in rows if state.global_step and row["step"] <= state.global_step]
        write_json_lines(self.file, kept)
        self._before = kept[-1] if kept else None

    def on_step_begin(self, args, state, control, **kwargs):  # noqa: D102
        if state.global_step == 0 and self._start is None:
            self._start = self.measure()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):  # noqa: D102
        # Written only now: a run that the step-0 check stopped has not begun, and leaves no line.
        if state.global_step == 0 and self._start is not None:
            self._write(self._start, state, control)

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        if state.global_step % self.every == 0:
            self._write(self.measure(), state, control)

    def _write(self, table: torch.Tensor, state: Any, control: Any) -> None:
        found = [Entanglement(*row[2:]) for row in table.tolist()]
        row = {
            "step": state.global_step,
            "parameters": self.gradients.which,
            "verdict": [pair.verdict for pair in found],
            "inner": [pair.inner for pair in found],
            "norm_chosen": [math.sqrt(pair.chosen) for pair in found],
            "norm_rejected": [math.sqrt(pair.rejected) for pair in found],
            "cosine": [pair.cosine for pair in found],
            "ratio": [pair.ratio for pair in found],
            "weight_chosen": [pair.weight_chosen for pair in found],
            "weight_rejected": [pair.weight_rejected for pair in found],
            "change_chosen": [pair.changes[0] for pair in found],
            "change_rejected": [pair.changes[1] for pair in found],
            "logp_chosen": table[:, 0].tolist(),
            "logp_rejected": table[:, 1].tolist(),
        }
        numbers = summary(row, self._before)
        self._before = row
        # transformers' own log, so that the sums of `PreferenceTrainer.log` stay what they are; it takes its line for
        # the one that may be due.
        due = control.should_log
        Trainer.log(self.trainer, numbers)
        control.should_log = due
        if state.is_world_process_zero:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(jsonable(row)) + "\n")
            without = ", without the degree loss" if "degree" in self.trainer.objective.needs else ""
            tqdm.write(f"  step {state.global_step}, {in_words(row)}{without}")


def summary(row: dict[str, Any], before: dict[str, Any] | None) -> dict[str, float]:
    """`entanglement/*` of one probe: means over its pairs, numbers of pairs for the verdicts.

    Args:
        row: a line of `entanglement.jsonl`.
        before: the probe before it, whose verdicts are held against all changes since; None leaves those out.
    """

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    def sign(value: float) -> int:
        return (value > 0) - (value < 0)

    found = {key: mean(row[key]) for key in MEANS}
    found |= {word.replace(" ", "_"): float(row["verdict"].count(word)) for word in VERDICTS}
    if before is not None:
        moved = [
            [now - then for now, then in zip(row[key], before[key], strict=True)]
            for key in ("logp_chosen", "logp_rejected")
        ]
        held = [VERDICTS[word] == (sign(w), sign(r)) for word, w, r in zip(before["verdict"], *moved, strict=True)]
        found |= {"moved_chosen": mean(moved[0]), "moved_rejected": mean(moved[1]), "foretold": mean(held)}
    return {f"entanglement/{key}": value for key, value in found.items()}


def in_words(row: dict[str, Any]) -> str:
    """The verdicts of one probe for a reader."""
    counts = ", ".join(f"{n} {word}" for word in VERDICTS if (n := row["verdict"].count(word)))
    where = {"last_layer": "last layer", "all": "all trained parameters"}[row["parameters"]]
    cosine = sum(row["cosine"]) / len(row["cosine"])
    return f"gradients of {len(row['cosine'])} probe pairs ({where}): {counts}; mean cosine {cosine:.2f}"
