"""From a recipe file to one merged document: `extends` and the command line's overrides.

Knows no section's schema, only one rule about sections: what belongs to a *named* thing (`objective`, `reward`) does
not outlive a change of that name, because one objective's beta is not another's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment.errors import UserError, nearest
from alignment.recipes.document import Document, KeyPath, Origin, Problem, RecipeError, parse_document, parse_value

COMMAND_LINE = "command line"
NAMED_SECTIONS = ("objective", "reward", "oracle")


def read_recipe_file(path: Path, asked_by: Problem | None = None) -> Document:
    """Read one file without following `extends`.

    Args:
        path: the file.
        asked_by: where another recipe names this file, for the message when it is missing.

    Raises:
        RecipeError: the file is missing, unreadable or not a YAML mapping.
    """

    def refuse(message: str) -> RecipeError:
        if asked_by is None:
            return RecipeError([Problem(Origin(str(path)), (), message)])
        return RecipeError([Problem(asked_by.origin, asked_by.path, f"{path}: {message}")])

    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise refuse(f"no such recipe file{_beside(path)}") from None
    except IsADirectoryError:
        raise refuse("is a folder; name a recipe file in it") from None
    except UnicodeDecodeError:
        raise refuse("not a text file (UTF-8)") from None
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from None
    return parse_document(text, str(path))


def _beside(path: Path) -> str:
    """Which recipe of the same folder was perhaps meant."""
    if not path.parent.is_dir():
        return f"; there is no folder {str(path.parent)!r}"
    stems = [file.stem for file in path.parent.glob("*.yaml")]
    return nearest(path.stem, stems) if stems else f"; {str(path.parent)!r} has no .yaml file"


def overlay(base: Document, child: Document, *, replace: Sequence[str] = ()) -> Document:
    """`child` laid over `base`, mapping by mapping; every key keeps the origin of the document it came from.

    Args:
        base: the document underneath.
        child: the document on top.
        replace: top-level sections that `child` replaces whole where it has them.
    """
    replaced = {section for section in replace if section in child.values}
    replaced |= {section for section in NAMED_SECTIONS if _name_changes(base, child, section)}
    values = {**base.values}
    for section, value in child.values.items():
        values[section] = value if section in replaced else _merge(base.values.get(section), value)
    origins = {
        path: origin for path, origin in base.origins.items() if _exists(values, path) and path[0] not in replaced
    }
    origins.update(child.origins)
    return Document(child.source, values, origins, base.problems + child.problems)


def _name_changes(base: Document, child: Document, section: str) -> bool:
    below, above = base.values.get(section), child.values.get(section)
    if not isinstance(below, dict) or not isinstance(above, dict):
        return False
    return "name" in above and above["name"] != below.get("name")


def _merge(base: Any, child: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(child, dict):
        return child
    if "name" in child and child["name"] != base.get("name"):  # another source of data: its settings are its own
        return child
    return {**base, **{key: _merge(base.get(key), value) for key, value in child.items()}}


def _exists(values: Any, path: KeyPath) -> bool:
    for part in path:
        keys = values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
        if part not in keys:
            return False
        values = values[part]
    return True


def read_with_bases(path: Path) -> Document:
    """Read `path` and everything that it extends, merged.

    `extends: other.yaml` is relative to the file that says it. Sections merge key by key, except `objective`, which
    the extending file replaces whole.

    Raises:
        RecipeError: a file is unreadable, or the files extend each other in a circle.
    """
    chain: list[Document] = []
    seen: list[Path] = []
    asked_by: Problem | None = None
    current: Path | None = path
    while current is not None:
        if current.resolve() in seen and asked_by is not None:
            shown = " -> ".join(document.source for document in chain)
            raise RecipeError([Problem(asked_by.origin, ("extends",), f"goes in a circle: {shown} -> {current}")])
        seen.append(current.resolve())
        document = read_recipe_file(current, asked_by)
        chain.append(document)
        origin = document.origin(("extends",))
        base = document.values.pop("extends", None)
        asked_by = Problem(origin, ("extends",), "")
        if base is not None and not isinstance(base, str):
            raise RecipeError([Problem(origin, ("extends",), f"expected the name of one recipe file, got {base!r}")])
        current = None if base is None else Path(os.path.normpath(current.parent / base))
    merged = chain.pop()
    while chain:
        merged = overlay(merged, chain.pop(), replace=("objective",))
    return merged


def parse_overrides(overrides: Sequence[str]) -> tuple[Document, list[KeyPath]]:
    """`training.learning_rate=1e-6 lora=null` as a document whose origin is the command line, and the keys it sets.

    Raises:
        UserError: an override is not of the form SECTION.KEY=VALUE, or two of them set the same key.
        RecipeError: a value is not YAML.
    """
    document = Document(COMMAND_LINE)
    paths: list[KeyPath] = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        path = tuple(dotted.strip().split("."))
        if not equals or not all(path):
            raise UserError(f"{COMMAND_LINE}: {override!r} is not an override; write SECTION.KEY=VALUE")
        if path == ("extends",):
            raise UserError(f"{COMMAND_LINE}: extends: belongs in a recipe file; name that file instead")
        if any(path[: len(other)] == other[: len(path)] for other in paths):
            raise UserError(f"{COMMAND_LINE}: {dotted}: given twice; keep one")
        value, inner = parse_value(text, path, COMMAND_LINE)
        document.problems += inner.problems
        document.origins.update(inner.origins)
        paths.append(path)
        section = document.values
        for key in path[:-1]:
            section = section.setdefault(key, {})
        section[path[-1]] = value
    return document, paths


def apply_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """The document with the command line's values on top; `source` stays the recipe file's name.

    Raises:
        UserError: an override is malformed.
        RecipeError: an override reaches into something that is not a section.
    """
    above, paths = parse_overrides(overrides)
    for path in paths:
        for depth in range(1, len(path)):
            inner: Any = document.values
            for part in path[:depth]:
                inner = inner.get(part) if isinstance(inner, dict) else None
            if inner is not None and not isinstance(inner, dict):
                shown = ".".join(str(part) for part in path[:depth])
                message = f"cannot be set: {shown} is {inner!r}, not a section"
                raise RecipeError([Problem(Origin(COMMAND_LINE), tuple(str(part) for part in path), message)])
    merged = overlay(document, above)
    for path in paths:  # sections that only the command line opens
        for depth in range(1, len(path)):
            merged.origins.setdefault(path[:depth], Origin(COMMAND_LINE))
    merged.source = document.source
    return merged
