"""One offline training run from a recipe: preferences, model, trainer, run directory.

`scripts/train.py` and `alignment train` read argv and call `train`. Every process of a launch runs this; what needs
doing once is done by the main process while the others wait.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, is_peft_model
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import DPOConfig

from alignment.data import overlap
from alignment.data.pipeline import Prepared, fingerprint, prepare, prepare_rows, write_rejected
from alignment.data.preferences import read_prompts, read_rows
from alignment.data.sampled import best_against_worst
from alignment.errors import UserError
from alignment.files import write_json, write_json_lines
from alignment.models import load_model, load_tokenizer
from alignment.models.gguf import cache_root
from alignment.models.loading import settle_accelerator
from alignment.models.sampling import prompt_ids, sample
from alignment.objectives import get_objective
from alignment.objectives.base import Objective, reads_reference
from alignment.recipes import Recipe
from alignment.rewards import get_reward
from alignment.trainers import hub, rundir
from alignment.trainers.frozen import weights_digest
from alignment.trainers.offline import PreferenceTrainer

WAIT_HOURS = 24
SAMPLES_FORMAT = "1"  # part of the cache key: raise it when the same settings give other pairs


def plan_batches(global_batch: int, per_device: int, world: int) -> tuple[int, int]:
    """(pairs per device and pass, accumulation steps) with which `world` processes make up the declared batch.

    The per-device batch is the largest divisor of each process's share that is at most `per_device`: the losses are
    per pair, so it changes memory and speed but no result.

    Raises:
        UserError: the declared batch cannot be split evenly.
    """
    if global_batch % world:
        raise UserError(
            f"training.global_batch_size: {global_batch} pairs cannot be split evenly over {world} processes; "
            f"declare {math.ceil(global_batch / world) * world}, or launch fewer"
        )
    share = global_batch // world
    fitting = max(d for d in range(1, min(per_device, share) + 1) if share % d == 0)
    return fitting, share // fitting


def sampled_preferences(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Rows built from the starting model's own samples; kept in the cache under everything that decides them."""
    settings, generation, reward = recipe.data.sample, recipe.generation, recipe.reward
    assert settings is not None and reward is not None  # the schema says so
    prompts = read_prompts(settings.prompts, settings.limit)
    judge = get_reward(reward.name, **reward.options)
    model: Any = load_model(**_model_arguments(recipe))
    encoded = [prompt_ids(tokenizer, p) for p in prompts]
    key = {
        "format": SAMPLES_FORMAT,
        "weights": weights_digest(model),
        "prompts": encoded,
        "sample": {k: v for k, v in settings.model_dump().items() if k not in ("prompts", "limit")},
        "generation": generation.model_dump(),
        "judge": judge.describe(),
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
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
        **generation.model_dump(),
        progress="  sampling prompts",
    )
    rows, counts = best_against_worst(
        prompts,
        encoded,
        draws,
        judge.score,
        pairs_per_prompt=settings.pairs_per_prompt,
        min_gap=settings.min_gap,
    )
    print("  " + ", ".join(f"{count} {name}" for name, count in counts.items()), flush=True)
    write_json_lines(cached, rows)
    return rows


def _model_arguments(recipe: Recipe) -> dict[str, Any]:
    return recipe.model.model_dump()


def _say(state: PartialState, text: str) -> None:
    if state.is_main_process:
        print(text, flush=True)


def _prepare_run(recipe: Recipe, run: Path, resume: bool, world: int) -> tuple[Path | None, Path | None]:
    """(checkpoint to resume from, None), or (None, where an earlier run went) and a fresh run with its manifest."""
    if resume:
        if not (run / "manifest.json").is_file():
            raise UserError(f"--resume: {run} is not a run directory")
        rundir.refuse_other_recipe(run, recipe)
        return rundir.last_checkpoint(run), None
    aside = rundir.move_aside(run)
    if aside is not None:
        print(f"{run} held an earlier run; it is now {aside}", flush=True)
    write_json(run / "manifest.json", _manifest(recipe, world))
    return None, aside


def _manifest(recipe: Recipe, world: int) -> dict[str, Any]:
    """What is known of a run before it begins."""
    return {
        "recipe": recipe.resolved(),
        "recipe_path": str(recipe.path),
        "objective": {"name": recipe.objective.name, **recipe.objective.hyperparameters},
        "objective_file_sha256": rundir.objective_digest(recipe),
        "seed": recipe.training.seed,
        "versions": rundir.versions(),
        "hardware": rundir.hardware(world),
    }


def given_rows(recipe: Recipe, role: str, tokenizer: PreTrainedTokenizerBase) -> Prepared | None:
    """`data.train` or `data.eval`, checked and tokenised; None where the recipe has none."""
    sources = recipe.data.train if role == "train" else recipe.data.eval
    if sources is None:
        return None
    return prepare(sources, tokenizer, role=role, seed=recipe.training.seed, **_row_settings(recipe))


def _row_settings(recipe: Recipe) -> dict[str, Any]:
    objective = get_objective(recipe.objective.name, **recipe.objective.hyperparameters)
    return {
        "max_length": recipe.data.max_length,
        "max_rejected_share": recipe.data.max_rejected_share,
        "calibration": "calibration" in objective.needs,
    }


def _judged_on(recipe: Recipe, given: Prepared | None, held_out: Prepared | None) -> overlap.Judged:
    """Hashes of what the run is judged on; prompts that are trained on as well are refused where that is asked,
    before the training time is spent."""
    evaluation, sample_of = recipe.evaluation, recipe.data.sample
    judged = overlap.judged_on(
        None if held_out is None else held_out.dataset,
        read_prompts(evaluation.prompts, evaluation.limit) if evaluation else (),
        evaluation.prompts if evaluation else "",
    )
    if recipe.data.overlap != "refuse":
        return judged
    if sample_of is not None:
        overlap.refuse(read_prompts(sample_of.prompts, sample_of.limit), judged, sample_of.prompts)
    if given is not None:
        overlap.refuse(given.dataset["prompt"], judged)
    return judged


def _training_data(
    recipe: Recipe,
    run: Path,
    tokenizer: PreTrainedTokenizerBase,
    state: PartialState,
    given: Prepared | None,
    held_out: Prepared | None,
) -> Prepared:
    """The rows to train on; sampled ones the main process builds and writes, the others read what it wrote."""
    judged = _judged_on(recipe, given, held_out)
    if given is None:
        file = run / "preferences.jsonl"
        if state.is_main_process and not file.is_file():
            write_json_lines(file, sampled_preferences(recipe, tokenizer))
        state.wait_for_everyone()
        given = prepare_rows(read_rows(file), str(file), tokenizer, role="train", **_row_settings(recipe))
    if recipe.data.overlap == "drop":
        given = overlap.without(given, judged)
    prepared = [given] if held_out is None else [given, held_out]
    if state.is_main_process:
        for line in (line for p in prepared for line in p.summary()):
            print(f"  {line}", flush=True)
        write_rejected(run, *prepared)
    state.wait_for_everyone()
    return given


def run_arguments(recipe: Recipe, run: Path, world: int) -> DPOConfig:
    """TRL's arguments for a run of the recipe in `run` with `world` processes."""
    per_device, accumulation = plan_batches(
        recipe.training.global_batch_size, recipe.training.per_device_train_batch_size, world
    )
    given = recipe.training.trl_arguments() | {
        "output_dir": str(run),
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "max_length": recipe.data.max_length,
        "use_cpu": recipe.training.use_cpu or not torch.cuda.is_available(),
    }
    try:
        return DPOConfig(**given)
    except ValueError as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error


def _sharding(args: DPOConfig, state: PartialState) -> str:
    if args.deepspeed_plugin is not None:
        return f"zero{args.deepspeed_plugin.zero_stage}"
    return "fsdp" if state.distributed_type == DistributedType.FSDP else "none"


def _adapter_config(recipe: Recipe) -> Any:
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    section = recipe.lora
    return LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        target_modules=section.target_modules,
        task_type="CAUSAL_LM",
    )


def _set_threads(wanted: int | None, state: PartialState) -> None:
    """CPU threads of this process. `accelerate launch` exports OMP_NUM_THREADS=1 unless told otherwise: that cannot be
    told from a wish, and is undone (training.cpu_threads=1 is the wish); any other exported number is kept."""
    if state.device.type != "cpu":
        return
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if wanted is None and (by_accelerate or "OMP_NUM_THREADS" not in os.environ):
        local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        wanted = max(1, cores // local)
    if wanted is not None:
        torch.set_num_threads(wanted)


def build_trainer(
    recipe: Recipe, args: DPOConfig, data: Dataset, held_out: Dataset | None, tokenizer: PreTrainedTokenizerBase
) -> PreferenceTrainer:
    """Model, objective and trainer of a recipe. `args` must exist first: with ZeRO-3 it makes loading shard."""
    model = load_model(**_model_arguments(recipe), trainable_adapter=recipe.lora is None)
    objective = get_objective(recipe.objective.name, **recipe.objective.hyperparameters)
    adapted = recipe.lora is not None or is_peft_model(model)
    trainer = PreferenceTrainer(
        model=model,
        objective=objective,
        args=args,
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=tokenizer,
        **_frozen_models(recipe, args, objective, adapted),
        precompute=recipe.reference.precompute,
        peft_config=_adapter_config(recipe),
        layout=recipe.training.layout,
        group_by_length=recipe.training.group_by_length,
        displacement_alarm=recipe.training.displacement_alarm,
        callbacks=[rundir.MetricsFile(Path(str(args.output_dir)) / "metrics.jsonl")],
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(rundir.CompactProgress)
    return trainer


def _frozen_models(recipe: Recipe, args: DPOConfig, objective: Objective, adapted: bool) -> dict[str, Any]:
    """Models that the trainer cannot make from the policy: another reference, and under ZeRO-3, whose sharded
    parameters cannot be copied, the start loaded a second time."""
    found: dict[str, Any] = {}
    reference = recipe.reference
    another = reference.name_or_path is not None and reads_reference(objective)
    if another:
        named = reference.model_dump(include={"name_or_path", "adapter", "revision"})
        # Dtype, quantisation and attention are the policy's.
        found["ref_model"] = load_model(**_model_arguments(recipe) | named).requires_grad_(False)
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if not zero3 or adapted or reference.precompute or not reads_reference(objective):
        return found
    if not another:
        start = load_model(**_model_arguments(recipe)).requires_grad_(False)
        return {"ref_model": start, "start_is_reference": True}
    if "previous" in objective.needs:
        found["start_model"] = load_model(**_model_arguments(recipe)).requires_grad_(False)
    return found


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Run a recipe's training; returns the run directory.

    The directory appears at once with manifest.json; the trained model in `final/` appears whole, at the end. An
    earlier run in the same place is moved aside, never overwritten.

    Raises:
        UserError: anything that the user can mend; before the first step it leaves everything as it was.
    """
    started = time.perf_counter()
    run = Path(recipe.training.output_dir)
    settle_accelerator()
    # The main process may sample for hours while the others wait for it.
    state = PartialState(
        cpu=recipe.training.use_cpu or not torch.cuda.is_available(), timeout=datetime.timedelta(hours=WAIT_HOURS)
    )
    plan_batches(recipe.training.global_batch_size, 1, state.num_processes)  # refuse before anything is touched
    if recipe.training.push_to_hub and state.is_main_process:
        hub.check_login()  # not after hours of training
    _set_threads(recipe.training.cpu_threads, state)
    tokenizer = load_tokenizer(recipe.model.name_or_path, **_tokenizer_arguments(recipe))
    given, held_out = (given_rows(recipe, role, tokenizer) for role in ("train", "eval"))
    main = state.is_main_process
    checkpoint, aside = _prepare_run(recipe, run, resume, state.num_processes) if main else (None, None)
    state.wait_for_everyone()
    if resume and not main:
        checkpoint = rundir.last_checkpoint(run)
    finished = False
    try:
        _train_in(run, recipe, state, tokenizer, given, held_out, checkpoint, started)
        finished = True
    finally:
        if main and not resume and not finished:
            rundir.undo_unless_begun(run, aside)
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
    _say(state, f"[1/3] preferences: {', '.join(sources) or 'sampled from the starting model'}")
    rows = _training_data(recipe, run, tokenizer, state, given, held_out)
    data, both = rows.dataset, [rows] if held_out is None else [rows, held_out]
    sampled = time.perf_counter()
    _say(state, f"[2/3] model and reference: {recipe.model.name_or_path}")
    args = run_arguments(recipe, run, state.num_processes)
    args.eval_on_start = args.eval_on_start and checkpoint is None  # the start was evaluated when the run began
    try:
        trainer = build_trainer(recipe, args, data, held_out.dataset if held_out else None, tokenizer)
    except (ValueError, ImportError, RuntimeError) as error:  # what PEFT, TRL and transformers say of a setting
        raise UserError(f"cannot set up training: {' '.join(str(error).split())[:400]}") from error
    pairs = len(trainer.train_dataset)  # type: ignore[arg-type]  # a Dataset, by our constructor
    manifest = _manifest(recipe, state.num_processes) | {
        "pairs": pairs,
        "batch": {"per_device": args.per_device_train_batch_size, "accumulation": args.gradient_accumulation_steps},
        "sharding": _sharding(args, state),
        "repeated_pairs": -pairs % recipe.training.global_batch_size,
        "chat": not isinstance(data[0]["prompt"], str),
        "rows": {p.role: p.manifest() for p in both},
        "sources": [source for p in both for source in p.sources],
        "data_fingerprint": fingerprint(data),
        "frozen_weights": trainer.frozen_digests,
        "template_hash": hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest(),
    }
    if checkpoint is not None:
        rundir.refuse_other_sharding(run, manifest["sharding"], state.num_processes)
        rundir.refuse_other_data(run, manifest["data_fingerprint"])
        rundir.refuse_other_weights(run, trainer.frozen_digests)
    state.wait_for_everyone()
    if state.is_main_process:
        write_json(run / "manifest.json", manifest)
    repeats = f" (and {manifest['repeated_pairs']} repeats, to fill the last batch)" * bool(manifest["repeated_pairs"])
    _say(state, f"[3/3] training: {pairs} pairs{repeats}, objective {recipe.objective.name}")
    pushes = recipe.training.push_to_hub and state.is_main_process
    if pushes:
        hub.claim(trainer)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trained = time.perf_counter()
    _save_final(trainer, run, state)
    manifest["wall_seconds"] = {
        "preferences": round(sampled - started, 1),
        "training": round(trained - sampled, 1),
        "total": round(time.perf_counter() - started, 1),
    }
    manifest["steps"] = trainer.state.global_step
    if state.is_main_process:
        write_json(run / "manifest.json", manifest)
    if pushes:
        print(f"uploaded {run / 'final'} to {hub.push(trainer, run / 'final')}", flush=True)


def _tokenizer_arguments(recipe: Recipe) -> dict[str, Any]:
    return {"revision": recipe.model.revision, "trust_remote_code": recipe.model.trust_remote_code}


def _save_final(trainer: PreferenceTrainer, run: Path, state: PartialState) -> None:
    """`final/`: a plain transformers folder (or adapter folder) with its tokenizer, by rename."""
    beside = run / ".final"
    trainer.save_model(str(beside))
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(
            beside / "ref", ignore_errors=True
        )  # TRL's frozen copy of the adapter that training started from
        trainer.create_model_card(model_name=run.name)  # into the run, as with every checkpoint
        shutil.copy(run / "README.md", beside / "README.md")
        final, before = run / "final", run / ".final-before"
        if final.exists():  # only when a finished run is resumed
            final.rename(before)
        beside.rename(final)
        shutil.rmtree(before, ignore_errors=True)
