"""What every section of a recipe is made of: keys with a default and its source, complaints at their keys, strictness.

No section itself: `sections`, `rows`, `training`, `reward_model` and `supervised` have them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


def option(default: Any, meaning: str, source: str, **constraints: Any) -> Any:
    """A key with a default; the description says what the key means and where the default is from."""
    return Field(default, description=f"{meaning} Default: {source}.", **constraints)


def error(message: str, *loc: str, value: Any = None) -> InitErrorDetails:
    """One problem at `loc` in words of our own, for `ValidationError.from_exception_data`."""
    kind = PydanticCustomError("recipe", "{message}", {"message": message})
    return InitErrorDetails(type=kind, loc=loc, input=value)


def refused_at(message: str, *loc: str) -> ValidationError:
    """The exception for a rule that ties several keys together, placed at the key that breaks it."""
    return ValidationError.from_exception_data("recipe", [error(message, *loc)])


def _names(value: Any) -> Any:
    """One name, or a list of names; said in one message instead of one per member of the union."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
        return value
    raise ValueError(f"expected a name or a list of names, got {value!r}")


Names = Annotated[str | list[str], BeforeValidator(_names)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A section whose keys are all listed here; `refused` has reasons for keys that people expect in vain."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    refused: ClassVar[dict[str, str]] = {}


class OpenSection(BaseModel):
    """A section some of whose keys are known elsewhere (a registry, TRL): `open_key_errors` checks those."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    @classmethod
    def open_keys(cls, data: dict[str, Any]) -> tuple[dict[str, Any], list[InitErrorDetails]]:
        """Defaults for open keys that are absent, and what is wrong with those that are present."""
        raise NotImplementedError

    @model_validator(mode="wrap")
    @classmethod
    def _check_open_keys(cls, data: Any, handler: Callable[[Any], Any]) -> Any:
        if not isinstance(data, dict):
            return handler(data)
        defaults, problems = cls.open_keys(data)
        try:
            section = handler({**defaults, **data})
        except ValidationError as failed:
            kept = failed.errors(include_url=False)
            problems += [
                InitErrorDetails(type=e["type"], loc=e["loc"], input=e["input"], ctx=e.get("ctx", {})) for e in kept
            ]
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return section
