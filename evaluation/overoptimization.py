"""Does a proxy reward over-optimise, and do ensembles resist? One command from policy to figure (Coste et al. 2024).

    python evaluation/overoptimization.py recipes/overoptimization/smollm2.yaml
    python evaluation/overoptimization.py recipes/overoptimization/smollm2.yaml --output runs/oo --seeds 5

The policy answers prompts; the gold reward says which of two answers is better; some labels are flipped; an ensemble
of reward models is trained on them, once per noise and seed; the policy draws a pool of N answers to prompts that no
pair has; the best of n by single member, mean, wco and uwo are compared by gold (`best_of_n`). Every stage leaves
files in the output folder and is skipped when they are there; the same command goes on after an interruption.
Not a benchmark of reward models: gold is whatever the experiment names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from pydantic import Field

from alignment.errors import UserError, run_or_exit
from alignment.files import json_digest, read_json_object, write_json, write_json_lines
from alignment.models.sampling import Generation
from evaluation.best_of_n import default_ns, overoptimization_curves
from evaluation.experiments import Strict, over_seeds, read_experiment
from evaluation.overoptimization_page import write_result
from evaluation.plans import ModelSource, say

METHODS = ("single", "mean", "wco", "uwo")


class Prompts(Strict):
    """A file of prompts, or its first `limit`."""

    file: str
    limit: int | None = Field(None, ge=1)


class Experiment(Strict):
    """The YAML file.

    Attributes:
        policy: arguments of `load_model` (name_or_path, dtype …).
        gold: a reward section: what the proxies are to stand for.
        pairs: prompts that the training pairs answer.
        samples_per_prompt: answers of one prompt; the first is paired with the second, the third with the fourth ….
        pool: prompts of the best-of-n pool; none of them may be in `pairs`.
        n: N, answers to each of them.
        reward_model: recipe of the ensemble (scripts/train_reward_model.py); its data come from here.
        overrides: of that recipe.
        noise: shares of flipped labels.
        seeds: the ensemble is trained so often at each noise; they decide its heads, order and flips.
        lam: lambda of uwo.
        max_new_tokens, batch_size: of the answers.
    """

    policy: dict[str, Any]
    gold: dict[str, Any]
    pairs: Prompts
    samples_per_prompt: int = Field(2, ge=2)
    pool: Prompts
    n: int = Field(512, ge=2)
    reward_model: str
    overrides: list[str] = []
    noise: list[float] = [0.0, 0.25]
    seeds: int = Field(3, ge=1)
    lam: float = Field(0.5, ge=0)
    max_new_tokens: int = Field(1024, ge=1)
    batch_size: int = Field(128, ge=1)


def run(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Carry out what is not there yet; returns the content of overoptimization.json."""
    from alignment.data.overlap import asked
    from alignment.data.prompt_files import read_prompts
    from alignment.rewards import get_reward

    settings = experiment.model_dump(mode="json")
    gold, recipe = get_reward(**experiment.gold), _recipe(experiment, [])  # mistakes in them show before any work
    questions = [read_prompts(p.file, p.limit) for p in (experiment.pairs, experiment.pool)]
    both = set(map(asked, questions[0])) & set(map(asked, questions[1]))
    if both:
        raise UserError(
            f"{experiment.pool.file}: {len(both)} prompts are in {experiment.pairs.file}, too: first "
            f"{sorted(both)[0][:60]!r}"
        )
    digests = {
        "pairs": json_digest(questions[0]),
        "pool": json_digest(questions[1]),
        "reward_model": json_digest({k: v for k, v in recipe.resolved().items() if k != "data"}),
    }
    _refuse_changes(folder, settings, digests)
    write_json(folder / "experiment.json", settings | {"sha256": digests})
    pairs, counts = _pairs(experiment, folder, questions[0], gold)
    pool, gold_scores = _pool(experiment, folder, questions[1], gold)
    ns = default_ns(experiment.n)
    found = []
    for noise in experiment.noise:
        for seed in range(experiment.seeds):
            name = f"noise-{noise:g}-seed-{seed}"
            say(f"reward models: {name}")
            trained = _train(experiment, folder / "reward-models" / name, pairs, noise, seed)
            members, facts = _member_scores(folder, pool, trained)
            curves = overoptimization_curves(
                members, gold_scores, ns, lam=experiment.lam, mean=facts["mean"], std=facts["std"], seed=seed
            )
            raw = overoptimization_curves(members, gold_scores, ns, lam=experiment.lam, normalise="none", seed=seed)
            found.append(
                {"noise": noise, "seed": seed, "curves": curves, "curves_not_normalised": raw}
                | _agreement(members, gold_scores)
            )
    from alignment.environment import hardware, versions

    result = {
        "experiment": settings,
        "pairs": counts,
        "gold": gold.describe(),
        "runs": found,
        "summary": summarise(found),
        "summary_not_normalised": summarise(found, "curves_not_normalised"),
        "versions": versions(),
        "hardware": hardware(1),
    }
    write_result(folder, result)
    return result


def _refuse_changes(folder: Path, settings: dict[str, Any], digests: dict[str, str]) -> None:
    """More seeds or noises may be added to an experiment; anything else would mix two.

    `digests` are of the prompts and of the reward model's recipe, whose files may change under the same name; a folder
    of before they were kept has none.
    """
    file = folder / "experiment.json"
    if not file.is_file():
        return
    before = read_json_object(file)
    for key in settings:
        if key not in ("seeds", "noise") and before.get(key) != settings[key]:
            raise UserError(f"{file}: {key} was {before.get(key)!r} and is {settings[key]!r}: give another --output")
    for key, digest in digests.items():
        if before.get("sha256", digests)[key] != digest:
            raise UserError(
                f"{file}: the content of {key} is not what the experiment began with: give another --output"
            )


def _source(experiment: Experiment) -> ModelSource:
    return ModelSource(str(experiment.policy.get("name_or_path")), dict(experiment.policy))


def _pairs(experiment: Experiment, folder: Path, prompts: list[Any], gold: Any) -> tuple[Path, dict[str, int]]:
    """pairs.jsonl: two answers of the policy each, the better one by gold chosen; ties are dropped and counted."""
    file, counted = folder / "pairs.jsonl", folder / "pairs.json"
    if counted.is_file():
        return file, {key: int(value) for key, value in read_json_object(counted).items()}
    from alignment.data.sampled import in_form_of
    from evaluation.pools import sample_source

    generation = Generation(max_new_tokens=experiment.max_new_tokens, batch_size=experiment.batch_size)
    draws = sample_source(
        _source(experiment), prompts, folder / "answers", experiment.samples_per_prompt, generation=generation, seed=2
    )
    rows: list[dict[str, Any]] = []
    counts = {"pairs": 0, "ties": 0, "unscored": 0}
    for shard in range(len(draws.shards)):
        asked, answers = draws.read(shard)
        for prompt, texts in zip(asked, answers, strict=True):
            scores = gold.score([prompt] * len(texts), texts)
            for i in range(0, len(texts) - 1, 2):
                a, b = scores[i], scores[i + 1]
                if np.isnan(a) or np.isnan(b):
                    counts["unscored"] += 1
                elif a == b:
                    counts["ties"] += 1
                else:
                    best, worst = (i, i + 1) if a > b else (i + 1, i)
                    pair = {"chosen": texts[best], "rejected": texts[worst]}
                    row = {"prompt": prompt} | {key: in_form_of(prompt, text) for key, text in pair.items()}
                    rows.append(row | {"reward_chosen": max(a, b), "reward_rejected": min(a, b)})
    counts["pairs"] = len(rows)
    write_json_lines(file, rows)
    write_json(counted, counts)
    return file, counts


def _pool(experiment: Experiment, folder: Path, prompts: list[Any], gold: Any) -> tuple[Any, np.ndarray]:
    from evaluation.pools import identity_of, sample_source, stored_scores

    generation = Generation(max_new_tokens=experiment.max_new_tokens, batch_size=experiment.batch_size)
    pool = sample_source(_source(experiment), prompts, folder / "pool", experiment.n, generation=generation, seed=1)
    return pool, stored_scores(pool, identity_of(gold), gold.score, "gold")[0]


def _recipe(experiment: Experiment, given: list[str]) -> Any:
    """The ensemble's recipe with the overrides `given` and the experiment's."""
    from alignment.recipes import load_reward_model_recipe

    recipe = load_reward_model_recipe(experiment.reward_model, [*given, *experiment.overrides])
    if recipe.reward_model.members < 2:
        raise UserError(f"{experiment.reward_model}: reward_model.members: an ensemble needs two or more")
    return recipe


def _train(experiment: Experiment, run_dir: Path, pairs: Path, noise: float, seed: int) -> Path:
    """The ensemble of one noise and seed; what is complete is left as it is."""
    from alignment.runs.reward_model import train

    given = [
        f"data.train={json.dumps(str(pairs))}",
        "data.eval=null",
        "training.eval_strategy=no",
        f"data.label_noise={noise}",
        f"data.noise_seed={seed}",
        f"training.seed={seed}",
        f"training.output_dir={json.dumps(str(run_dir))}",
    ]
    recipe = _recipe(experiment, given)
    independent = recipe.reward_model.mode == "independent"
    done = (run_dir / "manifest.json" if independent else run_dir / "final").exists()
    return run_dir if done else train(recipe, resume=independent and run_dir.exists())


def _member_scores(folder: Path, pool: Any, trained: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """`[k, Q, N]` scores of the members, and their constants. Where the trunk is as it was, its features of the pool
    are computed once and every ensemble's heads are applied to them."""
    from alignment.rewards.scored import EnsembleReward, load
    from evaluation.pools import identity_of, stored_scores

    ensemble = EnsembleReward(path=str(trained), how="mean", normalise="none")
    mean, std = ensemble.constants()
    facts = {"mean": mean, "std": std}
    manifest = read_json_object(trained / "manifest.json")
    if not manifest["recipe"]["reward_model"]["freeze_trunk"]:
        return stored_scores(pool, identity_of(ensemble), ensemble.member_scores, "proxy"), facts
    loaded = load(str(trained), "float32")
    features = _features(folder, pool, loaded)  # [Q, N, width]
    weight = loaded.model.score.weight.double().numpy()
    return np.moveaxis(features @ weight.T, 2, 0), facts


def _features(folder: Path, pool: Any, loaded: Any) -> np.ndarray:
    """`[Q, N, width]` float64, kept under the trunk's weights; equal answers are computed once."""
    from safetensors.numpy import load_file, save_file

    from alignment.models.loading import fingerprint
    from alignment.models.reward_model import trunk_features
    from alignment.rewards.scored import token_rows

    trunk = getattr(loaded.model, loaded.model.base_model_prefix)
    file = folder / f"features-{fingerprint(trunk)}.safetensors"
    if not file.is_file():
        tables = []
        for shard in range(len(pool.shards)):
            prompts, answers = pool.read(shard)
            flat = [(prompt, text) for prompt, texts in zip(prompts, answers, strict=True) for text in texts]
            unique = list(dict.fromkeys((str(p), t) for p, t in flat))
            of = {(str(p), t): p for p, t in flat}
            rows = token_rows(loaded, [of[key] for key in unique], [text for _, text in unique])
            if any(row is None for row in rows):
                raise UserError(f"{pool.folder}: shard {shard} holds answers that the reward model cannot read")
            table = trunk_features(loaded.model, [r for r in rows if r], loaded.pad, 64, f"features, shard {shard}")
            place = {key: i for i, key in enumerate(unique)}
            tables.append(table.numpy()[[place[str(p), t] for p, t in flat]])
        beside = file.with_name(f".{file.name}.tmp")
        save_file({"features": np.concatenate(tables)}, beside)
        beside.replace(file)
    return load_file(file)["features"].astype(np.float64).reshape(pool.prompts, pool.n, -1)


def _agreement(members: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """Mean over prompts of the rank correlation of single members, and of their mean, with gold; and the members'."""
    from scipy.stats import spearmanr

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        rows = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True) if np.ptp(x) > 0 and np.ptp(y) > 0]
        return float(np.mean(rows)) if rows else float("nan")

    return {
        "single_with_gold": float(np.mean([correlation(member, gold) for member in members])),
        "mean_with_gold": correlation(members.mean(0), gold),
        "members_with_each_other": correlation(members[0], members[1]),
    }


def summarise(runs: list[dict[str, Any]], which: str = "curves") -> list[dict[str, Any]]:
    """Per noise and method over seeds: gold at n = 1, at its best n, at the largest n, and what is lost in between.

    `lost` is gold at the largest n minus gold at the curve's best n; `over_single` is gold at the largest n minus the
    single members'. Intervals are 95 % t intervals over seeds (None for one seed): three seeds make them wide. `which`
    curves: of standardised members, or "curves_not_normalised".
    """
    rows = []
    for noise in dict.fromkeys(each["noise"] for each in runs):
        of = [each[which] for each in runs if each["noise"] == noise]
        single = np.array([c["single"][-1]["gold"] for c in of])
        for method in METHODS:
            last = np.array([c[method][-1]["gold"] for c in of])
            gold = np.array([[row["gold"] for row in c[method]] for c in of])  # [seeds, ns]
            best = int(gold.mean(0).argmax())
            rows.append(
                {
                    "noise": noise,
                    "method": method,
                    "seeds": len(of),
                    "gold_at_1": float(gold[:, 0].mean()),
                    "best_n": of[0][method][best]["n"],
                    "best_gold": over_seeds(gold[:, best]),
                    "largest_n": of[0][method][-1]["n"],
                    "last_gold": over_seeds(last),
                    "lost": over_seeds(last - gold[:, best]),
                    "over_single": over_seeds(last - single),
                }
            )
    return rows


def main(
    experiment: Annotated[Path, typer.Argument(help="YAML: see recipes/overoptimization/.", metavar="EXPERIMENT")],
    output: Annotated[Path | None, typer.Option(help="Folder of the experiment. [runs/ and the file's name]")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Instead of the file's number.")] = None,
) -> None:
    """From a policy and a gold reward to the over-optimisation figure: pairs, ensembles, pool, best of n."""
    settings = read_experiment(experiment, Experiment)
    if seeds is not None:
        settings = settings.model_copy(update={"seeds": seeds})
    folder = output or Path("runs") / f"overoptimization-{experiment.stem}"
    run(settings, folder)
    print((folder / "overoptimization.md").read_text(encoding="utf-8"))
    print(f"report: {folder / 'overoptimization.html'}")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    run_or_exit(app)
