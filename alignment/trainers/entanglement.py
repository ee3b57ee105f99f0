"""Gradient entanglement on a few fixed pairs while a run trains (Yuan et al. 2024, 2410.13828), and ∇log π(response).

    trainer.add_callback(GradientProbe(trainer, every=10))   # `training.diagnostics` of a recipe does this

A loss of the margin moves log π(chosen) by C (|g_w|² - <g_w, g_l>) and log π(rejected) by C (<g_w, g_l> - |g_l|²) to
first order, C > 0: where the inner product is larger than one of the squared norms, both fall or both rise together.
The probe only looks: `torch.autograd.grad` touches no `.grad` and no hook of DDP or ZeRO-2, and nothing is drawn. Each
response is a row and a pass of its own, whatever the layout of training. Not here: the mean displacement of all
trained pairs (`offline.py`), the remedy (`normalized.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import is_peft_model
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from alignment.errors import UserError
from alignment.files import iterate_json_lines, jsonable, write_json_lines
from alignment.trainers.scoring import ROW_KEYS, sequence_logps

FILE = "entanglement.jsonl"
Parameters = Literal["last_layer", "all"]
Gradient = Sequence[torch.Tensor | None]
# verdict → how (chosen, rejected) move
VERDICTS = {"both fall": (-1, -1), "both rise": (1, 1), "parted": (1, -1)}


# --- the condition --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entanglement:
    """`inner` = <g_w, g_l>, `chosen` = |g_w|², `rejected` = |g_l|² of one pair, in nats² per unit of weights²."""

    inner: float
    chosen: float
    rejected: float

    @property
    def cosine(self) -> float:
        """Of the angle between the gradients; 0 where one of them vanishes."""
        size = math.sqrt(self.chosen * self.rejected)
        return self.inner / size if size else 0.0

    @property
    def ratio(self) -> float:
        """<g_w, g_l> / min(|g_w|², |g_l|²): above 1 the two move together; 0 where a gradient vanishes."""
        least = min(self.chosen, self.rejected)
        return self.inner / least if least else 0.0

    @property
    def changes(self) -> tuple[float, float]:
        """First-order changes of log π(chosen) and log π(rejected) by a step of +1 along g_w - g_l."""
        return self.chosen - self.inner, self.inner - self.rejected

    @property
    def verdict(self) -> str:
        """A key of `VERDICTS`; never both of the first two (Cauchy-Schwarz)."""
        chosen, rejected = self.changes
        return "both fall" if chosen < 0 else "both rise" if rejected > 0 else "parted"


def dot(a: Gradient, b: Gradient) -> float:
    """Inner product of two gradients, given as one tensor per parameter (None: no dependence on it).

    Products in fp32, their sums within and over parameters in float64.
    """
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    parts = [(x.float() * y.float()).sum(dtype=torch.float64) for x, y in pairs]
    return float(torch.stack(parts).sum()) if parts else 0.0


def entangle(chosen: Gradient, rejected: Gradient) -> Entanglement:
    """The three products of a pair's gradients g_w and g_l."""
    return Entanglement(dot(chosen, rejected), dot(chosen, chosen), dot(rejected, rejected))


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
        parameters: see `ResponseGradients`. Both gradients of a pair are in memory at once.

    Raises:
        UserError: as `ResponseGradients`.
    """

    def __init__(self, trainer: Any, every: int, pairs: int = 4, parameters: Parameters = "last_layer"):
        self.trainer, self.every = trainer, every
        self.gradients = ResponseGradients(trainer, parameters, "training.diagnostics")
        data = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
        collator = replace(trainer.collator, layout="paired", calibration=False, copied=())
        self.pairs = min(pairs, len(data))
        columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
        self.rows = collator(list(data.select_columns(columns).select(range(self.pairs))))
        self.file = Path(str(trainer.args.output_dir)) / FILE
        self._start: torch.Tensor | None = None
        self._before: dict[str, Any] | None = None

    def measure(self) -> torch.Tensor:
        """`[pairs, 5]`, float64: log π of chosen and rejected (nats), <g_w, g_l>, |g_w|², |g_l|²."""
        accelerator = self.trainer.accelerator
        rows = {key: value.to(accelerator.device) for key, value in self.rows.items()}
        table = torch.zeros(self.pairs, 5, dtype=torch.float64)
        with _as_found(self.trainer.model):
            for i in range(accelerator.process_index, self.pairs, accelerator.num_processes):
                chosen, g_w = self.gradients(rows, i)
                rejected, g_l = self.gradients(rows, self.pairs + i)
                found = entangle(g_w, g_l)
                table[i] = torch.tensor([chosen, rejected, found.inner, found.chosen, found.rejected])
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
            tqdm.write(f"  step {state.global_step}, {in_words(row)}")


def summary(row: dict[str, Any], before: dict[str, Any] | None) -> dict[str, float]:
    """`entanglement/*` of one probe: means over its pairs, numbers of pairs for the verdicts.

    Args:
        row: a line of `entanglement.jsonl`.
        before: the probe before it, whose verdicts foretell the changes since; None leaves those out.
    """

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    found = {key: mean(row[key]) for key in ("inner", "norm_chosen", "norm_rejected", "cosine", "ratio")}
    found |= {word.replace(" ", "_"): float(row["verdict"].count(word)) for word in VERDICTS}
    if before is not None:
        moved = [
            [now - then for now, then in zip(row[key], before[key], strict=True)]
            for key in ("logp_chosen", "logp_rejected")
        ]
        foretold = [VERDICTS[word] for word in before["verdict"]]
        held = [up * w > 0 and down * r > 0 for (up, down), w, r in zip(foretold, *moved, strict=True)]
        found |= {"moved_chosen": mean(moved[0]), "moved_rejected": mean(moved[1]), "foretold": mean(held)}
    return {f"entanglement/{key}": value for key, value in found.items()}


def in_words(row: dict[str, Any]) -> str:
    """The verdicts of one probe for a reader."""
    counts = ", ".join(f"{row['verdict'].count(word)} {word}" for word in VERDICTS)
    where = {"last_layer": "last layer", "all": "all trained parameters"}[row["parameters"]]
    cosine = sum(row["cosine"]) / len(row["cosine"])
    return f"gradients of {len(row['cosine'])} probe pairs ({where}): {counts}; mean cosine {cosine:.2f}"
