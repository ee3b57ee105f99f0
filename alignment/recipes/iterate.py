"""Recipes of iterative training, those with an `iterate` section: its keys and rules, and the recipe of one iteration.

Every iteration trains by an ordinary recipe (`iteration_sections`), which anyone can run again by itself. How the
iterations follow each other is `alignment.pipeline`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import InitErrorDetails

from alignment.recipes.rows import Prompts, TextSection
from alignment.recipes.schema import Section, Text, error, option, refused_at

if TYPE_CHECKING:
    from alignment.objectives.base import Objective
    from alignment.recipes.loading import IterateRecipe


class CheckpointSection(Section):
    """A reference that is neither the base nor the previous iterate."""

    checkpoint: Text = Field(description="Model folder, adapter folder or hub id: the reference in every iteration.")


def _reference(value: Any) -> Any:
    """One message for the three forms."""
    if value in ("fixed", "previous") or isinstance(value, CheckpointSection):
        return value
    if isinstance(value, dict):
        return CheckpointSection.model_validate(value)
    raise ValueError(f"expected fixed, previous or {{checkpoint: PATH}}, got {value!r}")


IterateReference = Annotated[Literal["fixed", "previous"] | CheckpointSection, BeforeValidator(_reference)]


def _several(value: Any) -> Any:
    """One source of prompts, or one for each iteration."""
    return value if isinstance(value, list) else [value]


class IterateDataSection(TextSection):
    """The prompts that the iterates answer."""

    refused: ClassVar[dict[str, str]] = {
        "train": "the iterates write their own preferences; give prompts",
        "sample": "iterate.samples and generation say how the iterates are sampled; give prompts",
        "eval": "held-out preferences of another model say little of the iterates; see the evaluation section",
    }

    prompts: Annotated[list[Prompts], BeforeValidator(_several)] = Field(
        description="FILE (text, one a line, or .jsonl), or {name: …, limit: …}, shared out over the iterations, "
        "none twice; or a list with one source for each iteration.",
        min_length=1,
    )
    max_length: int = option(1024, "Prompt and response together, in tokens.", "TRL 1.16", ge=2)
    max_rejected_share: float = option(
        0.1, "Stop if more than this share of the prompts is unusable.", "alignment", ge=0, le=1
    )
    overlap: Literal["refuse", "drop", "allow"] = option(
        "refuse", "Prompts that evaluation asks, too: stop, drop them, or allow.", "alignment"
    )


class IterateSection(Section):
    """How the iterations follow each other: sample, judge, pair, train."""

    iterations: int = option(3, "Iterations T.", "INPO 2407.00617; also RLHF Workflow 2405.07863", ge=1)
    samples: int = option(8, "Responses K to each prompt.", "INPO and RLHF Workflow", ge=1)
    pairing: Literal["best_worst", "tournament", "iid"] = option(
        "best_worst",
        "best_worst of all K; tournament of K by 3K/2 - 1 comparisons; iid: K/2 pairs of independent samples, as the "
        "theory wants.",
        "INPO with a reward model, RLHF Workflow; INPO with a pairwise oracle has tournament",
    )
    labels: Literal["likelier", "drawn"] = option(
        "likelier", "(iid) Chosen is the likelier winner, or drawn with the oracle's probability.", "alignment"
    )
    min_gap: float = option(
        0.0, "(best_worst) Drop pairs whose gap of rewards or win probabilities is at most this.", "ties only", ge=0
    )
    length_penalty: float = option(
        0.0, "(reward) Taken from the reward for each token.", "none; RLHF Workflow tries 0.001", ge=0
    )
    unfinished: Literal["drop", "keep"] = option(
        "drop", "Responses that were cut at max_new_tokens.", "alignment: as worst ones they teach only length"
    )
    label_noise: float = option(0.0, "Turn a label round with this probability.", "none", ge=0, le=1)
    prompts_per_iteration: int | None = option(
        None, "So many fresh prompts in each iteration.", "all, shared out evenly and without a remainder", ge=1
    )
    train_on: Literal["new", "all"] = option(
        "new", "Pairs of this iteration, or of all so far.", "INPO: fresh data; RLHF Workflow and VPO: all"
    )
    start: Literal["previous", "base"] = option(
        "previous", "Training goes on from the previous iterate, or is a refit of the base.", "INPO, RLHF Workflow"
    )

    @model_validator(mode="after")
    def _enough_samples(self) -> IterateSection:
        if self.samples == 1:
            raise refused_at("one sample makes no pair: at least 2", "samples")
        power = self.samples >= 4 and self.samples & (self.samples - 1) == 0
        if self.pairing == "tournament" and not power:
            raise refused_at(f"a tournament needs 4, 8, 16 … samples, got {self.samples}", "samples")
        if self.pairing == "iid" and self.samples % 2:
            raise refused_at(f"pairs of independent samples need an even number, got {self.samples}", "samples")
        for key, pairing in (("labels", "iid"), ("min_gap", "best_worst")):
            if self.pairing != pairing and getattr(self, key) != type(self).model_fields[key].default:
                raise refused_at(f"belongs to pairing {pairing}, and pairing is {self.pairing}", key)
        return self


# What pairs of an iteration can bring; the rest an objective reads is scored.
_NEEDS = {"reference", "previous", "length", "calibration", "ref_calibration", "calibration_length", "degree"}


def iterate_problems(recipe: IterateRecipe) -> Iterator[InitErrorDetails]:
    """Rules that tie the sections together, each complaint at the key that breaks it."""
    from alignment.objectives import get_objective

    objective = get_objective(recipe.objective.name, **recipe.objective.hyperparameters)
    yield from _judged(recipe, objective)
    yield from _referred(recipe, objective)
    yield from _sampled(recipe, objective)
    yield from _idle(recipe, objective)
    settings = recipe.iterate
    sources = len(recipe.data.prompts)
    if sources not in (1, settings.iterations):
        yield error(
            f"{sources} sources for {settings.iterations} iterations: one for all, or one each", "data", "prompts"
        )
    if recipe.training.push_to_hub:
        yield error(
            "every iterate would be uploaded: upload the last with `alignment export`", "training", "push_to_hub"
        )
    if recipe.training.eval_strategy != "no" or recipe.training.what_needs_evaluation():
        yield error("there are no held-out preferences; see the evaluation section", "training", "eval_strategy")
    if (recipe.training.model_extra or {}).get("save_only_model"):
        yield error("an iteration that was killed could not go on", "training", "save_only_model")


def _idle(recipe: IterateRecipe, objective: Objective) -> Iterator[InitErrorDetails]:
    """Keys that would do nothing."""
    name, settings, reads = recipe.objective.name, recipe.iterate, set(objective.needs)
    if recipe.lora is not None and recipe.model.adapter is not None:
        yield error("trains a fresh adapter, and model.adapter is trained on as it is: give one of them", "lora")
    if "previous" in reads and recipe.reference == "previous":
        message = f"{name} reads the previous iterate besides: its weight tau would do nothing; fixed or a checkpoint"
        yield error(message, "reference")
    if settings.label_noise and reads & {"preference", "log_odds"}:
        yield error(f"objective {name!r} does not read which response is chosen", "iterate", "label_noise")


def _judged(recipe: IterateRecipe, objective: Objective) -> Iterator[InitErrorDetails]:
    name, settings = recipe.objective.name, recipe.iterate
    if recipe.reward is None and recipe.oracle is None:
        yield error("needs a reward or oracle section: something has to judge the samples", "iterate")
    if recipe.reward is not None and recipe.oracle is not None:
        yield error("excludes reward: the samples can have one judge; remove one section", "oracle")
    if objective.card.batch != "pairs":
        yield error(f"{name!r} samples while it trains: run scripts/train.py with data.prompts", "objective", "name")
    extra = set(objective.needs) - _NEEDS
    if "reward" in extra and recipe.reward is None:
        yield error(f"objective {name!r} reads rewards: judge with a reward section", "objective", "name")
    if extra & {"preference", "log_odds"}:
        if recipe.oracle is None:
            message = "probabilities: judge with an oracle, such as {name: bradley_terry, reward: …}"
            yield error(f"objective {name!r} reads {message}", "objective", "name")
        if settings.pairing != "best_worst":
            message = (
                f"objective {name!r} reads how often a response beats the others: all K are compared in best_worst"
            )
            yield error(message, "iterate", "pairing")
    if settings.labels == "drawn" and recipe.oracle is None:
        yield error("labels are drawn with an oracle's probabilities", "iterate", "labels")
    if settings.length_penalty and recipe.reward is None:
        yield error("is taken from a reward, and the judge is an oracle", "iterate", "length_penalty")


def _referred(recipe: IterateRecipe, objective: Objective) -> Iterator[InitErrorDetails]:
    from alignment.objectives.base import reads_reference

    name, settings = recipe.objective.name, recipe.iterate
    if not reads_reference(objective):
        if recipe.reference is not None:
            yield error(f"objective {name!r} reads no reference; leave it out", "reference")
    elif recipe.reference is None:
        yield error(
            "must be said: fixed (the base), previous (the iterate that sampled) or {checkpoint: PATH}", "reference"
        )
    if {"preference", "log_odds"} & set(objective.needs) and recipe.reference != "previous":
        yield error(f"objective {name!r} compares with the policy that sampled: previous", "reference")
    if settings.start == "base" and recipe.reference == "previous":
        yield error(
            "trains from the base, and the reference would be another model: fixed or a checkpoint", "iterate", "start"
        )
    if _steps(objective):
        for key, wanted in (("train_on", "new"), ("start", "previous")):
            if getattr(settings, key) != wanted:
                yield error(f"objective {name!r} is a step from the policy that sampled: {wanted}", "iterate", key)


def _steps(objective: Objective) -> bool:
    """Whether a loss is a step of its method only on samples of the very policy that it starts from."""
    return bool({"previous", "preference", "log_odds"} & set(objective.needs))


def _sampled(recipe: IterateRecipe, objective: Objective) -> Iterator[InitErrorDetails]:
    draws = recipe.generation
    if draws.replay is not None:
        yield error("belongs to on-policy training (data.prompts of scripts/train.py)", "generation", "replay")
    if draws.max_new_tokens >= recipe.data.max_length:
        message = (
            f"leaves no token of data.max_length {recipe.data.max_length} for a prompt, got {draws.max_new_tokens}: "
            "lower it, or raise data.max_length"
        )
        yield error(message, "generation", "max_new_tokens")
    for key in ("temperature", "top_p", "top_k") if _steps(objective) else ():
        if getattr(draws, key) != type(draws).model_fields[key].default:
            message = f"objective {recipe.objective.name!r} assumes samples of the iterate itself: leave it out"
            yield error(message, "generation", key)


# --- one iteration ---------------------------------------------------------------------------------------------------


def iteration_folder(run: str | Path, iteration: int) -> Path:
    """Where iteration `iteration` (from 1) of a run has its files."""
    return Path(run) / f"iteration-{iteration}"


def iterate_model(recipe: IterateRecipe, run: str | Path, iteration: int) -> dict[str, Any]:
    """The `model` section of pi_t, the policy that samples in iteration t; pi_1 is the base."""
    base = recipe.model.model_dump()
    if iteration == 1:
        return base
    trained = str(iteration_folder(run, iteration - 1) / "train" / "final")
    if recipe.lora is not None or recipe.model.adapter is not None:
        return base | {"adapter": trained}
    return base | {"name_or_path": trained, "revision": None}


def reference_model(recipe: IterateRecipe, run: str | Path, iteration: int) -> dict[str, Any]:
    """The `model` section of the reference of an iteration."""
    base = recipe.model.model_dump()
    if recipe.reference == "previous":
        return iterate_model(recipe, run, iteration)
    if isinstance(recipe.reference, CheckpointSection):
        return base | {"name_or_path": recipe.reference.checkpoint, "adapter": None, "revision": None}
    return base


def iteration_sections(recipe: IterateRecipe, run: str | Path, iteration: int) -> dict[str, Any]:
    """The sections of the ordinary recipe that trains pi_{t+1} in iteration t.

    Args:
        recipe: the whole.
        run: its folder.
        iteration: t, from 1.
    """
    settings, folder = recipe.iterate, iteration_folder(run, iteration)
    first = iteration if settings.train_on == "new" else 1
    start = iterate_model(recipe, run, 1 if settings.start == "base" else iteration)
    sections: dict[str, Any] = {
        "objective": recipe.objective.model_dump(),
        "model": start,
        "data": {
            "train": [
                {"name": str(iteration_folder(run, t) / "pairs" / "pairs.jsonl")} for t in range(first, iteration + 1)
            ],
            "max_length": recipe.data.max_length,
            "overlap": "allow",  # the prompts were compared before they were sampled
        },
        "training": recipe.training.model_dump()
        | {"output_dir": str(folder / "by-itself"), "seed": recipe.training.seed + iteration - 1},
    }
    if recipe.lora is not None and start["adapter"] is None:
        sections["lora"] = recipe.lora.model_dump()
    if recipe.reference is not None:
        sections["reference"] = {"precompute": True}
        frozen = reference_model(recipe, run, iteration)
        if frozen != start:
            sections["reference"] |= {key: frozen[key] for key in ("name_or_path", "adapter", "revision")}
    return sections
