"""README and docs/: links resolve, shown commands exist with their options, named files are there, the site builds.

What single pages promise beside that has a test of its own beside what it is about.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from alignment.cli import app
from alignment.games.recipe import load_games_recipe
from alignment.recipes import load_any
from evaluation.compare.recipe import load_compare_recipe
from evaluation.experiments import read_experiment
from tests.pages import PAGES, ROOT, anchors, commands, links, mentioned, prose, read, shell_lines


def _after_variables(line: str) -> str:
    """The command of a line that sets environment variables before it."""
    return re.sub(r"^(?:[A-Z_]+=\S+\s+)+", "", line)


SHOWN = [
    pytest.param(page, words, id=f"{page} {' '.join(words)[:60]}")
    for page in PAGES
    for words in [*commands([_after_variables(line) for line in shell_lines(read(page))]), *mentioned(read(page))]
]
MADE = [
    pytest.param(shlex.split(line, comments=True), id=f"{page} {line[:40]}")
    for page in PAGES
    for line in [*shell_lines(read(page)), *re.findall(r"`(make\s[^`]+)`", prose(read(page)))]
    if line.startswith("make ")
]
LOADERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("train", "iterate", "doctor", "export", "report", "recipe", "data"), load_any),
    "compare": load_compare_recipe,
    "games": load_games_recipe,
}
EXPERIMENTS = {"evaluation.overoptimization": "Experiment", "evaluation.replication": "Replication"}


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in links(read(page)):
        name, _, anchor = link.partition("#")
        target = (Path(page).parent / name) if name else Path(page)
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    """Paths of the checkout in code or prose; a folder, a file, or `file.py::test`."""
    found = re.findall(r"(?<![\w/.])((?:alignment|docs|evaluation|recipes|scripts|tests)/[\w./-]*\w)", read(page))
    assert [name for name in found if not (ROOT / name).exists() and "NAME" not in name] == []


@pytest.mark.parametrize("page", PAGES)
def test_lists_and_tables_begin_after_an_empty_line(page):
    """GitHub does without, the site does not."""
    lines = prose(read(page)).splitlines()
    for before, line in zip(lines, lines[1:], strict=False):
        for start in (r"\* |- ", r"\d+\. ", r"\|"):
            if re.match(start, line) and before.strip() and not before.startswith((" ", "<!--")):
                assert re.match(start, before), line


def _known(command: Any, words: list[str]) -> None:
    """Every option of the words is one of the command's; subcommands are followed."""
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, words[0]
        command, words = command.commands[words[0]], words[1:]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
    assert given - options - {"--help"} == set()


def _recipe(words: list[str], load: Callable[..., Any] = load_any) -> None:
    """The recipes among the words take the overrides behind them."""
    overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
    for word in words:
        if re.fullmatch(r"recipes/\S+\.yaml", word) and not word.startswith("recipes/accelerate/"):
            load(word, overrides)


def _python(words: list[str]) -> None:
    """A program of the checkout, or a module: it is there and has these options."""
    name = words[1] if words[0] == "-m" else words[0].removesuffix(".py").replace("/", ".")
    assert words[0] == "-m" or Path(words[0]).is_file(), words[0]
    assert importlib.util.find_spec(name) is not None, name
    rest = words[2:] if words[0] == "-m" else words[1:]
    if name in ("scripts.train", "scripts.sft", "scripts.train_reward_model"):
        assert {word for word in rest if word.startswith("-")} <= {"--resume"}
        _recipe(rest)
    elif name == "scripts.iterate":
        _known(typer.main.get_command(app), ["iterate", *rest])
    elif name.startswith(("scripts.", "evaluation.")):
        module = importlib.import_module(name)
        kind = EXPERIMENTS.get(name)
        for word in rest:
            if kind and word.startswith("recipes/"):
                read_experiment(Path(word), getattr(module, kind))
        if "app" in vars(module):
            _known(typer.main.get_command(module.app), rest)
        else:  # no options of its own
            assert "_main" in vars(module) and not any(word.startswith("-") for word in rest)


@pytest.mark.parametrize(("page", "words"), SHOWN)
def test_shown_commands_exist(page, words):
    from accelerate.commands.launch import launch_command_parser

    words = ["1" if word.startswith("$") else word for word in words if "…" not in word]
    files = [word for word in words if re.match(r"(recipes|scripts|evaluation|tests|docs)/", word)]
    assert [name for name in files if not Path(name).is_file()] == []
    if words[0] == "alignment":
        _known(typer.main.get_command(app), words[1:])
        if words[1] in LOADERS:
            _recipe(words[2:], LOADERS[words[1]])
        return
    if words[0] == "python":
        _python(words[1:])
        return
    assert words[:2] == ["accelerate", "launch"]
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if at is not None:
        launch_command_parser().parse_args([*words[2:at], "program"])  # exits at an unknown option
        _python(words[at:])


@pytest.mark.parametrize("words", MADE)
def test_shown_make_commands_exist(words):
    """Targets and variables are the Makefile's, a recipe can be read."""
    makefile = Path("Makefile").read_text()
    variables = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    assert {word for word in words[1:] if "=" not in word} <= set(re.findall(r"(?m)^(\w[\w-]*):", makefile))
    assert set(variables) <= set(re.findall(r"(?m)^([A-Z_]+) \?=", makefile))
    _recipe([variables.get("RECIPE", "")])


def test_the_site_builds_strictly(tmp_path):
    """Every page is in its navigation, every link and anchor within docs/ resolves: mkdocs.yml asks for these."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    pages = {str(Path(page).relative_to("docs").with_suffix(".html")) for page in PAGES if page.startswith("docs/")}
    assert pages <= {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*.html")}
    assert "<table" in (tmp_path / "site" / "objectives" / "dpo.html").read_text()


def test_every_page_is_reachable_from_readme():
    seen, ahead = set(), ["README.md"]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        targets = {(ROOT / page).parent / link.partition("#")[0] for link in links(read(page))}
        found = {str(t.resolve().relative_to(ROOT)) for t in targets if t.suffix == ".md"}
        ahead += sorted(found - seen)
    assert set(PAGES) <= seen
