"""SPO: any other objective plus a loss on recognising how much of a response's key content was removed.

Not the removal (`alignment.data.degrade`) and not the classification head (`alignment.trainers.degree`): here is the
maths, and how spo takes on the hyper-parameters of its base (`Objective.variant`). Of the paper only the abstract was
available; what it does not settle is marked CHOICE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal, get_type_hints

import torch.nn.functional as F
from torch import Tensor

from alignment.errors import nearest
from alignment.objectives.base import Card, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.registry import list_objectives, objective_class, prepare, register

CHOICE = "CHOICE: the paper's was not seen"


def degree_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over a pair's copies of -log softmax(logits)[label], `[B]`; 0 for a pair that has none.

    Args:
        logits: `[B, K, N]`, one row per copy.
        labels: `[B, K]`, the copy's degree in 0 to N - 1, or -1 where there is no such copy.
    """
    each = F.cross_entropy(logits.transpose(1, 2), labels.long(), ignore_index=-1, reduction="none")  # 0 at -1
    return each.sum(1) / (labels >= 0).sum(1).clamp(min=1)


@register
class SPO(Objective):
    """The base's loss plus gamma times the preference-degree loss; build it with `get_objective("spo", base=...)`."""

    card = Card(
        name="spo",
        title="Self-supervised Preference Optimization, on top of any other objective",
        paper="Li et al. 2024, arXiv:2409.17791",
        equation="none seen: only the abstract was available",
        formula="L_base + gamma L_deg,  L_deg = mean over the pair's copies of -log softmax(c)_k; a copy of degree k "
        "lacks k/(N-1) of the response's key content, k = 0 to N-1; c: N logits of a linear head on the hidden state "
        "that predicts the copy's last token",
        normalisation="the base's; L_deg: mean over the pair's copies, one value per copy",
        needs=("reference", "degree"),
        also_needs="what the base needs, beside degree",
        reward="the base's, as it stands",
        optimum=None,
        bounds="the base's plus gamma L_deg >= 0; L_deg = log N while the head is zero; |dL_deg/dc| <= 1/copies; the "
        "slopes in the log-probabilities are the base's",
        verified="the paper's, from its abstract: a self-supervised preference-degree loss is added to an alignment "
        "loss, and key content is removed from responses to grade them. Second-hand: RAKE finds that content. CHOICE: "
        "cross-entropy, the head and where it reads, both responses, the mean over copies, every default. Values, "
        "slopes and gamma = 0 against the formula above by the suite",
        pitfalls=(
            "The head can read the degree off length or broken grammar: compare its accuracy with removal=random and "
            "removal=length, which remove as many words without regard to content.",
            "A response with too few key phrases for N degrees has no copies; a pair without any has the base's loss.",
            "A zero head passes no gradient to the model: the degree loss reaches it from the second step on.",
            "Every copy is one more response to compute. A large gamma trains a classifier, not a policy.",
        ),
        collisions=(
            "Self-Play Preference Optimization (Swamy et al. 2024; SPPO, Wu et al., is a relative): the Nash kind.",
            "Soft, Step-aware (or Step-by-step, for diffusion) and Sequential Preference Optimization; Segment and "
            "Single-stream Policy Optimization: all SPO, all unrelated.",
            "gamma is the weight of L_deg. A base's hyper-parameter of a name that spo uses is written base_NAME: "
            "simpo's margin is base_gamma.",
        ),
        settings=(
            {"gamma": 1.0, "beta": 0.5, "label_smoothing": 0.1},
            {"gamma": 0.0},
            {"base": "simpo", "base_gamma": 0.5},
            {"base": "inpo", "eta": 0.5, "gamma": 2.0},
            {"base": "rpo", "baseline": "given", "form": "mean", "responses": "chosen", "removal": "random"},
        ),
    )
    aligned_class: ClassVar[type[Objective] | None] = None  # the base's class, in the variants

    base: str = hyper(
        "objective that the degree loss is added to; its hyper-parameters stand beside these",
        default="dpo",
        source="paper: DPO and its variants",
        allowed="another objective",
    )
    gamma: float = hyper("weight of the degree loss; sweep 0.01, 0.1, 1", default=0.1, ge=0, source=CHOICE)
    degrees: int = hyper("degrees N: the response itself and N - 1 degraded copies", default=3, ge=2, source=CHOICE)
    responses: Literal["both", "chosen", "rejected"] = hyper(
        "responses that are copied", default="both", source=CHOICE
    )
    removal: Literal["rake", "random", "length"] = hyper(
        "what copies lack: key phrases; as controls as many random other words, or the last words",
        default="rake",
        source="RAKE: a review of the paper; the controls: CHOICE",
    )
    head_learning_rate: float = hyper("learning rate of the head", default=1e-3, gt=0, source=CHOICE)

    @classmethod
    def variant(cls, hyperparameters: Mapping[str, Any]) -> type[Objective]:
        """The class with the base's hyper-parameters beside spo's own; ValueError if `base` is no other objective."""
        if cls.aligned_class is not None:
            return cls
        base = hyperparameters.get("base", cls.base)
        pairs = [card.name for card in list_objectives() if card.batch == "pairs"]
        valid = [name for name in pairs if not issubclass(objective_class(name), SPO)]
        if base not in valid:
            hint = "" if base == cls.card.name else nearest(str(base), valid)
            raise ValueError(f"{cls.card.name}: base must be another objective, got {base!r}{hint}")
        own = {field.name for field in dataclasses.fields(cls)}
        rest = {name: value for name, value in hyperparameters.items() if name not in own}
        key = (cls, objective_class(base).variant(rest))
        if key not in _VARIANTS:
            _VARIANTS[key] = _on_base(*key)
        return _VARIANTS[key]

    def resolve(self) -> None:
        if self.aligned_class is None or self.aligned_class.card.name != self.base:
            self.refuse(f"base {self.base!r} is not this class's: use get_objective({self.card.name!r}, base=...)")
        try:
            resolved = self.aligned.hyperparameters
        except ValueError as error:
            self.refuse(str(error).removeprefix(f"{self.base}: "))
        for name, value in resolved.items():
            self.set_derived(_name_in(SPO, name), value)

    @cached_property
    def aligned(self) -> Objective:
        """The base objective with its hyper-parameters."""
        cls = self.aligned_class or objective_class(self.base)
        return cls(**{field.name: getattr(self, _name_in(SPO, field.name)) for field in dataclasses.fields(cls)})

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.aligned.needs, "degree")

    def pair_loss(self, batch: PairLogps) -> Tensor:
        logits, labels = batch.column("degree_logits"), batch.column("degree_labels")
        if logits.shape[2] != self.degrees:
            self.refuse(f"degree_logits have {logits.shape[2]} degrees, and degrees is {self.degrees}")
        loss = self.aligned.pair_loss(batch)
        return loss + self.gamma * degree_loss(logits.to(loss.dtype), labels)

    def pair_rewards(self, batch: PairLogps) -> tuple[Tensor, Tensor]:
        return self.aligned.pair_rewards(batch)

    def saturated(self, batch: PairLogps) -> Tensor:
        """`[B]` bool, as the base: the degree loss does not read the log-probabilities."""
        return self.aligned.saturated(batch)

    def capped(self, batch: PairLogps) -> Tensor | None:
        """As the base."""
        return self.aligned.capped(batch)


_VARIANTS: dict[tuple[type[SPO], type[Objective]], type[Objective]] = {}  # so that equal settings are equal objectives


def _name_in(spo: type[SPO], name: str) -> str:
    """How a base's hyper-parameter is written beside spo's own: as it is, or base_NAME where spo has that name."""
    return f"base_{name}" if name in {field.name for field in dataclasses.fields(spo)} else name


def _on_base(spo: type[SPO], base: type[Objective]) -> type[Objective]:
    """`spo` with the hyper-parameters of `base` as further fields and a card to match."""
    hints = get_type_hints(base)
    added = {_name_in(SPO, field.name): field for field in dataclasses.fields(base)}
    body: dict[str, Any] = {
        name: dataclasses.field(default=field.default, metadata=field.metadata) for name, field in added.items()
    }
    own = next(field for field in dataclasses.fields(spo) if field.name == "base")
    body["base"] = dataclasses.field(default=base.card.name, metadata=own.metadata)
    annotations = {name: hints[field.name] for name, field in added.items()} | {"base": str}
    card = dataclasses.replace(
        spo.card,
        needs=(*base.card.needs, "degree"),
        start=base.card.start,
        reward=base.card.reward,
        bradley_terry=base.card.bradley_terry,
        selected=f"base={base.card.name!r}",
    )
    body |= {"card": card, "aligned_class": base, "__annotations__": annotations}
    body |= {"__module__": spo.__module__, "__doc__": spo.__doc__}
    return prepare(type(f"{spo.__name__}_{base.__name__}", (spo,), body))
