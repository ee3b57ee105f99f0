"""Win rate of a model against a baseline on the same prompts, with a bootstrap interval over prompts.

    python evaluation/win_rate.py --annotations annotations.json --json      # AlpacaEval's file, its keys, in percent
    python -m evaluation.win_rate runs/dpo                                   # a trained run against its starting model
    python -m evaluation.win_rate --a new.jsonl --b old.jsonl --reward vader   # files of outputs, or pools
    python -m evaluation.win_rate --model M --baseline B --prompts prompts.txt --reward length
    python -m evaluation.win_rate --a new.jsonl --b old.jsonl --oracle tabular --oracle-key table=table.json

A run's result goes to its win_rate.json, samples.jsonl and report.html; otherwise `--output FOLDER` keeps it. Judges
are the rewards and oracles of `alignment.rewards` (docs/rewards.md). The command line and the files of outputs are
here; sampling is in `plans`, numbers in `comparison` and `head_to_head`. docs/win_rates.md explains all of them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from alignment.data.overlap import TRAINED
from alignment.errors import UserError, run_or_exit
from alignment.files import jsonable, refuse_file
from alignment.locks import sole_user
from alignment.models.sampling import Generation
from alignment.rewards import PreferenceOracle, RewardFunction, get_oracle, get_reward
from evaluation.annotations import Annotation, difficulty_at, read_difficulty, read_model_outputs
from evaluation.comparison import Comparison, Side, compare, describe
from evaluation.equal_lengths import Difficulty
from evaluation.files import locate_prompts, read_outputs, read_pool, shorten
from evaluation.head_to_head import annotation_result, read_gamed, write_annotation_result
from evaluation.options import parse_keys
from evaluation.outputs import with_length_control, write_comparison, write_into_run, write_output
from evaluation.plans import (
    BASELINE_SEED_OFFSET,
    RESAMPLES,
    SAMPLES,
    ModelSource,
    Plan,
    overlap_notes,
    plan_of_run,
    read_manifest,
    run_plan,
    say,
)

__all__ = ["main", "win_rate_of_files", "write_comparison"]


def _read_side(path: Path) -> tuple[str, dict[str, tuple[str, list[str]]], dict[str, list[bool]] | None]:
    """Name, outputs by prompt, and what was finished where that is known."""
    if path.is_dir():
        return str(path), *read_pool(path)
    if path.name.endswith((".json", ".json.gz")):
        return *read_model_outputs(path), None
    return str(path), read_outputs(path), None


def win_rate_of_files(
    a: Path,
    b: Path,
    judge: RewardFunction | None = None,
    *,
    oracle: PreferenceOracle | None = None,
    resamples: int = RESAMPLES,
    seed: int = 1,
    difficulty: Difficulty | None = None,
) -> Comparison:
    """Compare two files of outputs or pools of samples, joined by prompt.

    Args:
        a, b: a .jsonl file with `prompt` and `response` in every row; AlpacaEval's model_outputs.json, whose generator
            names the side; or the folder of a pool, which also knows which samples are finished.
        difficulty: of length control; checked before anything is judged.

    Raises:
        UserError: a row is unusable, a pool incomplete, a prompt stands on one side only or has no difficulty.
    """
    read = [_read_side(side) for side in (a, b)]
    (_, outputs_a, _), (_, outputs_b, _) = read
    for here, there, other in ((outputs_a, outputs_b, b), (outputs_b, outputs_a, a)):
        alone = [prompt for prompt in here if prompt not in there]
        if alone:
            raise UserError(
                f"{here[alone[0]][0]}: prompt {shorten(alone[0])} is not in {other}; {len(alone)} such "
                f"prompt{'' if len(alone) == 1 else 's'}; both sides must answer the same prompts"
            )
    _refuse_unknown_difficulty(((prompt, outputs_a[prompt][0]) for prompt in outputs_a), difficulty)
    model, baseline = (
        Side(name, [out[p][1] for p in outputs_a], None if ended is None else [ended[p] for p in outputs_a])
        for name, out, ended in read
    )
    return compare(list(outputs_a), model, baseline, judge, oracle=oracle, resamples=resamples, seed=seed)


def _refuse_unknown_difficulty(prompts: Iterable[tuple[str, str]], difficulty: Difficulty | None) -> None:
    """UserError where a prompt (its text, where it stands) has no difficulty: said before samples and judges cost."""
    if difficulty is not None:
        for number, (prompt, where) in enumerate(prompts):
            difficulty_at(prompt, number, where, difficulty)


def _gamed_of(form: str, given: dict[str, Any]) -> list[list[Annotation]]:
    """The rows of every --gamed file; against whom they were judged is said where the baseline has no such name."""
    paths = given.get("gamed", [])
    if paths and form == "files" and given["b"].name.endswith((".json", ".json.gz")):
        name, _ = read_model_outputs(given["b"])
        if name != str(given["b"]):  # else its rows name no generator
            return read_gamed(paths, name, given["b"])
    found = read_gamed(paths)
    for path, rows in zip(paths, found, strict=True):
        say(f"--gamed {path}: its answers were judged against {rows[0].generator_1}; that must be this baseline")
    return found


def _given_judge(given: dict[str, Any]) -> dict[str, Any]:
    """The judge that the options name, as `judge` or `oracle`; nothing where they name none."""
    if "judge_from" in given:
        from alignment.recipes import load_recipe

        recipe = load_recipe(given["judge_from"])
        if recipe.reward is not None:
            return {"judge": get_reward(recipe.reward.name, **recipe.reward.options)}
        if recipe.oracle is not None:
            return {"oracle": get_oracle(recipe.oracle.name, **recipe.oracle.options)}
        raise UserError(f"--judge-from {given['judge_from']}: has neither a reward nor an oracle section")
    for kind in ("reward", "oracle"):
        if f"{kind}_key" in given and kind not in given:
            raise UserError(f"--{kind}-key without --{kind}: name the {kind} that the key belongs to")
    if "reward" in given:
        keys = parse_keys("reward", given["reward"], given.get("reward_key", []))
        return {"judge": get_reward(given["reward"], **keys)}
    if "oracle" in given:
        keys = parse_keys("oracle", given["oracle"], given.get("oracle_key", []))
        return {"oracle": get_oracle(given["oracle"], **keys)}
    return {}


_SAMPLING = {"prompts", "limit", "samples", "chat", "samples_dir", "vllm", *asdict(Generation())}
_JUDGES = {"reward", "oracle", "judge_from"}
_SUMMARY = {"seed", "bootstrap", "output", "json", "gamed", "difficulty"}
_SHARED = {*_JUDGES, "reward_key", "oracle_key", *_SUMMARY}
_FORMS = {  # what says which form is meant, what it needs besides a judge, what it may have
    "annotations": ({"annotations"}, {"annotations"}, _SUMMARY),
    "run": ({"RUN_DIR"}, {"RUN_DIR"}, _SHARED | _SAMPLING),
    "files": ({"a", "b"}, {"a", "b"}, _SHARED),
    "models": ({"model", "baseline"}, {"model", "baseline", "prompts"}, _SHARED | _SAMPLING | {"dtype"}),
}


def _spell(keys: Iterable[str]) -> str:
    return ", ".join(key if key.isupper() else "--" + key.replace("_", "-") for key in sorted(keys))


def choose_form(given: set[str]) -> str:
    """Which of the four forms the given options ask for; options of another form are refused, never ignored."""
    chosen = [name for name, (signs, _, _) in _FORMS.items() if signs & given]
    if len(chosen) != 1:
        forms = "RUN_DIR; --a FILE --b FILE; --model A --baseline B; --annotations FILE"
        raise UserError(f"give exactly one of: {forms} (see --help)")
    signs, needs, allowed = _FORMS[chosen[0]]
    if needs - given:
        raise UserError(f"{_spell(needs - given)} missing: needed with {_spell(signs & given)}")
    if given - needs - allowed:
        raise UserError(f"{_spell(given - needs - allowed)} does not apply with {_spell(signs)}; remove it")
    if len(named := given & _JUDGES) > 1:
        raise UserError(f"{_spell(named)}: one judge decides; keep one of them")
    if chosen[0] in ("files", "models") and not given & _JUDGES:
        raise UserError(f"--reward, --oracle or --judge-from missing: needed with {_spell(signs & given)}")
    return chosen[0]


def compare_as_asked(form: str, given: dict[str, Any], difficulty: Difficulty | None = None) -> Comparison:
    """Carry out one form with the options that were given; a prompt without difficulty is refused before it begins."""
    judge = _given_judge(given)
    renamed = {"bootstrap": "resamples", "seed": "seed", "samples": "samples_per_prompt"}
    settings = {renamed[key]: given[key] for key in renamed if key in given}
    if form == "run":
        file: dict[str, Any] = {key: given[key] for key in ("prompts", "limit", "chat", "vllm") if key in given}
        file["samples"] = given.get("samples_dir", given["RUN_DIR"] / SAMPLES)
        plan = plan_of_run(given["RUN_DIR"], generation=_generation(given), **judge, **file, **settings)
    elif form == "files":
        return win_rate_of_files(given["a"], given["b"], **judge, **settings, difficulty=difficulty)
    else:
        plan = _plan_of_models(given, judge, settings)
    _refuse_unknown_difficulty(((prompt.text, prompt.where) for prompt in plan.prompts), difficulty)
    return run_plan(plan)


def _plan_of_models(given: dict[str, Any], judge: dict[str, Any], settings: dict[str, Any]) -> Plan:
    dtype = given.get("dtype", "float32")
    prompts = locate_prompts(given["prompts"], given.get("limit"))
    notes = {"overlap_note": "not checked: what the models were trained on is unknown here"}
    run = Path(given["model"]).parent
    if (run / TRAINED).is_file():  # the model is a run's final/ or checkpoint
        notes = overlap_notes(run, read_manifest(run), prompts)
    return Plan(
        model=ModelSource(given["model"], {"name_or_path": given["model"], "dtype": dtype}),
        baseline=ModelSource(
            given["baseline"], {"name_or_path": given["baseline"], "dtype": dtype}, BASELINE_SEED_OFFSET
        ),
        prompts=prompts,
        judge=judge.get("judge"),
        oracle=judge.get("oracle"),
        generation=Generation(**_generation(given)),
        chat=given.get("chat", False),
        notes=notes,
        samples=given.get("samples_dir", given["output"] / SAMPLES if "output" in given else None),
        vllm=given.get("vllm", False),
        **settings,
    )


def _generation(given: dict[str, Any]) -> dict[str, Any]:
    return {key: given[key] for key in asdict(Generation()) if key in given}


def run_program(given: dict[str, Any]) -> None:
    """Compare, keep what is to be kept, print the result; what is written into a run is written by nobody else."""
    form = choose_form(set(given))
    refuse_file(given.get("output"), "--output")
    into_run = form == "run" and "output" not in given and given["RUN_DIR"].is_dir()
    with sole_user(given["RUN_DIR"]) if into_run else contextlib.nullcontext():
        _run_form(form, given)


def _run_form(form: str, given: dict[str, Any]) -> None:
    written: list[Path] = []
    if form == "annotations":
        settings = {"resamples": given.get("bootstrap", RESAMPLES), "seed": given.get("seed", 1)}
        control = {"gamed": given.get("gamed", ()), "difficulty": given.get("difficulty")}
        result, text, systems = annotation_result(given["annotations"], **control, **settings)
        if "output" in given:
            written = write_annotation_result(given["output"], result, text, systems)
    else:
        gamed = _gamed_of(form, given)
        difficulty = read_difficulty(given["difficulty"]) if "difficulty" in given else None
        comparison = with_length_control(compare_as_asked(form, given, difficulty), gamed, difficulty)
        result, text = comparison.result, describe(comparison.result)
        if "output" in given:
            written = write_output(given["output"], comparison)
        elif form == "run":
            written = write_into_run(given["RUN_DIR"], comparison)
    print(json.dumps(jsonable(result), allow_nan=False) if "json" in given else text)
    if written:
        say("written: " + ", ".join(map(str, written)))


RunDir = Annotated[
    Path | None,
    typer.Argument(help="A run that scripts/train.py wrote: RUN_DIR/final against the model it started from."),
]
OptionalPath = Path | None
OptionalInt = int | None
OptionalFloat = float | None
Chat = Annotated[
    bool | None,
    typer.Option(
        help="Prompts go through the chat template as what a user says. [as the run's training rows, else not]"
    ),
]
Temperature = Annotated[
    OptionalFloat,
    typer.Option(min=0, help="1 compares the models as trained; 0 is greedy, one response for all samples. [1]"),
]
Seed = Annotated[
    OptionalInt,
    typer.Option(
        min=0,
        help="Of the bootstrap and the model's samples; the baseline's add 1,000,000. Not the seed that drew the "
        "training data. [1]",
    ),
]


def main(
    run_dir: RunDir = None,
    a: Annotated[
        OptionalPath,
        typer.Option(help="The system under test: JSON lines of prompt and response, model_outputs.json, or a pool."),
    ] = None,
    b: Annotated[OptionalPath, typer.Option(help="The same prompts answered by the baseline; file or pool.")] = None,
    model: Annotated[str | None, typer.Option(help="Model under test: hub id, folder, adapter or GGUF file.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Model that it is compared with.")] = None,
    annotations: Annotated[
        list[Path] | None,
        typer.Option(help="AlpacaEval's annotations.json; several, of one baseline, are compared in pairs."),
    ] = None,
    gamed: Annotated[
        list[Path] | None,
        typer.Option(help="Annotations of the baseline told to be verbose, or concise: regularise length control."),
    ] = None,
    difficulty: Annotated[
        OptionalPath, typer.Option(help="Instruction difficulty for length control: JSON by text, CSV by row.")
    ] = None,
    prompts: Annotated[
        OptionalPath, typer.Option(help="Text file, one prompt a line. Over 128 give a usable interval. [recipe's]")
    ] = None,
    limit: Annotated[
        OptionalInt, typer.Option(min=1, help="Only the first so many prompts: a quick look. [all]")
    ] = None,
    chat: Chat = None,
    reward: Annotated[
        str | None, typer.Option(help="Judge: a reward of docs/rewards.md, such as vader. [recipe's judge]")
    ] = None,
    reward_key: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A key of the reward, such as pattern='(?i)good'.")
    ] = None,
    oracle: Annotated[
        str | None, typer.Option(help="Judge: an oracle of docs/rewards.md, such as llm_judge. [recipe's judge]")
    ] = None,
    oracle_key: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A key of the oracle, such as table=table.json.")
    ] = None,
    judge_from: Annotated[
        OptionalPath, typer.Option(help="Judge: the reward or oracle section of this recipe.")
    ] = None,
    samples: Annotated[
        OptionalInt, typer.Option(min=1, help="Samples per prompt and model; more prompts help more than samples. [2]")
    ] = None,
    max_new_tokens: Annotated[
        OptionalInt, typer.Option(min=1, help="Longest response; time grows with it. [the recipe's, else 1024]")
    ] = None,
    temperature: Temperature = None,
    top_p: Annotated[OptionalFloat, typer.Option(min=0, max=1, help="Nucleus sampling; 1 is off. [1]")] = None,
    top_k: Annotated[OptionalInt, typer.Option(min=0, help="Only the k likeliest tokens; 0 is off. [0]")] = None,
    batch_size: Annotated[
        OptionalInt, typer.Option(min=1, help="Responses drawn at once; lower it if memory runs out. [64]")
    ] = None,
    samples_dir: Annotated[
        OptionalPath,
        typer.Option(help="Samples are kept here and gone on from. [win_rate_samples in RUN_DIR or --output]"),
    ] = None,
    vllm: Annotated[bool | None, typer.Option("--vllm", help="Draw with vLLM, where it is installed.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Weights with --model: float32, bfloat16, float16. [float32]")
    ] = None,
    seed: Seed = None,
    bootstrap: Annotated[
        OptionalInt, typer.Option(min=100, help="Resamples of prompts; under 1,000 the limits wobble. [10000]")
    ] = None,
    output: Annotated[
        OptionalPath,
        typer.Option(
            help="Folder for JSON, Markdown, HTML, AlpacaEval's files, samples. [RUN_DIR, else nothing kept]"
        ),
    ] = None,
    as_json: Annotated[
        bool | None, typer.Option("--json", help="Print win_rate.json's content instead of the text.")
    ] = None,
) -> None:
    """Win rate of a model against a baseline on the same prompts, with a 95 % interval over prompts.

    Four forms: RUN_DIR; --a FILE --b FILE --reward NAME; --model A --baseline B --prompts FILE --reward NAME; with
    --oracle NAME or --judge-from RECIPE in place of --reward NAME, too; --annotations FILE. Settings that are not
    given come from the run's recipe, else from the value in brackets. Every sample of one side meets every sample of
    the other; ties count one half, and the rate without them is stated too. A reward decides a pair, an oracle's
    probability counts as it is.
    """
    given = {key: value for key, value in locals().items() if value is not None and value != []}
    run_program({{"run_dir": "RUN_DIR", "as_json": "json"}.get(key, key): value for key, value in given.items()})


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    run_or_exit(app)
