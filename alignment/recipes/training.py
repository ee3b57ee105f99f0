"""The `training` section: our own keys, and the keys of TRL's `DPOConfig` under TRL's names.

Every field of `DPOConfig` (TRL 1.16, transformers 5.23) stands in exactly one of three places: a field of
`TrainingSection` (shown by `alignment recipe explain`), `PASSED_THROUGH` (accepted, its type checked), or `REFUSED`
(with the reason). Written out rather than read from TRL, because importing TRL takes seconds and a typing error in a
recipe should take none; a test compares the three with TRL and fails when it moves.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from alignment.errors import nearest
from alignment.recipes.sections import Names, OpenSection, Text, error, option, refused_at

_OBJECTIVE = "belongs to the loss: write it in the objective section"
_MODEL = "write it in the model section"
_LAUNCH = "belongs to the launch: accelerate launch --config_file recipes/accelerate/zero3.yaml (or another)"
_REFERENCE = "the reference is the model that training starts from and stays fixed"
_BATCH = "would change the batch that global_batch_size declares"
_FUSED = "log-probabilities come from alignment's own forward pass; TRL's kernel would be ignored"

REFUSED: dict[str, str] = {
    "gradient_accumulation_steps": "derived: global_batch_size / (per_device_train_batch_size x processes)",
    "auto_find_batch_size": _BATCH,
    "beta": _OBJECTIVE,
    "loss_type": "the loss is objective.name",
    "loss_weights": "the loss is objective.name",
    "label_smoothing": _OBJECTIVE,
    "label_smoothing_factor": "smooths a cross-entropy that preference losses do not have; see objective dpo",
    "f_divergence_type": "write objective.name f_dpo and objective.divergence",
    "f_alpha_divergence_coef": "write objective.name f_dpo and objective.alpha (TRL's coefficient is 1 - alpha)",
    "ld_alpha": "changes every loss's log-probabilities; not an objective here",
    "use_weighting": "changes the loss; not an objective here",
    "discopop_tau": "changes the loss; not an objective here",
    "max_length": "write data.max_length",
    "truncation_mode": "responses are cut at the end; see data.max_length",
    "pad_to_multiple_of": "padding is the layout's; see training.layout",
    "padding_free": "padding is the layout's; see training.layout",
    "train_sampling_strategy": "write group_by_length",
    "length_column_name": "write group_by_length",
    "remove_unused_columns": "columns are the objective's needs",
    "label_names": "columns are the objective's needs",
    "prediction_loss_only": "evaluation needs the log-probabilities for its metrics",
    "model_init_kwargs": _MODEL,
    "trust_remote_code": _MODEL,
    "use_liger_kernel": _FUSED,
    "liger_kernel_config": _FUSED,
    "precompute_ref_log_probs": "reference log-probabilities are computed on the fly in this version",
    "precompute_ref_batch_size": "reference log-probabilities are computed on the fly in this version",
    "sync_ref_model": _REFERENCE,
    "ref_model_mixup_alpha": _REFERENCE,
    "ref_model_sync_steps": _REFERENCE,
    "activation_checkpointing": "write gradient_checkpointing, its name elsewhere",
    "activation_checkpointing_kwargs": "write gradient_checkpointing_kwargs, its name elsewhere",
    "deepspeed": _LAUNCH,
    "fsdp": _LAUNCH,
    "fsdp_config": _LAUNCH,
    "accelerator_config": _LAUNCH,
    "parallelism_config": _LAUNCH,
    "local_rank": "set by the launcher",
    "do_train": "has no effect in TRL",
    "do_eval": "has no effect in TRL; write eval_strategy",
    "do_predict": "has no effect in TRL",
    "hub_token": "a recipe is shared, a secret is not; log in with `hf auth login`",
    "pad_token": "deprecated in TRL; the tokenizer's own is used",
    # Not of this TRL, but still found in recipes.
    "warmup_ratio": "write warmup_steps: a number below 1 is a share of all steps",
    "max_prompt_length": "write data.max_length, for prompt and response together",
    "evaluation_strategy": "now called eval_strategy",
}

PASSED_THROUGH: dict[str, Any] = {
    "lr_scheduler_kwargs": dict | str | None,
    "optim_args": str | None,
    "adam_beta1": float,
    "adam_beta2": float,
    "adam_epsilon": float,
    "optim_target_modules": None | str | list[str],
    "average_tokens_across_devices": bool,
    "bf16_full_eval": bool,
    "fp16_full_eval": bool,
    "tf32": bool | None,
    "gradient_checkpointing_kwargs": dict[str, Any] | str | None,
    "activation_offloading": bool,
    "torch_compile": bool,
    "torch_compile_backend": str | None,
    "torch_compile_mode": str | None,
    "use_cache": bool,
    "neftune_noise_alpha": float | None,
    "torch_empty_cache_steps": int | None,
    "logging_strategy": Literal["no", "steps", "epoch"],
    "logging_first_step": bool,
    "log_on_each_node": bool,
    "logging_nan_inf_filter": bool,
    "include_num_input_tokens_seen": str | bool,
    "log_level": Literal["passive", "detail", "debug", "info", "warning", "error", "critical"],
    "log_level_replica": Literal["passive", "detail", "debug", "info", "warning", "error", "critical"],
    "disable_tqdm": bool | None,
    "run_name": str | None,
    "project": str,
    "trackio_space_id": str | None,
    "trackio_bucket_id": str | None,
    "trackio_static_space_id": str | None | Literal[False],
    "eval_delay": float,
    "eval_on_start": bool,
    "eval_do_concat_batches": bool,
    "eval_use_gather_object": bool,
    "eval_accumulation_steps": int | None,
    "include_for_metrics": list[str],
    "batch_eval_metrics": bool,
    "save_only_model": bool,
    "save_on_each_node": bool,
    "enable_jit_checkpoint": bool,
    "push_to_hub": bool,
    "hub_private_repo": bool | None,
    "hub_model_id": str | None,
    "hub_strategy": Literal["end", "every_save", "checkpoint", "all_checkpoints"],
    "hub_always_push": bool,
    "hub_revision": str | None,
    "load_best_model_at_end": bool,
    "metric_for_best_model": str | None,
    "greater_is_better": bool | None,
    "ignore_data_skip": bool,
    "restore_callback_states_from_checkpoint": bool,
    "full_determinism": bool,
    "data_seed": int | None,
    "dataloader_drop_last": bool,
    "dataloader_num_workers": int,
    "dataloader_pin_memory": bool,
    "dataloader_persistent_workers": bool,
    "dataloader_prefetch_factor": int | None,
    "dataloader_multiprocessing_context": str | None,
    "dataloader_in_order": bool,
    "ddp_find_unused_parameters": bool | None,
    "ddp_bucket_cap_mb": int | None,
    "ddp_broadcast_buffers": bool | None,
    "ddp_static_graph": bool | None,
    "ddp_backend": str | None,
    "ddp_timeout": int,
    "debug": str,
    "skip_memory_metrics": bool,
    "resume_from_checkpoint": str | None,
    "router_aux_loss_coef": float | None,
    "disable_dropout": bool,
    "dataset_num_proc": int | None,
}

# Ours; everything else in the section goes to DPOConfig.
OURS = ("global_batch_size", "layout", "group_by_length", "displacement_alarm", "cpu_threads")

# transformers 5 renamed these and warns about the names that everybody knows; a recipe keeps those.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

_TRL = "TRL 1.16"

LrScheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]


class TrainingSection(OpenSection):
    """How the optimiser runs; TRL's names, except for the batch, which is declared for all processes together."""

    output_dir: Text = option("runs/unnamed", "Folder of the run.", "runs/ and the recipe's file name")
    global_batch_size: int = Field(
        ge=1, description="Pairs per optimiser step over all processes; accumulation is derived from it."
    )
    per_device_train_batch_size: int = option(
        8, "Pairs per forward pass and process; lower it if memory runs out, the result does not change.", _TRL, ge=1
    )
    per_device_eval_batch_size: int = option(8, "Pairs per forward pass when evaluating.", _TRL, ge=1)
    layout: Literal["shared_prefix", "paired"] = option(
        "shared_prefix",
        "Compute the prompt once per pair, or once per response.",
        "alignment: same numbers, less work",
    )
    group_by_length: bool = option(True, "Batch pairs of like length.", "alignment: less padding; TRL's is random")
    displacement_alarm: float = option(
        10.0,
        "Warn when log-probability of chosen responses falls this many nats below step 0.",
        "alignment: e^10 less likely",
        gt=0,
    )
    cpu_threads: int | None = option(
        None,
        "Threads of each process where there is no GPU.",
        "the cores shared out over this machine's processes; `accelerate launch` alone would leave one",
        ge=1,
    )
    learning_rate: float = option(1e-6, "Peak learning rate.", _TRL, gt=0)
    num_train_epochs: float = option(
        1.0, "Passes over the data.", "alignment: one pass, as in the RPO and Zephyr recipes; TRL's is 3", gt=0
    )
    max_steps: int = option(-1, "Stop after so many steps; -1: num_train_epochs decides.", _TRL, ge=-1)
    lr_scheduler_type: LrScheduler = option("linear", "Course of the learning rate after warm-up.", _TRL)
    warmup_steps: float = option(0.0, "Steps of warm-up; a number below 1 is a share of all steps.", _TRL, ge=0)
    weight_decay: float = option(0.0, "Decoupled weight decay.", _TRL, ge=0)
    max_grad_norm: float = option(1.0, "Clip the gradient's norm here; 0: never.", _TRL, ge=0)
    optim: Text = option("adamw_torch_fused", "transformers' name of the optimiser.", _TRL)
    seed: int = option(42, "Seed of data order and dropout.", _TRL, ge=0)
    bf16: bool = option(False, "bfloat16 autocast.", "alignment: exact unless asked; TRL's is on")
    fp16: bool = option(False, "float16 autocast with loss scaling.", _TRL)
    gradient_checkpointing: bool = option(
        False, "Recompute activations: less memory, a third more time.", "alignment: small models first; TRL's is on"
    )
    use_cpu: bool = option(False, "Stay on the CPU though there is a GPU.", f"{_TRL}: a GPU if there is one")
    logging_steps: float = option(5.0, "Log every so many steps; below 1: a share.", "alignment; TRL's is 10", gt=0)
    eval_strategy: Literal["no", "steps", "epoch"] = option("no", "When to evaluate on data.eval.", _TRL)
    eval_steps: float | None = option(None, "Every so many steps with eval_strategy steps.", f"{_TRL}: logging_steps")
    save_strategy: Literal["no", "steps", "epoch", "best"] = option(
        "no", "When to write checkpoints; the final model is always written.", "alignment; TRL's is steps"
    )
    save_steps: float = option(500.0, "Every so many steps with save_strategy steps.", _TRL, gt=0)
    save_total_limit: int | None = option(None, "Keep only the newest so many checkpoints.", f"{_TRL}: all", ge=1)
    report_to: Names = option("none", "wandb, tensorboard, trackio …, or a list.", f"{_TRL}: none")

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    @model_validator(mode="after")
    def _batches_divide(self) -> TrainingSection:
        if self.global_batch_size % self.per_device_train_batch_size:
            raise refused_at(
                f"{self.global_batch_size} is not a multiple of per_device_train_batch_size "
                f"{self.per_device_train_batch_size}; change one of them",
                "global_batch_size",
            )
        if self.bf16 and self.fp16:
            raise refused_at("excludes fp16; set one of them to false", "bf16")
        return self

    @classmethod
    def open_keys(cls, data: dict[str, Any]) -> tuple[dict[str, Any], list[InitErrorDetails]]:
        """What is wrong with keys that are not fields here: unknown, refused, or of another type than TRL's."""
        problems: list[InitErrorDetails] = []
        for key, value in data.items():
            if key in cls.model_fields:
                continue
            if key in REFUSED:
                problems.append(error(f"not accepted: {REFUSED[key]}", key, value=value))
            elif key not in PASSED_THROUGH:
                problems.append(error(f"unknown key{_hint(key)}", key, value=value))
            else:
                problems += _type_errors(key, value)
        return {}, problems

    def trl_arguments(self) -> dict[str, Any]:
        """Keyword arguments for TRL's `DPOConfig`: this section without our own keys."""
        arguments = {key: value for key, value in self.model_dump().items() if key not in OURS}
        return {_RENAMED.get(key, key): value for key, value in arguments.items()}


def _hint(key: str) -> str:
    """The nearest key; where that one is refused, why."""
    hint = nearest(key, [*TrainingSection.model_fields, *PASSED_THROUGH, *REFUSED])
    if not hint.startswith("; did you mean"):  # a hundred names on one line help nobody
        return nearest(key, TrainingSection.model_fields)
    meant = hint.split("'")[1]
    return f"{hint} That is not accepted: {REFUSED[meant]}" if meant in REFUSED else hint


def _type_errors(key: str, value: Any) -> list[InitErrorDetails]:
    """At most one problem: the value is of none of the types that TRL's field takes."""
    kind = PASSED_THROUGH[key]
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as failed:
        wanted = " or ".join(dict.fromkeys(_wanted(dict(e)) for e in failed.errors()))
        return [error(f"expected {wanted}, got {value!r}", key, value=value)]
    return []


def _wanted(found: dict[str, Any]) -> str:
    return _WORDS.get(found["type"]) or str(found["ctx"]["expected"])


_WORDS = {
    "float_type": "a number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping",
    "list_type": "a list",
    "none_required": "null",
}
