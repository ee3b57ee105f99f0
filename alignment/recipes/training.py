"""The `training` section: our own keys, and the keys of TRL's `DPOConfig` under TRL's names.

Every field of `DPOConfig` (TRL 1.16, transformers 5.23) stands in exactly one of three places: here as a field of
`TrainingSection` (shown by `alignment recipe explain`), or in `alignment.recipes.trl_keys` under `PASSED_THROUGH`
(accepted, its type checked) or `REFUSED` (with the reason).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails

from alignment.errors import nearest
from alignment.recipes.schema import Names, OpenSection, Section, Text, error, option
from alignment.recipes.trl_keys import PASSED_THROUGH, REFUSED, REPORTERS, SCHEDULER_NEEDS, LrScheduler

# Ours; everything else in the section goes to DPOConfig.
OURS = (
    "global_batch_size",
    "on_nan",
    "layout",
    "group_by_length",
    "displacement_alarm",
    "normalized_gradient",
    "diagnostics",
    "cpu_threads",
)

# transformers 5 renamed these and warns about the names that everybody knows; a recipe keeps those.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

_TRL = "TRL 1.16"


class BaseTrainingSection(OpenSection):
    """What preference training and supervised fine-tuning share; TRL's names, except for the batch."""

    ours: ClassVar[tuple[str, ...]] = OURS
    passed_through: ClassVar[dict[str, Any]] = PASSED_THROUGH
    not_accepted: ClassVar[dict[str, str]] = REFUSED

    output_dir: Text = option("runs/unnamed", "Folder of the run.", "runs/ and the recipe's file name")
    global_batch_size: int = Field(
        ge=1, description="Pairs per optimiser step over all processes; accumulation is derived from it."
    )
    per_device_train_batch_size: int = option(
        8,
        "At most so many pairs per forward pass and process; lowered to a divisor of the process's share.",
        _TRL,
        ge=1,
    )
    per_device_eval_batch_size: int = option(8, "Pairs per forward pass when evaluating.", _TRL, ge=1)
    group_by_length: bool = option(True, "Batch pairs of like length.", "alignment: less padding; TRL's is random")
    cpu_threads: int | None = option(
        None,
        "Threads of each process where there is no GPU.",
        "the cores shared out over this machine's processes; `accelerate launch` alone would leave one",
        ge=1,
    )
    learning_rate: float = option(1e-6, "Peak learning rate.", _TRL, gt=0, le=1)
    num_train_epochs: float = option(
        1.0, "Passes over the data.", "alignment: one pass, as in the RPO and Zephyr recipes; TRL's is 3", gt=0
    )
    max_steps: int = option(-1, "Stop after so many steps; -1: num_train_epochs decides.", _TRL, ge=-1)
    lr_scheduler_type: LrScheduler = option("linear", "Course of the learning rate after warm-up.", _TRL)
    warmup_steps: float = option(0.0, "Steps of warm-up; a number below 1 is a share of all steps.", _TRL, ge=0)
    weight_decay: float = option(0.0, "Decoupled weight decay.", _TRL, ge=0)
    max_grad_norm: float = option(1.0, "Clip the gradient's norm here; 0: never.", _TRL, ge=0)
    on_nan: Literal["stop", "skip"] = option(
        "stop",
        "At a step whose loss or gradient is not finite: stop the run, or leave the step out and count it.",
        "alignment: nothing is learned from a number that is none",
    )
    optim: Text = option("adamw_torch_fused", "transformers' name of the optimiser.", _TRL)
    seed: int = option(42, "Seed of the order of pairs and of fresh adapters.", _TRL, ge=0)
    bf16: bool = option(False, "bfloat16 autocast.", "alignment: exact unless asked; TRL's is on")
    fp16: bool = option(False, "float16 autocast with loss scaling.", _TRL)
    gradient_checkpointing: bool = option(
        False, "Recompute activations: less memory, a third more time.", "alignment: small models first; TRL's is on"
    )
    use_cpu: bool = option(False, "Stay on the CPU though there is a GPU.", f"{_TRL}: a GPU if there is one")
    logging_steps: float = option(5.0, "Log every so many steps; below 1: a share.", "alignment; TRL's is 10", gt=0)
    eval_strategy: Literal["no", "steps", "epoch"] = option(
        "no", "When to evaluate on data.eval.", "epoch where data.eval is given, otherwise never (TRL 1.16)"
    )
    eval_steps: float | None = option(None, "Every so many steps with eval_strategy steps.", f"{_TRL}: logging_steps")
    save_strategy: Literal["no", "steps", "epoch", "best"] = option(
        "no", "When to write checkpoints; the final model is always written.", "alignment; TRL's is steps"
    )
    save_steps: float = option(500.0, "Every so many steps with save_strategy steps.", _TRL, gt=0)
    save_total_limit: int | None = option(None, "Keep only the newest so many checkpoints.", f"{_TRL}: all", ge=1)
    report_to: Names = option("none", "wandb, tensorboard, trackio …, or a list.", f"{_TRL}: none")
    push_to_hub: bool = option(False, "Upload the trained model (final/ alone) to the hub at the end.", _TRL)
    hub_model_id: Text | None = option(None, "Repository to upload to: NAME or OWNER/NAME.", "the run folder's name")
    hub_strategy: Text = option("end", "When to upload; only end is possible.", "alignment; TRL's is every_save")

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    # What may change when a run is resumed: nothing here decides the trained weights (beyond rounding). Where
    # evaluations steer the run (`what_needs_evaluation`), this does not hold: they happen when it logs and saves.
    NO_EFFECT_ON_RESULT: ClassVar[frozenset[str]] = frozenset(
        (
            # Where the run lies, and what it is called.
            "output_dir run_name project "
            # The same sums in another order or another kernel: numbers differ by rounding.
            "per_device_train_batch_size layout cpu_threads torch_compile torch_compile_backend torch_compile_mode "
            "ddp_bucket_cap_mb "
            # Time against memory: activations are computed again or moved, and are the same, since dropout is off.
            "gradient_checkpointing gradient_checkpointing_kwargs activation_offloading torch_empty_cache_steps "
            # How rows reach the device; their order is the sampler's.
            "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
            "dataloader_multiprocessing_context dataset_num_proc "
            # How many pairs an evaluation takes at a time.
            "per_device_eval_batch_size "
            # What is said, where and when.
            "report_to logging_steps logging_strategy logging_first_step log_level "
            "log_level_replica log_on_each_node disable_tqdm displacement_alarm skip_memory_metrics debug "
            "diagnostics diagnostics.every diagnostics.pairs diagnostics.parameters "
            "trackio_space_id trackio_bucket_id trackio_static_space_id "
            # What happens at a step that is not finite: a run that stopped there resumes with `skip`.
            "on_nan "
            # When checkpoints are written and which are kept. Not save_only_model: those cannot be resumed from.
            "save_strategy save_steps save_total_limit save_on_each_node enable_jit_checkpoint "
            # Where the trained model is uploaded to.
            "push_to_hub hub_model_id hub_strategy hub_private_repo hub_revision"
        ).split()
    )

    @field_validator("report_to")
    @classmethod
    def _known_reporters(cls, value: str | list[str]) -> str | list[str]:
        if value in ("none", "all", ["none"], ["all"]):
            return value
        for name in [value] if isinstance(value, str) else value:
            if name in ("none", "all"):
                raise ValueError(f"{name!r} stands alone, not in a list with others")
            if name not in REPORTERS:
                raise ValueError(f"unknown reporter {name!r}{nearest(name, [*REPORTERS, 'none', 'all'])}")
        return value

    @field_validator("hub_strategy")
    @classmethod
    def _at_the_end(cls, value: str) -> str:
        if value != "end":
            raise ValueError(
                f"{value!r} is not accepted: checkpoints hold more than the model; only 'end' is possible"
            )
        return value

    @model_validator(mode="after")
    def _keys_fit(self) -> BaseTrainingSection:
        problems = []
        given: dict[str, Any] = self.model_extra or {}
        if self.bf16 and self.fp16:
            problems.append(error("excludes fp16; set one of them to false", "bf16"))
        if self.save_strategy == "best" and given.get("metric_for_best_model") is None:
            problems.append(error("'best' needs metric_for_best_model, such as loss", "save_strategy"))
        for key in ("hub_model_id", "hub_private_repo", "hub_revision"):
            if not self.push_to_hub and getattr(self, key, None) is not None:
                problems.append(error("needs push_to_hub: true", key))
        if not all(part.count("=") == 1 for part in (given.get("optim_args") or "=").split(",")):
            problems.append(error(f"expected KEY=VALUE, KEY=VALUE …, got {given['optim_args']!r}", "optim_args"))
        needed = SCHEDULER_NEEDS.get(self.lr_scheduler_type, ())
        settings = given.get("lr_scheduler_kwargs")
        if needed and not isinstance(settings, str) and not set(needed) & set(settings or ()):
            message = f"{self.lr_scheduler_type!r} needs {' or '.join(needed)} in lr_scheduler_kwargs"
            problems.append(error(message, "lr_scheduler_type"))
        if problems:
            raise ValidationError.from_exception_data("training", problems)
        return self

    def what_needs_evaluation(self) -> dict[str, Any]:
        """Keys, with their values, that only evaluations on data.eval give a meaning."""
        found: dict[str, Any] = {}
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            found["lr_scheduler_type"] = self.lr_scheduler_type
        if self.save_strategy == "best":
            found["save_strategy"] = self.save_strategy
        if (self.model_extra or {}).get("load_best_model_at_end"):
            found["load_best_model_at_end"] = True
        return found

    @classmethod
    def open_keys(cls, data: dict[str, Any]) -> tuple[dict[str, Any], list[InitErrorDetails]]:
        """What is wrong with keys that are not fields here: unknown, refused, or of another type than TRL's."""
        problems: list[InitErrorDetails] = []
        for key, value in data.items():
            if key in cls.model_fields:
                continue
            if key in cls.not_accepted:
                problems.append(error(f"not accepted: {cls.not_accepted[key]}", key, value=value))
            elif key not in cls.passed_through:
                problems.append(error(f"unknown key{cls._hint(key)}", key, value=value))
            else:
                problems += _type_errors(cls.passed_through[key], key, value)
        return {}, problems

    @classmethod
    def _hint(cls, key: str) -> str:
        """The nearest key; where that one is refused, why."""
        refused = cls.not_accepted
        hint = nearest(key, [*cls.model_fields, *cls.passed_through, *refused])
        if not hint.startswith("; did you mean"):  # a hundred names on one line help nobody
            return nearest(key, cls.model_fields)
        meant = hint.split("'")[1]
        return f"{hint} That is not accepted: {refused[meant]}" if meant in refused else hint

    def trl_arguments(self) -> dict[str, Any]:
        """Keyword arguments for TRL's config: this section without our own keys.

        `push_to_hub` is among ours: TRL's would upload the whole run directory (see `runs.hub`).
        """
        arguments = {key: value for key, value in self.model_dump().items() if key not in (*self.ours, "push_to_hub")}
        return {_RENAMED.get(key, key): value for key, value in arguments.items()}


class DiagnosticsSection(Section):
    """Gradient entanglement of a few fixed pairs, measured while training goes on unchanged (docs/diagnostics.md)."""

    every: int = option(0, "Steps between probes; 0: none.", "off: a probe costs some passes for each response", ge=0)
    pairs: int = option(
        4, "How many of the first pairs of data.eval, or else of the training data.", "alignment", ge=1
    )
    parameters: Literal["last_layer", "all"] = option(
        "last_layer",
        "Gradients with respect to the last decoder layer, or to all that is trained; of LoRA the adapters alone.",
        "alignment: cheap; all keeps two or three gradients more in memory",
    )


class TrainingSection(BaseTrainingSection):
    """How the optimiser runs; TRL's names, except for the batch, which is declared for all processes together."""

    layout: Literal["shared_prefix", "paired"] = option(
        "shared_prefix",
        "Compute the prompt once per pair, or once per response.",
        "alignment: same numbers, less work",
    )
    displacement_alarm: float = option(
        10.0,
        "Warn when log-probability of chosen responses falls this many nats below step 0.",
        "alignment: e^10 less likely",
        gt=0,
    )
    normalized_gradient: bool = option(
        False,
        "Let both responses of a pair push equally: g_w/|g_w| - g_l/|g_l|, for losses of the margin alone.",
        "off; a pass more per response (2410.13828 proposes it against gradient entanglement)",
    )
    diagnostics: DiagnosticsSection = option(DiagnosticsSection(), "Probes of gradients.", "see its keys: off")


def _type_errors(kind: Any, key: str, value: Any) -> list[InitErrorDetails]:
    """At most one problem: the value is of none of the types that TRL's field takes."""
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as failed:
        wanted = " or ".join(dict.fromkeys(_wanted(dict(e)) for e in failed.errors()))
        return [error(f"expected {wanted}, got {value!r}", key, value=value)]
    return []


def _wanted(found: dict[str, Any]) -> str:
    return _WORDS.get(found["type"]) or str(found["ctx"]["expected"])


_WORDS = {
    "greater_than_equal": "a number >= 0",
    "less_than": "a number < 1",
    "float_type": "a number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping",
    "list_type": "a list",
    "none_required": "null",
}
