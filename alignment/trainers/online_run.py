"""One on-policy training run from a recipe with `data.prompts`: prompts, model, judge, trainer, run directory.

`trainers.run.train` comes here for such a recipe; run directories, resuming and final models are as offline's.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import is_peft_model
from transformers import PreTrainedTokenizerBase
from trl import RLOOConfig

from alignment.data import overlap
from alignment.data.pipeline import Prepared, fingerprint, write_rejected
from alignment.data.preferences import read_prompts
from alignment.data.prompts import prepare_prompts
from alignment.errors import UserError
from alignment.files import write_json
from alignment.models import load_model, load_tokenizer
from alignment.models.gguf import file_digest
from alignment.objectives import get_objective
from alignment.objectives.base import Objective
from alignment.recipes import Recipe
from alignment.recipes.on_policy import rollout_settings
from alignment.rewards import get_oracle, get_reward
from alignment.trainers import hub, rundir
from alignment.trainers.drawing import Sampler
from alignment.trainers.frozen import model_digest
from alignment.trainers.launching import (
    adapter_config,
    begin,
    compact,
    known,
    model_arguments,
    plan_batches,
    run_directory,
    save_final,
    say,
    sharding,
    tokenizer_arguments,
)
from alignment.trainers.online import OnlinePreferenceTrainer, Rollouts


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Train what a recipe says; returns the run directory.

    Raises:
        UserError: anything that the user can mend; before the first step it leaves everything as it was.
    """
    started = time.perf_counter()
    run = Path(recipe.training.output_dir)
    state = begin(recipe)
    tokenizer = load_tokenizer(recipe.model.name_or_path, **tokenizer_arguments(recipe))
    prompts = _prompts(recipe, tokenizer)
    with run_directory(recipe, state, resume, _manifest(recipe, state.num_processes)) as checkpoint:
        _train_in(run, recipe, state, tokenizer, prompts, checkpoint, started)
    return run


def _prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The prompts, apart from those that the evaluation asks."""
    section = recipe.data.prompts
    assert section is not None  # `trainers.run` says so
    objective = _objective(recipe)
    found = prepare_prompts(
        section.name,
        section.limit,
        tokenizer,
        longest=recipe.data.max_length - recipe.generation.max_new_tokens,
        answers=objective.card.batch == "groups",
        max_rejected_share=recipe.data.max_rejected_share,
    )
    asked = recipe.evaluation
    if asked is not None and recipe.data.overlap != "allow":
        judged = overlap.judged_on(None, read_prompts(asked.prompts, asked.limit), asked.prompts)
        if recipe.data.overlap == "refuse":
            overlap.refuse(found.dataset["prompt"], judged, section.name)
        found = overlap.without(found, judged)  # nothing is left to drop where it would have been refused
    return found


def _objective(recipe: Recipe) -> Objective:
    return get_objective(recipe.objective.name, **recipe.objective.hyperparameters)


def _manifest(recipe: Recipe, world: int) -> dict[str, Any]:
    return known(recipe, world) | {
        "objective": {"name": recipe.objective.name, **recipe.objective.hyperparameters},
        "objective_file_sha256": rundir.objective_digest(recipe),
    }


def run_arguments(recipe: Recipe, run: Path, world: int) -> RLOOConfig:
    """TRL's arguments. Its per-device batch counts responses, ours prompts; only its tables read the rollout's size.

    Raises:
        UserError: TRL or transformers refuses a value.
    """
    per_device, accumulation = plan_batches(
        recipe.training.global_batch_size, recipe.training.per_device_train_batch_size, world
    )
    sampling = rollout_settings(recipe)
    vllm = recipe.rollout.vllm
    served: dict[str, Any] = {} if vllm is None else {"use_vllm": True, "vllm_mode": vllm}
    if recipe.rollout.vllm_server:
        served["vllm_server_base_url"] = recipe.rollout.vllm_server
    import torch

    given = recipe.training.trl_arguments() | {
        "output_dir": str(run),
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "generation_batch_size": sampling["samples"] * sampling["per_rollout"],
        "num_generations": sampling["samples"],
        "log_completions": recipe.rollout.show > 0,
        "num_completions_to_print": recipe.rollout.show or None,
        "max_completion_length": recipe.generation.max_new_tokens,
        "temperature": 1.0,
        "beta": 0.0,
        "use_cpu": recipe.training.use_cpu or not torch.cuda.is_available(),
        **served,
    }
    try:
        return RLOOConfig(**given)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error


def rollouts(recipe: Recipe) -> Rollouts:
    """How the recipe samples."""
    explore = recipe.rollout.explore
    sampler = Sampler() if explore is None else Sampler(explore.temperature, explore.top_p, explore.top_k)
    replay = None if recipe.generation.replay is None else Path(recipe.generation.replay)
    return Rollouts(**rollout_settings(recipe), sampler=sampler, replay=replay)


def build_trainer(
    recipe: Recipe, args: RLOOConfig, prompts: Prepared, tokenizer: PreTrainedTokenizerBase
) -> OnlinePreferenceTrainer:
    """Model, judge and trainer of a recipe. `args` must exist first: with ZeRO-3 it makes loading shard."""
    model = load_model(**model_arguments(recipe), trainable_adapter=recipe.lora is None)
    adapted = recipe.lora is not None or is_peft_model(model)
    reward, oracle = recipe.reward, recipe.oracle
    trainer = OnlinePreferenceTrainer(
        model,
        _objective(recipe),
        args,
        prompts.dataset,
        tokenizer,
        rollouts(recipe),
        reward=None if reward is None else get_reward(reward.name, **reward.options),
        oracle=None if oracle is None else get_oracle(oracle.name, **oracle.options),
        **_reference(recipe, args, adapted),
        peft_config=adapter_config(recipe),
        layout=recipe.training.layout,
        callbacks=[rundir.MetricsFile(Path(str(args.output_dir)) / "metrics.jsonl")],
    )
    return compact(trainer)


def _reference(recipe: Recipe, args: RLOOConfig, adapted: bool) -> dict[str, Any]:
    """A reference that the trainer cannot make from the policy: another model, or under ZeRO-3 the start again."""
    section = recipe.reference
    if section.name_or_path is not None:
        named = section.model_dump(include={"name_or_path", "adapter", "revision"})
        try:
            model = load_model(**model_arguments(recipe) | named).requires_grad_(False)
        except UserError as error:
            raise UserError(str(error).replace("model.", "reference.", 1)) from error
        return {"ref_model": model, "start_is_reference": False}
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    reads = {"reference", "ref_calibration"} & set(_objective(recipe).needs)
    if not zero3 or adapted or not reads:
        return {}
    return {"ref_model": load_model(**model_arguments(recipe)).requires_grad_(False), "start_is_reference": True}


def _train_in(
    run: Path,
    recipe: Recipe,
    state: PartialState,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prepared,
    checkpoint: Path | None,
    started: float,
) -> None:
    """The stages, in a run directory that is ready."""
    assert recipe.data.prompts is not None
    say(state, f"[1/3] prompts: {recipe.data.prompts.name}")
    if state.is_main_process:
        write_rejected(run, prompts)
    state.wait_for_everyone()
    for line in prompts.summary():
        say(state, f"  {line}")
    say(state, f"[2/3] model: {recipe.model.name_or_path}")
    args = run_arguments(recipe, run, state.num_processes)
    try:
        trainer = build_trainer(recipe, args, prompts, tokenizer)
    except (ValueError, ImportError, RuntimeError) as error:  # what PEFT, TRL and transformers say of a setting
        raise UserError(f"cannot set up training: {' '.join(str(error).split())[:400]}") from error
    order = trainer.order
    replay = recipe.generation.replay
    manifest = _manifest(recipe, state.num_processes) | {
        "prompts": len(prompts.dataset),
        "batch": {"per_device": args.per_device_train_batch_size, "accumulation": args.gradient_accumulation_steps},
        "rollouts": {"per_epoch": order.rollouts_per_epoch, "steps": order.steps_per_rollout},
        "repeated_prompts": order.repeated,
        "sharding": sharding(args, state),
        "chat": not isinstance(prompts.dataset[0]["prompt"], str),
        "rows": {"prompts": prompts.manifest()},
        "data_fingerprint": fingerprint(prompts.dataset),
        "judge": _described(trainer),
        "frozen_weights": _digests(trainer),
        "replay_sha256": None if replay is None else file_digest(Path(replay)),
        "template_hash": hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest(),
    }
    if checkpoint is not None:
        rundir.refuse_other_sharding(run, manifest["sharding"], state.num_processes)
        rundir.refuse_other_data(run, manifest["data_fingerprint"])
        rundir.refuse_other_weights(run, manifest["frozen_weights"])
    state.wait_for_everyone()
    if state.is_main_process:
        write_json(run / "manifest.json", manifest)
    repeats = f" (and {order.repeated} repeats, to fill the last rollout)" * bool(order.repeated)
    say(state, f"[3/3] training: {len(prompts.dataset)} prompts{repeats}, objective {recipe.objective.name}")
    pushes = recipe.training.push_to_hub and state.is_main_process
    if pushes:
        hub.claim(trainer)
    set_up = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trained = time.perf_counter()
    save_final(trainer, run, state)
    manifest["wall_seconds"] = {
        "setup": round(set_up - started, 1),
        "training": round(trained - set_up, 1),
        "total": round(time.perf_counter() - started, 1),
    }
    manifest["steps"] = trainer.state.global_step
    if state.is_main_process:
        write_json(run / "manifest.json", manifest)
    if pushes:
        print(f"uploaded {run / 'final'} to {hub.push(trainer, run / 'final')}", flush=True)


def _described(trainer: OnlinePreferenceTrainer) -> str | None:
    judge = trainer.reward or trainer.oracle
    return None if judge is None else judge.describe()


def _digests(trainer: OnlinePreferenceTrainer) -> dict[str, str]:
    """Of a reference that is not the start."""
    if trainer.start_is_reference or trainer.ref_model is None:
        return {}
    return {"reference": model_digest(trainer.ref_model)}
