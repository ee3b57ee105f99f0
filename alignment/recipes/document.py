"""YAML with positions: one file read into plain values, each of which knows the line it came from.

Not a schema: this file knows neither sections nor keys, only the YAML subset that a recipe may use. It differs from
PyYAML's `safe_load` where that one guesses (YAML 1.1) or forgives:

* `5e-7` is a number; `yes`, `no`, `on`, `off` are text (`save_strategy: no` means "no"); dates, octal and
  base-60 numbers are text;
* a key given twice in one mapping is a problem that names both lines;
* `.nan` and `.inf`, tags other than YAML's own scalars, keys that are not text and self-references are problems.

Anchors, aliases and merge keys (`<<`) work as usual.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from alignment.errors import UserError

KeyPath = tuple[str | int, ...]

# An alias of an alias of an alias … grows exponentially; a recipe has some sixty values.
MAX_VALUES = 10_000

_MERGE = "tag:yaml.org,2002:merge"
_NULL, _BOOL, _INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str"))
_SEQ, _MAP = "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"


@dataclass(frozen=True, order=True)
class Origin:
    """Where a value was written: a file with a 1-based line, or the command line (line 0)."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True, order=True)
class Problem:
    """One thing wrong with a recipe, with its place; its text is a complete line."""

    origin: Origin
    path: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{self.origin}: {'.'.join(self.path)}{': ' if self.path else ''}{self.message}"


class RecipeError(UserError):
    """A recipe that cannot be used; the text is its first problem, `problems` holds all of them."""

    def __init__(self, problems: list[Problem]):
        self.problems = sorted(set(problems))
        more = len(self.problems) - 1
        tail = f" (+{more} more problem{'s' * (more > 1)})" if more else ""
        super().__init__(f"{self.problems[0]}{tail}")


@dataclass
class Document:
    """Plain values (`dict`, `list`, scalars) of one or several merged files, and the origin of each key path."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def origin(self, path: KeyPath) -> Origin:
        """The origin of `path`, or of the nearest enclosing section that was written."""
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path[:-1]
        return Origin(self.source)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the implicit types of YAML 1.2's core schema (and `1_000`, which people write)."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_Loader.add_implicit_resolver(_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
        r"|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(_MERGE, re.compile(r"^<<$"), ["<"])


class _Reader:
    """Turns a tree of YAML nodes into the values, origins and problems of a `Document`."""

    def __init__(self, document: Document, *, line_offset: int | None = 1):
        self.document = document
        self.line_offset = line_offset  # None: the text has no lines (command line)
        self.open_nodes: list[int] = []
        self.count = 0

    def place(self, node: yaml.Node) -> Origin:
        if self.line_offset is None:
            return Origin(self.document.source)
        return Origin(self.document.source, node.start_mark.line + self.line_offset)

    def problem(self, origin: Origin, path: KeyPath, message: str) -> None:
        self.document.problems.append(Problem(origin, tuple(str(part) for part in path), message))

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        """The plain value of `node`; problems are recorded and leave None."""
        self.count += 1
        if self.count > MAX_VALUES:
            raise RecipeError([Problem(self.place(node), (), f"more than {MAX_VALUES} values; is this a recipe?")])
        if id(node) in self.open_nodes:
            self.problem(self.place(node), path, "an alias refers to the value that contains it")
            return None
        self.open_nodes.append(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == _SEQ:
                return [self.item(child, (*path, index)) for index, child in enumerate(node.value)]
            if isinstance(node, yaml.ScalarNode):
                return self.scalar(node, path)
        finally:
            self.open_nodes.pop()
        self.problem(self.place(node), path, f"the tag {node.tag!r} is not allowed in a recipe; write a plain value")
        return None

    def item(self, node: yaml.Node, path: KeyPath) -> Any:
        self.document.origins[path] = self.place(node)
        return self.value(node, path)

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        first: dict[str, Origin] = {}
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                continue
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _STR:
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self.problem(self.place(key_node), path, f"a key must be text, got {shown}; put it in quotes")
                continue
            key, place = key_node.value, self.place(key_node)
            if key in first:
                self.problem(place, (*path, key), f"given twice; the first one is on line {first[key].line}")
                continue
            first[key] = self.document.origins[(*path, key)] = place
            values[key] = self.value(value_node, (*path, key))
        for key_node, merged in self.merged_entries(node, path):
            if key_node.value not in values:
                self.document.origins[(*path, key_node.value)] = self.place(key_node)
                values[key_node.value] = self.value(merged, (*path, key_node.value))
        return values

    def merged_entries(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        """Entries that `<<: *anchor` (or a list of anchors) brings in, the first source of a key first."""
        for key_node, value_node in node.value:
            if key_node.tag != _MERGE:
                continue
            sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for source in sources:
                if not isinstance(source, yaml.MappingNode) or id(source) in self.open_nodes:
                    self.problem(self.place(key_node), path, "'<<' needs the alias of another mapping")
                    continue
                yield from ((key, value) for key, value in source.value if key.tag == _STR)

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text = node.value
        if node.tag == _STR:
            return text
        if node.tag == _NULL:
            return None
        if node.tag == _BOOL and text.lower() in ("true", "false"):
            return text.lower() == "true"
        try:
            if node.tag == _INT:
                return int(text)
            if node.tag == _FLOAT:
                number = math.inf if text.lower().endswith(("inf", "nan")) else float(text)
                if math.isfinite(number):
                    return number
                self.problem(self.place(node), path, f"expected a finite number, got {text}")
                return 0.0
        except ValueError:
            self.problem(self.place(node), path, f"{text[:40]!r} cannot be read as {node.tag.rpartition(':')[2]}")
            return None
        self.problem(self.place(node), path, f"the tag {node.tag!r} is not allowed in a recipe; write a plain value")
        return None


_PLAIN_WORDS = {
    "but found another document": "a second document begins here ('---'); a recipe is one",
    "found character '\\t' that cannot start any token": "a tab begins this line; indent with spaces",
    "expected the node content, but found '<stream end>'": "ends inside a bracket or quote",
}


def _compose(text: str, source: str, path: KeyPath | None = None) -> yaml.Node | None:
    """The root node of `text`; a syntax error becomes a `RecipeError` at its line, or at `path` for a single value."""
    where = tuple(str(part) for part in path or ())
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None and path is None else 0
        what = error.problem or error.context or "syntax error"
        what = _PLAIN_WORDS.get(what, what)
        raise RecipeError([Problem(Origin(source, line), where, f"not valid YAML: {what}")]) from None
    except yaml.YAMLError as error:  # characters that YAML forbids
        what = str(error).splitlines()[0]
        raise RecipeError([Problem(Origin(source), where, f"not valid YAML: {what}")]) from None
    except RecursionError:
        raise RecipeError([Problem(Origin(source), where, "nested too deeply for a recipe")]) from None


def parse_document(text: str, source: str) -> Document:
    """Read one YAML text whose root is a mapping.

    Args:
        text: the file's content.
        source: the file's name as it is to stand in messages.

    Returns:
        The document; its `problems` hold what is wrong with single values.

    Raises:
        RecipeError: the text is not YAML, is empty, or its root is not a mapping.
    """
    document = Document(source)
    root = _compose(text, source)
    if root is None:
        raise RecipeError(
            [Problem(Origin(source), (), "the file is empty; a recipe has sections such as 'objective:'")]
        )
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError([Problem(Origin(source, 1), (), "a recipe is a mapping of sections such as 'objective:'")])
    values = _Reader(document).value(root, ())
    document.values = values if isinstance(values, dict) else {}
    return document


def parse_value(text: str, path: KeyPath, source: str) -> tuple[Any, Document]:
    """Read one value of the command line as YAML (`1e-6`, `[a, b]`, `{r: 8}`, `null`); nothing at all is null.

    Returns:
        The value, and a document with the origins and problems of what is in it (its `values` stay empty).
    """
    document = Document(source, origins={path: Origin(source)})
    root = _compose(text, source, path)
    value = None if root is None else _Reader(document, line_offset=None).value(root, path)
    return value, document
