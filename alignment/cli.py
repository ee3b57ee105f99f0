"""The `alignment` command. Each subcommand is a thin wrapper: read arguments, call the library, print.

Nothing heavy is imported before a subcommand that needs it runs (`alignment --help` takes a tenth of a second); no
logic lives here. A mistake of the user's is one line on standard error and exit code 2.

    alignment --help
    alignment recipe check recipes/quickstart/dpo.yaml
    alignment train recipes/quickstart/dpo.yaml training.learning_rate=1e-5
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from alignment import __version__
from alignment.errors import UserError, run_or_exit


def _group(help_text: str, *, needs_command: bool = True) -> typer.Typer:
    """A command group with plain-text help: rich's boxes would double the start-up time."""
    return typer.Typer(
        help=help_text,
        no_args_is_help=needs_command,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


app = _group("Preference alignment of language models: recipes, proved objectives, honest comparison.")
recipe_app = _group("Check, explain and compare recipes.")
data_app = _group("Look at a recipe's preference data.")
objectives_app = _group("List objectives, show their cards, run their proofs.", needs_command=False)
games_app = _group("The tabular lab: objectives on games that can be solved.")
app.add_typer(recipe_app, name="recipe")
app.add_typer(data_app, name="data")
app.add_typer(objectives_app, name="objectives")
app.add_typer(games_app, name="games")

RecipeFile = Annotated[Path, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Such as training.learning_rate=1e-6 lora=null.", metavar="SECTION.KEY=VALUE"),
]


def main() -> None:
    """Entry point: run the command; a user's mistake becomes one line and exit code 2."""
    run_or_exit(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"alignment {__version__}")
        raise typer.Exit()


@app.callback()
def _alignment(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    accelerate_config: Annotated[
        Path | None, typer.Option("--accelerate-config", help="Such as recipes/accelerate/zero3.yaml.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
) -> None:
    """Train as a recipe says.

    In one process, with exit code 2 for any mistake of yours; with --accelerate-config the same as `accelerate launch
    --quiet --config_file FILE scripts/train.py RECIPE [SECTION.KEY=VALUE]... [--resume]`, after a check of the recipe
    and of what it names.
    """
    words = [str(recipe), *(overrides or ()), *(["--resume"] if resume else [])]
    if accelerate_config is None:
        from alignment.runs.program import main as launched

        return launched(words)
    from alignment.recipes import RecipeError, load_recipe
    from alignment.recipes.inspection import what_is_missing
    from alignment.recipes.launch import read_launch

    problems = what_is_missing(load_recipe(recipe, overrides or ()))
    if problems:
        raise RecipeError(problems)
    read_launch(accelerate_config)
    sys.stdout.flush()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]  # no traceback of its own after ours
    os.execv(launch[0], [*launch, "--config_file", str(accelerate_config), "-m", "alignment.runs.program", *words])


@app.command()
def iterate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    accelerate_config: Annotated[
        Path | None, typer.Option("--accelerate-config", help="Of the stages; such as recipes/accelerate/zero3.yaml.")
    ] = None,
) -> None:
    """Train in iterations: sample, judge, pair, train, and again.

    The recipe has an `iterate` section. What is complete is skipped: the same command goes on where it was stopped,
    and ends with the same files. Each stage is a process of its own; with --accelerate-config those that sample, score
    and train are launched by accelerate.
    """
    from alignment.recipes import RecipeError, load_iterate_recipe
    from alignment.recipes.inspection import what_is_missing

    loaded = load_iterate_recipe(recipe, overrides or ())
    if problems := what_is_missing(loaded):
        raise RecipeError(problems)
    from alignment.pipeline.driver import run

    folder = run(loaded, accelerate_config)
    from evaluation.report import write_report

    for training in sorted(folder.glob("iteration-*/train")):
        write_report(training)
    typer.echo(f"last iterate: {folder / 'final'}")
    typer.echo(f"report: {write_report(folder)}")
    if loaded.evaluation is not None:
        typer.echo(f"win rate over the base: python evaluation/win_rate.py {folder}")


@app.command()
def compare(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Compare objectives fairly: the same pairs, budget, tuning, judge and seeds.

    The recipe has a `compare` section. Trains what is not complete, one run after another, and writes report.html,
    report.md, table.csv and results.json. The same command goes on where it was stopped.
    """
    from evaluation.compare.command import compare as carried_out

    folder = carried_out(recipe, overrides or ())
    typer.echo((folder / "report.md").read_text(encoding="utf-8"))
    typer.echo(f"report: {folder / 'report.html'}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN")]) -> None:
    """Write a run's report.html.

    Curves, win rate with its interval, samples before and after; self-contained. Where the run's recipe names a Python
    file in objective.file, it is executed.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder; training.output_dir of the recipe names it")
    from evaluation.report import write_report

    typer.echo(f"report: {write_report(run)}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder; or a model's, a checkpoint's, an adapter's.")],
    folder: Annotated[Path, typer.Argument(help="A folder that is new or empty.", metavar="DIR")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default the run's own.")
    ] = None,
) -> None:
    """Write a trained model as a plain transformers folder.

    An adapter is merged into its base, in float32 on the CPU. Before the folder appears, its logits on a few prompts
    are compared with the trained model's.
    """
    from alignment.models.export import export as exported

    for line in exported(run, folder, dtype):
        typer.echo(line)
    typer.echo(f"exported: {folder}")


@app.command()
def doctor(
    recipe: RecipeFile,
    overrides: Overrides = None,
    accelerate_config: Annotated[
        Path | None,
        typer.Option("--accelerate-config", help="Plan for this launch, such as recipes/accelerate/zero3.yaml."),
    ] = None,
    world: Annotated[int | None, typer.Option("--world", help="Devices; the file's num_processes otherwise.")] = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Load no weights: no step 0, no sampling.")] = False,
    config_json: Annotated[
        Path | None, typer.Option("--config-json", help="The model's config.json, where the hub cannot be reached.")
    ] = None,
    row: Annotated[int, typer.Option("--row", help="Which usable row of the data to show.")] = 1,
) -> None:
    """Will this recipe run here, and on the right numbers?

    Environment against the tested versions; one preference pair as the model sees it (prints its text); the first
    batch scored and checked without an update; a plan of memory per device and operations per step. Exit code 1 if a
    check fails; what cannot be looked at here (no network, too little memory) is said and is no failure.
    """
    from alignment.recipes import RecipeError, load_recipe
    from alignment.recipes.inspection import what_is_missing

    loaded = load_recipe(recipe, overrides or ())
    problems = what_is_missing(loaded)
    if no_model:  # a plan for another machine needs no attention kernel on this one
        problems = [problem for problem in problems if problem.path != ("model", "attn_implementation")]
    if problems:
        raise RecipeError(problems)
    from rich.console import Console

    from alignment.doctor.examination import Options, examine

    options = Options(accelerate_config, world, config_json, row, not no_model)
    if not examine(loaded, options, Console()):
        raise typer.Exit(1)


@recipe_app.command()
def check(
    files: Annotated[
        list[str],
        typer.Argument(help="Recipes, then overrides for all of them.", metavar="RECIPE"),
    ],
) -> None:
    """Check recipes, and the files and packages that they name.

    Every problem is a line of its own; exit code 2 if there is one. No weights are loaded. A Python file in
    objective.file is executed: it registers the objective.
    """
    from alignment.recipes.inspection import check as problems_of

    overrides = [item for item in files if re.match(r"[A-Za-z_][\w.]*=", item)]
    recipes = [item for item in files if item not in overrides]
    if not recipes:
        raise UserError("recipe check: name at least one recipe file")
    failed = False
    for path in recipes:
        problems = problems_of(path, overrides)
        failed |= bool(problems)
        for problem in problems:
            typer.echo(f"error: {problem}", err=True)
        if not problems:
            typer.echo(f"ok: {path}")
    if failed:
        raise typer.Exit(2)


@recipe_app.command()
def explain(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Show every value and where it came from.

    That is a file and line, the command line, or a default with its source. A Python file in objective.file is
    executed: it registers the objective.
    """
    from alignment.recipes import load_any
    from alignment.recipes.inspection import explain as explained

    typer.echo(explained(load_any(recipe, overrides or ())))


@recipe_app.command()
def diff(first: RecipeFile, second: RecipeFile) -> None:
    """Show the resolved values in which two recipes differ.

    A Python file in objective.file is executed: it registers the objective.
    """
    from alignment.recipes import load_any
    from alignment.recipes.inspection import diff as difference

    typer.echo(difference(load_any(first), load_any(second)) or "no difference")


@data_app.command("report")
def data_report(
    recipe: RecipeFile,
    overrides: Overrides = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with plots as well.", metavar="FILE")
    ] = None,
) -> None:
    """Count what is in the preference data.

    Unusable rows by reason, lengths and length bias, duplicates, truncation, BOS and EOS, soft labels; no row's text.
    Reads all rows; loads the model's tokenizer, no weights. Exit code 1 if training would refuse the data.
    """
    from alignment.data.report import as_text
    from alignment.data.report import data_report as counted
    from alignment.recipes import RecipeError, load_recipe
    from alignment.recipes.inspection import what_is_missing

    loaded = load_recipe(recipe, overrides or ())
    if problems := what_is_missing(loaded):
        raise RecipeError(problems)
    found = counted(loaded)
    typer.echo(as_text(found))
    if html is not None:
        from alignment.data.report_page import write_page

        write_page(found, html)
        typer.echo(f"page: {html}")
    if not found.ok:
        raise typer.Exit(1)


Treatment = Annotated[str, typer.Option(help="flip, soft, margin, smooth, drop or keep.")]


@data_app.command("strength")
def data_strength(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Argument(help="A new .jsonl file.", metavar="OUT.jsonl")],
    overrides: Overrides = None,
    lowest: Treatment = "flip",
    low: Treatment = "soft",
    middle: Treatment = "keep",
    high: Treatment = "smooth",
    smoothing: Annotated[float, typer.Option("--smoothing", help="Of the treatment smooth.")] = 0.1,
    members: Annotated[int, typer.Option("--members", min=1, help="Heads that judge each row.")] = 10,
    folds: Annotated[int, typer.Option("--folds", min=2, help="Heads learn on all folds but the one they judge.")] = 5,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of folds and bootstraps.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows per forward pass.")] = 8,
) -> None:
    """Judge data.train by models that have not seen it, and write the rows with the doubtful ones mended.

    Linear heads on features of the recipe's model rank the rows: the lowest 20 % are flipped where they are judged the
    other way round, the next 20 % get soft labels, the highest 10 % smoothed ones, unless you say otherwise.
    """
    from alignment.data.strength import Bands
    from alignment.recipes import IterateRecipe, RecipeError, SftRecipe, load_any
    from alignment.recipes.inspection import what_is_missing

    loaded = load_any(recipe, overrides or ())
    if isinstance(loaded, SftRecipe | IterateRecipe):
        raise UserError(f"{recipe}: no preferences are given there (data.train, data.sample)")
    if problems := what_is_missing(loaded):
        raise RecipeError(problems)
    from alignment.runs.data_strength import mend

    bands = Bands(lowest, low, middle, high, smoothing=smoothing)
    found = mend(loaded, out, bands, members=members, folds=folds, seed=seed, batch_size=batch_size)
    for line in found.lines():
        typer.echo(line)
    typer.echo(f"rows: {out}")


@objectives_app.callback(invoke_without_command=True)
def list_all(context: typer.Context) -> None:
    """List objectives, show their cards, run their proofs.

    Without a command: the list, with paper and what each objective needs beyond log-probabilities of the policy.
    """
    if context.invoked_subcommand is not None:
        return
    from alignment.objectives import list_objectives

    cards = list_objectives()
    width = max(len(card.name) for card in cards)
    paper = max(len(card.paper) for card in cards)
    for card in cards:
        typer.echo(f"{card.name:<{width}}  {card.paper:<{paper}}  needs: {', '.join(card.needs) or 'nothing'}")


@objectives_app.command()
def show(name: Annotated[str, typer.Argument(help="An objective's name.", metavar="NAME")]) -> None:
    """Print an objective's card: formula, hyper-parameters, needs, pitfalls."""
    from alignment.objectives.render import show as card_text

    try:
        typer.echo(card_text(name))
    except ValueError as error:
        raise UserError(str(error)) from None


@objectives_app.command("check")
def prove(
    names: Annotated[list[str] | None, typer.Argument(help="Objectives; all if none.", metavar="NAME")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="Python file that registers an objective; it is executed.")
    ] = None,
) -> None:
    """Run the conformance suite.

    A line per check as it ends; exit code 1 if one fails. With --file, the objectives of that file unless named.
    """
    from alignment.objectives import load_plugin
    from alignment.objectives.conformance import run_checks

    try:
        registered = load_plugin(file) if file is not None else None
        results = run_checks(names or registered)
    except ValueError as error:
        raise UserError(str(error)) from None
    failed = passed = 0
    for result in results:
        failed, passed = failed + (not result.ok), passed + result.ok
        typer.echo(f"{'ok  ' if result.ok else 'FAIL'}  {result.objective:<16}  {result.check}: {result.detail}")
    typer.echo(f"{passed} checks passed, {failed} failed")
    if failed:
        raise typer.Exit(1)


@games_app.command("run")
def run_games(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="A folder; runs/games-NAME of the recipe otherwise.")
    ] = None,
) -> None:
    """Play objectives on enumerated responses, and log how far each is from the Nash policy.

    Writes figure.svg, figure.png, table.md and table.json, and prints the table. Exit code 1 if what theory says of
    exact runs (EGPO's linear rate, where mirror descent cannot converge) does not hold.
    """
    from alignment.games.recipe import load_games_recipe

    loaded = load_games_recipe(recipe, overrides or ())
    folder = output or Path("runs") / f"games-{recipe.stem}"
    from alignment.games.run import run_and_write

    text, holds = run_and_write(loaded.claim, loaded.experiment(), folder)
    typer.echo(text)
    typer.echo(f"figure: {folder / 'figure.svg'}")
    if not holds:
        raise typer.Exit(1)
