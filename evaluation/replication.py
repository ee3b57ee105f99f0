"""A claim of a paper, small: arms that differ in a few keys, several seeds each, one table with intervals.

    python evaluation/replication.py recipes/replications/p3o.yaml
    python evaluation/replication.py recipes/replications/egpo.yaml --output runs/egpo --seeds 5

The YAML names a task of `evaluation/tiny.py` (a tiny model and its prompts), what all arms share, the arms, and what
is measured. Each arm and seed is a normal run directory; what is complete is left as it is, so that the same command
goes on after an interruption. Writes table.md, table.json and figure.svg. Intervals are t intervals over seeds: they
hold what sampling and order change, not what another model or other prompts would. Not `alignment compare`: budgets
are as the YAML says.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from pydantic import Field

from alignment.errors import UserError, run_or_exit
from alignment.files import iterate_json_lines, read_json_object, write_json, write_text
from evaluation.experiments import Strict, cell, over_seeds, read_experiment

SAMPLES = 8  # of each held-out prompt when policies are measured
REPLIES = 40  # candidates for the best reply to a policy


class Arm(Strict):
    """One way to train: another recipe (of one run, or an iterative one), or other keys; or `untrained`, the start."""

    recipe: str | None = None
    overrides: list[str] = []
    shared: bool = True  # whether the overrides of all arms apply
    untrained: bool = False


class Replication(Strict):
    """The YAML file.

    Attributes:
        claim: what is looked for, in words.
        task: of `evaluation.tiny`: grammar, arithmetic or recite.
        recipe: of all arms that name none.
        overrides: of all arms; `{task}` is the task's folder, `{seed}` the seed.
        arms: name -> keys.
        seeds: so many, from 0.
        measure: `policy` (reward, KL and, with `oracle`, duels of all arms), or `answers`.
        reward, oracle: sections that measure the policies; may differ from what trains them.
        limit: held-out prompts.
        at_kl: compare rewards on the training prompts where a run's KL first passes this many nats.
    """

    claim: str
    task: Literal["grammar", "arithmetic", "recite"]
    recipe: str
    overrides: list[str] = []
    arms: dict[str, Arm]
    seeds: int = Field(3, ge=1)
    measure: Literal["policy", "answers"] = "policy"
    reward: dict[str, Any] | None = None
    oracle: dict[str, Any] | None = None
    limit: int = Field(60, ge=2)
    at_kl: float | None = Field(None, gt=0)


def run(replication: Replication, folder: Path) -> dict[str, Any]:
    """Train and measure what is not there yet; returns the content of table.json."""
    from alignment.recipes import load_any
    from evaluation import tiny

    task = folder / replication.task
    recipes = {
        (name, seed): load_any(arm.recipe or replication.recipe, _overrides(replication, arm, folder, name, seed))
        for name, arm in replication.arms.items()
        for seed in range(replication.seeds)
    }  # a mistake in one of them shows before any work
    task.mkdir(parents=True, exist_ok=True)
    tiny.build(replication.task, task)
    _refuse_changes(replication, folder)
    for (name, seed), recipe in recipes.items():
        if replication.arms[name].untrained:
            _leave(recipe, task / "model")
        else:
            _train(recipe, name, seed)
    curves = {name: _curves(folder, name, replication.seeds) for name in replication.arms}
    rows = []
    for name, seed in recipes:
        numbers = dict(_measured(replication, folder, task, name, seed))
        if replication.at_kl is not None:
            numbers[f"reward_at_kl_{replication.at_kl:g}"] = reward_at(curves[name][seed], replication.at_kl)
        rows.append({"arm": name, "seed": seed, **numbers})
    duels = _duels(replication, folder, task) if replication.oracle is not None else None
    return {
        "replication": replication.model_dump(mode="json"),
        "rows": rows,
        "summary": summarise(rows),
        "curves": curves,
        "duels": duels,
    }


def _overrides(replication: Replication, arm: Arm, folder: Path, name: str, seed: int) -> list[str]:
    own = [override.partition("=")[0] for override in arm.overrides]  # an arm's keys replace the shared ones
    shared = [
        o
        for o in replication.overrides
        if arm.shared and not any(f"{o.partition('=')[0]}.".startswith(f"{k}.") for k in own)
    ]
    given = [*shared, *arm.overrides]
    words = {"{task}": str(folder / replication.task), "{seed}": str(seed)}
    for word, value in words.items():
        given = [override.replace(word, value) for override in given]
    place = [f"training.output_dir={folder / f'{name}-{seed}'}", f"training.seed={seed}"]
    return [f"model.name_or_path={folder / replication.task / 'model'}", *given, *place]


def _refuse_changes(replication: Replication, folder: Path) -> None:
    """More seeds or arms may be added; anything else would mix two experiments."""
    file, now = folder / "replication.json", replication.model_dump(mode="json")
    if file.is_file():
        before = read_json_object(file)
        fixed = [key for key in now if key not in ("seeds", "arms", "claim", "reward", "oracle", "limit", "at_kl")]
        for key in fixed:
            if before.get(key) != now[key]:
                raise UserError(f"{folder}: began with another {key}; give another --output")
        for name, arm in before.get("arms", {}).items():
            if name in now["arms"] and now["arms"][name] != arm:
                raise UserError(f"{folder}: arm {name} began with other keys; rename it, or give another --output")
    write_json(file, now)


def _leave(recipe: Any, model: Path) -> None:
    """The run directory of an arm that is not trained."""
    run_dir = Path(recipe.training.output_dir)
    run_dir.mkdir(exist_ok=True)
    write_json(run_dir / "manifest.json", {"recipe": recipe.resolved()})
    write_text(run_dir / "metrics.jsonl", "")
    if not (run_dir / "final").exists():
        (run_dir / "final").symlink_to(model.resolve())


def _train(recipe: Any, name: str, seed: int) -> None:
    from alignment.pipeline.driver import run as iterate
    from alignment.recipes import IterateRecipe
    from alignment.runs.preferences import train

    run_dir = Path(recipe.training.output_dir)
    if (run_dir / "final").is_dir():
        return
    print(f"== {name}, seed {seed}", flush=True)
    if isinstance(recipe, IterateRecipe):
        iterate(recipe)
    else:
        train(recipe)


# --- measuring -------------------------------------------------------------------------------------------------------


def _held_out(replication: Replication, task: Path) -> list[dict[str, Any]]:
    file = task / ("held_out.txt" if replication.task == "grammar" else "held_out.jsonl")
    if file.suffix == ".txt":
        from alignment.data.prompt_files import read_prompts

        return [{"prompt": prompt} for prompt in read_prompts(file)][: replication.limit]
    return [row for _, row in iterate_json_lines(file)][: replication.limit]


def _measured(replication: Replication, folder: Path, task: Path, name: str, seed: int) -> dict[str, float]:
    """Numbers of one trained policy on held-out prompts; kept in its run directory."""
    run_dir = folder / f"{name}-{seed}"
    file = run_dir / "measured.json"
    key = {"reward": replication.reward, "limit": replication.limit, "measure": replication.measure}
    if file.is_file() and read_json_object(file)["of"] == key:
        numbers: dict[str, float] = read_json_object(file)["numbers"]
        return numbers
    rows = _held_out(replication, task)
    if replication.measure == "answers":
        from dataclasses import asdict

        from alignment.models import load_model, load_tokenizer
        from evaluation.answers import measure

        recipe = read_json_object(run_dir / "manifest.json")["recipe"]
        model, tokenizer = load_model(run_dir / "final"), load_tokenizer(run_dir / "final")
        found = asdict(measure(model, tokenizer, rows, max_new_tokens=recipe["generation"]["max_new_tokens"]))
        numbers = {
            k: float(v) for k, v in found.items() if isinstance(v, int | float) and k not in ("prompts", "samples")
        }
    else:
        numbers = _policy_numbers(replication, run_dir, task, rows)
    write_json(file, {"of": key, "numbers": numbers})
    return numbers


def _responses(run_dir: Path, rows: Sequence[Mapping[str, Any]], seed: int = 1) -> tuple[Any, Any, list[Any]]:
    from alignment.models import load_model, load_tokenizer
    from alignment.models.sampling import sample

    recipe = read_json_object(run_dir / "manifest.json")["recipe"]
    model, tokenizer = load_model(run_dir / "final"), load_tokenizer(run_dir / "final")
    new = recipe["generation"]["max_new_tokens"]
    drawn = sample(model, tokenizer, [row["prompt"] for row in rows], SAMPLES, max_new_tokens=new, seed=seed)
    return model, tokenizer, drawn


def _policy_numbers(
    replication: Replication, run_dir: Path, task: Path, rows: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Mean reward of fresh samples and their KL to the start: E_pi[log pi - log start], in nats."""
    from alignment.models import load_model
    from alignment.models.sampling import prompt_ids
    from alignment.rewards import get_reward
    from alignment.trainers.rollout import distinct
    from evaluation.policies import log_probs

    model, tokenizer, drawn = _responses(run_dir, rows)
    start = load_model(task / "model")
    flat = [(row["prompt"], one) for row, group in zip(rows, drawn, strict=True) for one in group]
    ids = [(prompt_ids(tokenizer, prompt), one.ids) for prompt, one in flat]
    ratios = log_probs(model, ids) - log_probs(start, ids)
    numbers = {"kl": float(ratios.mean()), "length": float(np.mean([len(one.ids) for _, one in flat]))}
    numbers["distinct_2"] = distinct([one.ids for _, one in flat], 2)
    if replication.reward is not None:
        reward = get_reward(**replication.reward)
        scores = reward.score([prompt for prompt, _ in flat], [one.text for _, one in flat])
        numbers["reward"] = float(np.nanmean(scores))
    return numbers


def _duels(replication: Replication, folder: Path, task: Path) -> dict[str, Any]:
    """Win rates of every arm's final policy against every other's under the oracle, and how far each can be exploited.

    `exploited`: of the REPLIES responses that the arms of a seed gave most often, the one that does best against the
    policy on all prompts wins so much more than 1/2. A lower bound of what a best reply to each prompt would win.
    """
    from alignment.rewards import get_oracle
    from evaluation.policies import means_of, tables_won

    assert replication.oracle is not None
    oracle, rows, names = get_oracle(**replication.oracle), _held_out(replication, task), list(replication.arms)
    prompts = [row["prompt"] for row in rows]

    def won(ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]]) -> float:
        return float(np.nanmean(means_of(tables_won(oracle, prompts, ours, theirs))))

    wins, exploited = [], []
    for seed in range(replication.seeds):
        texts = {
            # Draws of each policy's own: with shared random numbers close policies would say the same, and tie.
            name: [[one.text for one in group] for group in _responses(folder / f"{name}-{seed}", rows, number)[2]]
            for number, name in enumerate(names, start=1)
        }
        wins.append(np.array([[won(texts[a], texts[b]) for b in names] for a in names]))
        said = Counter(text for name in names for group in texts[name] for text in group)
        replies = [text for text, _ in said.most_common(REPLIES)]
        best = [max(won([[r]] * len(prompts), texts[name]) for r in replies) for name in names]
        exploited.append(np.array(best) - 0.5)
    return {
        "arms": names,
        "wins": [[over_seeds([w[i, j] for w in wins]) for j in range(len(names))] for i in range(len(names))],
        "exploited": {name: over_seeds([e[i] for e in exploited]) for i, name in enumerate(names)},
    }


def _curves(folder: Path, name: str, seeds: int) -> list[list[dict[str, Any]]]:
    """Per seed the logged lines of a rollout: its reward or preference, and its KL."""
    found = []
    for seed in range(seeds):
        lines = [row for _, row in iterate_json_lines(folder / f"{name}-{seed}" / "metrics.jsonl")]
        names = {"step": "step", "samples/kl": "kl", "reward": "reward", "preference": "preference"}
        found.append([{ours: r[k] for k, ours in names.items() if k in r} for r in lines if "samples/kl" in r])
    return found


def reward_at(curve: Sequence[Mapping[str, float]], kl: float) -> float:
    """Reward where the curve first passes `kl`, between the two rollouts around it; NaN where it never does."""
    points = [(point["kl"], point["reward"]) for point in curve if "reward" in point]
    for (before, low), (after, high) in zip(points, points[1:], strict=False):
        if before < kl <= after:
            return low + (high - low) * (kl - before) / (after - before)
    return math.nan


# --- the table -------------------------------------------------------------------------------------------------------


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and 95 % t interval over seeds of every number, one row per arm."""
    found = []
    for name in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == name]
        numbers = {k: over_seeds([row[k] for row in own]) for k in own[0] if k not in ("arm", "seed")}
        found.append({"arm": name, "seeds": len(own), **numbers})
    return found


def describe(result: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    asked, summary = result["replication"], result["summary"]
    lines = [f"{asked['claim']}", "", f"Tiny model `{asked['task']}`, {asked['seeds']} seeds, 95 % t intervals.", ""]
    names = [key for key in summary[0] if key not in ("arm", "seeds")]
    lines += ["| arm | " + " | ".join(n.replace("_", " ") for n in names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += ["| " + " | ".join([row["arm"], *(cell(row[n]) for n in names)]) + " |" for row in summary]
    if result["duels"] is not None:
        arms, wins = result["duels"]["arms"], result["duels"]["wins"]
        lines += ["", "Win rate of the row against the column, under the oracle; and what a best reply wins:", ""]
        lines += ["| | " + " | ".join(arms) + " | exploited |", "|---" * (len(arms) + 2) + "|"]
        for i, name in enumerate(arms):
            cells = ["–" if i == j else cell(wins[i][j]) for j in range(len(arms))]
            lines.append("| " + " | ".join([name, *cells, cell(result["duels"]["exploited"][name])]) + " |")
    return "\n".join(lines) + "\n"


def write_figure(result: Mapping[str, Any], path: Path) -> None:
    """Reward (or preference) against KL over training, one line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for number, (name, seeds) in enumerate(result["curves"].items()):
        for curve in seeds:
            which = "reward" if any("reward" in point for point in curve) else "preference"
            points = [(p["kl"], p[which]) for p in curve if which in p]
            if points:
                axes.plot(*zip(*points, strict=True), ".-", color=f"C{number}", alpha=0.6, linewidth=1)
        axes.plot([], [], color=f"C{number}", label=name)
    axes.set_xlabel("KL to the start, nats (training prompts)")
    axes.set_ylabel("reward or preference")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(
    replication: Annotated[Path, typer.Argument(help="A YAML file of recipes/replications.")],
    output: Annotated[Path | None, typer.Option(help="Where the runs go; default runs/FILE NAME.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="In place of the file's.")] = None,
) -> None:
    """Train arms with several seeds, and put what came of them side by side."""
    asked = read_experiment(replication, Replication)
    if seeds is not None:
        asked = asked.model_copy(update={"seeds": seeds})
    folder = output or Path("runs") / f"replication-{replication.stem}"
    folder.mkdir(parents=True, exist_ok=True)
    result = run(asked, folder)
    write_json(folder / "table.json", json.loads(json.dumps(result)))
    write_text(folder / "table.md", describe(result))
    write_figure(result, folder / "figure.svg")
    print(describe(result))
    print(f"{folder / 'table.md'}, figure.svg")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    run_or_exit(app)
