"""The conformance suite: every registered objective proved, runnable by anyone who adds one.

    from alignment.objectives.conformance import run_checks
    for result in run_checks(["dpo"]):
        print(result.objective, result.check, result.ok, result.detail)

Also `alignment objectives check [NAME]`, and one parametrised test. Not imported by `alignment.objectives`, which
needs torch only; this package needs mpmath and scipy as well. An objective without data here gets the generic checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from alignment.objectives.base import Objective
from alignment.objectives.conformance import generic, golden, laws, on_policy, tabular
from alignment.objectives.conformance.batches import CheckFailed
from alignment.objectives.conformance.relations import RELATIONS
from alignment.objectives.registry import list_objectives, objective_class

__all__ = ["CheckFailed", "CheckResult", "checks_of", "run_check", "run_checks"]

Check = Callable[[type[Objective]], str]

GENERIC: tuple[Check, ...] = (
    generic.shapes,
    generic.permutation,
    generic.split,
    generic.padding,
    generic.columns,
    generic.start,
    generic.direction,
    generic.extremes,
    generic.finite_differences,
    generic.saturation,
    generic.labels,
    generic.hyperparameters,
    tabular.optimum,
)
WITH_DATA: tuple[tuple[Callable[[type[Objective]], bool], Check], ...] = (
    (golden.has_golden, golden.golden),
    (golden.has_paper, golden.paper),
    (laws.has_start_law, laws.start_law),
    (laws.has_bounds, laws.bounds),
)


@dataclass(frozen=True)
class CheckResult:
    """One check of one objective: `detail` says what was covered, or what was expected and what came."""

    objective: str
    check: str
    ok: bool
    detail: str


def _related(cls: type[Objective], label: str) -> str:
    RELATIONS[cls.card.name][label](cls.build)
    return "holds"


def checks_of(cls: type[Objective]) -> dict[str, Callable[[], str]]:
    """The checks that apply to a class, by name; each returns what it covered or raises `CheckFailed`."""
    offline = [*GENERIC, *(check for applies, check in WITH_DATA if applies(cls))]
    checks = offline if cls.card.batch == "pairs" else [*on_policy.CHECKS, generic.hyperparameters]
    named: dict[str, Callable[[], str]] = {check.__name__: partial(check, cls) for check in checks}
    for label in RELATIONS.get(cls.card.name, {}):
        named[f"relation: {label}"] = partial(_related, cls, label)
    return named


def run_check(cls: type[Objective], check: str) -> CheckResult:
    """Run one named check; whatever an objective raises is a failed check with its message."""
    name = cls.card.name
    try:
        return CheckResult(name, check, True, checks_of(cls)[check]())
    except CheckFailed as failure:
        return CheckResult(name, check, False, str(failure))
    except Exception as error:  # a user's objective may raise anything: that is a finding, not a crash of the suite
        return CheckResult(name, check, False, f"{type(error).__name__}: {error}")


def run_checks(names: list[str] | None = None) -> Iterator[CheckResult]:
    """Run every check of the named objectives (all registered ones by default), one result at a time.

    Raises:
        ValueError: an unknown name, with the nearest valid one, before anything runs.
    """
    classes = [objective_class(name) for name in names or [card.name for card in list_objectives()]]
    return (run_check(cls, check) for cls in classes for check in checks_of(cls))
