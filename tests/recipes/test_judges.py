"""The `reward` and `oracle` sections: what may judge what, mistakes at their lines, files that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.recipes import RecipeError, load_recipe
from alignment.recipes.inspection import check, explain

SAMPLE = "sample: {prompts: p.txt}"
BRADLEY_TERRY = "oracle:\n  name: bradley_terry\n  reward:\n    name: vader\n  temperature: 0.5\ndata:"


def problems(path: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return [str(problem) for problem in caught.value.problems]


def test_an_oracle_judges_samples_and_evaluation(small):
    text = Path(small("data:", BRADLEY_TERRY)).read_text().replace("train: pairs.jsonl", SAMPLE)
    Path("r.yaml").write_text(text + "evaluation:\n  prompts: e.txt\n")
    recipe = load_recipe("r.yaml")
    assert recipe.reward is None and recipe.oracle is not None
    assert recipe.oracle.name == "bradley_terry"
    assert recipe.oracle.options == {"reward": {"name": "vader"}, "temperature": 0.5}
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in explain(recipe).splitlines()}
    assert rows["oracle.reward.name"] == ["vader", "r.yaml:9"]
    assert rows["data.sample.label_noise"] == ["0.0", "default: none"]
    assert load_recipe("r.yaml", ["oracle.reward.name=length"]).oracle.options["reward"] == {"name": "length"}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("name: tabluar", "r.yaml:7: oracle.name: unknown oracle 'tabluar'; did you mean 'tabular'?"),
        ("name: vader", "r.yaml:7: oracle.name: unknown oracle 'vader'; valid: bradley_terry, cyclic, general, "),
        ("table: t.json", "r.yaml:6: oracle.name: required key is missing: An oracle of docs/rewards.md"),
        (
            "name: tabular\n  table: t.json\n  tabel: t.json",
            "r.yaml:9: oracle.tabel: oracle 'tabular' has no key 'tabel'; did you mean 'table'?",
        ),
        ("name: tabular\n  table: 5", "r.yaml:8: oracle.table: must be a JSON file or a mapping"),
        ("name: bradley_terry", "r.yaml:6: oracle: key 'reward' is missing; add it"),
        (
            "name: bradley_terry\n  reward: vader\n  temperature: 0",
            "r.yaml:9: oracle.temperature: must be a number above 0, not 0",
        ),
        (
            "name: bradley_terry\n  reward:\n    name: vadr",
            "r.yaml:9: oracle.reward.name: unknown reward 'vadr'; did you mean 'vader'?",
        ),
        (
            "name: bradley_terry\n  reward:\n    name: regex\n    pattern: '('",
            "r.yaml:10: oracle.reward.pattern: '(' is not a valid expression",
        ),
        (
            "name: bradley_terry\n  reward:\n    name: regex\n    patern: a\n    pattern: a",
            "r.yaml:10: oracle.reward.patern: reward 'regex' has no key 'patern'; did you mean 'pattern'?",
        ),
        (
            "name: tabular\n  table:\n    responses: [a, b]\n    matrix: [[0.5, 0.9], [0.9, 0.5]]",
            "r.yaml:8: oracle.table: matrix[0][1] + matrix[1][0] must be 1, not 1.8",
        ),
    ],
)
def test_a_mistake_in_an_oracle_is_one_line_at_its_key(small, section, expected):
    found = problems(small("data:", f"oracle:\n  {section}\ndata:"))
    assert len(found) == 1 and found[0].startswith(expected), found


def test_two_judges_are_one_too_many_where_something_is_judged(small):
    both = "reward:\n  name: vader\n" + BRADLEY_TERRY
    assert load_recipe(small("data:", both)).reward is not None  # nothing here is judged
    Path("s.yaml").write_text(Path("r.yaml").read_text().replace("train: pairs.jsonl", SAMPLE))
    expected = "oracle: excludes reward: data.sample can have one judge; remove one section"
    assert problems("s.yaml") == [f"s.yaml:8: {expected}"]
    Path("e.yaml").write_text(Path("s.yaml").read_text() + "evaluation:\n  prompts: e.txt\n")
    assert problems("e.yaml") == [f"e.yaml:8: {expected.replace('sample can', 'sample and evaluation can')}"]


def test_an_objective_that_reads_rewards_needs_a_reward(small):
    text = Path(small("data:", BRADLEY_TERRY)).read_text().replace("train: pairs.jsonl", SAMPLE)
    Path("r.yaml").write_text(text.replace("name: dpo\n  beta: 0.2", "name: reward_aware_rpo"))
    (found,) = problems("r.yaml")
    assert found.startswith("r.yaml:5: oracle: objective 'reward_aware_rpo' reads the rewards of the two responses")


@pytest.mark.parametrize("name", ["sppo", "gpo"])
def test_an_objective_that_reads_probabilities_of_winning_needs_an_oracle(small, name):
    reward = small("data:", "reward:\n  name: vader\ndata:")
    text = Path(reward).read_text().replace("train: pairs.jsonl", SAMPLE)
    Path("r.yaml").write_text(text.replace("name: dpo\n  beta: 0.2", f"name: {name}"))
    (found,) = problems("r.yaml")
    assert found.startswith(f"r.yaml:5: reward: objective '{name}' reads probabilities of winning, and a reward gives")
    assert "oracle: {name: bradley_terry, reward: {...}}" in found
    Path("r.yaml").write_text(Path("r.yaml").read_text().replace("reward:\n  name: vader\ndata:", BRADLEY_TERRY))
    assert load_recipe("r.yaml").objective.name == name


@pytest.mark.parametrize(
    ("noise", "message"), [("-0.1", "must be >= 0"), ("1.5", "must be <= 1"), ("some", "expected")]
)
def test_label_noise_is_a_probability(small, noise, message):
    reward = small("data:", "reward:\n  name: vader\ndata:")
    sample = f"sample:\n    prompts: p.txt\n    label_noise: {noise}"
    Path(reward).write_text(Path(reward).read_text().replace("train: pairs.jsonl", sample))
    (found,) = problems(reward)
    assert found.startswith(f"r.yaml:11: data.sample.label_noise: {message}")


def test_check_looks_for_the_files_of_judges(small):
    Path("pairs.jsonl").touch()
    Path("there.json").touch()
    path = small("data:", "oracle:\n  name: tabular\n  table: t.json\ndata:")
    wanted = ["model.name_or_path=org/model", "data.train=org/data"]
    assert [str(p) for p in check(path, wanted)] == [
        f"r.yaml:8: oracle.table: t.json: no such file (looked in {Path.cwd()})"
    ]
    assert check(path, [*wanted, "oracle.table=there.json"]) == []
    nested = "{name: bradley_terry, reward: {name: exact_match, answers: a.jsonl}}"
    (found,) = check(small("data:", f"oracle: {nested}\ndata:"), wanted)
    assert str(found).startswith("r.yaml:6: oracle.reward.answers: a.jsonl: no such file")
    (found,) = check(small("data:", "reward:\n  name: exact_match\n  answers: a.jsonl\ndata:"), wanted)
    assert str(found).startswith("r.yaml:8: reward.answers: a.jsonl: no such file")
