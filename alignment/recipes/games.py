"""Recipes of the tabular lab (recipes/games/*.yaml): their keys, and from a file to an `Experiment`.

Not a recipe of training: no model, no data. Strict and with places in the file like the others, `extends` and
overrides included; lists are overridden whole (`settings='[{beta: 0.1, learning_rate: 0.1, iterations: 100}]'`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from alignment.games.lab import Experiment, Games, Setting
from alignment.games.methods import Method
from alignment.objectives import objective_class
from alignment.recipes.checking import Root, checked
from alignment.recipes.schema import Section, Text, error, option, refused_at

OURS = "our choice"
AUTHORS = "EGPO's simulation"


class GamesSection(Section):
    """The games: a kind that is drawn, or one matrix."""

    kind: Literal["random", "rock_paper_scissors", "cyclic", "bradley_terry", "ties", "deterministic"] = option(
        "random", "Who beats whom.", AUTHORS
    )
    arms: int = option(10, "Responses of a game.", AUTHORS, ge=2)
    count: int = option(10, "How many games.", AUTHORS, ge=1)
    strength: float = option(1.0, "cyclic: P = (1 + strength)/2; bradley_terry: scale of the rewards.", OURS, ge=0)
    matrix: list[list[float]] | None = option(None, "P in full, in place of a kind.", "none")
    reference: Literal["normal", "uniform"] = option("normal", "Its logits: N(0, 1) or 0.", AUTHORS)
    seed: int = option(0, "Of matrices and references.", OURS, ge=0)

    @model_validator(mode="after")
    def _is_a_game(self) -> GamesSection:
        try:
            self.games().make()
        except ValueError as wrong:
            raise refused_at(str(wrong), "kind" if self.matrix is None else "matrix") from None
        return self

    def games(self) -> Games:
        matrix = None if self.matrix is None else tuple(map(tuple, self.matrix))
        return Games(self.kind, self.arms, self.count, self.strength, matrix, self.reference, self.seed)


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
        arms = len(self.games.matrix) if self.games.matrix else self.games.arms
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
            for setting in self.settings:
                eta = 4 * setting.learning_rate / (arms * setting.beta)
                try:
                    section.method().build(setting.beta, eta)
                except ValueError as wrong:
                    yield _at(str(wrong), "methods", at, "hyperparameters")
                    break

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
