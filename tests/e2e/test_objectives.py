"""Every objective, trained end to end from its quick-start recipe on the tiny language model, and judged.

Those that sample while they train are judged the same way, apart from the fixed pairs, which they do not have.
Learning means: on openings that training never saw, fresh samples beat the starting model's (lower 95 % limit of the
win rate above one half), the mean reward rises by more than its interval, and the objective's own loss on a fixed set
of held-out pairs ends below its value at step 0. Two controls show that these could fail.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.data.preferences import read_rows
from alignment.data.sampled import best_against_worst
from alignment.files import write_json_lines
from alignment.models import load_model, load_tokenizer
from alignment.models.sampling import prompt_ids, sample
from alignment.objectives import list_objectives, objective_class
from alignment.recipes import load_recipe
from alignment.rewards import get_oracle, get_reward
from alignment.runs.preferences import train
from evaluation.comparison import Side, compare
from evaluation.plans import Plan, plan_of_run, sample_side
from tests import tiny_lm
from tests.e2e.conftest import TRAINED_ON, Grammar

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart"
ALL = sorted(path for path in QUICKSTART.glob("*.yaml") if path.stem not in ("sft", "reward_model", "iterate"))
ON_POLICY = [path for path in ALL if load_recipe(path).data.prompts is not None]
RECIPES = [path for path in ALL if path not in ON_POLICY]

# The recipes' rates are for 135M parameters; this model has 0.1M. One epoch is 14 steps.
LEARNING_RATE = 1e-3
GENTLER = {  # a large step overshoots: simpo loses the text, the others weigh z by exp(-z) or penalise falls of chosen
    "simpo": 3e-4,
    "dpop": 3e-4,
    "f_dpo objective.divergence=forward_kl": 2e-4,
    "f_dpo objective.divergence=alpha objective.alpha=0.5": 3e-4,
}
LONGER = {"simpo": 3}  # epochs, where a difference per token moves a win rate of short texts too slowly for one
VARIANTS = [
    ("dpo", "objective.label_smoothing=0.2"),
    ("ipo", "objective.normalization=mean", "objective.tau=2.0"),  # eight tokens: the same target as a sum's 0.25
    ("rpo", "objective.form=mean"),
    ("rpo", "objective.baseline=given"),
    ("vpo", "objective.calibration=rejected"),
    ("vpo", "objective.mode=online", "objective.calibration=given"),
    ("reward_aware_rpo", "objective.form=sq"),
    ("reward_aware_rpo", "objective.form=bwd_kl"),
    ("reward_aware_rpo", "objective.form=fwd_kl"),
    ("f_dpo", "objective.divergence=reverse_kl"),
    ("f_dpo", "objective.divergence=forward_kl"),
    ("f_dpo", "objective.divergence=jsd"),
    ("f_dpo", "objective.divergence=alpha", "objective.alpha=0.5"),
]
# `make test` trains the objectives that users meet first; conformance covers every loss there.
QUICK = ("dpo", "simpo", "spo", "rpo", "f_dpo")
SETTINGS = [pytest.param((p.stem,), marks=[] if p.stem in QUICK else pytest.mark.slow) for p in RECIPES]
SETTINGS += [pytest.param(setting, marks=pytest.mark.slow) for setting in VARIANTS]


@pytest.fixture(scope="module")
def held_out_pairs(grammar: Grammar, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of the starting model's samples on held-out openings: the fixed set on which the loss must fall.

    Judged by the count of kind words and by its oracle, which agree on the pairs: rows have every judge's columns.
    """
    model, tokenizer = load_model(grammar.model), load_tokenizer(grammar.model)
    prompts = grammar.held_out.read_text().split("\n")[:-1]
    samples = sample(model, tokenizer, prompts, 4, max_new_tokens=12, seed=5)
    encoded = [prompt_ids(tokenizer, p) for p in prompts]
    reward = get_reward("regex", pattern=tiny_lm.KIND_PATTERN)
    oracle = get_oracle("bradley_terry", reward={"name": "regex", "pattern": tiny_lm.KIND_PATTERN}, temperature=0.25)
    scored, _ = best_against_worst(prompts, encoded, samples, reward.score)
    judged, _ = best_against_worst(prompts, encoded, samples, probability=oracle.probability)
    assert [(row["chosen"], row["rejected"]) for row in scored] == [(row["chosen"], row["rejected"]) for row in judged]
    rows = [one | other for one, other in zip(scored, judged, strict=True)]
    file = tmp_path_factory.mktemp("pairs") / "held_out.jsonl"
    write_json_lines(file, rows)
    return file


@pytest.fixture(scope="module")
def start() -> dict[str, Side]:
    """The starting model's samples, drawn once for all runs."""
    return {}


def compared(plan: Plan, start: dict[str, Side]) -> dict[str, Any]:
    """win_rate.json's content for a run, without drawing the starting model's samples again."""
    if "side" not in start:
        start["side"] = sample_side(plan.baseline, plan)
    texts = [prompt.text for prompt in plan.prompts]
    return compare(texts, sample_side(plan.model, plan), start["side"], plan.judge, resamples=2000, seed=1).result


def trained(grammar: Grammar, run: Path, setting: tuple[str, ...], *more: str) -> Path:
    name, *overrides = setting
    recipe = next(path for path in RECIPES if path.stem == name)
    rate = GENTLER.get(" ".join(setting), LEARNING_RATE)
    epochs = [f"training.num_train_epochs={LONGER[name]}"] if name in LONGER else []
    judge = judged_by_kindness(recipe)
    given = grammar.overrides(run, f"training.learning_rate={rate}", *epochs, *judge, *overrides, *more)
    return train(load_recipe(recipe, given))


JUDGED = f"{{name: regex, pattern: '{tiny_lm.KIND_PATTERN}'}}"


def judged_by_kindness(recipe: Path) -> list[str]:
    """Overrides that put the Bradley-Terry oracle of the count of kind words in the place of a recipe's oracle."""
    oracle = f"oracle={{name: bradley_terry, temperature: 0.25, reward: {JUDGED}}}"
    return [] if load_recipe(recipe).oracle is None else ["reward=null", oracle]


def test_every_objective_has_a_quick_start():
    ours = [card for card in list_objectives() if objective_class(card.name).__module__.startswith("alignment.")]
    shipped = {card.name for card in ours if card.batch == "pairs"}
    assert {load_recipe(path).objective.name for path in RECIPES} == shipped
    assert len(shipped) >= 13
    sampling = {load_recipe(path).objective.name for path in ON_POLICY}
    assert sampling - {"vpo"} == {card.name for card in ours if card.batch != "pairs"} and len(sampling) >= 8


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: " ".join(setting).replace("objective.", ""))
def test_objective_learns(grammar, held_out_pairs, start, tmp_path, setting):
    run = trained(
        grammar,
        tmp_path / "run",
        setting,
        f"data.eval={held_out_pairs}",
        "training.eval_strategy=epoch",
        "training.eval_on_start=true",
    )
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["objective"]["name"] == setting[0] and manifest["pairs"] > 100
    result = compared(plan_of_run(run, judge=get_reward("regex", pattern=tiny_lm.KIND_PATTERN)), start)
    assert result["prompts"] == len(tiny_lm.openings()) - TRAINED_ON
    assert result["interval"][0] > 0.5, result
    assert result["mean_score"]["difference_interval"][0] > 0, result
    losses = [row["eval_loss"] for row in read_rows(run / "metrics.jsonl") if "eval_loss" in row]
    assert len(losses) == 1 + LONGER.get(setting[0], 1) and losses[-1] < losses[0]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.stem, marks=[] if path.stem in ("p3o", "egpo") else pytest.mark.slow)
        for path in ON_POLICY
        if path.stem != "likelihood"
    ],
)
def test_on_policy_objective_learns(grammar, start, tmp_path, name):
    """From its quick start: the judge is the count of kind words, or its Bradley-Terry oracle."""
    given = grammar.overrides(
        tmp_path / "run",
        "data.sample=null",
        f"data.prompts={{name: {grammar.prompts}}}",
        f"training.learning_rate={LEARNING_RATE}",
        *judged_by_kindness(QUICKSTART / f"{name}.yaml"),
    )
    run = train(load_recipe(QUICKSTART / f"{name}.yaml", given))
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["prompts"] == TRAINED_ON
    result = compared(plan_of_run(run, judge=get_reward("regex", pattern=tiny_lm.KIND_PATTERN)), start)
    assert result["prompts"] == len(tiny_lm.openings()) - TRAINED_ON
    assert result["interval"][0] > 0.5, result
    assert result["mean_score"]["difference_interval"][0] > 0, result


def test_likelihood_learns_the_reference_answer(grammar, tmp_path):
    """ "my dog" -> a chain that ends with " is" -> "kind ." or "warm .", as the noun decides: the reference answer
    becomes likelier by more than a nat, and the model says it itself more often."""
    prompts = sorted({opening.rpartition(" ")[0] for opening in tiny_lm.openings()})
    rows = [{"prompt": prompt, "answer": f"{tiny_lm.KIND[len(prompt.split()[1]) % 2]} ."} for prompt in prompts]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    given = grammar.overrides(
        tmp_path / "run",
        "data.sample=null",
        f"data.prompts={{name: {tmp_path / 'rows.jsonl'}}}",
        "reward=null",
        "evaluation=null",
        "rollout.answer={marker: ' is', separator: ' '}",
        f"training.learning_rate={LEARNING_RATE}",
        "training.num_train_epochs=4",
    )
    run = train(load_recipe(QUICKSTART / "likelihood.yaml", given))
    lines = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]

    def mean(name: str, part: slice) -> float:
        return sum(row[name] for row in lines[part]) / len(lines[part])

    first, last = slice(0, 5), slice(-5, None)
    assert mean("objective/answer_logprob", last) > mean("objective/answer_logprob", first) + 1
    assert mean("samples/accuracy", last) > mean("samples/accuracy", first) + 0.05


@pytest.mark.slow
def test_spo_reads_key_content_and_not_length_alone(grammar, held_out_pairs, tmp_path):
    """On held-out pairs, against chance, against what length alone would tell, and against both controls."""
    accuracy, length = {}, {}
    for removal in ("rake", "random", "length"):
        setting = ("spo", f"objective.removal={removal}", "objective.gamma=1", "objective.head_learning_rate=0.01")
        evaluated = (f"data.eval={held_out_pairs}", "training.eval_strategy=epoch", "training.num_train_epochs=3")
        run = trained(grammar, tmp_path / removal, setting, *evaluated)
        *_, last = (row for row in read_rows(run / "metrics.jsonl") if "eval_loss" in row)
        accuracy[removal], length[removal] = last["eval_degree/accuracy"], last["eval_degree/length_baseline"]
    assert accuracy["rake"] > length["rake"] + 0.2 > 1 / 3 + 0.2, (accuracy, length)
    assert accuracy["rake"] > max(accuracy["random"], accuracy["length"]) + 0.1, (accuracy, length)


def test_swapped_labels_teach_the_opposite(grammar, start, tmp_path):
    """Control: everything above hangs on which response is called chosen."""
    first = trained(grammar, tmp_path / "first", ("dpo",))
    other = {"chosen": "rejected", "rejected": "chosen"}
    rows = [
        {"_".join(other.get(part, part) for part in key.split("_")): value for key, value in row.items()}
        for row in read_rows(first / "preferences.jsonl")
    ]
    assert rows[0]["reward_chosen"] < rows[0]["reward_rejected"]
    write_json_lines(tmp_path / "swapped.jsonl", rows)
    run = trained(
        grammar, tmp_path / "swapped", ("dpo",), "data.sample=null", f"data.train={tmp_path / 'swapped.jsonl'}"
    )
    result = compared(plan_of_run(run), start)
    assert result["interval"][1] < 0.5
    assert result["mean_score"]["difference_interval"][1] < 0


def test_no_training_is_no_difference(grammar, start, tmp_path):
    """Control: the same judging of the starting model against itself, other draws, finds nothing."""
    plan = plan_of_run(trained(grammar, tmp_path / "run", ("dpo",)))
    compared(plan, start)
    untrained = sample_side(plan.baseline, replace(plan, seed=plan.seed + 1))
    texts = [prompt.text for prompt in plan.prompts]
    result = compare(texts, untrained, start["side"], plan.judge, resamples=2000, seed=1).result
    assert result["interval"][0] < 0.5 < result["interval"][1]
    low, high = result["mean_score"]["difference_interval"]
    assert low < 0 < high
