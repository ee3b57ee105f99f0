"""The one place that maps a recipe's `reward.name` to a class. A new reward is one dataclass and one entry here."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from alignment.errors import UserError, nearest
from alignment.rewards.base import RewardFunction
from alignment.rewards.rules import LengthReward, RegexReward, VaderReward

_REWARDS: dict[str, Any] = {cls.name: cls for cls in (VaderReward, LengthReward, RegexReward)}


def list_rewards() -> list[str]:
    """Names of all rewards, sorted."""
    return sorted(_REWARDS)


def _reward_class(name: str) -> Any:
    if name not in _REWARDS:
        raise UserError(f"unknown reward {name!r}{nearest(str(name), _REWARDS)}")
    return _REWARDS[name]


def reward_keys(name: str) -> set[str]:
    """The keys that reward `name` takes besides `name`.

    Raises:
        UserError: there is no such reward.
    """
    return {field.name for field in fields(_reward_class(name))}


def get_reward(name: str, **keys: Any) -> RewardFunction:
    """Make a reward by name.

    Args:
        name: one of `list_rewards()`.
        **keys: exactly the keys of that reward (`reward_keys(name)`).

    Raises:
        UserError: unknown name, unknown or missing key, or a key's value that the reward refuses.
    """
    cls = _reward_class(name)
    known = reward_keys(name)
    for key in keys:
        if key not in known:
            hint = nearest(key, known) if known else "; it takes no keys"
            raise UserError(f"reward {name}: unknown key {key!r}{hint}")
    for field in fields(cls):
        if field.name not in keys and field.default is MISSING:
            raise UserError(f"reward {name}: key {field.name!r} is missing; add it")
    return cls(**keys)
