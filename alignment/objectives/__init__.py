"""Preference objectives: pure functions on sequence log-probabilities, each with a card. Needs torch only.

    from alignment.objectives import PairLogps, get_objective, list_objectives
    objective = get_objective("rpo", beta=0.1, eta=0.005)
    objective.loss(batch)      # [B]

Offline objectives read `PairLogps`; on-policy ones `SamplePairs` or `GroupLogps`: `objective.card.batch` says which.

A new objective is one file here (found without being listed anywhere) or anywhere else (`load_plugin`). No models, no
files, no configuration objects in this package; the proofs are in `conformance/`.
"""

import importlib
import pkgutil

from alignment.objectives.base import Card, HyperParameter, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.on_policy import GroupObjective, SampleObjective
from alignment.objectives.registry import (
    get_objective,
    list_objectives,
    load_plugin,
    objective_class,
    objective_signature,
    own_cards,
    register,
)
from alignment.objectives.samples import GroupLogps, SamplePairs

__all__ = [
    "Card",
    "GroupLogps",
    "GroupObjective",
    "HyperParameter",
    "Objective",
    "PairLogps",
    "SampleObjective",
    "SamplePairs",
    "get_objective",
    "hyper",
    "list_objectives",
    "load_plugin",
    "objective_class",
    "objective_signature",
    "own_cards",
    "register",
]

_NOT_OBJECTIVES = {"base", "batch", "margin", "on_policy", "registry", "render", "samples"}

for _module in pkgutil.iter_modules(__path__):
    if not _module.ispkg and _module.name not in _NOT_OBJECTIVES:
        importlib.import_module(f"{__name__}.{_module.name}")
