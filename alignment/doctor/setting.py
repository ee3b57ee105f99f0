"""What a plan is made for, besides the model: sharding, precision, adapter, reference, batch and lengths.

`from_recipe` reads it off a recipe and an accelerate configuration file. Not the formulas (`memory.py`, `flops.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from alignment.errors import UserError, nearest
from alignment.files import read_json_object
from alignment.recipes import Recipe
from alignment.recipes.launch import Launch

Sharding = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp"]
Reference = Literal["none", "copy", "adapter_off", "adapter_copy", "precomputed"]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter: rank and target modules as in PEFT."""

    r: int = 16
    target_modules: str | list[str] = "all-linear"


@dataclass(frozen=True)
class Setting:
    """One planned training step of one process.

    Attributes:
        world: processes (devices).
        sharding: what is split over them.
        offload_optimizer, offload_parameters: kept in the host's memory instead (DeepSpeed).
        dtype: of the weights as loaded.
        mixed_precision: no, bf16 or fp16 (`training.bf16`, `training.fp16`).
        quantization: of the frozen weights of linear layers: nf4, int8 or None.
        lora: the trained adapter, or None where all weights are trained.
        reference: none is needed; an own copy; the policy with its adapter off, or with a frozen copy of the adapter
            that training started from; or log-probs read from the cache.
        previous: the same of the previous iterate, where training starts at it beside another reference (inpo).
        optimizer: transformers' name.
        gradient_checkpointing: recompute activations, layer by layer.
        layout: of the rows (`alignment.models.scoring`).
        pairs: preference pairs per forward pass and device.
        accumulation: passes per optimizer step.
        prompt: tokens of each prompt.
        responses: tokens of each response: chosen, rejected, calibration where there is one; or all samples.
        copied: which of them have degraded copies (spo), counted as long as the response.
        degrees: the response and its copies.
    """

    world: int = 1
    sharding: Sharding = "none"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    dtype: str = "float32"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    quantization: str | None = None
    lora: Lora | None = None
    reference: Reference = "copy"
    previous: Reference = "none"
    optimizer: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    layout: Literal["shared_prefix", "paired"] = "shared_prefix"
    pairs: int = 1
    accumulation: int = 1
    prompt: int = 512
    responses: tuple[int, ...] = field(default=(512, 512))
    copied: tuple[int, ...] = ()
    degrees: int = 1

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("sharding", self.sharding, get_args(Sharding)),
            ("reference", self.reference, get_args(Reference)),
            ("previous", self.previous, get_args(Reference)),
            ("dtype", self.dtype, BYTES),
            ("quantization", self.quantization, (None, "nf4", "int8")),
        ):
            if value not in valid:
                raise UserError(f"plan: {name} {value!r} is unknown{nearest(str(value), map(str, valid))}")
        if self.quantization is not None and self.lora is None:
            raise UserError("plan: quantised weights cannot be trained: give a lora adapter")

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed runs the step."""
        return self.sharding.startswith("zero")

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight in memory: DeepSpeed casts the whole model to the half precision it runs in."""
        return 2 if self.deepspeed and self.mixed_precision != "no" else BYTES[self.dtype]

    @property
    def trained_bytes(self) -> int:
        """Bytes of a trained weight. FSDP2 keeps trained weights in float32 under mixed precision (accelerate); PEFT
        makes adapters float32, except with ZeRO-3 (TRL) or quantised weights (bfloat16, TRL)."""
        if self.sharding == "fsdp" and self.mixed_precision != "no":
            return 4
        if self.lora is None or (self.deepspeed and self.mixed_precision != "no") or self.sharding == "zero3":
            return self.weight_bytes
        return 2 if self.quantization is not None else 4

    @property
    def compute_bytes(self) -> int:
        """Bytes of what matrix multiplications read and write."""
        return 2 if self.mixed_precision != "no" else self.weight_bytes

    @property
    def casts(self) -> bool:
        """Whether autocast makes 16-bit copies of 32-bit tensors on the way."""
        return self.mixed_precision != "no" and self.weight_bytes == 4 and self.sharding != "fsdp"

    @property
    def plain(self) -> Setting:
        """The same without copies: what frozen models score."""
        return replace(self, copied=(), degrees=1)

    @property
    def copies(self) -> list[int]:
        """Tokens of each degraded copy of a pair."""
        return [self.responses[branch] for branch in self.copied] * (self.degrees - 1)

    @property
    def rows(self) -> int:
        """Rows of one pass."""
        return self.pairs * (1 if self.layout == "shared_prefix" else len(self.responses) + len(self.copies))

    @property
    def width(self) -> int:
        """Columns of a row: `[prompt[:-1] | prompt[-1] y_1[:-1] | …]`, as `scoring.build_rows` lays it out."""
        return max(self.prompt - 1, 0) + self.kept + (sum(self.copies) if self.layout == "shared_prefix" else 0)

    @property
    def kept(self) -> int:
        """Columns on which the LM head runs: never those of copies in a shared row."""
        return sum(self.responses) if self.layout == "shared_prefix" else max(self.responses)


def from_recipe(recipe: Recipe, launched: Launch | None = None, world: int | None = None) -> Setting:
    """The setting of a recipe, at its longest rows: half of `data.max_length` prompt, half each response.

    On-policy: as long a response as may be drawn, and as many as are learned from; the prompt takes the rest.

    Args:
        recipe: the recipe.
        launched: what an accelerate configuration file says (`read_launch`), or None.
        world: processes; by default the file's `num_processes`, or 1.
    """
    from alignment.objectives import get_objective
    from alignment.runs.lifecycle import plan_batches
    from alignment.trainers.degree import RESPONSES

    launch = launch_of(launched, world)
    training = recipe.training
    pairs, accumulation = plan_batches(training.global_batch_size, training.per_device_train_batch_size, launch.world)
    objective: Any = get_objective(recipe.objective.name, **recipe.objective.hyperparameters)
    copying = "degree" in objective.needs
    prompt, responses = _lengths(recipe, objective)
    return replace(
        launch,
        dtype=recipe.model.dtype,
        mixed_precision="bf16" if training.bf16 else "fp16" if training.fp16 else "no",
        quantization=recipe.model.quantization,
        lora=_lora(recipe),
        reference=_reference(recipe, objective),
        previous=_previous(recipe, objective),
        optimizer=training.optim,
        gradient_checkpointing=training.gradient_checkpointing,
        layout=training.layout,
        pairs=pairs,
        accumulation=accumulation,
        prompt=prompt,
        responses=responses,
        copied=RESPONSES[objective.responses] if copying else (),
        degrees=objective.degrees if copying else 1,
    )


def _lengths(recipe: Recipe, objective: Any) -> tuple[int, tuple[int, ...]]:
    """Tokens of the prompt and of each response."""
    calibration = 1 if "calibration" in objective.needs else 0
    longest = recipe.data.max_length
    if recipe.data.prompts is None:
        return longest // 2, (longest - longest // 2,) * (2 + calibration)
    from alignment.recipes.on_policy import rollout_settings

    drawn = recipe.generation.max_new_tokens
    return longest - drawn, (drawn,) * (rollout_settings(recipe)["samples"] + calibration)


def _lora(recipe: Recipe) -> Lora | None:
    if recipe.lora is not None:
        return Lora(recipe.lora.r, recipe.lora.target_modules)
    folder = adapter_folder(recipe)
    if folder is None:
        return None
    keys = read_adapter(folder)
    return Lora(keys["r"], keys["target_modules"])


def read_adapter(folder: str) -> dict[str, Any]:
    """The keys of a LoRA adapter's adapter_config.json.

    Raises:
        UserError: it is missing, damaged or not a LoRA adapter's, or names no modules.
    """
    file = Path(folder) / "adapter_config.json"
    keys = read_json_object(file)
    if keys.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type {keys.get('peft_type')!r}: there is a plan for LORA only")
    modules = keys.get("target_modules")
    named = modules if isinstance(modules, list) else [modules]
    if not named or not all(isinstance(name, str) for name in named):
        raise UserError(f"{file}: target_modules {modules!r}: the names of the adapted modules are needed")
    if type(keys.get("r")) is not int or keys["r"] < 1:
        raise UserError(f"{file}: r {keys.get('r')!r}: the rank, a whole number, is needed")
    if not isinstance(keys.get("base_model_name_or_path"), str):
        raise UserError(f"{file}: does not name its base model (base_model_name_or_path)")
    return keys


def _reference(recipe: Recipe, objective: Any) -> Reference:
    from alignment.objectives.base import reads_reference

    if not reads_reference(objective):
        return "none"
    if recipe.reference.precompute:
        return "precomputed"
    return "copy" if recipe.reference.name_or_path is not None else _start(recipe)


def _previous(recipe: Recipe, objective: Any) -> Reference:
    """The start of training, where another model is the reference and the objective reads both."""
    if "previous" not in objective.needs or recipe.reference.name_or_path is None:
        return "none"
    return "precomputed" if recipe.reference.precompute else _start(recipe)


def _start(recipe: Recipe) -> Reference:
    """How the model that training starts from can be asked later."""
    if recipe.lora is not None:
        return "adapter_off"
    return "copy" if adapter_folder(recipe) is None else "adapter_copy"


def adapter_folder(recipe: Recipe) -> str | None:
    """The folder of the existing adapter that training starts from, if there is one."""
    if recipe.model.adapter is not None:
        return recipe.model.adapter
    path = Path(recipe.model.name_or_path).expanduser()
    return str(path) if (path / "adapter_config.json").is_file() else None


def launch_of(launch: Launch | None, world: int | None = None) -> Setting:
    """World size, sharding and offload of a launch; everything else at its default.

    Raises:
        UserError: a distributed type that has no plan, or settings in a DeepSpeed file of their own.
    """
    if world is None:
        world = 1 if launch is None else launch.num_processes
    if world < 1:
        raise UserError(f"world: {world} processes; at least 1 is needed")
    kind = "NO" if launch is None else launch.distributed_type
    if launch is not None and kind == "DEEPSPEED":
        config = launch.deepspeed_config
        if config.deepspeed_config_file is not None:
            raise UserError("deepspeed_config_file: a plan reads zero_stage and offload from the accelerate file")
        if config.zero_stage not in (1, 2, 3):
            raise UserError(f"deepspeed_config.zero_stage: {config.zero_stage} has no plan; 1, 2 or 3")
        sharding: tuple[Sharding, ...] = ("zero1", "zero2", "zero3")
        return Setting(
            world=world,
            sharding=sharding[config.zero_stage - 1],
            offload_optimizer=config.offload_optimizer_device not in (None, "none"),
            offload_parameters=config.offload_param_device not in (None, "none"),
        )
    if kind == "FSDP":
        return Setting(world=world, sharding="fsdp")
    if kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return Setting(world=world, sharding="ddp" if world > 1 else "none")
    raise UserError(f"distributed_type: {kind} has no plan; NO, MULTI_GPU, MULTI_CPU, DEEPSPEED or FSDP")
