"""Supervised fine-tuning from a recipe, the step before preference training: TRL's SFTTrainer on our rows.

`scripts/sft.py` reads argv and calls `train`. The run directory is that of preference training, and `final/` is what
the next recipe's `model.name_or_path` takes. The loss is the mean negative log-likelihood, in nats, of the learned
tokens of the whole global batch (TRL's `nll`): it does not change with the number of processes or with accumulation.
Not here: which tokens are learned (`alignment.data.supervised`), what runs have in common (`launching`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from alignment.data import overlap
from alignment.data.messages import TextRules
from alignment.data.pipeline import Prepared, write_rejected
from alignment.data.supervised import prepare_supervised, refuse_overlap
from alignment.data.tables import fingerprint
from alignment.models import load_model
from alignment.models.ends import settle_ends
from alignment.recipes import SftRecipe
from alignment.trainers import callbacks
from alignment.trainers.collation import LengthGroupedSampler, train_sampler
from alignment.trainers.supervised import SupervisedTrainer
from alignment.runs.lifecycle import (
    adapter_config,
    begin,
    carry_out,
    compact,
    conclude,
    known,
    manifest_of_batches,
    model_arguments,
    run_directory,
    say,
    setting_up,
    trl_config,
)
from alignment.trainers.metrics import EpochOrder
from alignment.runs.opening import dated, open_tokenizer, refuse_unfit


def build_trainer(
    recipe: SftRecipe, args: SFTConfig, data: Dataset, held_out: Dataset | None, tokenizer: PreTrainedTokenizerBase
) -> SupervisedTrainer:
    """Model and trainer of a recipe. `args` must exist first: with ZeRO-3 it makes loading shard."""
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    args.average_tokens_across_devices = True
    model: Any = load_model(**model_arguments(recipe), trainable_adapter=recipe.lora is None)
    trainer = SupervisedTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=adapter_config(recipe),
        group_by_length=recipe.training.group_by_length,
        on_nan=recipe.training.on_nan,
        callbacks=[callbacks.MetricsFile(Path(str(args.output_dir)) / "metrics.jsonl")],
    )
    compact(trainer)
    return trainer


def train(recipe: SftRecipe, resume: bool = False) -> Path:
    """Run a recipe's supervised fine-tuning; returns the run directory.

    The directory appears at once with manifest.json; the trained model in `final/` appears whole, at the end. An
    earlier run in the same place is moved aside, never overwritten.

    Raises:
        UserError: anything that the user can mend; before the first step it leaves everything as it was.
    """
    started = time.perf_counter()
    run = Path(recipe.training.output_dir)
    state = begin(recipe)
    tokenizer = open_tokenizer(recipe, state, resume)
    data, held_out = (_rows(recipe, role, tokenizer) for role in ("train", "eval"))
    assert data is not None  # the schema says so
    refuse_overlap(data.dataset, held_out.dataset if held_out else None)
    refuse_unfit(recipe, tokenizer, [found.dataset for found in (data, held_out) if found], state)
    manifest = known(recipe, state.num_processes) | dated(tokenizer)
    with run_directory(recipe, state, resume, manifest) as checkpoint:
        _train_in(run, recipe, state, tokenizer, data, held_out, checkpoint, started)
    return run


def _rows(recipe: SftRecipe, role: str, tokenizer: PreTrainedTokenizerBase) -> Prepared | None:
    sources = recipe.data.train if role == "train" else recipe.data.eval
    if sources is None:
        return None
    return prepare_supervised(
        sources,
        tokenizer,
        max_length=recipe.data.max_length,
        role=role,
        turns=recipe.sft.turns,
        max_rejected_share=recipe.data.max_rejected_share,
        seed=recipe.training.seed,
        rules=TextRules.of(recipe.data),
    )


def _train_in(
    run: Path,
    recipe: SftRecipe,
    state: PartialState,
    tokenizer: PreTrainedTokenizerBase,
    rows: Prepared,
    held_out: Prepared | None,
    checkpoint: Path | None,
    started: float,
) -> None:
    """The three stages, in a run directory that is ready."""
    both = [rows] if held_out is None else [rows, held_out]
    say(state, f"[1/3] rows: {', '.join(source.name for source in recipe.data.train)}")
    if state.is_main_process:
        for line in (line for prepared in both for line in prepared.summary()):
            print(f"  {line}", flush=True)
        write_rejected(run, *both)
    state.wait_for_everyone()
    say(state, f"[2/3] model: {recipe.model.name_or_path}")
    args = trl_config(SFTConfig, recipe, run, state.num_processes)
    args.eval_on_start = args.eval_on_start and checkpoint is None  # the start was evaluated when the run began
    with setting_up():
        trainer = build_trainer(recipe, args, rows.dataset, held_out.dataset if held_out else None, tokenizer)
    trainer.row_name, trainer.held_out_name = rows.name_of, None if held_out is None else held_out.name_of
    count = len(rows.dataset)
    repeated = -count % recipe.training.global_batch_size
    manifest = known(recipe, state.num_processes) | manifest_of_batches(args, state, tokenizer) | dated(tokenizer)
    manifest |= {
        "repeated_rows": repeated,
        "rows": {prepared.role: prepared.manifest() for prepared in both},
        "sources": [source for prepared in both for source in prepared.sources],
        "data_fingerprint": fingerprint(rows.dataset),
    }
    repeats = f" (and {repeated} repeats, to fill the last batch)" * bool(repeated)
    if state.is_main_process:
        overlap.write_trained(run, rows.prompts)
    carry_out(trainer, recipe, run, state, checkpoint, manifest, f"{count} rows{repeats}")
    conclude(trainer, recipe, run, state, manifest, {"total": started})
