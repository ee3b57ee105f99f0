"""From a document to a checked recipe of some kind; what pydantic finds, in our words and at the line of its key.

Every kind of recipe goes through `checked`: those of training (`loading`), of the tabular lab, of comparisons. No kind
is defined here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import PrivateAttr, ValidationError

from alignment.errors import nearest
from alignment.recipes.document import Document, KeyPath, Origin, Problem, RecipeError
from alignment.recipes.merge import COMMAND_LINE, apply_overrides, read_with_bases
from alignment.recipes.schema import OpenSection, Section

Kind = TypeVar("Kind", bound="Root")


class Root(Section):
    """What every kind of recipe has; `origin` says which line a value came from."""

    _document: Document = PrivateAttr(default_factory=lambda: Document("recipe"))

    @property
    def path(self) -> Path:
        """The recipe file."""
        return Path(self._document.source)

    def resolved(self) -> dict[str, Any]:
        """Every value, defaults included, as plain JSON-able types."""
        return self.model_dump(mode="json")

    def origin(self, dotted: str) -> Origin | None:
        """Where the value of `training.learning_rate` was written; None for a default."""
        return self._document.origins.get(tuple(dotted.split(".")))


def checked(
    kind: type[Kind] | Callable[[Document], type[Kind]],
    path: str | Path,
    overrides: Sequence[str] = (),
    fill_in: Callable[[Document], None] | None = None,
) -> Kind:
    """A recipe file with its `extends` and the overrides, checked.

    Args:
        kind: the recipe's class, or what tells it from the document.
        path: the YAML file.
        overrides: `SECTION.KEY=VALUE`, values read as YAML.
        fill_in: writes the defaults that depend on what is written into the document.

    Raises:
        RecipeError: anything is wrong; its text is the first problem with its place, `problems` has all.
        UserError: an override is not of that form.
    """
    document = apply_overrides(read_with_bases(Path(path)), overrides)
    if fill_in is not None:
        fill_in(document)
    model: Any = kind if isinstance(kind, type) else kind(document)
    try:
        recipe: Kind = model.model_validate(document.values)
    except ValidationError as failed:
        found = {problem.path for problem in document.problems}
        new = [problem for problem in problems_of(failed, document, model) if problem.path not in found]
        raise RecipeError(document.problems + new) from None
    if document.problems:
        raise RecipeError(document.problems)
    recipe._document = document
    return recipe


def beside(document: Document, where: KeyPath, file: str) -> str:
    """The absolute path of a file as it lies from the recipe that names it; from here, if the command line does."""
    source = document.origin(where).source
    folder = Path() if source == COMMAND_LINE else Path(source).parent
    return str((folder / file).resolve())


def problems_of(failed: ValidationError, document: Document, kind: type[Root]) -> list[Problem]:
    """What pydantic found in a document, each problem at its line."""
    return [_problem(dict(found), document, kind) for found in failed.errors(include_url=False)]


_EXPECTED = {
    "string_type": "text",
    "float_type": "a number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "list_type": "a list",
    "finite_number": "a finite number",
    "string_too_short": "text that is not empty",
}
_LIMITS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}
_TRUTHS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def _problem(found: dict[str, Any], document: Document, root: type[Root]) -> Problem:
    """One pydantic error as a problem in our words, at the line of the key that it is about."""
    loc = _as_written(found["loc"], document.values)
    kind, value, ctx = found["type"], found["input"], found.get("ctx", {})
    if kind == "extra_forbidden":
        section = _section_at(root, loc[:-1])
        reason = section.refused.get(str(loc[-1])) if issubclass(section, Section) else None
        message = (
            f"not accepted: {reason}" if reason else f"unknown key{nearest(str(loc[-1]), _keys_at(root, loc[:-1]))}"
        )
    elif kind == "missing":
        what = "section" if len(loc) == 1 else "key"
        message = f"required {what} is missing: {_description(root, loc)}"
    elif kind in _EXPECTED:
        message = f"expected {_EXPECTED[kind]}, got {shown(value)}{_type_hint(kind, value)}"
    elif kind in _LIMITS:
        name, sign = _LIMITS[kind]
        message = f"must be {sign} {ctx[name]:g}, got {shown(value)}"
    elif kind == "literal_error":
        close = nearest(value, _choices(ctx["expected"])) if isinstance(value, str) else ""
        close = close if close.startswith("; did") else ""
        message = f"expected one of {ctx['expected'].replace(' or ', ', ')}; got {shown(value)}{close}"
    elif kind in ("model_type", "dict_type", "model_attributes_type"):
        message = f"expected a section with keys of its own, got {shown(value)}"
    else:
        message = found["msg"].removeprefix("Value error, ")
    return Problem(document.origin(loc), tuple(str(part) for part in loc), message)


def _as_written(loc: KeyPath, values: Any) -> KeyPath:
    """`loc` without the places in lists that the file does not write as lists (one source of data)."""
    path: list[str | int] = []
    for part in loc:
        if isinstance(part, int) and not isinstance(values, list):
            continue
        path.append(part)
        known = isinstance(values, dict) and part in values or isinstance(values, list) and part in range(len(values))
        values = values[part] if known else None
    return tuple(path)


def shown(value: Any) -> str:
    """A value as a message shows it."""
    if value is None:
        return "nothing (null)"
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else f"{text[:57]}..."


def _type_hint(kind: str, value: Any) -> str:
    """A remedy where the cause is a well-known slip of YAML."""
    if kind == "string_type" and isinstance(value, int | float):
        return "; put it in quotes"
    if kind == "bool_type" and isinstance(value, str) and value.lower() in _TRUTHS:
        return f"; write {_TRUTHS[value.lower()]}"
    if kind in ("float_type", "int_type") and isinstance(value, str) and _is_number(value):
        return "; write it as a plain decimal number without quotes"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _choices(expected: str) -> list[str]:
    return [choice.strip().strip("'") for choice in expected.replace(" or ", ", ").split(",")]


def _section_at(root: type[Root], path: KeyPath) -> type[Section] | type[OpenSection]:
    """The section model at `path`; the recipe itself at `()`."""
    model: type[Section] | type[OpenSection] = root
    for part in path:
        if isinstance(part, str):  # a number is a place in a list of sections
            model = next(_sections_in(model.model_fields[part].annotation))
    return model


def _sections_in(annotation: Any) -> Iterator[type[Section] | type[OpenSection]]:
    """The section models inside a field's type: of `X`, `X | None`, `list[X]` with or without extra metadata."""
    if isinstance(annotation, type) and issubclass(annotation, Section | OpenSection):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _sections_in(inner)


def _keys_at(root: type[Root], path: KeyPath) -> list[str]:
    keys = list(_section_at(root, path).model_fields)
    return keys if path else [*keys, "extends"]


def _description(root: type[Root], path: KeyPath) -> str:
    field = _section_at(root, path[:-1]).model_fields[str(path[-1])]
    return (field.description or "").rstrip(".")
