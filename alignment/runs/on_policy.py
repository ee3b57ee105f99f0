"""One on-policy training run from a recipe with `data.prompts`: prompts, model, judge, trainer, run directory.

`preferences.train` comes here for such a recipe; run directories, resuming and final models are as offline's.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import is_peft_model
from transformers import PreTrainedTokenizerBase
from trl import RLOOConfig

from alignment.data import overlap
from alignment.data.messages import TextRules
from alignment.data.pipeline import Prepared, write_rejected
from alignment.data.prompt_files import read_prompts
from alignment.data.prompts import prepare_prompts
from alignment.data.tables import fingerprint
from alignment.errors import UserError
from alignment.files import file_digest
from alignment.models import load_model
from alignment.recipes import Recipe
from alignment.recipes.on_policy import rollout_settings
from alignment.rewards import get_oracle, get_reward
from alignment.trainers import callbacks
from alignment.trainers.drawing import Sampler
from alignment.runs.lifecycle import (
    adapter_config,
    begin,
    carry_out,
    compact,
    conclude,
    manifest_of_batches,
    model_arguments,
    plan_batches,
    run_directory,
    say,
    setting_up,
)
from alignment.trainers.online import OnlinePreferenceTrainer, Rollouts
from alignment.runs.opening import dated, open_tokenizer, refuse_unfit
from alignment.runs.preferences import begun, frozen_models, objective_of


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Train what a recipe says; returns the run directory.

    Raises:
        UserError: anything that the user can mend; before the first step it leaves everything as it was.
    """
    started = time.perf_counter()
    run = Path(recipe.training.output_dir)
    state = begin(recipe)
    tokenizer = open_tokenizer(recipe, state, resume)
    prompts = _not_judged_on(recipe, given_prompts(recipe, tokenizer))
    refuse_unfit(recipe, tokenizer, [prompts.dataset], state, recipe.generation.max_new_tokens)
    manifest = begun(recipe, state.num_processes) | dated(tokenizer)
    with run_directory(recipe, state, resume, manifest) as checkpoint:
        _train_in(run, recipe, state, tokenizer, prompts, checkpoint, started)
    return run


def given_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """`data.prompts`, checked and tokenised.

    Raises:
        UserError: they cannot be read, or none can be used.
    """
    section = recipe.data.prompts
    assert section is not None  # whoever asks has looked
    return prepare_prompts(
        section.name,
        section.limit,
        tokenizer,
        longest=recipe.data.max_length - recipe.generation.max_new_tokens,
        answers=objective_of(recipe).card.batch == "groups",
        max_rejected_share=recipe.data.max_rejected_share,
        rules=TextRules.of(recipe.data),
    )


def _not_judged_on(recipe: Recipe, found: Prepared) -> Prepared:
    """The prompts, apart from those that the evaluation asks: refused, dropped or kept, as `data.overlap` says."""
    asked, section = recipe.evaluation, recipe.data.prompts
    if asked is None or recipe.data.overlap == "allow":
        return found
    judged = overlap.judged_on(None, read_prompts(asked.prompts, asked.limit), asked.prompts)
    if recipe.data.overlap == "drop":
        return overlap.without(found, judged)
    overlap.refuse(found.dataset["prompt"], judged, str(section.name if section else ""))
    return found


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
    objective, reward, oracle = objective_of(recipe), recipe.reward, recipe.oracle
    trainer = OnlinePreferenceTrainer(
        model,
        objective,
        args,
        prompts.dataset,
        tokenizer,
        rollouts(recipe),
        reward=None if reward is None else get_reward(reward.name, **reward.options),
        oracle=None if oracle is None else get_oracle(oracle.name, **oracle.options),
        **frozen_models(recipe, args, objective, adapted),
        peft_config=adapter_config(recipe),
        layout=recipe.training.layout,
        on_nan=recipe.training.on_nan,
        callbacks=[callbacks.MetricsFile(Path(str(args.output_dir)) / "metrics.jsonl")],
    )
    return compact(trainer)


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
    with setting_up():
        trainer = build_trainer(recipe, args, prompts, tokenizer)
    trainer.row_name = prompts.name_of
    order, replay = trainer.order, recipe.generation.replay
    judge = trainer.reward or trainer.oracle
    manifest = begun(recipe, state.num_processes) | manifest_of_batches(args, state, tokenizer) | dated(tokenizer)
    manifest |= {
        "prompts": len(prompts.dataset),
        "rollouts": {"per_epoch": order.rollouts_per_epoch, "steps": order.steps_per_rollout},
        "repeated_prompts": order.repeated,
        "chat": not isinstance(prompts.dataset[0]["prompt"], str),
        "rows": {"prompts": prompts.manifest()},
        # Of all that the run learns from: samples that are replayed are data, too.
        "data_fingerprint": fingerprint(prompts.dataset) + ("" if replay is None else file_digest(Path(replay))),
        "judge": None if judge is None else judge.describe(),
        "frozen_weights": trainer.frozen_digests,
    }
    repeats = f" (and {order.repeated} repeats, to fill the last rollout)" * bool(order.repeated)
    if state.is_main_process:
        overlap.write_trained(run, map(overlap.prompt_hash, prompts.dataset["prompt"]))
    what = f"{len(prompts.dataset)} prompts{repeats}, objective {recipe.objective.name}"
    set_up = time.perf_counter()
    carry_out(trainer, recipe, run, state, checkpoint, manifest, what)
    seconds = {"setup": set_up - started, "training": time.perf_counter() - set_up, "total": started}
    conclude(trainer, recipe, run, state, manifest, seconds)
