"""Rule rewards: values worked out by hand, mistakes named."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from alignment.errors import UserError
from alignment.rewards import get_oracle, get_reward, list_oracles, list_rewards, oracle_keys, reward_keys


def test_names_and_keys():
    assert list_rewards() == [
        *("ensemble", "exact_match", "implicit", "length", "model", "recorded", "regex", "shifted", "vader")
    ]
    assert list_oracles() == ["bradley_terry", "cyclic", "general", "llm_judge", "recorded", "tabular"]
    assert reward_keys("vader") == set() == reward_keys("length")
    assert reward_keys("regex") == {"pattern"}
    assert reward_keys("exact_match") == {"answers", "strip", "ignore_case"}
    assert oracle_keys("bradley_terry") == {"reward", "temperature", "hard"}
    assert oracle_keys("tabular") == {"table"}


def test_exact_match_looks_up_the_prompt_s_answers(tmp_path):
    chat = [{"role": "user", "content": "2 + 2?"}]
    two = [{"role": "system", "content": "Be brief."}, *chat]
    rows = [
        {"prompt": "2 + 2?", "answer": ["4", "four"]},
        {"prompt": "capital of France?", "answer": " Paris\n"},
        {"prompt": "2 + 2?", "answer": "IV"},
        {"prompt": two, "answer": "vier"},
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = ["2 + 2?", chat, "2 + 2?", "2 + 2?", "capital of France?", "capital of France?", two, two, "3 + 3?"]
    responses = ["4", " four ", "IV", "iv", "Paris", "paris", "vier", "4", "6"]

    def scores(**keys):
        found = get_reward("exact_match", answers=str(file), **keys).score(prompts, responses)
        return "".join("-" if math.isnan(score) else str(int(score)) for score in found)

    assert scores() == "11101010-"
    assert scores(ignore_case=True) == "11111110-"
    assert scores(strip=False) == "10100010-"
    assert get_reward("exact_match", answers=str(file))(prompts[-1:], responses[-1:]) == [None]  # as TRL calls it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": holds no rows; rows of prompt and answer are needed"),
        ('{"prompt": "p", "answer": "a"}\n{"prompt": "p"}\n', ":2: answer must be text or a list of texts, not None"),
        ('{"prompt": "p", "answer": []}\n', ":1: answer must be text or a list of texts, not []"),
        ('{"prompt": 3, "answer": "a"}\n', ":1: prompt must be text or chat messages, not 3"),
    ],
)
def test_unusable_answers_are_named(tmp_path, text, message):
    file = tmp_path / "answers.jsonl"
    file.write_text(text)
    reward = get_reward("exact_match", answers=str(file))  # reads nothing yet
    with pytest.raises(UserError) as caught:
        reward.score(["p"], ["a"])
    assert str(caught.value).startswith(f"{file}{message}")


def test_description_of_exact_match_changes_with_what_decides_the_score(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "p", "answer": "a"}\n')
    before = get_reward("exact_match", answers=str(file)).describe()
    assert "\n" not in before and get_reward("exact_match", answers=str(file), strip=False).describe() != before
    file.write_text('{"prompt": "p", "answer": "b"}\n')
    assert get_reward("exact_match", answers=str(file)).describe() != before


@pytest.mark.parametrize("make", [get_reward, get_oracle])
def test_a_name_is_of_one_kind(make):
    foreign = {"get_reward": "tabular", "get_oracle": "vader"}[make.__name__]
    with pytest.raises(UserError, match=f"unknown {make.__name__[4:]} '{foreign}'"):
        make(foreign)


def test_length_counts_characters_not_bytes():
    assert get_reward("length").score(["p"] * 3, ["", "abc", "naïve 😀"]) == [0.0, 3.0, 7.0]


def test_regex_counts_matches_without_overlap():
    reward = get_reward("regex", pattern=r"(?i)aa")
    assert reward.score(["p"] * 4, ["", "aaaa", "aaa", "AaxaA"]) == [0.0, 2.0, 1.0, 2.0]


def test_vader_compound_follows_its_published_normalisation():
    # One lexicon word of valence v has compound v / sqrt(v^2 + 15); the lexicon gives "good" 1.9, "bad" -2.5.
    good, bad, none = get_reward("vader").score(["ignored: terrible"] * 3, ["good", "bad", ""])
    assert good == pytest.approx(1.9 / (1.9**2 + 15) ** 0.5, abs=5e-5)
    assert bad == pytest.approx(-2.5 / (2.5**2 + 15) ** 0.5, abs=5e-5)
    assert none == 0.0


def test_equal_exactly_when_they_judge_alike():
    assert get_reward("regex", pattern="a") == get_reward("regex", pattern="a")
    assert get_reward("regex", pattern="a") != get_reward("regex", pattern="b")
    assert get_reward("vader") != get_reward("length")


@pytest.mark.parametrize("name", ["vader", "length", "regex"])
def test_describe_is_one_line_and_lengths_must_match(name):
    reward = get_reward(name, **({"pattern": "x"} if name == "regex" else {}))
    assert reward.name == name
    assert reward.describe() and "\n" not in reward.describe()
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        reward.score(["a", "b"], ["c"])


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("vadr", {}, "unknown reward 'vadr'; did you mean 'vader'?"),
        ("zzz", {}, "unknown reward 'zzz'; valid: ensemble, exact_match, implicit, length, "),
        ("exact_match", {"answers": 5}, "reward exact_match: answers must be a JSON-lines file, not 5"),
        ("exact_match", {"answers": "a", "strip": 1}, "reward exact_match: strip must be true or false, not 1"),
        ("regex", {"patern": "x"}, "reward regex: unknown key 'patern'; did you mean 'pattern'?"),
        ("vader", {"pattern": "x"}, "reward vader: unknown key 'pattern'; it takes no keys"),
        ("regex", {}, "reward regex: key 'pattern' is missing; add it"),
        ("regex", {"pattern": 5}, "reward regex: pattern must be text, not 5; quote it"),
        ("regex", {"pattern": "("}, "reward regex: pattern '(' is not a valid expression"),
    ],
)
def test_mistakes_are_named(name, keys, message):
    with pytest.raises(UserError) as caught:
        get_reward(name, **keys)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "use",
    [
        "",
        "alignment.rewards.get_oracle('bradley_terry', reward={'name': 'regex', 'pattern': 'a'}).probability(['p'], "
        "['a'], ['b'])",
    ],
)
def test_import_is_light(use):
    heavy = ("torch", "transformers", "httpx", "vaderSentiment", "numpy", "pydantic")
    code = f"import sys, alignment.rewards\n{use}\nprint([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
