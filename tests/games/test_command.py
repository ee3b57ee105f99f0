"""`alignment games run`: what it prints and leaves, and one line for every mistake."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignment.cli import app
from alignment.errors import UserError
from alignment.games.recipe import load_games_recipe

RECIPE = """\
claim: A small one
games: {kind: random, arms: 4, count: 2}
settings:
  - {beta: 0.1, learning_rate: 0.05, iterations: 300}
methods:
  - {objective: egpo}
  - {objective: online_ipo1}
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def test_it_prints_the_table_and_leaves_the_files(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["games", "run", str(file)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("A small one\n") and "| setting | iterations | egpo | online_ipo1 |" in done.stdout
    folder = tmp_path / "runs" / "games-small"
    assert {path.name for path in folder.iterdir()} == {"figure.svg", "figure.png", "table.md", "table.json"}
    assert "FAILS" not in done.stdout and done.stdout.count("* holds:") == 1
    assert done.stdout.count("* not judged:") == 1  # mirror descent: nothing repels it


def test_overrides_and_output(file, tmp_path):
    words = ["games", "run", str(file), "games.seed=3", "claim=Another", "settings=[{beta: 0.2, learning_rate: 0.1, "]
    words[-1] += "iterations: 40}]"
    done = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "there")])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Another\n") and "| beta 0.2, eta 0.5 | 40 |" in done.stdout
    assert (tmp_path / "there" / "table.md").is_file()


def test_what_theory_says_and_does_not_hold_is_exit_code_1(file, tmp_path, monkeypatch):
    from alignment.games import report

    monkeypatch.setattr(report, "_linear", lambda *_: (False, "said"))
    done = CliRunner().invoke(app, ["games", "run", str(file), "--output", str(tmp_path / "there")])
    assert done.exit_code == 1 and "* FAILS: said" in done.stdout


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("beta: 0.1", "beta: 0.0", 4, "settings.0.beta: must be > 0, got 0.0"),
        ("beta: 0.1", "beta: .nan", 4, "settings.0.beta: expected a finite number, got .nan"),
        (
            "objective: egpo",
            "objective: egppo",
            6,
            "methods.0.objective: unknown objective 'egppo'; did you mean 'egpo'?",
        ),
        ("objective: egpo", "objective: likelihood", 6, "'likelihood' reads what the arms of a game do not have"),
        ("objective: egpo", "objective: online_ipo1", 7, "methods.1: 'online_ipo1' is there twice"),
        ("{objective: egpo}", "{objective: egpo, smapler: policy}", 6, "unknown key; did you mean 'sampler'?"),
        ("{objective: egpo}", "{objective: egpo, sampler: all}", 6, "got 'all'"),
        (
            "{objective: egpo}",
            "{objective: egpo, hyperparameters: {bta: 1.0}}",
            6,
            "objective 'egpo' has no hyper-parameter 'bta'; did you mean 'beta'?",
        ),
        ("kind: random", "kind: randon", 2, "got 'randon'; did you mean 'random'?"),
        ("kind: random, arms: 4", "kind: rock_paper_scissors, arms: 4", 2, "has three arms, got 4"),
        ("kind: random, arms: 4", "matrix: [[0.5, 0.7], [0.2, 0.5]]", 2, "P[0, 1] + P[1, 0] must be 1, got 0.9"),
        ("kind: random, arms: 4", "matrix: [[0.5, 0.7], [0.3]]", 2, "games.matrix: the matrix is not square"),
        ("learning_rate: 0.05", "learning_rate: 1.5", 4, "eta beta = 4 lr/4 must be at most 1, got lr 1.5"),
        ("iterations: 300", "iterations: 0", 4, "settings.0.iterations: must be >= 1, got 0"),
        (
            "{objective: online_ipo1}",
            "{objective: inpo}\nsamples: 10",
            7,
            "methods.1: an exact iteration needs a table and exact gradients; write `exact: false`",
        ),
        (
            "{objective: egpo}",
            "{objective: online_ipo2, opponent: mixture}",
            6,
            "methods.0.opponent: 'mixture': online_ipo2 reads no third response; leave it out",
        ),
        (
            "{objective: egpo}",
            "{objective: dpo, look_ahead: true}",
            6,
            "methods.0.look_ahead: true: dpo reads no third",
        ),
        ("{objective: egpo}", "{objective: vpo, mixture: 0.9}", 6, "methods.0.mixture: 0.9: vpo reads no third"),
        (
            "{objective: egpo}",
            "{objective: egpo, mixture: 0.5}",
            6,
            "methods.0.mixture: 0.5: the opponent is the policy",
        ),
        (
            "{objective: egpo}",
            "{objective: sppo, exact: true, look_ahead: true}",
            6,
            "methods.0.look_ahead: true: an exact iteration has no half step",
        ),
        (
            "{objective: egpo}",
            "{objective: inpo, learning_rate_scale: 2.0}",
            6,
            "methods.0.learning_rate_scale: 2: an exact iteration has no rate",
        ),
        (
            "{objective: egpo}",
            "{objective: egpo, learning_rate_scale: 100.0}",
            6,
            "methods.0.learning_rate_scale: 100: eta beta = 4 lr scale/4 must be at most 1: at most 20",
        ),
        ("claim: A", "labels: drawn\nclaim: A", 1, "labels: drawn would do nothing: exact gradients draw nothing"),
        ("claim: A", "policy: neural\noffset: 0.5\nclaim: A", 2, "offset: 0.5 would do nothing: a network starts"),
        ("claim: A", "seed: 3\nclaim: A", 1, "seed: 3 would do nothing"),
        (
            "claim: A",
            "seeds: 2\nclaim: A",
            1,
            "seeds: 2: exact runs of a table from one start are copies of each other",
        ),
        ("arms: 4", "strength: 0.5", 2, "games.strength: 0.5 would do nothing: games of kind random have no strength"),
        (
            "kind: random",
            "matrix: [[0.5, 0.7], [0.3, 0.5]]",
            2,
            "games.arms: 4 would do nothing: the matrix is the game",
        ),
        ("kind: random", "kind: ties, reference: uniform", 2, "games.count: 2 games that are the same"),
        ("kind: random", "kind: ties, reference: uniform, seed: 1", 2, "games.seed: 1 would do nothing: neither"),
        (
            "{kind: random, arms: 4, count: 2}",
            "{kind: ties, reference: uniform}",
            2,
            "games: 10 games that are the same",
        ),
        (
            "kind: random, arms: 4, count: 2}",
            "kind: rock_paper_scissors, arms: 3}\nmethods: [{objective: gpo}]\n#",
            3,
            "methods.0.objective: 'gpo' reads log-odds, and those of a preference of 0 or 1 are infinite",
        ),
        (
            "{objective: online_ipo1}",
            "{objective: hinge, exact: true}",
            7,
            "methods.1: hinge: no minimum of the population loss within 50 Newton steps, under beta 0.1, lr 0.05; "
            "write `exact: false`",
        ),
        (
            "kind: random, arms: 4, count: 2}",
            "kind: deterministic}\nmethods: [{objective: egpo}, {objective: dpo, exact: true}]\n#",
            3,
            "methods.1: dpo: no minimum of the population loss",
        ),
        (
            "{objective: online_ipo1}",
            "{objective: ipo, learning_rate_scale: 1e308, hyperparameters: {tau: 1e-6}}",
            7,
            "methods.1: its policy is not finite after one iteration in 2 of 2 runs, under beta 0.1, lr 0.05; lower",
        ),
        ("claim: A small one\n", "", None, "claim: required section is missing"),
        ("claim", "clam", 1, "clam: unknown key; did you mean 'claim'?"),
        ("methods:\n  - {objective: egpo}\n  - {objective: online_ipo1}", "methods: []", 5, "at least one is needed"),
    ],
)
def test_mistakes_are_one_line_with_their_place(file, old, new, line, words):
    assert old in RECIPE
    file.write_text(RECIPE.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_games_recipe(file)
    assert "\n" not in str(caught.value)
    place = f"{file}:{line}: " if line else f"{file}: "
    assert any(str(p).startswith(place) and words in str(p) for p in caught.value.problems), str(caught.value)


def test_keys_that_do_something_are_taken_and_a_resolved_recipe_is_one(file):
    """A scale beyond mirror descent's limit is for methods whose step that is not (docs/games.md, Nash-MD-PG)."""
    for new in (
        "{objective: nash_md_pg, learning_rate_scale: 40.0, mixture: 0.5}",
        "{objective: p3o, opponent: mixture, look_ahead: true}",
        "{objective: gpo, opponent: mixture}",
        "{objective: dpo, look_ahead: false, sampler: uniform}",
    ):
        file.write_text(RECIPE.replace("{objective: egpo}", new))
        resolved = load_games_recipe(file).resolved()
        (file.parent / "again.yaml").write_text(json.dumps(resolved))
        assert load_games_recipe(file.parent / "again.yaml").resolved() == resolved
    games = load_games_recipe(file, ["games={kind: null, arms: null, matrix: [[0.5, 0.7], [0.3, 0.5]]}"]).games.games()
    assert games.arms == 2 and games.make()[0].shape == (2, 2, 2)
    for kind in ("cyclic", "bradley_terry"):
        assert load_games_recipe(file, [f"games.kind={kind}", "games.strength=0.5"]).games.games().strength == 0.5


def test_a_run_that_leaves_the_numbers_is_exit_code_1(file, tmp_path):
    file.write_text(RECIPE.replace("{objective: online_ipo1}", "{objective: ipo, learning_rate_scale: 1000.0}"))
    done = CliRunner().invoke(app, ["games", "run", str(file), "--output", str(tmp_path / "there")])
    assert done.exit_code == 1 and "* FAILS: beta 0.1: ipo's policy is not finite in 2 of 2 runs" in done.stdout


def test_a_mistake_ends_the_command_with_one_line_and_code_2(file, tmp_path):
    program = [sys.executable, "-c", "from alignment.cli import main; main()", "games", "run", str(file)]
    words = "settings=[{beta: -1.0, learning_rate: 0.1, iterations: 1}]"
    done = subprocess.run([*program, words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: command line: settings.0.beta: must be > 0, got -1.0\n"
    with pytest.raises(UserError, match="smal.yaml: no such recipe file"):
        load_games_recipe(tmp_path / "smal.yaml")


def test_a_folder_that_cannot_be_made(file, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken: cannot be made"):
        from alignment.games.run import run_and_write

        recipe = load_games_recipe(file)
        run_and_write(recipe.claim, recipe.experiment(), tmp_path / "taken")


def test_commands_of_the_page_and_of_recipes_can_be_run(root, monkeypatch):
    """Files and keys exist; every recipe is shown; the page's tables have the rows that egpo.yaml makes."""
    monkeypatch.chdir(root)
    page = (root / "docs" / "games.md").read_text()
    heads = [path.read_text().replace("#   alignment", "alignment") for path in Path("recipes/games").glob("*.yaml")]
    lines = [line for text in (page, *heads) for line in text.splitlines() if line.startswith("alignment games run ")]
    shown = set()
    for line in lines:
        words = shlex.split(line, comments=True)[3:]
        load_games_recipe(words[0], [word for word in words[1:] if "=" in word])
        shown.add(words[0])
    assert shown == {str(path) for path in Path("recipes/games").glob("*.yaml")} and len(lines) >= 8
    recipe = load_games_recipe("recipes/games/egpo.yaml")
    for setting in recipe.settings:
        eta = 4 * setting.learning_rate / (recipe.games.arms * setting.beta)
        for share in (0.1, 0.5, 1):
            assert page.count(f"| beta {setting.beta:g}, eta {eta:.2g} | {setting.iterations * share:.0f} |") == 2


@pytest.mark.parametrize("name", ["egpo", "neural", "rock_paper_scissors", "sampled"])
def test_shipped_recipes_are_read_and_their_heads_show_them(root, name):
    path = root / "recipes" / "games" / f"{name}.yaml"
    load_games_recipe(path)
    assert f"#   alignment games run recipes/games/{name}.yaml" in path.read_text()
    assert {p.stem for p in path.parent.iterdir()} == {"egpo", "neural", "rock_paper_scissors", "sampled"}
