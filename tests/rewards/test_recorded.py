"""Recorded answers: what is in the file comes back to the bit, what is not is NaN, contradictions are named."""

from __future__ import annotations

import json
import math

import pytest

from alignment.errors import UserError
from alignment.rewards import get_oracle, get_reward

CHAT = [{"role": "user", "content": "2 + 2?"}]
TWO = [{"role": "system", "content": "Be brief."}, *CHAT]


def written(tmp_path, rows):
    file = tmp_path / "recorded.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def pair(prompt, first, second, probability):
    return {"prompt": prompt, "first": first, "second": second, "probability": probability}


def scored(prompt, response, score):
    return {"prompt": prompt, "response": response, "score": score}


def test_preferences_come_back_in_both_orders(tmp_path):
    rows = [
        pair("p", "a", "b", 0.3),
        pair("p", "z", "c", 0.3),  # first sorts after second: still answered as it was recorded
        pair("q", "a", "b", 1),
        pair("q", "a ", "b", 0),
        pair(CHAT, "4", "5", 0.9),
        pair(TWO, "4", "5", 0.8),
        pair("p", "u", "v", None),
    ]
    oracle = get_oracle("recorded", path=written(tmp_path, rows))
    asked = [
        *[("p", "a", "b", 0.3), ("p", "b", "a", 0.7), ("p", "z", "c", 0.3), ("p", "c", "z", 0.7)],
        *[("q", "b", "a", 0.0), ("q", "a ", "b", 0.0), ("2 + 2?", "5", "4", 0.1), (TWO, "4", "5", 0.8)],
        *[("p", "same", "same", 0.5), ("unknown", "same", "same", 0.5)],
    ]
    prompts, first, second, wanted = map(list, zip(*asked, strict=True))
    found = oracle.probability(prompts, first, second)
    assert found == pytest.approx(wanted, abs=1e-15)
    assert [found[i] for i in (0, 2, 7)] == [0.3, 0.3, 0.8]  # to the bit, as recorded
    assert [p + q for p, q in zip(found, oracle.probability(prompts, second, first), strict=True)] == [1.0] * 10
    missing = oracle.probability(["p", "r", "q", "p", "p"], ["a", "a", "a", "u", "v"], ["c", "b", " b", "v", "u"])
    assert all(math.isnan(p) for p in missing)


def test_scores_come_back_to_the_bit(tmp_path):
    rows = [scored("p", "a", 0.1 + 0.2), scored("p", "b", -7), scored(CHAT, "4", 1e300), scored("p", "c", None)]
    reward = get_reward("recorded", path=written(tmp_path, rows))
    assert reward.score(["p", "p", CHAT, "2 + 2?"], ["a", "b", "4", "4"]) == [0.1 + 0.2, -7.0, 1e300, 1e300]
    assert all(math.isnan(s) for s in reward.score(["p", "p", "q", "p"], ["c", "d", "a", "a "]))
    assert reward(["p", "q"], ["b", "b"]) == [-7.0, None]  # as TRL calls it


def test_rows_that_agree_may_repeat(tmp_path):
    """0.7 and 0.3 agree in opposite orders, as decimals; the first row is what counts."""
    rows = [pair("p", "a", "b", 0.3), pair("p", "b", "a", 0.7), pair("p", "a", "b", 0.3), pair("p", "x", "x", 0.5)]
    oracle = get_oracle("recorded", path=written(tmp_path, rows))
    assert oracle.probability(["p", "p"], ["a", "b"], ["b", "a"]) == [0.3, 1 - 0.3]
    reward = get_reward("recorded", path=written(tmp_path, [scored("p", "a", 2), scored("p", "a", 2.0)]))
    assert reward.score(["p"], ["a"]) == [2.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "{file}: holds no rows; rows of prompt, first, second, probability are needed"),
        (
            [pair("p", "a", "b", 0.3), pair("q", "a", "b", 0.9), pair("p", "a", "b", 0.4)],
            "{file}:1 and {file}:3: probability 0.3 and 0.4 of one pair; remove one row",
        ),
        (
            [pair("p", "a", "b", 0.3), pair("p", "b", "a", 0.3)],
            "{file}:1 and {file}:2: probability 0.3 and 0.3 of one pair, in opposite orders; remove one row",
        ),
        ([pair("p", "a", "a", 0.7)], "{file}:1: probability must be 0.5, not 0.7: first and second are the same text"),
        ([pair("p", "a", "b", 1.5)], "{file}:1: probability must be in [0, 1], not 1.5"),
        ([pair("p", "a", "b", math.nan)], "{file}:1: probability must be a number or null, not nan"),
        ([pair("p", "a", "b", True)], "{file}:1: probability must be a number or null, not True"),
        ([pair("p", 3, "b", 0.5)], "{file}:1: first must be text, not 3"),
        ([pair(3, "a", "b", 0.5)], "{file}:1: prompt must be text or chat messages, not 3"),
        (
            [{"prompt": "p", "first": "a", "probability": 1}],
            "{file}:1: key 'second' is missing; a row needs prompt, first, second, probability",
        ),
    ],
)
def test_unusable_preferences_are_named(tmp_path, rows, message):
    file = written(tmp_path, rows)
    oracle = get_oracle("recorded", path=file)  # reads nothing yet
    with pytest.raises(UserError) as caught:
        oracle.probability(["p"], ["a"], ["b"])
    assert str(caught.value) == message.replace("{file}", file)


def test_contradictory_scores_and_wrong_keys_are_named(tmp_path):
    file = written(tmp_path, [scored("p", "a", 1), scored("p", "b", 1), scored("p", "a", 2)])
    with pytest.raises(UserError) as caught:
        get_reward("recorded", path=file).score(["p"], ["b"])
    assert str(caught.value) == f"{file}:1 and {file}:3: score 1.0 and 2.0 of one response; remove one row"
    for make, kind in ((get_reward, "reward"), (get_oracle, "oracle")):
        with pytest.raises(UserError) as caught:
            make("recorded", path=3)
        assert str(caught.value) == f"{kind} recorded: path must be a JSON-lines file, not 3"
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        get_oracle("recorded", path=file).probability(["a", "b"], ["c"], ["d"])


def test_description_changes_with_the_file(tmp_path):
    oracle = get_oracle("recorded", path=written(tmp_path, [pair("p", "a", "b", 0.3)]))
    before = oracle.describe()
    written(tmp_path, [pair("p", "a", "b", 0.4)])
    assert oracle.describe() != before and "\n" not in before
