"""One training run from a recipe: preferences, model, trainer, run directory. With `data.prompts` see `on_policy`.

`scripts/train.py` and `alignment train` read argv and call `train`. Every process of a launch runs this; what needs
doing once is done by the main process while the others wait.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import DPOConfig

from alignment.data import overlap
from alignment.data.messages import TextRules
from alignment.data.pipeline import Prepared, prepare, prepare_rows, write_rejected
from alignment.data.preferences import read_rows
from alignment.data.prompt_files import locate_prompts, read_prompts, refuse_unrendered
from alignment.data.sampled import best_against_worst, with_label_noise
from alignment.data.tables import fingerprint
from alignment.errors import UserError
from alignment.files import json_digest, write_json_lines
from alignment.models import load_model
from alignment.models.digest import weights_digest
from alignment.models.ends import ends_of
from alignment.models.gguf import cache_root
from alignment.models.sampling import prompt_ids, sample
from alignment.objectives import get_objective
from alignment.objectives.base import Objective, reads_reference, row_columns
from alignment.recipes import Recipe
from alignment.rewards import get_oracle, get_reward
from alignment.runs import directory
from alignment.trainers import callbacks
from alignment.trainers.entanglement import GradientProbe
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
from alignment.trainers.offline import PreferenceTrainer
from alignment.runs.opening import dated, open_tokenizer, refuse_unfit

SAMPLES_FORMAT = "2"  # part of the cache key: raise it when the same settings give other pairs


def sampled_preferences(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Rows built from the starting model's own samples; kept in the cache under everything that decides them."""
    settings, generation = recipe.data.sample, recipe.generation
    assert settings is not None  # the schema says so
    placed = locate_prompts(settings.prompts, settings.limit)
    refuse_unrendered(placed, tokenizer)
    prompts = [one.prompt for one in placed]
    reward = None if recipe.reward is None else get_reward(recipe.reward.name, **recipe.reward.options)
    oracle = None if recipe.oracle is None else get_oracle(recipe.oracle.name, **recipe.oracle.options)
    judge = reward or oracle
    assert judge is not None  # the schema says so, and that there is one
    model: Any = load_model(**model_arguments(recipe))
    encoded = [prompt_ids(tokenizer, p) for p in prompts]
    key = {
        "format": SAMPLES_FORMAT,
        "weights": weights_digest(model),
        "ends": ends_of(tokenizer, model.generation_config).ids,
        "prompts": encoded,
        "sample": {k: v for k, v in settings.model_dump().items() if k not in ("prompts", "limit")},
        "generation": generation.drawing,
        "judge": judge.describe(),
        "torch": torch.__version__,
    }
    digest = json_digest(key)
    cached = cache_root() / "samples" / f"{digest[:32]}.jsonl"
    if cached.is_file():
        print(f"  the same samples are in the cache: {cached}", flush=True)
        return read_rows(cached)
    if torch.cuda.is_available():
        model.cuda()
    draws = sample(
        model,
        tokenizer,
        prompts,
        settings.samples_per_prompt,
        **generation.drawing,
        progress="  sampling prompts",
    )
    rows, counts = best_against_worst(
        prompts,
        encoded,
        draws,
        reward.score if reward else None,
        probability=oracle.probability if oracle else None,
        pairs_per_prompt=settings.pairs_per_prompt,
        min_gap=settings.min_gap,
    )
    if settings.label_noise:
        rows, counts["flipped"] = with_label_noise(rows, settings.label_noise, generation.seed)
    print("  " + ", ".join(f"{count} {name}" for name, count in counts.items()), flush=True)
    write_json_lines(cached, rows)
    return rows


def objective_of(recipe: Recipe) -> Objective:
    """The recipe's objective with its hyper-parameters."""
    return get_objective(recipe.objective.name, **recipe.objective.hyperparameters)


def begun(recipe: Recipe, world: int) -> dict[str, Any]:
    """What is known of a run before it begins."""
    card = objective_of(recipe).card
    return known(recipe, world) | {
        "objective": {"name": recipe.objective.name, **recipe.objective.hyperparameters},
        "objective_file_sha256": directory.objective_digest(recipe),
        "method": {"title": card.title, "paper": card.paper},
    }


def given_rows(recipe: Recipe, role: str, tokenizer: PreTrainedTokenizerBase) -> Prepared | None:
    """`data.train` or `data.eval`, checked and tokenised; None where the recipe has none."""
    sources = recipe.data.train if role == "train" else recipe.data.eval
    if sources is None:
        return None
    return prepare(sources, tokenizer, role=role, seed=recipe.training.seed, **_row_settings(recipe))


def _row_settings(recipe: Recipe) -> dict[str, Any]:
    objective = objective_of(recipe)
    return {
        "max_length": recipe.data.max_length,
        "max_rejected_share": recipe.data.max_rejected_share,
        "calibration": "calibration" in objective.needs,
        "rules": TextRules.of(recipe.data),
        "reads": row_columns(objective),
    }


def _judged_on(recipe: Recipe, held_out: Prepared | None) -> overlap.Judged:
    """Hashes of what the run is judged on: `data.eval` and `evaluation.prompts`."""
    section = recipe.evaluation
    rows = None if held_out is None else held_out.dataset
    if section is None:
        return overlap.judged_on(rows)
    return overlap.judged_on(rows, read_prompts(section.prompts, section.limit), section.prompts)


def _training_data(
    recipe: Recipe,
    run: Path,
    tokenizer: PreTrainedTokenizerBase,
    state: PartialState,
    given: Prepared | None,
    held_out: Prepared | None,
) -> Prepared:
    """The rows to train on; sampled ones the main process builds and writes, the others read what it wrote."""
    judged, drawn_for = _judged_on(recipe, held_out), recipe.data.sample
    refusing = recipe.data.overlap == "refuse"
    if given is None:
        assert drawn_for is not None  # the schema says so
        if refusing:  # before hours of sampling
            overlap.refuse(read_prompts(drawn_for.prompts, drawn_for.limit), judged, drawn_for.prompts)
        file = run / "preferences.jsonl"
        if state.is_main_process and not file.is_file():
            write_json_lines(file, sampled_preferences(recipe, tokenizer))
        state.wait_for_everyone()
        given = prepare_rows(read_rows(file), str(file), tokenizer, role="train", **_row_settings(recipe))
    if state.is_main_process:
        write_rejected(run, given, *([] if held_out is None else [held_out]))
    state.wait_for_everyone()
    overlap.refuse_two_kinds(given, held_out)
    if refusing:
        overlap.refuse(given.dataset["prompt"], judged)
    elif recipe.data.overlap == "drop":
        given = overlap.without(given, judged)
    for line in [*given.summary(), *(held_out.summary() if held_out else ())]:
        say(state, f"  {line}")
    return given


def run_arguments(recipe: Recipe, run: Path, world: int) -> DPOConfig:
    """TRL's arguments for a run of the recipe in `run` with `world` processes."""
    return trl_config(DPOConfig, recipe, run, world)


def build_trainer(
    recipe: Recipe, args: DPOConfig, data: Dataset, held_out: Dataset | None, tokenizer: PreTrainedTokenizerBase
) -> PreferenceTrainer:
    """Model, objective and trainer of a recipe. `args` must exist first: with ZeRO-3 it makes loading shard."""
    model = load_model(**model_arguments(recipe), trainable_adapter=recipe.lora is None)
    objective = get_objective(recipe.objective.name, **recipe.objective.hyperparameters)
    adapted = recipe.lora is not None or is_peft_model(model)
    trainer = PreferenceTrainer(
        model=model,
        objective=objective,
        args=args,
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=tokenizer,
        **frozen_models(recipe, args, objective, adapted),
        precompute=recipe.reference.precompute,
        peft_config=adapter_config(recipe),
        layout=recipe.training.layout,
        group_by_length=recipe.training.group_by_length,
        displacement_alarm=recipe.training.displacement_alarm,
        normalized_gradient=recipe.training.normalized_gradient,
        on_nan=recipe.training.on_nan,
        callbacks=[callbacks.MetricsFile(Path(str(args.output_dir)) / "metrics.jsonl")],
    )
    probe = recipe.training.diagnostics
    if probe.every:
        trainer.add_callback(GradientProbe(trainer, probe.every, probe.pairs, probe.parameters))
    return compact(trainer)


def frozen_models(recipe: Recipe, args: TrainingArguments, objective: Objective, adapted: bool) -> dict[str, Any]:
    """Models that the trainer cannot make from the policy: another reference, and under ZeRO-3, whose sharded
    parameters cannot be copied, the start loaded a second time."""
    found: dict[str, Any] = {}
    reference = recipe.reference
    another = reference.name_or_path is not None and reads_reference(objective)
    if another:
        named = reference.model_dump(include={"name_or_path", "adapter", "revision"})
        try:  # dtype, quantisation and attention are the policy's
            found["ref_model"] = load_model(**model_arguments(recipe) | named).requires_grad_(False)
        except UserError as error:
            raise UserError(re.sub(r"^model\.", "reference.", str(error))) from error
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if not zero3 or adapted or reference.precompute or not reads_reference(objective):
        return found
    if not another:
        start = load_model(**model_arguments(recipe)).requires_grad_(False)
        return {"ref_model": start, "start_is_reference": True}
    if "previous" in objective.needs:
        found["start_model"] = load_model(**model_arguments(recipe)).requires_grad_(False)
    return found


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Run a recipe's training; returns the run directory.

    The directory appears at once with manifest.json; the trained model in `final/` appears whole, at the end. An
    earlier run in the same place is moved aside, never overwritten.

    Raises:
        UserError: anything that the user can mend; before the first step it leaves everything as it was.
    """
    if recipe.data.prompts is not None:
        from alignment.runs import on_policy

        return on_policy.train(recipe, resume)
    started = time.perf_counter()
    run = Path(recipe.training.output_dir)
    state = begin(recipe)
    tokenizer = open_tokenizer(recipe, state, resume)
    given, held_out = (given_rows(recipe, role, tokenizer) for role in ("train", "eval"))
    refuse_unfit(recipe, tokenizer, [found.dataset for found in (given, held_out) if found], state)
    manifest = begun(recipe, state.num_processes) | dated(tokenizer)
    with run_directory(recipe, state, resume, manifest) as checkpoint:
        _train_in(run, recipe, state, tokenizer, given, held_out, checkpoint, started)
    return run


def _train_in(
    run: Path,
    recipe: Recipe,
    state: PartialState,
    tokenizer: PreTrainedTokenizerBase,
    given: Prepared | None,
    held_out: Prepared | None,
    checkpoint: Path | None,
    started: float,
) -> None:
    """The three stages, in a run directory that is ready."""
    sources = [source.name for source in recipe.data.train or ()]
    say(state, f"[1/3] preferences: {', '.join(sources) or 'sampled from the starting model'}")
    rows = _training_data(recipe, run, tokenizer, state, given, held_out)
    data, both = rows.dataset, [rows] if held_out is None else [rows, held_out]
    sampled = time.perf_counter()
    say(state, f"[2/3] model and reference: {recipe.model.name_or_path}")
    args = run_arguments(recipe, run, state.num_processes)
    args.eval_on_start = args.eval_on_start and checkpoint is None  # the start was evaluated when the run began
    with setting_up():
        trainer = build_trainer(recipe, args, data, held_out.dataset if held_out else None, tokenizer)
    trainer.row_name, trainer.held_out_name = rows.name_of, None if held_out is None else held_out.name_of
    pairs = len(trainer.train_dataset)  # type: ignore[arg-type]  # a Dataset, by our constructor
    repeated = -pairs % recipe.training.global_batch_size
    manifest = begun(recipe, state.num_processes) | manifest_of_batches(args, state, tokenizer) | dated(tokenizer)
    manifest |= {
        "pairs": pairs,
        "repeated_pairs": repeated,
        "chat": not isinstance(data[0]["prompt"], str),
        "rows": {p.role: p.manifest() for p in both},
        "sources": [source for p in both for source in p.sources],
        "data_fingerprint": fingerprint(data),
        "frozen_weights": trainer.frozen_digests,
        **({"degraded_copies": trainer.copy_facts} if trainer.copy_facts else {}),
    }
    repeats = f" (and {repeated} repeats, to fill the last batch)" * bool(repeated)
    if state.is_main_process:
        overlap.write_trained(run, map(overlap.prompt_hash, data["prompt"]))
    what = f"{pairs} pairs{repeats}, objective {recipe.objective.name}"
    carry_out(trainer, recipe, run, state, checkpoint, manifest, what)
    seconds = {"preferences": sampled - started, "training": time.perf_counter() - sampled, "total": started}
    conclude(trainer, recipe, run, state, manifest, seconds)
