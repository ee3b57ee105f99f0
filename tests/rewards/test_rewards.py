"""Rule rewards: values worked out by hand, mistakes named."""

from __future__ import annotations

import subprocess
import sys

import pytest

from alignment.errors import UserError
from alignment.rewards import get_reward, list_rewards, reward_keys


def test_names_and_keys():
    assert list_rewards() == ["length", "regex", "vader"]
    assert reward_keys("vader") == set() == reward_keys("length")
    assert reward_keys("regex") == {"pattern"}


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
        ("zzz", {}, "unknown reward 'zzz'; valid: length, regex, vader"),
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


def test_import_is_light():
    code = (
        "import sys, alignment.rewards; print([m for m in ('torch', 'vaderSentiment', 'numpy') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
