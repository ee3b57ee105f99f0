"""What every kind of training run does: its processes, threads and batches, its directory, its final model.

Not a run by itself: `run` (preferences) and `sft` (supervised fine-tuning) are. Every process of a launch calls these;
what needs doing once is done by the main process.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from alignment.errors import UserError
from alignment.files import write_json
from alignment.locks import sole_user
from alignment.models.ends import write_ends
from alignment.models.loading import settle_accelerator
from alignment.models.public_names import digest_of_start
from alignment.processes import WAIT_HOURS, plan_batches, set_threads
from alignment.recipes import AnyRecipe, EveryRecipe
from alignment.runs import hub
from alignment import environment
from alignment.runs import directory
from alignment.trainers import callbacks
from alignment.trainers import checkpoints

Config = TypeVar("Config", bound=TrainingArguments)


def begin(recipe: EveryRecipe) -> PartialState:
    """The processes, connected; what can be refused before anything is read or written is refused here.

    Raises:
        UserError: the batch cannot be split over the processes, or the hub does not let us in.
    """
    settle_accelerator()
    # The main process may sample for hours while the others wait for it.
    state = PartialState(
        cpu=recipe.training.use_cpu or not torch.cuda.is_available(), timeout=datetime.timedelta(hours=WAIT_HOURS)
    )
    plan_batches(recipe.training.global_batch_size, 1, state.num_processes)
    if recipe.training.push_to_hub and state.is_main_process:
        hub.check_login()  # not after hours of training
    set_threads(recipe.training.cpu_threads, state)
    return state


def say(state: PartialState, text: str) -> None:
    """Print on the main process."""
    if state.is_main_process:
        print(text, flush=True)


def model_arguments(recipe: AnyRecipe) -> dict[str, Any]:
    """Keyword arguments of `load_model`."""
    return recipe.model.loading


def tokenizer_arguments(recipe: EveryRecipe) -> dict[str, Any]:
    """Keyword arguments of `load_tokenizer` besides the name."""
    return recipe.model.tokenizing


def adapter_config(recipe: AnyRecipe) -> Any:
    """PEFT's configuration of a fresh adapter; None where the recipe trains none."""
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


def trl_config(kind: type[Config], recipe: AnyRecipe, run: Path, world: int) -> Config:
    """TRL's arguments, of its class `kind`, for a run of the recipe in `run` with `world` processes.

    Raises:
        UserError: TRL or transformers refuses a value.
    """
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
        args = kind(**given)
    except ValueError as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error
    _refuse_unbuildable(args)
    return args


def _refuse_unbuildable(args: TrainingArguments) -> None:
    """Settings that optimiser or schedule refuse, tried on one number before the model is loaded."""
    model: Any = torch.nn.ParameterList([torch.zeros(1)])
    key, settings = "optim_args", args.lr_scheduler_kwargs
    try:
        if args.optim_args and not args.optim_target_modules:  # those want the modules themselves
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
            kind(model.parameters(), **options)
        key = "lr_scheduler_kwargs"
        plain = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
        get_scheduler(args.lr_scheduler_type, plain, 0, 1000, cast("dict[str, Any] | None", settings))
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"training.{key}: {getattr(args, key)}: {reason}") from error


def sharding(args: TrainingArguments, state: PartialState) -> str:
    """How the launch shards weights or optimiser: zero1 … zero3, fsdp or none; warns where it should and does not.

    Known once the trainer is built: accelerate settles on FSDP only then.
    """
    if args.deepspeed_plugin is not None:
        return f"zero{args.deepspeed_plugin.zero_stage}"
    if state.distributed_type == DistributedType.FSDP:
        return "fsdp"
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):  # as `accelerate launch` says it
        say(
            state, "warning: the launcher asks for FSDP, which accelerate has only on several GPUs: nothing is sharded"
        )
    return "none"


def known(recipe: AnyRecipe, world: int) -> dict[str, Any]:
    """What a manifest says of a run before it begins."""
    return {
        "recipe": recipe.resolved(),
        "recipe_path": str(recipe.path),
        "seed": recipe.training.seed,
        "versions": environment.versions(),
        "hardware": environment.hardware(world),
    }


def prepare_run(
    recipe: AnyRecipe, run: Path, resume: bool, manifest: dict[str, Any]
) -> tuple[Path | None, Path | None]:
    """(checkpoint to resume from, None), or (None, where an earlier run went) and a fresh run with its manifest."""
    if resume:
        if not (run / "manifest.json").is_file():
            raise UserError(f"--resume: {run} is not a run directory")
        directory.refuse_other_recipe(run, recipe)
        return checkpoints.last_checkpoint(run), None
    aside = directory.move_aside(run)
    if aside is not None:
        print(f"{run} held an earlier run; it is now {aside}", flush=True)
    write_json(run / "manifest.json", manifest)
    return None, aside


@contextlib.contextmanager
def run_directory(
    recipe: AnyRecipe, state: PartialState, resume: bool, manifest: dict[str, Any]
) -> Iterator[Path | None]:
    """The run's folder, ready, as long as the block lasts; gives the checkpoint to resume from.

    An earlier run in the same place is moved aside; where the block fails before training has begun, all is put back.

    Raises:
        UserError: another program works in the folder.
    """
    run, main = Path(recipe.training.output_dir), state.is_main_process
    with sole_user(run) if main else contextlib.nullcontext():
        checkpoint, aside = prepare_run(recipe, run, resume, manifest) if main else (None, None)
        state.wait_for_everyone()
        if resume and not main:
            checkpoint = checkpoints.last_checkpoint(run)
        finished = False
        try:
            yield checkpoint
            finished = True
        finally:
            if main and not resume and not finished:
                directory.undo_unless_begun(run, aside)


def compact(trainer: Any) -> Any:
    """The trainer with our progress bar in the place of transformers' two, and lists of checkpoints' files."""
    trainer.add_callback(checkpoints.CheckpointFiles())
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(callbacks.CompactProgress)
    return trainer


def manifest_of_batches(args: TrainingArguments, state: PartialState, tokenizer: Any) -> dict[str, Any]:
    """What every manifest says of a run whose trainer stands."""
    return {
        "batch": {"per_device": args.per_device_train_batch_size, "accumulation": args.gradient_accumulation_steps},
        "sharding": sharding(args, state),
        "template_hash": hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest(),
    }


@contextlib.contextmanager
def setting_up() -> Iterator[None]:
    """What PEFT, TRL and transformers say of a setting, in one line."""
    try:
        yield
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"cannot set up training: {' '.join(str(error).split())[:400]}") from error


def carry_out(
    trainer: Any,
    recipe: AnyRecipe,
    run: Path,
    state: PartialState,
    checkpoint: Path | None,
    manifest: dict[str, Any],
    announced: str,
) -> None:
    """Train: a resumed run is compared with its manifest first, which is then written.

    Args:
        checkpoint: to resume from.
        manifest: with `sharding`, `data_fingerprint` and, where models are frozen, `frozen_weights`.
        announced: what is trained, for the terminal.

    Raises:
        UserError: the run that is resumed began otherwise.
    """
    if checkpoint is not None:
        directory.refuse_other_sharding(run, manifest["sharding"], state.num_processes)
        directory.refuse_other_data(run, manifest["data_fingerprint"])
        directory.refuse_other_weights(run, manifest.get("frozen_weights", {}))
    trainer.manifest = manifest
    state.wait_for_everyone()
    if state.is_main_process:
        manifest["start_sha256"] = digest_of_start(recipe.model.model_dump())
        write_json(run / "manifest.json", manifest)
    say(state, f"[3/3] training: {announced}")
    if recipe.training.push_to_hub and state.is_main_process:
        hub.claim(trainer)
    trainer.add_callback(callbacks.MissedEvaluation(trainer, run / "metrics.jsonl"))
    trainer.add_callback(callbacks.StopWhenDone)
    with contextlib.suppress(callbacks.AllDone):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def conclude(
    trainer: Any,
    recipe: AnyRecipe,
    run: Path,
    state: PartialState,
    manifest: dict[str, Any],
    seconds: dict[str, float],
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Save `final/`, complete the manifest, and upload where the recipe says so.

    Args:
        seconds: of the run's stages, by `time.perf_counter`: "total" is when it began.
        extra: see `save_final`.
    """
    save_final(trainer, run, state, extra)
    took = {name: value for name, value in seconds.items() if name != "total"}
    took["total"] = time.perf_counter() - seconds["total"]
    manifest["wall_seconds"] = {name: round(value, 1) for name, value in took.items()}
    manifest["steps"] = trainer.state.global_step
    if trainer.skipped_steps:
        manifest["skipped_steps"] = trainer.skipped_steps
        say(state, f"{trainer.skipped_steps} of {manifest['steps']} steps were skipped (training.on_nan)")
    if state.is_main_process:
        write_json(run / "manifest.json", manifest)
    if recipe.training.push_to_hub and state.is_main_process:
        print(f"uploaded {run / 'final'} to {hub.push(trainer, run / 'final')}", flush=True)


def save_final(trainer: Any, run: Path, state: PartialState, extra: Callable[[Path], None] | None = None) -> None:
    """`final/`: a plain transformers folder (or adapter folder) with its tokenizer, by rename.

    `extra` writes further files into the folder before it appears.
    """
    beside = run / ".final"
    trainer.save_model(str(beside))
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(
            beside / "ref", ignore_errors=True
        )  # TRL's frozen copy of the adapter that training started from
        trainer.create_model_card(model_name=run.name)
        write_ends(beside, trainer.model, trainer.processing_class)
        if extra is not None:
            extra(beside)
        final, before = run / "final", run / ".final-before"
        if final.exists():  # only when a finished run is resumed
            final.rename(before)
        beside.rename(final)
        shutil.rmtree(before, ignore_errors=True)
