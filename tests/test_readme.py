"""README's promises: two commands come first, and those of the command line run. (Links and files: test_docs.py.)"""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from alignment.cli import app
from tests.pages import blocks, commands, read

README = read("README.md")
LINES = [line for block in blocks(README, "bash") for line in block.splitlines()]
COMMANDS = [words for words in commands(LINES) if words[0] == "alignment"]


def test_two_commands_come_first(root):
    assert re.findall(r"^make \w+", blocks(README, "bash")[0], flags=re.MULTILINE) == ["make train", "make test"]
    targets = re.findall(r"^(\w[\w-]*):", (root / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"train", "test", "test-all", "docs"} <= set(targets)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_shown_commands_run(root, monkeypatch, words):
    monkeypatch.chdir(root)
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_the_python_example_trains(tiny, tmp_path, monkeypatch):
    (shown,) = blocks(README, "python")
    monkeypatch.chdir(tmp_path)
    exec(re.sub(r'^name = ".*"', f"name = {str(tiny)!r}", shown, flags=re.MULTILINE), {})


def _rows(text: str) -> list[dict[str, str]]:
    """The table of a comparison with tuning points: its rows, each from head to cell."""
    lines = text[text.index("| objective | tuned |") :].split("\n\n")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_numbers_shown_are_those_of_the_comparison():
    shown, whole = _rows(README), _rows(read("docs/compare.md"))
    assert len(shown) == 3
    for row in shown:
        assert any(row.items() <= full.items() for full in whole), row["objective"]


def test_all_groups_of_the_command_are_shown():
    assert {tuple(words[1:3]) for words in COMMANDS} >= {
        ("objectives",),
        ("objectives", "show"),
        ("objectives", "check"),
        ("recipe", "check"),
        ("recipe", "explain"),
        ("recipe", "diff"),
    }
