"""The fields of TRL's `DPOConfig` that are not `TrainingSection`'s: accepted as they are, or refused with a reason.

Written out rather than read from TRL, because importing TRL takes seconds and a typing error in a recipe should take
none; a test compares these tables with TRL 1.16 and transformers 5.23 and fails when they move. A field that nothing
reads, or that our trainer contradicts, is refused: a key that is accepted does something.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

_OBJECTIVE = "belongs to the loss: write it in the objective section"
_MODEL = "write it in the model section"
_LAUNCH = "belongs to the launch: accelerate launch --config_file recipes/accelerate/zero3.yaml (or another)"
_REFERENCE = "the reference stays fixed during a run; see the reference section"
_PRECOMPUTE = "write reference.precompute"
_BATCH = "would change the batch that global_batch_size declares"
_NOISE = "policy and reference must agree at step 0, so nothing random is left in the forward pass"
_PREDICTIONS = "evaluation keeps losses and log-probabilities; there are no predictions to gather or to judge"
_CONNECTED = "never read: the processes are connected before TRL's arguments exist"
_FUSED = "log-probabilities come from alignment's own forward pass; TRL's kernel would be ignored"

# Keys of older versions, of TRL's other trainers and of other programs, which are found in recipes.
ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(
        ("packing", "packing_strategy", "eval_packing", "sample_packing", "neat_packing"),
        "rows are not packed: group_by_length puts rows of like length together, which saves the padding",
    ),
    "max_seq_length": "write data.max_length",
    "max_completion_length": "write data.max_length, for prompt and response together",
    "max_target_length": "write data.max_length, for prompt and response together",
    "assistant_only_loss": "only responses are learned",
    "completion_only_loss": "only responses are learned",
    "no_cuda": "now called use_cpu",
    "per_gpu_train_batch_size": "write per_device_train_batch_size, or leave it to global_batch_size",
    "warmup_ratio": "write warmup_steps: a number below 1 is a share of all steps",
    "max_prompt_length": "write data.max_length, for prompt and response together",
    "evaluation_strategy": "now called eval_strategy",
}

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
    "router_aux_loss_coef": "only the objective is trained: a router's auxiliary loss is not added",
    "logging_nan_inf_filter": "would log a loss that is no number as the mean of the others; write on_nan",
    "average_tokens_across_devices": "the loss is a mean over pairs, not over tokens",
    "disable_dropout": f"dropout is off: {_NOISE}",
    "neftune_noise_alpha": f"noise is off: {_NOISE}",
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
    "prediction_loss_only": _PREDICTIONS,
    "include_for_metrics": _PREDICTIONS,
    "batch_eval_metrics": _PREDICTIONS,
    "eval_do_concat_batches": _PREDICTIONS,
    "eval_use_gather_object": _PREDICTIONS,
    "eval_accumulation_steps": _PREDICTIONS,
    "bf16_full_eval": "never read: evaluation happens during training, in training's precision",
    "fp16_full_eval": "never read: evaluation happens during training, in training's precision",
    "dataloader_drop_last": "every training batch is full, and evaluation uses every pair",
    "dataloader_in_order": "batches that overtake each other would mix the pairs of several steps",
    "include_num_input_tokens_seen": "would count nothing; metrics.jsonl has tokens_per_second",
    "use_cache": "a forward pass over whole sequences has no use for a cache",
    "model_init_kwargs": _MODEL,
    "trust_remote_code": _MODEL,
    "use_liger_kernel": _FUSED,
    "liger_kernel_config": _FUSED,
    "precompute_ref_log_probs": _PRECOMPUTE,
    "precompute_ref_batch_size": _PRECOMPUTE,
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
    "ddp_backend": f"{_CONNECTED}; the device decides (GPU: NCCL, CPU: gloo)",
    "ddp_timeout": _CONNECTED,
    "resume_from_checkpoint": "never read: write --resume after the recipe",
    "ignore_data_skip": "--resume goes on with the pairs that come next",
    "restore_callback_states_from_checkpoint": "no callback here has a state to restore",
    "do_train": "has no effect in TRL",
    "do_eval": "has no effect in TRL; write eval_strategy",
    "do_predict": "has no effect in TRL",
    "hub_always_push": "never read: only the trained model is uploaded, once, at the end",
    "hub_token": "a recipe is shared, a secret is not; log in with `hf auth login`",
    "pad_token": "deprecated in TRL; the tokenizer's own is used",
    **ELSEWHERE,
}

_Decay = Annotated[float, Field(ge=0, lt=1)]

PASSED_THROUGH: dict[str, Any] = {
    "lr_scheduler_kwargs": dict | str | None,
    "optim_args": str | None,
    "adam_beta1": _Decay,
    "adam_beta2": _Decay,
    "adam_epsilon": Annotated[float, Field(ge=0)],
    "optim_target_modules": None | str | list[str],
    "tf32": bool | None,
    "gradient_checkpointing_kwargs": dict[str, Any] | str | None,
    "activation_offloading": bool,
    "torch_compile": bool,
    "torch_compile_backend": str | None,
    "torch_compile_mode": str | None,
    "torch_empty_cache_steps": int | None,
    "logging_strategy": Literal["no", "steps", "epoch"],
    "logging_first_step": bool,
    "log_on_each_node": bool,
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
    "save_only_model": bool,
    "save_on_each_node": bool,
    "enable_jit_checkpoint": bool,
    "load_best_model_at_end": bool,
    "metric_for_best_model": str | None,
    "greater_is_better": bool | None,
    "full_determinism": bool,
    "data_seed": int | None,
    "dataloader_num_workers": int,
    "dataloader_pin_memory": bool,
    "dataloader_persistent_workers": bool,
    "dataloader_prefetch_factor": int | None,
    "dataloader_multiprocessing_context": str | None,
    "ddp_find_unused_parameters": bool | None,
    "ddp_bucket_cap_mb": int | None,
    "ddp_broadcast_buffers": bool | None,
    "ddp_static_graph": bool | None,
    "debug": str,
    "skip_memory_metrics": bool,
    "dataset_num_proc": int | None,
    "hub_private_repo": bool | None,
    "hub_revision": str | None,
}

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

# Where `report_to` sends the metrics, and the Python packages of which one must be there. Empty: no plain answer.
REPORTERS: dict[str, tuple[str, ...]] = {
    "azure_ml": (),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": (),
    "dvclive": ("dvclive",),
    "flyte": (),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}

# Schedules that cannot be built without one of these keys in `lr_scheduler_kwargs`.
SCHEDULER_NEEDS: dict[str, tuple[str, ...]] = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
