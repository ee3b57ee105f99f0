"""A compare recipe: the ordinary sections of a recipe without `objective`, and a section `compare`. No runs here.

Strict at every depth, with file and line, `extends` and overrides as in every recipe. The word {task} in a text is the
folder of the tiny task that `compare.task` names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from alignment.recipes.checking import Root, beside, checked
from alignment.recipes.document import Document
from alignment.recipes.registries import objective_defaults_and_errors
from alignment.recipes.rows import DataSection
from alignment.recipes.schema import Section, Text, error, option, refused_at
from alignment.recipes.sections import (
    EvaluationSection,
    GenerationSection,
    LoraSection,
    ModelSection,
    ObjectiveSection,
    OracleSection,
    RewardSection,
)
from alignment.recipes.training import TrainingSection

OURS = "our choice"


class Entry(ObjectiveSection):
    """An objective to compare: `name`, its hyper-parameters where they are not the default, and two keys of ours."""

    fixed: ClassVar[tuple[str, ...]] = (*ObjectiveSection.fixed, "label", "over")

    label: Text | None = option(None, "In tables and folders.", "the name, with -VALUE for each choice that is given")
    over: Text | None = option(None, "Hyper-parameter to tune.", "beta, else the first number of its card")

    @classmethod
    def open_keys(cls, data: dict[str, Any]) -> tuple[dict[str, Any], list[InitErrorDetails]]:
        """Defaults stay out: what was not given may follow what is tuned (inpo's tau follows eta)."""
        ours = ("label", "over")
        return {}, objective_defaults_and_errors({key: value for key, value in data.items() if key not in ours})[1]


def _entries(value: Any) -> Any:
    """`all`, or a list of names and sections, as a list of sections; `all` is the empty list."""
    if value == "all":
        return []
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected all, or a list of objectives, got {value!r}")
    return [{"name": item} if isinstance(item, str) else item for item in value]


def _tuning_seeds(value: Any) -> Any:
    """A whole number from 1, or `seeds`; said in one message instead of one per member of the union."""
    if value == "seeds" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"expected a whole number from 1 on, or seeds (all of them), got {value!r}")


class CompareSection(Section):
    """What is compared, and how often."""

    objectives: Annotated[list[Entry], BeforeValidator(_entries)] = option(
        [], "all, or a list of names or {name: …, HYPER-PARAMETER: …}.", "all that train on pairs under this judge"
    )
    baseline: Text = option("dpo", "Label of the row that the others are tested against.", OURS)
    validation: Text | None = option(
        None, "Text file of prompts that choose the tuning point; format as evaluation's.", "none; needed to tune"
    )
    validation_limit: int | None = option(None, "Use only the first so many.", "all", ge=1)
    tune: int = option(3, "Values of one hyper-parameter that each objective is trained with.", OURS, ge=1)
    tuning_factor: float = option(3.0, "From one of these values to the next.", OURS, gt=1, le=100)
    tuning_seeds: Annotated[int | Literal["seeds"], BeforeValidator(_tuning_seeds)] = option(
        1,
        "Seeds that each value is trained with; the chosen one gets all, and claims are about these settings. "
        "seeds: all of them, each of which chooses for itself, and claims are about the objectives.",
        OURS,
    )
    seeds: int = option(3, "Seeds of data, training and samples.", OURS, ge=1)
    first_seed: int = option(0, "The others follow.", OURS, ge=0)
    iterations: int = option(2, "Iterations of methods that sample again (inpo, sppo, gpo).", OURS, ge=2)
    task: Literal["grammar"] | None = option(
        None, "A tiny model and its prompts are built in OUTPUT_DIR/TASK, {task} in other keys.", "none"
    )

    @model_validator(mode="after")
    def _can_tune(self) -> CompareSection:
        if self.tuning_seeds != "seeds" and self.tuning_seeds > self.seeds:
            raise refused_at(f"{self.tuning_seeds}, and compare.seeds is {self.seeds}", "tuning_seeds")
        if self.tune > 1 and self.validation is None:
            raise refused_at(f"{self.tune} values need compare.validation, prompts to choose one by", "tune")
        return self


class CompareRecipe(Root):
    """A checked compare recipe. Attributes are the sections."""

    compare: CompareSection = Field(description="The objectives, and how they are tuned and repeated.")
    model: ModelSection = Field(description="What every run starts from, and the reference.")
    lora: LoraSection | None = Field(None, description="Train adapters only. Default: all weights are trained.")
    data: DataSection = Field(description="The preferences: drawn from the model (sample) or given (train).")
    generation: GenerationSection = Field(
        default_factory=GenerationSection, description="How responses are drawn. Default: see its keys."
    )
    reward: RewardSection | None = Field(None, description="The judge, of training and test. Default: none.")
    oracle: OracleSection | None = Field(None, description="The judge, if it compares two. Default: none.")
    training: TrainingSection = Field(description="How the optimiser runs; the same for all objectives.")
    evaluation: EvaluationSection = Field(description="The test prompts, and samples of each policy per prompt.")

    @model_validator(mode="after")
    def _sections_fit(self) -> CompareRecipe:
        if problems := list(self._problems()):
            raise ValidationError.from_exception_data("recipe", problems)
        return self

    def _problems(self) -> Iterator[InitErrorDetails]:
        if self.data.prompts is not None or self.data.eval is not None:
            key = "prompts" if self.data.prompts is not None else "eval"
            yield error("not in a comparison: give data.sample (drawn from the model) or data.train", "data", key)
        if self.reward is None and self.oracle is None:
            yield error("needs a reward or oracle section: something has to judge", "compare")
        if self.reward is not None and self.oracle is not None:
            yield error("excludes reward: there is one judge; remove one section", "oracle")
        for key in ("temperature", "top_p", "top_k"):
            if (value := getattr(self.generation, key)) != GenerationSection.model_fields[key].default:
                plain = "samples have to be the policies' own distribution: KL and the reference's role are of that"
                yield error(f"{value:g}: {plain}; leave it out", "generation", key)
        if self.training.eval_strategy != "no" or self.training.push_to_hub:
            key = "push_to_hub" if self.training.push_to_hub else "eval_strategy"
            yield error("not in a comparison: leave it out", "training", key)

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.training.output_dir)

    @property
    def seeds(self) -> range:
        """The numbers of the seeds."""
        return range(self.compare.first_seed, self.compare.first_seed + self.compare.seeds)

    @property
    def tuning_seeds(self) -> range:
        """The seeds that every tuning point is trained with."""
        count = self.compare.tuning_seeds
        return self.seeds if count == "seeds" else self.seeds[:count]

    @property
    def each_seed_tunes(self) -> bool:
        """Whether every seed chooses its own tuning point, so that the noise of the choice is in the spread of seeds.

        A choice that all seeds share is one draw: no test over seeds or prompts sees what another draw would change.
        """
        return self.compare.tune > 1 and len(self.seeds) > 1 and self.tuning_seeds == self.seeds


def load_compare_recipe(path: str | Path, overrides: Sequence[str] = ()) -> CompareRecipe:
    """Read and check a compare recipe; no weights, no data.

    Raises:
        RecipeError: anything is wrong; its text is the first problem with its place.
        UserError: an override is not of the form SECTION.KEY=VALUE.
    """
    return checked(CompareRecipe, path, overrides, _fill_in)


def _fill_in(document: Document) -> None:
    """The folder's default, {task}, and objectives' files as they lie from the recipe."""
    training, section = document.values.get("training"), document.values.get("compare")
    entries = section.get("objectives") if isinstance(section, dict) else None
    for i, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, dict) and isinstance(entry.get("file"), str):
            entry["file"] = beside(document, ("compare", "objectives", i), entry["file"])
    if not isinstance(training, dict):
        return
    document.values["training"] = training = {
        "output_dir": f"runs/compare-{Path(document.source).stem}",
        **training,
    }
    task = section.get("task") if isinstance(section, dict) else None
    if isinstance(task, str):
        document.values = _replaced(document.values, str(Path(str(training["output_dir"])) / task))


def _replaced(value: Any, place: str) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(inner, place) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, place) for inner in value]
    return value.replace("{task}", place) if isinstance(value, str) else value
