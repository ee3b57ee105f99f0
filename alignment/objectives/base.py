"""What an objective is: a frozen dataclass of its hyper-parameters, a loss, implicit rewards and a card.

Not the registry (`registry.py`) and no formula of any paper: those are one file each beside this one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from alignment.objectives.batch import NEEDS, POLICY_COLUMNS, MissingColumn, PairLogps

BatchKind = Literal["pairs", "samples", "groups"]
Judge = Literal["none", "reward", "oracle", "verifier"]
SATURATED_SHARE = 0.01  # a pair is saturated when its push is below this share of the push at margin 0


@dataclass(frozen=True)
class HyperParameter:
    """One hyper-parameter as the card shows it; `default` None means that `meaning` says how it is derived."""

    name: str
    type: str
    default: Any
    range: str
    meaning: str
    source: str


@dataclass(frozen=True)
class Card:
    """What a reader should know before using an objective; the CLI, the recipe schema and the docs come from it.

    Attributes:
        needs: keys of `batch.NEEDS` (on-policy: of `samples.NEEDS_OF[batch]`) that the default settings read;
            `also_needs` says in words what others add.
        start: where the implicit rewards are all 0: "reference" (policy == reference), "previous" (policy == previous
            iterate == reference) or "none".
        bradley_terry: whether the loss fits sigmoid(reward of chosen - reward of rejected) to the labels, perhaps
            beside other terms: only then does the calibration of that probability mean something.
        optimum: the known minimiser of the population loss, or None if none is known.
        bounds: what is claimed (and tested) about the size of the loss and its slopes.
        verified: which parts were checked against what, and which are from memory.
        settings: keyword arguments that the conformance suite runs beside the defaults.
        selected: what picked this variant of the objective, such as "base='ipo'"; empty where there is only one.
        judge: what must judge samples while an on-policy objective trains: a scalar reward, a pairwise oracle, a
            verifier (right or wrong) or nothing; offline data is judged already, "none".
        batch: what the loss reads, filled in by `register` from the base class: "pairs" is `PairLogps` (offline),
            "samples" is `SamplePairs` and "groups" is `GroupLogps` (both on-policy).
        hyperparameters: filled in by `register` from the class's fields; never written by hand.
    """

    name: str
    title: str
    paper: str
    equation: str
    formula: str
    normalisation: str = "sum over tokens"
    needs: tuple[str, ...] = ("reference",)
    also_needs: str = ""
    start: Literal["reference", "previous", "none"] = "reference"
    reward: str = "beta z"
    bradley_terry: bool = False
    optimum: str | None = None
    bounds: str = "not analysed"
    verified: str = "not stated"
    pitfalls: tuple[str, ...] = ()
    collisions: tuple[str, ...] = ()
    settings: tuple[dict[str, Any], ...] = ()
    selected: str = ""
    judge: Judge = "none"
    batch: BatchKind = "pairs"
    hyperparameters: tuple[HyperParameter, ...] = ()


def hyper(
    meaning: str,
    *,
    default: Any,
    source: str = "",
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    allowed: str = "",
) -> Any:
    """A hyper-parameter's field: its meaning, default, the default's source and its open (gt, lt) or closed range.

    `allowed` says in words what a text may be, where the type does not.
    """
    bounds = {"gt": gt, "ge": ge, "lt": lt, "le": le}
    metadata = {"meaning": meaning, "source": source, "bounds": bounds, "allowed": allowed}
    return dataclasses.field(default=default, metadata=metadata)


def describe_range(annotation: Any, bounds: dict[str, float | None]) -> str:
    """The allowed values in words: `> 0`, `[0, 0.5)`, `'sum' | 'mean'`."""
    choices = literal_choices(annotation)
    if choices:
        return " | ".join(repr(choice) for choice in choices)
    if annotation is bool:
        return "true | false"
    low = bounds["gt"] if bounds.get("gt") is not None else bounds.get("ge")
    high = bounds["lt"] if bounds.get("lt") is not None else bounds.get("le")
    open_low, open_high = bounds.get("gt") is not None, bounds.get("lt") is not None
    if low is None and high is None:
        return "finite" if number_type(annotation) else "any"
    if high is None:
        return f"{'>' if open_low else '>='} {low:g}"
    if low is None:
        return f"{'<' if open_high else '<='} {high:g}"
    return f"in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"


def literal_choices(annotation: Any) -> tuple[Any, ...]:
    """The values of `Literal[...]` or `Literal[...] | None`, else ()."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) for choice in literal_choices(part))


def number_type(annotation: Any) -> type[int] | type[float] | None:
    """`float` or `int` where the annotation is one of them, possibly `| None`; else None."""
    parts = get_args(annotation) or (annotation,)
    return next((kind for kind in (float, int) if kind in parts), None)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of every objective; an offline one writes `pair_loss`, and `pair_rewards` if the default does not fit.

    On-policy objectives build on `on_policy.SampleObjective` and `on_policy.GroupObjective` instead. A subclass
    declares hyper-parameters as fields with `hyper(...)`, a class attribute `card`, and is decorated with `@register`.
    Hyper-parameters are checked on construction.
    """

    card: ClassVar[Card]
    batch_kind: ClassVar[BatchKind] = "pairs"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            bounds = field.metadata.get("bounds", {})
            value = self._checked(field.name, getattr(self, field.name), hints[field.name], bounds)
            object.__setattr__(self, field.name, value)
        self.resolve()

    def _checked(self, name: str, value: Any, annotation: Any, bounds: dict[str, float | None]) -> Any:
        """The value with ints made floats where a float is declared; ValueError naming value and range otherwise."""
        if value is None and type(None) in get_args(annotation):
            return None
        kind, choices = number_type(annotation), literal_choices(annotation)
        allowed = describe_range(annotation, bounds)
        wanted = f"one of {allowed}" if choices or annotation is bool else f"a number {allowed}"
        message = f"{self.card.name}: {name} must be {wanted}, got {value!r}"
        if choices and value not in choices:
            raise ValueError(message)
        if annotation is bool and not isinstance(value, bool):
            raise ValueError(message)
        if kind is None:
            return value
        whole = kind is float or isinstance(value, int)
        if isinstance(value, bool) or not isinstance(value, Real) or not whole or not math.isfinite(value):
            raise ValueError(message)
        tests = {"gt": float.__gt__, "ge": float.__ge__, "lt": float.__lt__, "le": float.__le__}
        if any(limit is not None and not tests[key](float(value), float(limit)) for key, limit in bounds.items()):
            raise ValueError(message)
        return float(value) if kind is float else value

    @classmethod
    def variant(cls, hyperparameters: Mapping[str, Any]) -> type[Objective]:
        """The class that these hyper-parameters select: this one, unless some of them bring others with them.

        An override returns a prepared subclass with further fields, the same one for the same selection, and raises
        ValueError "NAME: KEY must be ..." for a selection that does not exist.
        """
        return cls

    @classmethod
    def build(cls, **hyperparameters: Any) -> Objective:
        """An instance of the variant that the hyper-parameters select; TypeError for one that it does not have."""
        return cls.variant(hyperparameters)(**hyperparameters)

    def resolve(self) -> None:
        """Derive hyper-parameters left at None and check rules that tie two of them (`set_derived`, `refuse`)."""

    def set_derived(self, name: str, value: Any) -> None:
        """Set a field of this frozen instance; only from `resolve`."""
        object.__setattr__(self, name, value)

    def refuse(self, message: str) -> None:
        """Raise ValueError with the objective's name in front."""
        raise ValueError(f"{self.card.name}: {message}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Keys of `batch.NEEDS` that these settings read; the trainer fills exactly these."""
        return self.card.needs

    @property
    def judge(self) -> Judge:
        """What must judge samples with these settings, as `Card.judge`."""
        return self.card.judge

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Every hyper-parameter's resolved value."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def pair_loss(self, batch: PairLogps) -> Tensor:
        """The formula: one value per pair, `[B]`, to be minimised."""
        raise NotImplementedError(f"{type(self).__name__} defines no pair_loss")

    def pair_rewards(self, batch: PairLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards of chosen and rejected, `[B]` each, unless overridden: beta times the log-ratio.

        Without a hyper-parameter `beta` the factor is 1; without a reference the log-probability replaces the ratio.
        """
        beta = self.hyperparameters.get("beta", 1.0)
        if "reference" in self.needs:
            return beta * batch.log_ratio_chosen, beta * batch.log_ratio_rejected
        return beta * batch.chosen, beta * batch.rejected

    def loss(self, batch: PairLogps) -> Tensor:
        """One value per pair, `[B]`, differentiable; ValueError naming the column if the batch lacks one.

        With a `label` column it is the expected loss of a pair whose label is right with that probability:
        label * pair_loss(pair) + (1 - label) * pair_loss(swapped pair).
        """
        try:
            kept = self.pair_loss(batch)
            if batch.label is None:
                return kept
            label = batch.label.to(kept.dtype)
            return label * kept + (1 - label) * self.pair_loss(batch.swapped())
        except MissingColumn as error:
            raise ValueError(f"objective {self.card.name!r} needs {', '.join(self.needs)}: {error}") from None

    def rewards(self, batch: PairLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards (chosen `[B]`, rejected `[B]`), what the card's `reward` says; for logging."""
        try:
            return self.pair_rewards(batch)
        except MissingColumn as error:
            raise ValueError(f"objective {self.card.name!r} needs {', '.join(self.needs)}: {error}") from None

    def saturated(self, batch: PairLogps) -> Tensor:
        """`[B]` bool: |dL/ds_w| + |dL/ds_l| is below 1 % of what it would be at margin 0, so the pair teaches nothing.

        Margin 0 is policy == reference where the batch has reference columns, else equal log-probability per token
        (per response without lengths).
        """
        columns = batch.columns()
        if batch.ref_chosen is not None and batch.ref_rejected is not None:
            start = columns | {"chosen": batch.ref_chosen, "rejected": batch.ref_rejected}
        elif batch.chosen_length is not None and batch.rejected_length is not None:
            start = columns | {"rejected": batch.chosen * batch.rejected_length / batch.chosen_length}
        else:
            start = columns | {"rejected": batch.chosen}
        return self._push(columns) < SATURATED_SHARE * self._push(start)

    def capped(self, batch: PairLogps) -> Tensor | None:
        """`[B]` bool: pairs where a numerical extension replaces the paper's formula; None if there is none."""
        return None

    def label_probability(self, sigmoid: Tensor) -> Tensor:
        """What sigmoid(implicit margin), `[B]`, says of labels as they are given: itself, unless noise is assumed."""
        return sigmoid

    def _push(self, columns: dict[str, Tensor]) -> Tensor:
        """|dL/ds_w| + |dL/ds_l| per pair, `[B]`; the loss treats pairs independently, so one backward gives all."""
        with torch.enable_grad():
            leaves = {
                name: value.detach().clone().requires_grad_(name in POLICY_COLUMNS) for name, value in columns.items()
            }
            total = self.loss(PairLogps(**leaves)).sum()
            gradients = torch.autograd.grad(total, [leaves["chosen"], leaves["rejected"]], allow_unused=True)
        parts = [gradient.abs() for gradient in gradients if gradient is not None]
        return torch.stack(parts).sum(0)


def row_columns(*objectives: Objective) -> set[str]:
    """The columns of a pair's row that objectives read, besides the pair's texts and token ids."""
    found = {"label"} | {column for one in objectives for need in one.needs for column in NEEDS.get(need, ())}
    return found | ({"calibration_ids"} if "calibration" in found else set())


def reads_reference(objective: Objective) -> bool:
    """Whether scoring under a frozen model is needed (iteration 1's previous iterate is the reference)."""
    return bool({"reference", "ref_calibration", "previous"} & set(objective.needs))
