"""What judges text: a response in, a number out; or two responses in, a probability out.

Not the place of learned judges' training, nor of win rates (`evaluation.win_rate`). Importing this package imports
nothing heavy; a judge loads what it needs when it is asked for the first time. docs/rewards.md has them all.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from alignment.rewards.base import PreferenceOracle, RewardFunction
from alignment.rewards.registry import get_oracle, get_reward, list_oracles, list_rewards, oracle_keys, reward_keys

__all__ = [
    "PreferenceOracle",
    "RewardFunction",
    "aggregate",
    "get_oracle",
    "get_reward",
    "list_oracles",
    "list_rewards",
    "oracle_keys",
    "reward_keys",
]


def __getattr__(name: str) -> Any:
    if name != "aggregate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from alignment.rewards.aggregate import aggregate

    return aggregate


class _Package(ModuleType):
    """Python binds a submodule to its package when it is first imported; here `aggregate` is the function in it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "aggregate" and isinstance(value, ModuleType):
            value = value.aggregate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
