"""Rooms import downwards only: the order is data here, and a broken rule is named with its file and line."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.pages import ROOT

# From the bottom up. A room imports those of earlier lines, and itself.
ORDER = (
    ("errors", "files", "locks", "web", "environment", "processes"),
    ("objectives",),
    ("models",),
    ("rewards",),
    ("recipes",),
    ("data",),
    ("games",),
    ("trainers",),
    ("runs",),
    ("doctor",),
    ("pipeline",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
OWED = {  # upward arrows that are still there; none may be added
    ("processes", "models"),
    ("rewards", "data"),
    ("recipes", "data"),
    ("runs", "evaluation"),
}


def arrows(source: str) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of ours, also of those inside functions; `evaluation` is a room above all."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, *rest = name.split(".")
            if package == "evaluation" or (package == "alignment" and rest and not rest[0].startswith("__")):
                yield node.lineno, rest[0] if package == "alignment" else package


def broken(room: str, source: str) -> list[str]:
    """The rules that a file of `room` breaks."""
    return [
        f"line {line}: {room} imports {other}, which lies above it"
        for line, other in arrows(source)
        if room != "cli" and (room, other) not in OWED and FLOOR.get(other, len(ORDER)) > FLOOR[room]
    ]


def files() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "alignment").rglob("*.py"))


@pytest.mark.parametrize("name", [name for name in files() if name != "alignment/__init__.py"])
def test_no_arrow_goes_up(name):
    room = name.split("/")[1].removesuffix(".py")
    assert room in FLOOR, f"{name}: {room} is in no line of ORDER"
    assert broken(room, (ROOT / name).read_text()) == [], name


def test_what_is_owed_is_still_there():
    """An arrow that is gone leaves the list, so that it cannot come back."""
    found = {
        (name.split("/")[1].removesuffix(".py"), other)
        for name in files()
        for _, other in arrows((ROOT / name).read_text())
    }
    assert found >= OWED


@pytest.mark.parametrize(
    "line", ["from alignment import doctor", "def f():\n    from alignment.runs import hub", "import evaluation.files"]
)
def test_an_upward_arrow_is_named(line):
    (problem,) = broken("trainers", line)
    assert problem.startswith("line ") and "trainers imports" in problem
    assert broken("cli", line) == []


def test_trainers_know_no_recipe():
    """They are what a Python user imports, and take no path but `output_dir`."""
    for name in files():
        if name.startswith("alignment/trainers/"):
            assert not {other for _, other in arrows((ROOT / name).read_text())} & {"recipes", "runs"}, name
