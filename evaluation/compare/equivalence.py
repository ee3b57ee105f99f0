"""Which objectives are the same method under another name: the equivalence map, as rules. Nothing is trained here.

Every rule is an identity of losses up to a constant that the policy cannot change; tests/evaluation/
test_compare_rules.py proves each on numbers, and docs/compare.md has them in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignment.objectives import get_objective

Loss = tuple[str, tuple[tuple[str, Any], ...]]

# (name, what must hold, name it equals, its hyper-parameters: our key -> the other's, fixed values of the other's)
RULES: tuple[tuple[str, Mapping[str, Any], str, Mapping[str, str], Mapping[str, Any]], ...] = (
    ("robust", {"label_smoothing": 0.0}, "dpo", {"beta": "beta"}, {"label_smoothing": 0.0}),
    ("f_dpo", {"divergence": "reverse_kl"}, "dpo", {"beta": "beta"}, {"label_smoothing": 0.0}),
    ("vpo", {"mode": "offline", "calibration": "chosen"}, "rpo", {"beta": "beta", "alpha": "eta"},
     {"form": "sum", "baseline": "chosen"}),
    ("vpo", {"alpha": 0.0}, "dpo", {"beta": "beta"}, {"label_smoothing": 0.0}),
    ("rpo", {"eta": 0.0}, "dpo", {"beta": "beta"}, {"label_smoothing": 0.0}),
    ("dpop", {"lam": 0.0}, "dpo", {"beta": "beta"}, {"label_smoothing": 0.0}),
)  # fmt: skip
FIRST_ITERATION = {"inpo": ("ipo", {"eta": "tau"})}  # sum form; there the previous iterate is the reference


def loss_of(name: str, hyperparameters: Mapping[str, Any]) -> Loss:
    """The objective as the simplest one that it equals: (name, sorted hyper-parameters).

    Args:
        name: of the registry.
        hyperparameters: those that are given.
    """
    values = get_objective(name, **hyperparameters).hyperparameters
    if name == "spo" and values["gamma"] == 0:  # its base alone
        card = get_objective(values["base"]).hyperparameters
        return loss_of(values["base"], {key: values.get(f"base_{key}", values.get(key)) for key in card})
    for ours, holding, other, keys, fixed in RULES:
        if ours == name and all(values[key] == value for key, value in holding.items()):
            return loss_of(other, {theirs: values[key] for key, theirs in keys.items()} | dict(fixed))
    return name, tuple(sorted((key, value) for key, value in values.items() if value is not None))


def same_up_to_tuning(ours: Sequence[Loss], theirs: Sequence[Loss]) -> bool:
    """Whether two objectives are one method that was tuned twice; with one point each, whether their losses are equal.

    Args:
        ours, theirs: `loss_of` each tuning point. A hyper-parameter that differs among the points is tuned.
    """
    if len({name for name, _ in (*ours, *theirs)}) > 1:
        return False
    one, other = ([dict(pairs) for _, pairs in losses] for losses in (ours, theirs))
    tuned = {key for each in (one, other) for key in each[0] if any(at.get(key) != each[0][key] for at in each)}
    return all(one[0].get(key) == other[0].get(key) for key in {*one[0], *other[0]} - tuned)


def describe_equal(name: str, hyperparameters: Mapping[str, Any]) -> str | None:
    """`= dpo (beta=0.1)`, in words for the table; None where no rule applies."""
    if name in FIRST_ITERATION:
        other, keys = FIRST_ITERATION[name]
        values = get_objective(name, **hyperparameters).hyperparameters
        shown = ", ".join(f"{theirs}={values[key]:g}" for key, theirs in keys.items())
        every = values["tau"] == values["eta"]  # the previous iterate then has weight 0
        return f"{'every' if every else 'first'} iteration = {other} ({shown})"
    found, pairs = loss_of(name, hyperparameters)
    if found == name:
        return None
    plain = get_objective(found).hyperparameters
    shown = ", ".join(f"{k}={v:g}" for k, v in pairs if isinstance(v, float) and (k == "beta" or plain.get(k) != v))
    return f"= {found} ({shown})"
