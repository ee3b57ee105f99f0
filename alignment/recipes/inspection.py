"""What `alignment recipe check | explain | diff` print: plain lines, made for reading and for `grep`.

Not the checks themselves, which `load_recipe` makes; only whether the files and packages that a recipe names exist is
looked up here, because `check` promises that and `load_recipe` reads nothing but recipes.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.files import PACKAGE_SCHEME, package_file, read_json_object
from alignment.models.adapters import kind_of, why_not_trained
from alignment.recipes.document import Origin, Problem, RecipeError
from alignment.recipes.iterate import CheckpointSection
from alignment.recipes.loading import EveryRecipe, IterateRecipe, Recipe, SftRecipe, load_any
from alignment.recipes.registries import judge_files
from alignment.recipes.rows import SourceSection
from alignment.recipes.sections import ObjectiveSection
from alignment.recipes.trl_keys import REPORTERS

# Of which Python packages one must be there (`kernels` fetches the same kernel from the hub); all others need none.
ATTENTION_PACKAGES: dict[str, tuple[str, ...]] = {
    "flash_attention_2": ("flash_attn", "kernels"),
    "flash_attention_3": ("flash_attn_interface", "kernels"),
}
QUANTIZATION_PACKAGES: dict[str, tuple[str, ...]] = {"nf4": ("bitsandbytes",)}
_MISSING = object()


def check(path: str | Path, overrides: Sequence[str] = ()) -> list[Problem]:
    """All problems of a recipe, in the order of its lines; empty if it can be used.

    Beyond the schema this looks whether the local files that the recipe names exist (paths are relative to the current
    folder), and the Python packages that its values need. No weights are loaded and nothing is downloaded; a Python
    file in `objective.file` is executed, because it registers the objective.
    """
    try:
        recipe = load_any(path, overrides)
    except RecipeError as failed:
        return failed.problems
    return what_is_missing(recipe)


def what_is_missing(recipe: EveryRecipe) -> list[Problem]:
    """One problem per local file or Python package that the recipe needs and that is not there."""
    problems = []
    for dotted, message in (*_missing_files(recipe), *_missing_packages(recipe)):
        place = recipe.origin(dotted) or Origin(str(recipe.path))
        problems.append(Problem(place, tuple(dotted.split(".")), message))
    return sorted(problems)


def _missing_files(recipe: EveryRecipe) -> Iterator[tuple[str, str]]:
    files: dict[str, str | None] = {}
    if isinstance(recipe, Recipe):
        files["data.sample.prompts"] = recipe.data.sample.prompts if recipe.data.sample else None
        files["generation.replay"] = recipe.generation.replay
    if isinstance(recipe, Recipe | IterateRecipe):
        asked = recipe.data.prompts or []
        named = [source.name for source in (asked if isinstance(asked, list) else [asked])]
        local = [name for name in named if isinstance(name, str)]  # of the hub there is nothing to look for
        files["data.prompts"] = next((name for name in local if not Path(name).is_file()), None)
        files["evaluation.prompts"] = recipe.evaluation.prompts if recipe.evaluation else None
        files |= judge_files("reward", recipe.reward.model_dump()) if recipe.reward else {}
        files |= judge_files("oracle", recipe.oracle.model_dump()) if recipe.oracle else {}
    for dotted, name in files.items():
        if name is not None and not Path(name).is_file():
            yield dotted, f"{name}: no such file (looked in {Path.cwd()})"
    yield from _unreadable_prompts(recipe)
    given: list[tuple[str, list[SourceSection] | None]] = []
    if not isinstance(recipe, IterateRecipe):
        given = [("data.train", recipe.data.train), ("data.eval", recipe.data.eval)]
    for dotted, sources in given:
        for rows in sources or ():
            if rows.is_local and not rows.path.exists():
                yield dotted, f"{rows.name}: no such file (looked in {Path.cwd()})"
    if recipe.model.adapter is not None and not (Path(recipe.model.adapter) / "adapter_config.json").is_file():
        there = Path(recipe.model.adapter).is_dir()
        what = "no adapter_config.json there: not a folder of a LoRA adapter" if there else "no such folder"
        yield "model.adapter", f"{recipe.model.adapter}: {what}"
    for key, name in (("model.name_or_path", recipe.model.name_or_path), ("model.adapter", recipe.model.adapter)):
        file = Path(name or "") / "adapter_config.json"
        config = read_json_object(file) if name is not None and file.is_file() else {}
        why = why_not_trained(config) if config and not isinstance(recipe, SftRecipe) else None
        if why is not None:
            yield key, f"{name}: {kind_of(config)} {why}; start from full weights or from a LoRA adapter"
    if recipe.lora is not None and (Path(recipe.model.name_or_path) / "adapter_config.json").is_file():
        yield (
            "lora",
            f"trains a fresh adapter, and {recipe.model.name_or_path} is an adapter already: give one of them",
        )
    yield from (("model.name_or_path", message) for message in _missing_model(recipe.model.name_or_path))
    if isinstance(recipe, IterateRecipe) and isinstance(recipe.reference, CheckpointSection):
        yield from (("reference.checkpoint", message) for message in _missing_model(recipe.reference.checkpoint))
    reference = recipe.reference if isinstance(recipe, Recipe) else None
    if reference is not None and reference.name_or_path is not None:
        yield from (("reference.name_or_path", message) for message in _missing_model(reference.name_or_path))
        if reference.adapter is not None and not Path(reference.adapter).is_dir():
            yield "reference.adapter", f"{reference.adapter}: no such folder"


def _unreadable_prompts(recipe: EveryRecipe) -> Iterator[tuple[str, str]]:
    """What is wrong with files of prompts that are there."""
    from alignment.data.prompt_files import read_prompts, refuse_without_prompts

    strict: dict[str, Any] = {}
    if isinstance(recipe, Recipe):
        strict["data.sample.prompts"] = recipe.data.sample
    if isinstance(recipe, Recipe | IterateRecipe):
        strict["evaluation.prompts"] = recipe.evaluation
    for dotted, section in strict.items():
        if section is not None and Path(section.prompts).is_file():
            try:
                read_prompts(section.prompts, section.limit)
            except UserError as error:
                yield dotted, str(error)
    asked = (recipe.data.prompts or []) if isinstance(recipe, Recipe | IterateRecipe) else []
    for source in asked if isinstance(asked, list) else [asked]:
        if isinstance(source.name, str) and Path(source.name).is_file():
            try:
                refuse_without_prompts(source.name)
            except UserError as error:
                yield "data.prompts", str(error)


def _missing_packages(recipe: EveryRecipe) -> Iterator[tuple[str, str]]:
    reporters = recipe.training.report_to
    named = [
        ("training.report_to", name, REPORTERS) for name in ([reporters] if isinstance(reporters, str) else reporters)
    ]
    named.append(("model.attn_implementation", recipe.model.attn_implementation or "", ATTENTION_PACKAGES))
    named.append(("model.quantization", recipe.model.quantization or "", QUANTIZATION_PACKAGES))
    for dotted, name, table in named:
        packages = table.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            yield dotted, f"{name} needs the Python package {packages[0]}, which is not installed"


def _missing_model(name: str) -> Iterator[str]:
    if name.startswith(PACKAGE_SCHEME):
        try:
            package_file(name)
        except UserError as error:
            yield str(error)
    elif name.endswith(".gguf"):
        if not Path(name).expanduser().is_file():
            yield f"{name}: no such file"
    elif name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        yield f"{name}: no such folder"


def explain(recipe: EveryRecipe) -> str:
    """Every value of the recipe, one line each: key, value, and the file and line or the default's source."""
    rows = [(dotted, _yaml(value), _origin(recipe, dotted)) for dotted, value in flatten(recipe.resolved())]
    key_width = max(len(key) for key, _, _ in rows)
    value_width = min(40, max(len(value) for _, value, _ in rows))
    return "\n".join(f"{key:<{key_width}}  {value:<{value_width}}  {origin}" for key, value, origin in rows)


def _origin(recipe: EveryRecipe, dotted: str) -> str:
    """Where a value was written, or its default's source; a key without default was written in its section's place."""
    if (place := recipe.origin(dotted)) is not None:
        return str(place)
    source = default_source(recipe, dotted)
    return f"default: {source}" if source else str(recipe.origin(dotted.rpartition(".")[0]) or "")


def diff(first: EveryRecipe, second: EveryRecipe) -> str:
    """The resolved values in which two recipes differ, with the origin of each; empty if there are none."""
    before, after = dict(flatten(first.resolved())), dict(flatten(second.resolved()))
    lines = []
    for dotted in sorted(before | after):
        old, new = before.get(dotted, _MISSING), after.get(dotted, _MISSING)
        if old != new and not (_MISSING in (old, new) and None in (old, new)):  # a section's keys follow
            lines.append(f"{dotted}: {_side(first, dotted, old)} -> {_side(second, dotted, new)}")
    return "\n".join(lines)


def _side(recipe: EveryRecipe, dotted: str, value: Any) -> str:
    return "absent" if value is _MISSING else f"{_yaml(value)} ({recipe.origin(dotted) or 'default'})"


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values, section by section; a section that is absent is one key with null."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def default_source(recipe: EveryRecipe, dotted: str) -> str:
    """Where a default comes from: the schema's word for it, or the objective's card."""
    section, _, key = dotted.partition(".")
    if (
        isinstance(recipe, Recipe | IterateRecipe)
        and section == "objective"
        and key not in ObjectiveSection.model_fields
    ):
        return _hyperparameter_source(recipe.objective, key)
    model: Any = recipe
    *path, last = dotted.split(".")
    for part in path:
        model = getattr(model, part)
    description = type(model).model_fields[last].description or ""
    return description.partition("Default: ")[2].rstrip(".")


def _hyperparameter_source(objective: ObjectiveSection, key: str) -> str:
    from alignment.objectives import objective_class

    cls = objective_class(objective.name).variant(objective.hyperparameters)
    rows = {row.name: row for row in cls.card.hyperparameters}
    return rows[key].source or rows[key].meaning


def _yaml(value: Any) -> str:
    """The value as it would stand in a recipe."""
    return value if isinstance(value, str) and value else json.dumps(value)
