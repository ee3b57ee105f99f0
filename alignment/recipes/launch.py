"""The accelerate configuration file of a launch: what `alignment train` and `alignment doctor` read of it, checked.

accelerate itself answers a mistake in that file with a traceback. Keys that are not listed here are accelerate's own
business. Not a recipe, and not the plan of a launch (`alignment.doctor.setting`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from alignment.errors import UserError, nearest
from alignment.files import read_text

_KEYS = ConfigDict(extra="allow", strict=True, frozen=True)
DISTRIBUTED = (  # accelerate's DistributedType, whose import takes seconds
    *("NO", "DEEPSPEED", "FSDP", "XLA", "MEGATRON_LM", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU"),
    *("MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_HPU", "MULTI_NEURON"),
)
# Accelerate 1.x takes an empty section for an absent one, and YAML's unquoted no, which is False, for "no".
_Absent = BeforeValidator(lambda value: {} if value is None else value)
_No = BeforeValidator(lambda value: "no" if value in (None, False) else value)


class DeepSpeedKeys(BaseModel):
    """`deepspeed_config`; the defaults are accelerate's."""

    model_config = _KEYS
    zero_stage: int = 2
    offload_optimizer_device: str | None = None
    offload_param_device: str | None = None
    deepspeed_config_file: str | None = None


class Launch(BaseModel):
    """The keys that decide how many processes there are, what they share and in which precision they compute."""

    model_config = _KEYS
    distributed_type: str
    num_processes: int = Field(ge=1)
    mixed_precision: Annotated[Literal["no", "fp16", "bf16", "fp8"], _No] = "no"
    deepspeed_config: Annotated[DeepSpeedKeys, _Absent] = DeepSpeedKeys()

    @field_validator("distributed_type")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in DISTRIBUTED:
            raise ValueError(f"unknown{nearest(value, DISTRIBUTED)}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _one_process(cls, keys: Any) -> Any:
        alone = isinstance(keys, dict) and keys.get("distributed_type") == "NO"
        return {"num_processes": 1, **keys} if alone else keys


def read_launch(file: Path) -> Launch:
    """The launch that an accelerate configuration file (YAML, or JSON, which is YAML too) describes.

    Raises:
        UserError: it is missing, no mapping, or a key that is read here is missing or has a value of another kind.
    """
    try:
        found = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: the keys of an accelerate configuration are needed")
    try:
        return Launch.model_validate(found)
    except ValidationError as failed:
        first = failed.errors(include_url=False)[0]
        key, value = ".".join(map(str, first["loc"])), first["input"]
        got = "" if first["type"] == "missing" else f", not {value!r}"
        raise UserError(f"{file}: {key}: {first['msg']}{got}") from None
