"""Recipes of the tabular lab (recipes/games/*.yaml): their keys, and from a file to an `Experiment`.

Not a recipe of training: no model, no data. Strict and with places in the file like the others, `extends` and
overrides included; lists are overridden whole (`settings='[{beta: 0.1, learning_rate: 0.1, iterations: 100}]'`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from alignment.games.gradients import THIRD
from alignment.games.lab import Experiment, Games, Setting, probe
from alignment.games.methods import Method
from alignment.objectives import objective_class
from alignment.recipes.checking import Root, checked, shown
from alignment.recipes.schema import Section, Text, error, option, refused_at

OURS = "our choice"
AUTHORS = "EGPO's simulation"
SCALED = ("cyclic", "bradley_terry")  # kinds with a strength


class GamesSection(Section):
    """The games: a kind that is drawn, or one matrix."""

    kind: Literal["random", "rock_paper_scissors", "cyclic", "bradley_terry", "ties", "deterministic"] | None = option(
        None, "Who beats whom.", f"random ({AUTHORS}), or the matrix"
    )
    arms: int | None = option(None, "Responses of a game.", f"10 ({AUTHORS}), or those of the matrix", ge=2)
    count: int = option(10, "How many games.", AUTHORS, ge=1)
    strength: float | None = option(
        None, "cyclic: P = (1 + strength)/2; bradley_terry: scale of the rewards.", f"1 ({OURS})", ge=0
    )
    matrix: list[list[float]] | None = option(None, "P in full, in place of a kind.", "none")
    reference: Literal["normal", "uniform"] = option("normal", "Its logits: N(0, 1) or 0.", AUTHORS)
    seed: int = option(0, "Of matrices and references.", OURS, ge=0)

    @model_validator(mode="after")
    def _is_a_game(self) -> GamesSection:
        if problems := list(self._idle()):
            raise ValidationError.from_exception_data("games", problems)
        try:
            self.games().make()
        except ValueError as wrong:
            raise refused_at(str(wrong), "kind" if self.matrix is None else "matrix") from None
        return self

    def _idle(self) -> Iterator[InitErrorDetails]:
        """Keys that would do nothing."""
        for key in ("kind", "arms", "strength"):
            value = getattr(self, key)
            if value is not None and self.matrix is not None:
                yield _idle(value, "the matrix is the game", key)
            elif key == "strength" and value is not None and self.kind not in SCALED:
                what = f"games of kind {self.kind or 'random'} have no strength ({', '.join(SCALED)} do)"
                yield _idle(value, what, key)
        if self.seed and not self.drawn:
            yield _idle(self.seed, "neither matrix nor reference is drawn", "seed")

    @property
    def drawn(self) -> bool:
        """Whether the games differ: matrices or references are random."""
        return self.reference == "normal" or (self.matrix is None and self.kind in (None, "random", "bradley_terry"))

    def games(self) -> Games:
        matrix = None if self.matrix is None else tuple(map(tuple, self.matrix))
        strength = 1.0 if self.strength is None else self.strength
        kind, arms = self.kind or "random", self.arms or (10 if matrix is None else len(matrix))
        return Games(kind, arms, self.count, strength, matrix, self.reference, self.seed)


class SettingSection(Section):
    """One panel of the figure."""

    beta: float = Field(gt=0, description="Weight of the KL terms.")
    learning_rate: float = Field(gt=0, description="Of SGD; mirror descent's step is 4 lr/(arms beta).")
    iterations: int = Field(ge=1, description="Full iterations of every method.")


class MethodSection(Section):
    """One line of the figure: an objective, and where it differs from how the method is usually run."""

    objective: Text = Field(description="A name of `alignment objectives`.")
    name: Text | None = option(None, "In figure and table.", "the objective's name")
    sampler: Literal["uniform", "policy", "reference"] | None = option(
        None, "Draws the pair.", "as the method is usually run"
    )
    opponent: Literal["policy", "mixture"] | None = option(
        None, "Gives the third response.", "as the method is usually run"
    )
    mixture: float | None = option(None, "c of the mixture pi^(1-c) ref^c.", "eta beta", ge=0, le=1)
    look_ahead: bool | None = option(None, "Extragradient.", "for egpo")
    exact: bool | None = option(None, "An iteration is the minimiser of the population loss.", "for inpo")
    learning_rate_scale: float = option(1.0, "Times the setting's learning rate.", OURS, gt=0)
    hyperparameters: dict[str, Any] = option({}, "Of the objective.", "beta from the setting, the rest its own")

    @model_validator(mode="after")
    def _is_known(self) -> MethodSection:
        try:
            card = objective_class(self.objective).card
        except ValueError as wrong:
            raise refused_at(str(wrong), "objective") from None
        if card.batch == "groups" or "degree" in card.needs:
            raise refused_at(f"{self.objective!r} reads what the arms of a game do not have", "objective")
        return self

    def idle(self, needs: Collection[str]) -> Iterator[tuple[str, str]]:
        """Keys that would do nothing, each with a message; `needs` are the objective's."""
        method = self.method().resolved()
        asked = {"opponent": self.opponent, "mixture": self.mixture, "look_ahead": self.look_ahead or None}
        given = {key: value for key, value in asked.items() if value is not None}
        if not THIRD & set(needs):
            for key, value in given.items():
                yield key, f"{shown(value)}: {self.objective} reads no third response; leave it out"
        elif self.mixture is not None and method.opponent != "mixture":
            yield (
                "mixture",
                f"{self.mixture:g}: the opponent is the policy; write `opponent: mixture`, or leave it out",
            )
        if method.exact and self.look_ahead and THIRD & set(needs):
            yield "look_ahead", "true: an exact iteration has no half step; leave it out, or write `exact: false`"
        if method.exact and self.learning_rate_scale != 1:
            scale = f"{self.learning_rate_scale:g}"
            yield (
                "learning_rate_scale",
                f"{scale}: an exact iteration has no rate; leave it out, or write `exact: false`",
            )

    def method(self) -> Method:
        return Method(
            self.objective, self.name or "", self.sampler, self.opponent, self.mixture, self.look_ahead, self.exact,
            self.learning_rate_scale, self.hyperparameters,
        )  # fmt: skip


class GamesRecipe(Root):
    """A checked recipe of the tabular lab."""

    claim: Text = Field(description="What is looked for, in words.")
    games: GamesSection = Field(default_factory=GamesSection, description="The games. Default: see its keys.")
    methods: list[MethodSection] = Field(description="The algorithms.")
    settings: list[SettingSection] = Field(description="One panel each.")
    policy: Literal["tabular", "neural"] = option("tabular", "What is trained.", OURS)
    samples: int | None = option(None, "Draws per game and gradient.", "none: exact gradients", ge=1)
    labels: Literal["probability", "drawn"] = option(
        "probability", "With samples: comparisons are P, or 0/1 draws.", OURS
    )
    seeds: int = option(1, "Repetitions in every game.", OURS, ge=1)
    seed: int = option(0, "Of draws and initial networks.", OURS, ge=0)
    offset: float = option(0.0, "Scale of noise on the logits that a table starts from.", "0: at the reference", ge=0)

    @model_validator(mode="after")
    def _fit(self) -> GamesRecipe:
        if problems := list(self._problems()):
            raise ValidationError.from_exception_data("recipe", problems)
        return self

    def _problems(self) -> Iterator[InitErrorDetails]:
        """What does not fit together; only where there is nothing, what one iteration of each method shows."""
        found = [*self._misfits(), *self._idle(), *self._methods_misfits()]
        yield from found
        if not found:
            yield from (_at(message, "methods", place) for place, message in probe(self.experiment()))

    def _idle(self) -> Iterator[InitErrorDetails]:
        """Keys that would do nothing."""
        if self.labels == "drawn" and self.samples is None:
            yield _idle("drawn", "exact gradients draw nothing (samples does)", "labels")
        if self.offset and self.policy == "neural":
            yield _idle(f"{self.offset:g}", "a network starts where its random weights put it", "offset")
        if self.policy == "neural" or self.samples is not None or self.offset:
            return
        if self.seed:
            yield _idle(self.seed, "exact gradients of a table from the reference draw nothing", "seed")
        same = "exact runs of a table from one start are copies of each other; write 1, or give samples or an offset"
        if self.seeds > 1:
            yield _at(f"{self.seeds}: {same}", "seeds")
        if self.games.count > 1 and not self.games.drawn:
            key = "games.count" if "count" in self.games.model_fields_set else "games"
            yield _at(f"{self.games.count} games that are the same: {same}", *key.split("."))

    def _misfits(self) -> Iterator[InitErrorDetails]:
        arms = self.games.games().arms
        for empty in ("settings", "methods"):
            if not getattr(self, empty):
                yield _at("at least one is needed", empty)
        for at, setting in enumerate(self.settings):
            if 4 * setting.learning_rate > arms:
                message = f"eta beta = 4 lr/{arms} must be at most 1, got lr {setting.learning_rate:g}"
                yield _at(message, "settings", at, "learning_rate")
        names = [method.name or method.objective for method in self.methods]
        for at, section in enumerate(self.methods):
            if names.index(names[at]) != at:
                yield _at(f"{names[at]!r} is there twice; give one of them a `name`", "methods", at)
            if section.method().resolved().exact and (self.policy != "tabular" or self.samples is not None):
                yield _at("an exact iteration needs a table and exact gradients; write `exact: false`", "methods", at)

    def _methods_misfits(self) -> Iterator[InitErrorDetails]:
        for at, section in enumerate(self.methods if self.settings else ()):
            yield from (_at(message, "methods", at, key) for key, message in self._method_misfits(section))

    def _method_misfits(self, section: MethodSection) -> Iterator[tuple[str, str]]:
        """What one method cannot do in these games and settings: key and message."""
        games, method = self.games.games(), section.method().resolved()
        for setting in self.settings:
            try:
                objective = method.build(setting.beta, 4 * setting.learning_rate / (games.arms * setting.beta))
            except ValueError as wrong:
                yield "hyperparameters", str(wrong)
                return
            rate, scale = setting.learning_rate, method.rate_scale
            if method.mirror and self.policy == "tabular" and 4 * rate <= games.arms < 4 * rate * scale:
                limit = f"eta beta = 4 lr scale/{games.arms} must be at most 1"
                largest = games.arms / (4 * max(each.learning_rate for each in self.settings))
                yield "learning_rate_scale", f"{scale:g}: {limit}: at most {largest:g} in these settings"
                break
        yield from section.idle(objective.needs)
        preference = games.make()[0]
        if "log_odds" in objective.needs and bool(((preference == 0) | (preference == 1)).any()):
            yield (
                "objective",
                (
                    f"{section.objective!r} reads log-odds, and those of a preference of 0 or 1 are infinite; use "
                    f"games without certain wins, such as kind cyclic with a strength below 1"
                ),
            )

    def experiment(self) -> Experiment:
        """The same as the lab reads it."""
        return Experiment(
            games=self.games.games(),
            methods=tuple(section.method() for section in self.methods),
            settings=tuple(Setting(s.beta, s.learning_rate, s.iterations) for s in self.settings),
            policy=self.policy,
            samples=self.samples,
            labels=self.labels,
            seeds=self.seeds,
            seed=self.seed,
            offset=self.offset,
        )


def _idle(value: object, why: str, *loc: str) -> InitErrorDetails:
    return _at(f"{value} would do nothing: {why}; leave it out", *loc)


def _at(message: str, *loc: str | int) -> InitErrorDetails:
    """As `schema.error`, also at places in lists."""
    return InitErrorDetails(type=error(message)["type"], loc=loc, input=None)


def load_games_recipe(path: str | Path, overrides: Sequence[str] = ()) -> GamesRecipe:
    """Read and check a recipe of the tabular lab.

    Raises:
        RecipeError: anything is wrong; its text is the first problem with its place, `problems` has all.
        UserError: an override is not of the form KEY=VALUE.
    """
    return checked(GamesRecipe, path, overrides)
