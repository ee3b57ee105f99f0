"""The one place that maps `reward.name` and `oracle.name` of a recipe to a class. One dataclass and one entry each.

A class is a frozen dataclass whose fields are its recipe keys; it loads weights and reads files at the first question,
so that making one checks a recipe in no time. Its module is imported when its name is used. Metadata of a field tells
the checks of recipes what they cannot see: `{"file": True}`, a text there is a local file; `{"section": "reward"}`, a
mapping there is a reward section.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from importlib import import_module
from typing import Any, Literal

from alignment.errors import UserError, nearest
from alignment.rewards.base import PreferenceOracle, RewardFunction

Kind = Literal["reward", "oracle"]

_CLASSES: dict[Kind, dict[str, str]] = {
    "reward": {
        "ensemble": "alignment.rewards.scored:EnsembleReward",
        "exact_match": "alignment.rewards.rules:ExactMatchReward",
        "implicit": "alignment.rewards.implicit:ImplicitReward",
        "length": "alignment.rewards.rules:LengthReward",
        "model": "alignment.rewards.scored:ModelReward",
        "recorded": "alignment.rewards.recorded:RecordedReward",
        "regex": "alignment.rewards.rules:RegexReward",
        "shifted": "alignment.rewards.studies:ShiftedReward",
        "vader": "alignment.rewards.rules:VaderReward",
    },
    "oracle": {
        "bradley_terry": "alignment.rewards.oracles:RewardOracle",
        "cyclic": "alignment.rewards.studies:CyclicOracle",
        "general": "alignment.rewards.general:GeneralOracle",
        "llm_judge": "alignment.rewards.judge:LLMJudge",
        "recorded": "alignment.rewards.recorded:RecordedOracle",
        "tabular": "alignment.rewards.oracles:TabularOracle",
    },
}


def list_rewards() -> list[str]:
    """Names of all rewards, sorted."""
    return sorted(_CLASSES["reward"])


def list_oracles() -> list[str]:
    """Names of all oracles, sorted."""
    return sorted(_CLASSES["oracle"])


def judge_fields(kind: Kind, name: str) -> dict[str, Field[Any]]:
    """The keys of a reward or oracle besides `name`, as fields of its dataclass.

    Raises:
        UserError: there is no such reward or oracle.
    """
    return {field.name: field for field in fields(_judge_class(kind, name)) if field.init}


def reward_keys(name: str) -> set[str]:
    """The keys that reward `name` takes besides `name`; UserError if there is no such reward."""
    return set(judge_fields("reward", name))


def oracle_keys(name: str) -> set[str]:
    """The keys that oracle `name` takes besides `name`; UserError if there is no such oracle."""
    return set(judge_fields("oracle", name))


def get_reward(name: str, **keys: Any) -> RewardFunction:
    """Make a reward by name.

    Args:
        name: one of `list_rewards()`.
        **keys: exactly the keys of that reward (`reward_keys(name)`).

    Raises:
        UserError: unknown name, unknown or missing key, or a key's value that the reward refuses.
    """
    made: RewardFunction = _make("reward", name, keys)
    return made


def get_oracle(name: str, **keys: Any) -> PreferenceOracle:
    """Make an oracle by name; arguments and errors as of `get_reward`."""
    made: PreferenceOracle = _make("oracle", name, keys)
    return made


def _judge_class(kind: Kind, name: str) -> Any:
    if name not in _CLASSES[kind]:
        raise UserError(f"unknown {kind} {name!r}{nearest(str(name), _CLASSES[kind])}")
    module, _, cls = _CLASSES[kind][name].partition(":")
    return getattr(import_module(module), cls)


def _make(kind: Kind, name: str, keys: Mapping[str, Any]) -> Any:
    known = judge_fields(kind, name)
    for key in keys:
        if key not in known:
            hint = nearest(key, known) if known else "; it takes no keys"
            raise UserError(f"{kind} {name}: unknown key {key!r}{hint}")
    for key, field in known.items():
        if key not in keys and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{kind} {name}: key {key!r} is missing; add it")
    return _judge_class(kind, name)(**keys)
