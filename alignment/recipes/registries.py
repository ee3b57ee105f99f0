"""Checks the keys of `objective` and `reward` against their registries, and puts each complaint at its key.

The registries own names, types and ranges; nothing of that is repeated here. `alignment.objectives` imports torch, so
both are imported only when a section of theirs is checked.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic_core import InitErrorDetails

from alignment.errors import UserError, nearest
from alignment.recipes.sections import ObjectiveSection, error


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


def reward_errors(data: dict[str, Any]) -> list[InitErrorDetails]:
    """What is wrong with a reward section: unknown name, unknown, missing or refused keys."""
    from alignment.rewards import get_reward, list_rewards, reward_keys

    name = data.get("name")
    if not isinstance(name, str):
        return []
    if name not in list_rewards():
        return [error(f"unknown reward {name!r}{nearest(name, list_rewards())}", "name", value=name)]
    valid = sorted(reward_keys(name))
    given = {key: value for key, value in data.items() if key != "name"}
    problems = [
        error(f"reward {name!r} has no key {key!r}{_hint(key, valid)}", key, value=given.pop(key))
        for key in list(given)
        if key not in valid
    ]
    try:
        get_reward(name, **given)
    except UserError as failed:
        key, message = _locate(str(failed), f"reward {name}", given)
        problems.append(error(message, *([key] if key else []), value=data))
    return problems


def _hint(key: str, valid: list[str]) -> str:
    return nearest(key, valid) if valid else "; it takes none"


def _locate(message: str, prefix: str, given: dict[str, Any]) -> tuple[str | None, str]:
    """The given key that a registry's message begins with, and the message without its prefix and that key."""
    message = message.removeprefix(f"{prefix}: ")
    found = re.match(r"(\w+) ", message)
    if found and found[1] in given:
        return found[1], message[found.end() :]
    return None, message
