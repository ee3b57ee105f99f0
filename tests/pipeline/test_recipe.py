"""Recipes of iterative training: what is refused, in one line at its key, and what one iteration trains by."""

from __future__ import annotations

import re

import pytest

from alignment.recipes import IterateRecipe, RecipeError, load_any, load_iterate_recipe, load_recipe
from alignment.recipes.inspection import explain
from alignment.recipes.iterate import iterate_model, iteration_sections, reference_model
from alignment.recipes.loading import Recipe
from tests.pipeline.conftest import QUICKSTART

REWARD = "reward={name: vader}"
REFUSED = [
    (["iterate.samples=1"], "iterate.samples: one sample makes no pair: at least 2"),
    (["iterate.samples=6"], "iterate.samples: a tournament needs 4, 8, 16 … samples, got 6"),
    (
        ["iterate.pairing=iid", "iterate.samples=3"],
        "iterate.samples: pairs of independent samples need an even number",
    ),
    (["iterate.labels=drawn"], "iterate.labels: belongs to pairing iid, and pairing is tournament"),
    (["iterate.min_gap=0.1"], "iterate.min_gap: belongs to pairing best_worst"),
    (["iterate.length_penalty=0.1"], "iterate.length_penalty: is taken from a reward, and the judge is an oracle"),
    (["reference=null"], "reference: must be said: fixed (the base), previous"),
    (["reference=moving"], "reference: expected fixed, previous or {checkpoint: PATH}, got 'moving'"),
    (["reference={path: x}"], "reference.checkpoint: required key is missing"),
    (["oracle=null"], "iterate: needs a reward or oracle section"),
    ([REWARD], "oracle: excludes reward"),
    (["iterate.train_on=all"], "iterate.train_on: objective 'inpo' is a step from the policy that sampled: new"),
    (["iterate.start=base"], "iterate.start: objective 'inpo' is a step from the policy that sampled: previous"),
    (["generation.temperature=0.7"], "generation.temperature: objective 'inpo' assumes samples of the iterate itself"),
    (["generation.top_p=0.9"], "generation.top_p: objective 'inpo' assumes samples of the iterate itself"),
    (["generation.replay=x.jsonl"], "generation.replay: belongs to on-policy training"),
    (["data.max_length=24"], "generation.max_new_tokens: leaves no token of data.max_length 24 for a prompt, got 24"),
    (["data.prompts=[a.txt, b.txt]"], "data.prompts: 2 sources for 3 iterations: one for all, or one each"),
    (["data.train=x.jsonl"], "data.train: not accepted: the iterates write their own preferences; give prompts"),
    (["training.push_to_hub=true"], "training.push_to_hub: every iterate would be uploaded"),
    (["training.eval_strategy=epoch"], "training.eval_strategy: there are no held-out preferences"),
    (["training.save_only_model=true"], "training.save_only_model: an iteration that was killed could not go on"),
    (["objective={name: simpo}"], "reference: objective 'simpo' reads no reference; leave it out"),
    (["objective={name: p3o}", "oracle=null", REWARD], "objective.name: 'p3o' samples while it trains"),
    (["objective={name: sppo}", "iterate.pairing=best_worst"], "reference: objective 'sppo' compares with the policy"),
    (["objective={name: sppo}", "reference=previous"], "iterate.pairing: objective 'sppo' reads how often a response"),
    (
        ["objective={name: gpo}", "oracle=null", REWARD, "reference=previous", "iterate.pairing=best_worst"],
        "objective.name: objective 'gpo' reads probabilities: judge with an oracle",
    ),
    (["objective={name: reward_aware_rpo}"], "objective.name: objective 'reward_aware_rpo' reads rewards"),
    (
        ["objective={name: vpo}", "reference=previous", "iterate.start=base"],
        "iterate.start: trains from the base, and the reference would be another model",
    ),
    (["lora={r: 4}", "model.adapter=x"], "lora: trains a fresh adapter, and model.adapter is trained on as it is"),
    (["reference=previous"], "reference: inpo reads the previous iterate besides: its weight tau would do nothing"),
    (
        ["objective={name: sppo}", "reference=previous", "iterate.pairing=best_worst", "iterate.label_noise=0.1"],
        "iterate.label_noise: objective 'sppo' does not read which response is chosen",
    ),
    (["model.quantization=nf4"], "model.quantization: quantised weights cannot be trained: add a lora section"),
    (["iterate.rounds=3"], "iterate.rounds: unknown key"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), REFUSED, ids=lambda value: " ".join(value)[:60] * isinstance(value, list)
)
def test_what_is_refused(root, monkeypatch, overrides, message):
    monkeypatch.chdir(root)
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_iterate_recipe(QUICKSTART, overrides)


def test_programs_of_other_kinds_name_ours(root, monkeypatch):
    monkeypatch.chdir(root)
    assert isinstance(load_any(QUICKSTART), IterateRecipe)
    with pytest.raises(RecipeError, match="is iterative training: run python scripts/iterate.py"):
        load_recipe(QUICKSTART)
    with pytest.raises(RecipeError, match="is preference training: run python scripts/train.py"):
        load_iterate_recipe(QUICKSTART.with_name("dpo.yaml"))


def test_explain_says_where_values_come_from(root, monkeypatch):
    monkeypatch.chdir(root)
    lines = dict(line.split(maxsplit=1) for line in explain(load_iterate_recipe(QUICKSTART)).splitlines())
    assert lines["reference"].startswith("fixed") and "iterate.yaml:" in lines["reference"]
    assert "RLHF Workflow" in lines["iterate.train_on"]
    assert lines["objective.eta"].startswith("0.1")


def recipe_of(root, monkeypatch, *overrides):
    monkeypatch.chdir(root)
    return load_iterate_recipe(QUICKSTART, overrides)


def test_an_iteration_is_an_ordinary_recipe(root, monkeypatch):
    recipe = recipe_of(root, monkeypatch)
    base = recipe.model.name_or_path
    first, second = (Recipe.model_validate(iteration_sections(recipe, "RUN", t)) for t in (1, 2))
    assert first.model.name_or_path == base and first.reference.name_or_path is None
    assert second.model.name_or_path == "RUN/iteration-1/train/final"
    assert second.reference.name_or_path == base and second.reference.precompute
    assert [source.name for source in second.data.train] == ["RUN/iteration-2/pairs/pairs.jsonl"]
    assert (first.training.seed, second.training.seed) == (42, 43)
    assert second.objective == first.objective == recipe.objective


def test_the_reference_is_a_setting(root, monkeypatch):
    moving = recipe_of(root, monkeypatch, "reference=previous", "objective={name: dpo}")
    second = Recipe.model_validate(iteration_sections(moving, "RUN", 2))
    assert second.reference.name_or_path is None  # the model that training starts from, which is pi_2
    assert reference_model(moving, "RUN", 3) == iterate_model(moving, "RUN", 3)
    other = recipe_of(root, monkeypatch, "reference={checkpoint: some/model}")
    for t in (1, 2):
        found = Recipe.model_validate(iteration_sections(other, "RUN", t))
        assert found.reference.name_or_path == "some/model"


def test_refits_on_all_pairs_start_from_the_base(root, monkeypatch):
    recipe = recipe_of(root, monkeypatch, "objective={name: vpo}", "iterate.train_on=all", "iterate.start=base")
    third = Recipe.model_validate(iteration_sections(recipe, "RUN", 3))
    assert third.model.name_or_path == recipe.model.name_or_path and third.reference.name_or_path is None
    assert [source.name for source in third.data.train] == [f"RUN/iteration-{t}/pairs/pairs.jsonl" for t in (1, 2, 3)]


def test_an_adapter_is_trained_on_over_the_same_base(root, monkeypatch):
    recipe = recipe_of(root, monkeypatch, "lora={r: 4}")
    first, second = (Recipe.model_validate(iteration_sections(recipe, "RUN", t)) for t in (1, 2))
    assert first.lora is not None and first.model.adapter is None
    assert second.lora is None and second.model.adapter == "RUN/iteration-1/train/final"
    assert second.model.name_or_path == recipe.model.name_or_path == second.reference.name_or_path
    assert second.reference.adapter is None
