"""The one place that maps an objective's name to its class, and that lets a user's own file join.

Not a plug-in framework: a class decorated with `@register` is known from the moment its file is imported. Files in
this package are imported when the package is; `load_plugin` imports any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform, get_type_hints

from alignment.errors import nearest
from alignment.objectives.base import (
    Card,
    HyperParameter,
    Objective,
    describe_range,
    hyper,
    literal_choices,
    number_type,
)
from alignment.objectives.samples import NEEDS_OF

PACKAGE = "alignment.objectives."
_REGISTRY: dict[str, type[Objective]] = {}
T = TypeVar("T", bound=type[Objective])


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(hyper,))
def prepare(cls: T) -> T:
    """Make `cls` a frozen keyword-only dataclass and complete its card with its hyper-parameters."""
    dataclasses.dataclass(frozen=True, kw_only=True)(cls)  # decorates in place: no slots
    hints = get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        if "meaning" not in field.metadata:
            raise TypeError(f"{cls.__name__}.{field.name}: declare hyper-parameters with hyper(meaning, default=...)")
        annotation, meta = hints[field.name], field.metadata
        kind = "choice" if literal_choices(annotation) else getattr(number_type(annotation), "__name__", "any")
        kind = "bool" if annotation is bool else kind
        allowed = meta.get("allowed") or describe_range(annotation, meta["bounds"])
        rows.append(HyperParameter(field.name, kind, field.default, allowed, meta["meaning"], meta["source"]))
    known = NEEDS_OF[cls.batch_kind]
    unknown = set(cls.card.needs) - set(known)
    if unknown:
        raise ValueError(f"{cls.__name__}.card.needs: unknown {sorted(unknown)}; valid: {', '.join(known)}")
    cls.card = dataclasses.replace(cls.card, batch=cls.batch_kind, hyperparameters=tuple(rows))
    return cls


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(hyper,))
def register(cls: T) -> T:
    """Class decorator: prepare the dataclass and enter it under its card's name; a taken name is a ValueError."""
    cls = prepare(cls)
    name = cls.card.name
    known = _REGISTRY.get(name)
    if known is not None and _source(known) != _source(cls):
        raise ValueError(f"objective name {name!r} is taken by {_source(known)}; choose another for {_source(cls)}")
    _REGISTRY[name] = cls
    return cls


def _source(cls: type) -> str:
    """The file that defines `cls`, and its name there."""
    return f"{getattr(sys.modules.get(cls.__module__), '__file__', cls.__module__)}:{cls.__qualname__}"


def objective_class(name: str) -> type[Objective]:
    """The registered class; ValueError with the nearest valid name otherwise."""
    if name not in _REGISTRY:
        raise ValueError(f"unknown objective {name!r}{nearest(str(name), _REGISTRY)}")
    return _REGISTRY[name]


def get_objective(name: str, **hyperparameters: Any) -> Objective:
    """Build an objective: `get_objective("rpo", beta=0.1, eta=0.005)`.

    Raises:
        ValueError: unknown name or hyper-parameter (naming the nearest valid one), or a value outside its range.
    """
    cls = objective_class(name).variant(hyperparameters)
    valid = [field.name for field in dataclasses.fields(cls)]
    for key in hyperparameters:
        if key not in valid:
            raise ValueError(no_such_hyperparameter(cls, key))
    return cls(**hyperparameters)


def no_such_hyperparameter(cls: type[Objective], key: str) -> str:
    """The message for a key that a class (a variant, where there are several) does not have."""
    valid = [field.name for field in dataclasses.fields(cls)]
    which = f"objective {cls.card.name!r}" + (f" with {cls.card.selected}" if cls.card.selected else "")
    return f"{which} has no hyper-parameter {key!r}" + (nearest(key, valid) if valid else "; it takes none")


def own_cards() -> list[Card]:
    """The cards of this package's objectives, without plug-ins that happen to be loaded."""
    return [card for card in list_objectives() if objective_class(card.name).__module__.startswith(PACKAGE)]


def list_objectives() -> list[Card]:
    """The cards of all registered objectives, sorted by name."""
    return [_REGISTRY[name].card for name in sorted(_REGISTRY)]


def objective_signature(
    objective: str | type[Objective], hyperparameters: Mapping[str, Any] | None = None
) -> dict[str, inspect.Parameter]:
    """Hyper-parameters of a name or class as keyword-only parameters with resolved annotations and defaults.

    `hyperparameters` are those that select a variant (spo's base); without them it is the default one.

    Raises:
        ValueError: an unknown name, or a variant that does not exist.
    """
    cls = objective_class(objective) if isinstance(objective, str) else objective
    cls = cls.variant(hyperparameters or {})
    hints = get_type_hints(cls)
    kind = inspect.Parameter.KEYWORD_ONLY
    return {
        field.name: inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name])
        for field in dataclasses.fields(cls)
    }


def load_plugin(path: str | Path) -> list[str]:
    """Import a user's Python file and return the names of the objectives that it registered.

    Loading the same file again replaces its objectives; a file that fails leaves the registry as it was.

    Raises:
        ValueError: the file is missing, fails to import, takes an existing name or registers nothing.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise ValueError(f"{path}: no such file; `file:` must name a Python file that registers an objective")
    module_name = f"alignment_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    module = types.ModuleType(module_name)
    module.__file__ = str(file)
    before = dict(_REGISTRY)
    for name in [name for name, cls in before.items() if cls.__module__ == module_name]:
        del _REGISTRY[name]  # loaded earlier: what the file no longer defines must go
    sys.modules[module_name] = module  # dataclasses and get_type_hints look the module up
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)  # the source itself: no stale bytecode
    except Exception as error:  # whatever the user's file raises becomes one line that names the file
        _REGISTRY.clear()
        _REGISTRY.update(before)
        del sys.modules[module_name]
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    names = sorted(name for name, cls in _REGISTRY.items() if cls.__module__ == module_name)
    if not names:
        raise ValueError(f"{path}: registers no objective; decorate its class with @register")
    return names
