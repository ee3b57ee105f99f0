"""Rules of on-policy recipes: each mistake is one line, at the key that causes it."""

import pytest

from alignment.recipes import RecipeError, load_recipe
from alignment.recipes.on_policy import rollout_settings
from tests.recipes.conftest import ROOT

RECIPE = """\
objective: {name: p3o}
model: {name_or_path: some/model}
data: {prompts: prompts.jsonl, max_length: 64}
generation: {max_new_tokens: 16}
reward: {name: vader}
training: {global_batch_size: 16, learning_rate: 5e-7}
"""
GAME = ("reward=null", "oracle={name: bradley_terry, reward: {name: vader}}")
CHAINS = ("objective.name=likelihood", "reward=null")
OFFLINE = ("data={train: pairs.jsonl, prompts: null}", "objective.name=dpo", "reward=null")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return lambda *overrides: load_recipe("r.yaml", overrides)


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        # what judges
        (["reward=null"], "objective", "learns from rewards, and the recipe has neither; add a reward section"),
        (GAME, "objective", "learns from rewards, and the recipe has an oracle: a preference is no scalar"),
        (["objective.name=egpo"], "objective", "preferences of an oracle, and the recipe has a reward; write oracle:"),
        (
            ["objective.name=nash_md_pg", "reward=null"],
            "objective",
            "preferences of an oracle, and the recipe has none",
        ),
        (["objective.name=dpo", "reward=null"], "data.prompts", "something has to label the samples"),
        (["objective.name=dpo", GAME[1]], "oracle", "excludes reward: the samples can have one judge"),
        # what on-policy samples cannot give
        (["objective.name=inpo"], "objective.name", "reads previous, which on-policy training does not provide"),
        (["objective.name=spo"], "objective.name", "which on-policy training does not provide"),
        # how it samples
        ([*CHAINS, "rollout.samples=1"], "rollout.samples", "one sample has no leave-one-out baseline: at least 2"),
        (["rollout.samples=1"], "rollout.samples", "'p3o' compares two samples of a prompt, got 1"),
        (["rollout.samples=4"], "rollout.samples", "'p3o' compares two samples of a prompt, got 4"),
        (
            ["rollout.prompts_per_rollout=24"],
            "rollout.prompts_per_rollout",
            "must be a multiple of training.global_batch_size, 16, got 24",
        ),
        (
            [*CHAINS, "rollout.inner_epochs=2"],
            "rollout.inner_epochs",
            "does not correct for samples of an older policy",
        ),
        ([*CHAINS, "rollout.prompts_per_rollout=32"], "rollout.prompts_per_rollout", "one rollout is one step"),
        (
            [*GAME, "objective.name=online_ipo2", "rollout.inner_epochs=2"],
            "rollout.inner_epochs",
            "online_ipo2 does not correct for samples of an older policy",
        ),
        (
            [*GAME, "objective.name=nash_md", "rollout.vllm=colocate"],
            "rollout.vllm",
            "nash_md draws from the reference, too",
        ),
        (["generation.temperature=0.7"], "generation.temperature", "its estimates assume them"),
        (["generation.top_p=0.9"], "generation.top_p", "its estimates assume them"),
        (["generation.top_k=5"], "generation.top_k", "its estimates assume them"),
        (
            [*GAME, "objective.name=online_ipo1", "generation.temperature=2"],
            "generation.temperature",
            "rollout.explore is for that",
        ),
        ([*GAME, "objective.name=egpo", "rollout.inner_epochs=2"], "rollout.inner_epochs", "one rollout is one step"),
        (
            [*GAME, "objective.name=egpo", "rollout.prompts_per_rollout=32"],
            "rollout.prompts_per_rollout",
            "one rollout is one step",
        ),
        (["generation.max_new_tokens=64"], "generation.max_new_tokens", "the response alone may take 64"),
        (["rollout.vllm_server=http://localhost:8000"], "rollout.vllm_server", "belongs to rollout.vllm: server"),
        (["rollout.vllm=server"], "rollout.vllm_server", "belongs to rollout.vllm: server, which needs it"),
        # what nothing would read
        (["rollout.explore={}"], "rollout.explore", "belongs to egpo, online_ipo1, nash_md, and the objective is p3o"),
        (["rollout.mixture=0.5"], "rollout.mixture", "belongs to nash_md, nash_md_pg, and the objective is p3o"),
        ([*GAME, "objective.name=egpo", "rollout.mixture=0.5"], "rollout.mixture", "and the objective is egpo"),
        ([*GAME, "objective.name=nash_md_pg", "rollout.explore={}"], "rollout.explore", "the objective is nash_md_pg"),
        (["rollout.label_noise=0.1"], "rollout.label_noise", "belongs to dpo, vpo …, and the objective is p3o"),
        (["rollout.drift=3"], "rollout.drift", "belongs to vpo online, and the objective is p3o"),
        (["objective.name=dpo", "rollout.drift=3"], "rollout.drift", "and the objective is dpo"),
        (["rollout.answer.marker=Answer"], "rollout.answer", "belongs to likelihood, and the objective is p3o"),
        (["reference.precompute=true"], "reference.precompute", "samples are new at every step"),
        (["training.group_by_length=false"], "training.group_by_length", "belongs to training on given pairs"),
        (["training.displacement_alarm=3"], "training.displacement_alarm", "belongs to training on given pairs"),
        (["training.activation_offloading=true"], "training.activation_offloading", "have no such option"),
        (["data.eval=held_out.jsonl"], "data.eval", "on-policy training has no held-out preferences"),
        # offline recipes with on-policy settings
        (
            [*OFFLINE[:1], "reward=null"],
            "objective.name",
            "learns from samples of the policy being trained: give data.",
        ),
        ([*OFFLINE[:1], *CHAINS], "objective.name", "learns from samples of the policy being trained: give data."),
        ([*OFFLINE, "rollout.inner_epochs=2"], "rollout.inner_epochs", "belongs to on-policy training"),
        ([*OFFLINE, "generation.replay=rollouts.jsonl"], "generation.replay", "belongs to on-policy training"),
        (["data.train=pairs.jsonl"], "data.train", "excludes data.prompts"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list | tuple) else "",
)
def test_one_mistake_is_one_line_at_its_key(recipe, overrides, key, message):
    recipe(*good(overrides))
    with pytest.raises(RecipeError) as refused:
        recipe(*overrides)
    (problem,) = refused.value.problems
    assert ".".join(problem.path) == key and message in str(problem)


def good(overrides):
    """A recipe of the same kind that has no mistake: what is refused is the mistake, not the kind."""
    if overrides[0] == OFFLINE[0]:
        return OFFLINE
    if "objective.name=likelihood" in overrides:
        return CHAINS
    return [*GAME, "objective.name=egpo"] if any(o.startswith("oracle=") for o in overrides) else []


def test_several_mistakes_are_all_said(recipe):
    with pytest.raises(RecipeError) as refused:
        recipe("rollout={samples: 3, prompts_per_rollout: 20, drift: 1}", "generation={max_new_tokens: 80, top_k: 2}")
    assert {".".join(p.path) for p in refused.value.problems} == {
        *("rollout.samples", "rollout.prompts_per_rollout", "rollout.drift"),
        *("generation.max_new_tokens", "generation.top_k"),
    }


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), {"per_rollout": 16, "samples": 2, "opponent": None, "calibration": False, "look_ahead": False}),
        (["rollout.prompts_per_rollout=48", "rollout.inner_epochs=3"], {"per_rollout": 48, "inner_epochs": 3}),
        ([*GAME, "objective.name=egpo"], {"opponent": 0.0, "look_ahead": True, "drift": None}),
        ([*GAME, "objective.name=online_ipo1"], {"opponent": 0.0, "look_ahead": False}),
        ([*GAME, "objective.name=online_ipo2"], {"opponent": None, "look_ahead": False}),
        ([*GAME, "objective.name=nash_md"], {"opponent": 0.125, "look_ahead": False}),
        ([*GAME, "objective.name=nash_md_pg", "rollout.mixture=0.5"], {"opponent": 0.5}),
        (
            ["objective={name: vpo, mode: online, calibration: given}", "rollout.label_noise=0.1"],
            {"calibration": True, "drift": 20.0, "label_noise": 0.1, "opponent": None, "samples": 2},
        ),
        (["objective.name=dpo"], {"calibration": False, "drift": None}),
        (CHAINS, {"samples": 4, "marker": "Answer:", "separator": " "}),
        ([*CHAINS, "rollout={samples: 8, answer: {marker: '####'}}"], {"samples": 8, "marker": "####"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list | tuple) else "",
)
def test_what_each_objective_samples(recipe, overrides, expected):
    settings = rollout_settings(recipe(*overrides))
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "sampled"),
    [
        ("p3o", {"per_rollout": 16, "inner_epochs": 2, "opponent": None}),
        ("egpo", {"look_ahead": True, "opponent": 0.0}),
        ("online_ipo1", {"look_ahead": False, "opponent": 0.0}),
        ("online_ipo2", {"look_ahead": False, "opponent": None}),
        ("nash_md", {"opponent": 0.125}),
        ("nash_md_pg", {"opponent": 0.125}),
        ("vpo_online", {"calibration": True, "drift": 20.0}),
    ],
)
def test_quick_starts_sample_as_their_papers_do(monkeypatch, name, sampled):
    monkeypatch.chdir(ROOT)
    settings = rollout_settings(load_recipe(f"recipes/quickstart/{name}.yaml"))
    assert {key: settings[key] for key in sampled} == sampled
