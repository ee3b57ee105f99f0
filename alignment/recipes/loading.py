"""`load_recipe`: a file and the command line's overrides in, a checked `Recipe` or a `RecipeError` out.

`load_sft_recipe`, `load_reward_model_recipe` and `load_iterate_recipe` do the same for the other kinds, `load_any`
takes any.
No weights, no data and no accelerator are touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from alignment.recipes.checking import Kind, Root, beside, checked, shown
from alignment.recipes.document import Document, Origin, Problem, RecipeError
from alignment.recipes.iterate import (
    IterateDataSection,
    IterateReference,
    IterateSection,
    iterate_problems,
    iteration_sections,
)
from alignment.recipes.on_policy import on_policy_problems
from alignment.recipes.reward_model import RewardDataSection, RewardModelSection, RewardTrainingSection
from alignment.recipes.rows import DataSection
from alignment.recipes.schema import error
from alignment.recipes.sections import (
    EvaluationSection,
    GenerationSection,
    LoraSection,
    ModelSection,
    ObjectiveSection,
    OracleSection,
    ReferenceSection,
    RewardSection,
    RolloutSection,
)
from alignment.recipes.supervised import SftDataSection, SftSection, SftTrainingSection
from alignment.recipes.training import TrainingSection


class Recipe(Root):
    """A checked recipe of preference training. Attributes are the sections."""

    objective: ObjectiveSection = Field(description="The loss and its hyper-parameters.")
    model: ModelSection = Field(description="What is trained, and the reference.")
    reference: ReferenceSection = Field(
        default_factory=ReferenceSection,
        description="What the policy is compared with. Default: the model that training starts from.",
    )
    lora: LoraSection | None = Field(None, description="Train adapters only. Default: all weights are trained.")
    data: DataSection = Field(description="The preferences.")
    generation: GenerationSection = Field(
        default_factory=GenerationSection, description="How responses are drawn. Default: see its keys."
    )
    rollout: RolloutSection = Field(
        default_factory=RolloutSection, description="On-policy training: how it samples. Default: see its keys."
    )
    reward: RewardSection | None = Field(None, description="What scores responses. Default: none.")
    oracle: OracleSection | None = Field(None, description="What compares two responses. Default: none.")
    training: TrainingSection = Field(description="How the optimiser runs.")
    evaluation: EvaluationSection | None = Field(None, description="Win rate after training. Default: none.")

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        problems = [*_unjudged(self), *_misfits(self), *_idle_reference(self), *_pushed_unequally(self)]
        if problems := [*problems, *on_policy_problems(self)]:
            raise ValidationError.from_exception_data("recipe", problems)
        return self


class SftRecipe(Root):
    """A checked recipe of supervised fine-tuning: the step before preference training. Attributes are the sections."""

    sft: SftSection = Field(description="What is learned of a row.")
    model: ModelSection = Field(description="What is trained.")
    lora: LoraSection | None = Field(None, description="Train adapters only. Default: all weights are trained.")
    data: SftDataSection = Field(description="The rows to learn.")
    training: SftTrainingSection = Field(description="How the optimiser runs.")

    @model_validator(mode="after")
    def _sections_fit(self) -> SftRecipe:
        if problems := list(_misfits(self)):
            raise ValidationError.from_exception_data("recipe", problems)
        return self


class RewardModelRecipe(Root):
    """A checked recipe of a reward model, or of an ensemble of them. Attributes are the sections."""

    reward_model: RewardModelSection = Field(description="What is fitted to the preferences, and how many times.")
    model: ModelSection = Field(description="The trunk that training starts from.")
    lora: LoraSection | None = Field(None, description="Train adapters only. Default: all weights are trained.")
    data: RewardDataSection = Field(description="The preferences.")
    training: RewardTrainingSection = Field(description="How the optimiser runs.")

    @model_validator(mode="after")
    def _sections_fit(self) -> RewardModelRecipe:
        problems = list(_misfits(self))
        if self.reward_model.freeze_trunk and self.lora is not None:
            problems.append(error("excludes lora: an adapter is part of the trunk", "reward_model", "freeze_trunk"))
        if problems:
            raise ValidationError.from_exception_data("recipe", problems)
        return self


class IterateRecipe(Root):
    """A checked recipe of iterative training. Attributes are the sections."""

    objective: ObjectiveSection = Field(description="The loss of one iteration and its hyper-parameters.")
    model: ModelSection = Field(description="The base: what the first iteration samples and trains.")
    reference: IterateReference | None = Field(
        None,
        description="fixed: the base in every iteration; previous: the iterate that sampled; {checkpoint: PATH}. "
        "Default: none; must be said where the objective reads a reference.",
    )
    lora: LoraSection | None = Field(None, description="Train adapters only. Default: all weights are trained.")
    data: IterateDataSection = Field(description="The prompts.")
    generation: GenerationSection = Field(
        default_factory=GenerationSection, description="How the iterates are sampled. Default: see its keys."
    )
    iterate: IterateSection = Field(description="How the iterations follow each other.")
    reward: RewardSection | None = Field(None, description="What scores samples. Default: none.")
    oracle: OracleSection | None = Field(None, description="What compares two samples. Default: none.")
    training: TrainingSection = Field(description="How the optimiser runs in each iteration.")
    evaluation: EvaluationSection | None = Field(
        None, description="Win rate of the last iterate over the base. Default: none."
    )

    @model_validator(mode="after")
    def _sections_fit(self) -> IterateRecipe:
        if problems := list(iterate_problems(self)):
            raise ValidationError.from_exception_data("recipe", problems)
        Recipe.model_validate(iteration_sections(self, self.training.output_dir, 1))  # complains at the same keys
        return self


AnyRecipe = Recipe | SftRecipe | RewardModelRecipe  # of one run
EveryRecipe = AnyRecipe | IterateRecipe


def _unjudged(recipe: Recipe) -> Iterator[InitErrorDetails]:
    """Samples and evaluations that nothing would judge, or two things at once."""
    asking = [
        (what, place)
        for what, place, section in (
            ("choose between samples", ("data", "sample"), recipe.data.sample),
            ("judge the responses", ("evaluation",), recipe.evaluation),
        )
        if section is not None
    ]
    if recipe.reward is None and recipe.oracle is None:
        for what, place in asking:
            yield error(f"needs a reward or oracle section: something has to {what}", *place)
    elif recipe.reward is not None and recipe.oracle is not None and asking:
        named = " and ".join(".".join(place) for _, place in asking)
        yield error(f"excludes reward: {named} can have one judge; remove one section", "oracle")
    elif recipe.data.sample is not None:
        from alignment.objectives import get_objective

        objective = get_objective(recipe.objective.name, **recipe.objective.hyperparameters)
        if recipe.oracle is not None and "reward" in objective.needs:
            yield error(
                f"objective {recipe.objective.name!r} reads the rewards of the two responses, and an oracle has none: "
                "sample with a reward section",
                "oracle",
            )
        wins = objective.card.batch == "pairs" and {"preference", "log_odds"} & {*objective.needs}
        if recipe.reward is not None and wins:
            yield error(
                f"objective {recipe.objective.name!r} reads probabilities of winning, and a reward gives none: write "
                "oracle: {name: bradley_terry, reward: {...}} around it",
                "reward",
            )


def _misfits(recipe: AnyRecipe) -> Iterator[InitErrorDetails]:
    """Rules that tie the shared sections together, each at the key that breaks it."""
    data, training = recipe.data, recipe.training
    if recipe.lora is not None and recipe.model.adapter is not None:
        yield error("trains a fresh adapter, and model.adapter is trained on as it is: give one of them", "lora")
    if recipe.model.quantization is not None and recipe.lora is None and recipe.model.adapter is None:
        yield error(
            "quantised weights cannot be trained: add a lora section (or model.adapter)", "model", "quantization"
        )
    if training.eval_strategy != "no" and data.eval is None:
        yield error(f"{training.eval_strategy!r} needs data.eval", "training", "eval_strategy")
    elif training.eval_strategy == "no":
        missing = "data.eval" if data.eval is None else "training.eval_strategy steps or epoch"
        for key, value in training.what_needs_evaluation().items():
            yield error(f"{shown(value)} needs {missing}", "training", key)
    if (training.model_extra or {}).get("eval_on_start") and data.eval is None:
        yield error("true needs data.eval", "training", "eval_on_start")


def _idle_reference(recipe: Recipe) -> Iterator[InitErrorDetails]:
    """A reference that the objective does not read."""
    given = [key for key in ("name_or_path", "precompute") if getattr(recipe.reference, key)]
    if not given:
        return
    from alignment.objectives import get_objective
    from alignment.objectives.base import reads_reference

    if not reads_reference(get_objective(recipe.objective.name, **recipe.objective.hyperparameters)):
        yield error(f"objective {recipe.objective.name!r} reads no reference; leave it out", "reference", given[0])


def _pushed_unequally(recipe: Recipe) -> Iterator[InitErrorDetails]:
    """A normalised gradient of an objective that is no loss of the margin."""
    if not recipe.training.normalized_gradient or recipe.data.prompts is not None:
        return
    from alignment.objectives import get_objective
    from alignment.objectives.margin import is_margin_loss, why_not_margin

    objective = get_objective(recipe.objective.name, **recipe.objective.hyperparameters)
    if not is_margin_loss(objective):
        yield error(why_not_margin(objective), "training", "normalized_gradient")


_PROGRAMS = {
    "sft": ("is supervised fine-tuning", "scripts/sft.py"),
    "reward_model": ("is a reward model", "scripts/train_reward_model.py"),
    "iterate": ("is iterative training", "scripts/iterate.py"),
    "objective": ("is preference training", "scripts/train.py"),
}
# Files of other kinds: top-level keys that tell one, what it is, what reads it.
_ELSEWHERE: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("compare",), "is a comparison", "alignment compare {path}"),
    (("games", "methods", "settings"), "is of the tabular lab", "alignment games run {path}"),
    (("arms",), "is a replication", "python evaluation/replication.py {path}"),
    (("pool", "gold"), "is an experiment", "python evaluation/overoptimization.py {path}"),
    (
        ("compute_environment", "distributed_type"),
        "is accelerate's launch file",
        "alignment train RECIPE --accelerate-config {path}",
    ),
)
_KINDS: dict[str, type[EveryRecipe]] = {
    "sft": SftRecipe,
    "reward_model": RewardModelRecipe,
    "iterate": IterateRecipe,
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe of preference training; see `load_any`."""
    return _of_kind(Recipe, path, overrides)


def load_sft_recipe(path: str | Path, overrides: Sequence[str] = ()) -> SftRecipe:
    """Read and check a recipe of supervised fine-tuning; see `load_any`."""
    return _of_kind(SftRecipe, path, overrides)


def load_reward_model_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RewardModelRecipe:
    """Read and check a recipe of a reward model; see `load_any`."""
    return _of_kind(RewardModelRecipe, path, overrides)


def load_iterate_recipe(path: str | Path, overrides: Sequence[str] = ()) -> IterateRecipe:
    """Read and check a recipe of iterative training; see `load_any`."""
    return _of_kind(IterateRecipe, path, overrides)


def _of_kind(kind: type[Kind], path: str | Path, overrides: Sequence[str]) -> Kind:
    recipe = load_any(path, overrides)
    if isinstance(recipe, kind):
        return recipe
    section = next((name for name, other in _KINDS.items() if isinstance(recipe, other)), "objective")
    what, program = _PROGRAMS[section]
    place = recipe.origin(section) or Origin(str(path))
    raise RecipeError([Problem(place, (section,), f"{what}: run python {program} {path}")])


def load_any(path: str | Path, overrides: Sequence[str] = ()) -> EveryRecipe:
    """Read and check a recipe of a run; a section `sft`, `reward_model` or `iterate` says that it is of that kind.

    Args:
        path: the YAML file; its `extends` is followed.
        overrides: `SECTION.KEY=VALUE`, values read as YAML. Changing `objective.name` or `reward.name` drops what the
            file says in that section.

    Raises:
        RecipeError: anything is wrong; its text is the first problem with its place, `problems` has all. Of a file of
            another kind it is the command that reads it.
        UserError: an override is not of that form.
    """
    return checked(_kind, path, overrides, _fill_in)


def _refuse_other_kinds(document: Document) -> None:
    """RecipeError naming the command, where the file is no recipe of a run."""
    if any(isinstance(document.values.get(key), dict) for key in ("objective", *_KINDS)):
        return
    for keys, what, command in _ELSEWHERE:
        key = next((key for key in keys if key in document.values), None)
        if key is not None:
            message = f"{what}, not a recipe of a run: {command.format(path=document.source)} reads it"
            raise RecipeError([Problem(document.origin((key,)), (key,), message)])


def _kind(document: Document) -> type[EveryRecipe]:
    _refuse_other_kinds(document)
    return next((found for section, found in _KINDS.items() if section in document.values), Recipe)


def _fill_in(document: Document) -> None:
    """Defaults that depend on what is written: the run's name, evaluation of data.eval; `objective.file` absolute."""
    training, data = document.values.get("training"), document.values.get("data")
    for section in _KINDS:
        if document.values.get(section, ...) is None:  # `sft:` alone is a section of defaults
            document.values[section] = {}
    if isinstance(training, dict):
        defaults = {"output_dir": f"runs/{Path(document.source).stem}"}
        if isinstance(data, dict) and data.get("eval") is not None:
            defaults["eval_strategy"] = "epoch"
        document.values["training"] = {**defaults, **training}
    objective = document.values.get("objective")
    if isinstance(objective, dict) and isinstance(objective.get("file"), str):
        document.values["objective"] = {
            **objective,
            "file": beside(document, ("objective", "file"), objective["file"]),
        }
