"""Checks the keys of `objective`, `reward` and `oracle` against registries, and puts each complaint at its key.

The registries own names, types and ranges; nothing of that is repeated here. `alignment.objectives` imports torch, so
they are imported only when a section of theirs is checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic_core import InitErrorDetails

from alignment.errors import UserError, nearest
from alignment.recipes.schema import error
from alignment.recipes.sections import ObjectiveSection

if TYPE_CHECKING:
    from alignment.rewards.registry import Kind


def objective_defaults_and_errors(data: dict[str, Any]) -> tuple[dict[str, Any], list[InitErrorDetails]]:
    """Resolved hyper-parameters that `data` leaves out, and what is wrong with those that it gives.

    Args:
        data: the objective section with `name`, possibly `file` (already an absolute path), and hyper-parameters.

    Returns:
        Absent hyper-parameters with their (possibly derived) defaults, empty if there are problems; the problems.
    """
    from alignment.objectives import get_objective, list_objectives, load_plugin, objective_class
    from alignment.objectives.registry import no_such_hyperparameter, objective_signature

    name, file = data.get("name"), data.get("file")
    if isinstance(file, str):
        try:
            load_plugin(file)
        except ValueError as failed:
            return {}, [error(str(failed), "file", value=file)]
    if not isinstance(name, str):
        return {}, []
    known = [card.name for card in list_objectives()]
    if name not in known:
        return {}, [error(f"unknown objective {name!r}{nearest(name, known)}", "name", value=name)]

    given = {key: value for key, value in data.items() if key not in ObjectiveSection.fixed}
    try:
        cls = objective_class(name).variant(given)
    except ValueError as failed:  # which other keys are valid, nobody can say
        key, message = _locate(str(failed), name, given)
        return {}, [error(message, *([key] if key else []), value=data)]
    valid = list(objective_signature(cls))
    problems = [
        error(no_such_hyperparameter(cls, key), key, value=given.pop(key)) for key in list(given) if key not in valid
    ]
    while True:
        try:
            objective = get_objective(name, **given)
        except ValueError as failed:
            key, message = _locate(str(failed), name, given)
            problems.append(error(message, *([key] if key else []), value=data))
            if key is None or not given:
                return {}, problems
            del given[key]
            continue
        absent = {key: value for key, value in objective.hyperparameters.items() if key not in data}
        return ({} if problems else absent), problems


def judge_errors(kind: Kind, data: dict[str, Any]) -> list[InitErrorDetails]:
    """What is wrong with a reward or oracle section: unknown name, unknown, missing or refused keys.

    Reward sections inside it (`oracle.reward`) are checked alike, with their complaints at their own keys.
    """
    return [error(message, *path, value=value) for path, message, value in _complaints(kind, data)]


def judge_files(kind: Kind, data: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key in the recipe -> file, for every key of a checked reward or oracle section that names a file."""
    from alignment.rewards.registry import judge_fields

    prefix = prefix or kind
    files = {}
    for key, field in judge_fields(kind, data["name"]).items():
        if field.metadata.get("file") and isinstance(data.get(key), str):
            files[f"{prefix}.{key}"] = data[key]
        if _is_reward_section(field, data.get(key)):
            files |= judge_files("reward", data[key], f"{prefix}.{key}")
    return files


def _is_reward_section(field: Any, value: Any) -> bool:
    """Whether a key holds a reward section; a reward's name alone has no keys."""
    return field.metadata.get("section") == "reward" and isinstance(value, dict) and isinstance(value.get("name"), str)


def _complaints(kind: Kind, data: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """(path inside the section, message, value) of each mistake."""
    from alignment.rewards.registry import get_oracle, get_reward, judge_fields, list_oracles, list_rewards

    name, names = data.get("name"), list_rewards() if kind == "reward" else list_oracles()
    if not isinstance(name, str):
        return
    if name not in names:
        yield ("name",), f"unknown {kind} {name!r}{nearest(name, names)}", name
        return
    valid = judge_fields(kind, name)
    given = {key: value for key, value in data.items() if key != "name"}
    for key in [key for key in given if key not in valid]:
        yield (key,), f"{kind} {name!r} has no key {key!r}{_hint(key, sorted(valid))}", given.pop(key)
    inner = [
        ((key, *path), message, value)
        for key, field in valid.items()
        if _is_reward_section(field, given.get(key))
        for path, message, value in _complaints("reward", given[key])
    ]
    yield from inner
    if inner:  # which making it would find again, with less to say of the place
        return
    try:
        (get_reward if kind == "reward" else get_oracle)(name, **given)
    except UserError as failed:
        at, message = _locate(str(failed), f"{kind} {name}", given)
        yield ((at,) if at else ()), message, data


def _hint(key: str, valid: list[str]) -> str:
    return nearest(key, valid) if valid else "; it takes none"


def _locate(message: str, prefix: str, given: dict[str, Any]) -> tuple[str | None, str]:
    """The given key that a registry's message begins with, and the message without its prefix and that key."""
    message = message.removeprefix(f"{prefix}: ")
    found = re.match(r"(\w+):? ", message)
    if found and found[1] in given:
        return found[1], message[found.end() :]
    return None, message
