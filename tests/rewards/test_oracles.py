"""Oracles: Bradley–Terry against mpmath, tables with a cycle, both promises for any back-end, label noise."""

from __future__ import annotations

import itertools
import json
import math

import mpmath
import pytest
from scipy.stats import binomtest

from alignment.errors import UserError
from alignment.rewards import get_oracle
from alignment.rewards.oracles import flip_labels, symmetric

NAN = math.nan
ROCK_PAPER_SCISSORS = {
    "responses": ["rock", "paper", "scissors"],
    "matrix": [[0.5, 0.1, 0.8], [0.9, 0.5, 0.3], [0.2, 0.7, 0.5]],
}


def sigmoid(x) -> mpmath.mpf:
    with mpmath.workdps(60):
        return 1 / (1 + mpmath.exp(-mpmath.mpf(x)))


@pytest.mark.parametrize("temperature", [1.0, 0.25, 7, 1e-3])
def test_bradley_terry_is_the_sigmoid_of_the_gap_over_the_temperature(temperature):
    """Length as the reward: gaps of -40 to 40 characters; the small tail to full relative precision."""
    oracle = get_oracle("bradley_terry", reward={"name": "length"}, temperature=temperature)
    sizes = [(a, b) for a in (0, 1, 2, 40) for b in (0, 1, 3, 40)]
    found = oracle.probability(["p"] * len(sizes), ["x" * a for a, _ in sizes], ["x" * b for _, b in sizes])
    for (a, b), p in zip(sizes, found, strict=True):
        exact = sigmoid(mpmath.mpf(a - b) / mpmath.mpf(temperature))
        assert p == pytest.approx(float(exact), rel=1e-14, abs=1e-323)


def test_bradley_terry_sums_to_one_to_the_last_bit():
    oracle = get_oracle("bradley_terry", reward={"name": "length"}, temperature=13.7)
    texts = ["x" * n for n in range(0, 400, 7)]
    first, second = zip(*itertools.product(texts, texts), strict=True)
    prompts = ["p"] * len(first)
    for p, q in zip(
        oracle.probability(prompts, first, second), oracle.probability(prompts, second, first), strict=True
    ):
        assert p + q == 1.0


def test_hard_is_one_half_or_nothing():
    oracle = get_oracle("bradley_terry", reward={"name": "length"}, hard=True)
    assert oracle.probability(["p"] * 4, ["aa", "a", "ab", "a"], ["b", "bb", "cd", "a"]) == [1.0, 0.0, 0.5, 0.5]


def test_a_reward_that_cannot_score_gives_no_number_but_equal_texts_tie(tmp_path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "known", "answer": "yes"}\n')
    oracle = get_oracle("bradley_terry", reward={"name": "exact_match", "answers": str(answers)})
    prompts = ["known", "unknown", "unknown", [{"role": "user", "content": "known"}]]
    found = oracle.probability(prompts, ["yes", "yes", "no", "no"], ["no", "no", "no", "yes"])
    assert found[0] == pytest.approx(float(sigmoid(1)), rel=1e-15)
    assert math.isnan(found[1])
    assert found[2] == 0.5
    assert found[3] == 1 - found[0]


def test_a_reward_s_name_alone_is_its_section():
    long, short = get_oracle("bradley_terry", reward={"name": "vader"}), get_oracle("bradley_terry", reward="vader")
    arguments = (["p"], ["good"], ["bad"])
    assert long.probability(*arguments) == short.probability(*arguments)
    # VADER: one word of valence v has v / sqrt(v^2 + 15), to four digits.
    gap = round(1.9 / math.sqrt(1.9**2 + 15), 4) - round(-2.5 / math.sqrt(2.5**2 + 15), 4)
    assert long.probability(*arguments) == pytest.approx([float(sigmoid(gap))], rel=1e-12)


@pytest.mark.parametrize("source", ["mapping", "file"])
def test_a_cycle_in_the_table_stays_one(tmp_path, source):
    file = tmp_path / "table.json"
    file.write_text(json.dumps(ROCK_PAPER_SCISSORS))
    oracle = get_oracle("tabular", table=ROCK_PAPER_SCISSORS if source == "mapping" else str(file))
    names = ROCK_PAPER_SCISSORS["responses"]
    first, second = zip(*itertools.product(names, names), strict=True)
    found = oracle.probability(["any prompt"] * 9, first, second)
    given = [p for row in ROCK_PAPER_SCISSORS["matrix"] for p in row]
    assert found == pytest.approx(given, abs=1e-15)
    p = dict(zip(zip(first, second, strict=True), found, strict=True))
    # Each loses to the next: no scalar reward could say so.
    assert all(p[a, b] < 0.5 for a, b in (("rock", "paper"), ("paper", "scissors"), ("scissors", "rock")))
    assert all(p[a, b] + p[b, a] == 1.0 for a, b in itertools.product(names, names))


def test_texts_outside_the_table_are_no_number():
    oracle = get_oracle("tabular", table=ROCK_PAPER_SCISSORS)
    found = oracle.probability(["p"] * 4, ["rock", "well", "well", "rock"], ["well", "rock", "well", "rock"])
    assert [math.isnan(p) for p in found] == [True, True, False, False]
    assert found[2:] == [0.5, 0.5]


def with_matrix(matrix):
    return {"table": {"responses": ["a", "b"], "matrix": matrix}}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (with_matrix([[0.5, 0.7], [0.4, 0.5]]), "table: matrix[0][1] + matrix[1][0] must be 1, not 1.1"),
        (with_matrix([[0.4, 0.7], [0.3, 0.5]]), "table: matrix[0][0] must be 0.5, not 0.4"),
        (with_matrix([[0.5, 1.2], [-0.2, 0.5]]), "table: matrix[0][1] must be a probability, not 1.2"),
        (with_matrix([[0.5, NAN], [NAN, 0.5]]), "table: matrix[0][1] must be a probability, not nan"),
        (with_matrix([[0.5, True], [0, 0.5]]), "table: matrix[0][1] must be a probability, not True"),
        (with_matrix([[0.5, 0.7]]), "table: matrix must have 2 rows of 2 numbers, as there are 2 responses"),
        ({"table": {"responses": ["a", "a"], "matrix": []}}, "table: responses has 'a' twice"),
        ({"table": {"responses": "ab", "matrix": []}}, "table: responses must be a list of texts"),
        ({"table": {"rows": []}}, "table: needs the keys responses and matrix, got rows"),
        ({"table": 5}, "table must be a JSON file or a mapping of responses and matrix, not 5"),
    ],
)
def test_a_table_that_is_none_is_refused_at_once(keys, message):
    with pytest.raises(UserError) as caught:
        get_oracle("tabular", **keys)
    assert str(caught.value).startswith(f"oracle tabular: {message}")


def test_a_file_is_read_and_checked_at_the_first_question(tmp_path):
    file = tmp_path / "table.json"
    oracle = get_oracle("tabular", table=str(file))
    with pytest.raises(UserError, match="no such file"):
        oracle.probability(["p"], ["a"], ["b"])
    file.write_text('{"responses": ["a"], "matrix": [[1]]}')
    with pytest.raises(UserError) as caught:
        oracle.probability(["p"], ["a"], ["b"])
    assert str(caught.value).startswith(f"oracle tabular: table {file}: matrix[0][0] must be 0.5, not 1")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "oracle bradley_terry: key 'reward' is missing; add it"),
        ({"reward": 5}, "oracle bradley_terry: reward must be a reward's name or a reward section with a name, not 5"),
        ({"reward": {"pattern": "a"}}, "oracle bradley_terry: reward must be a reward's name or a reward section"),
        ({"reward": "vadr"}, "unknown reward 'vadr'; did you mean 'vader'?"),
        ({"reward": {"name": "regex"}}, "reward regex: key 'pattern' is missing; add it"),
        ({"reward": "vader", "temperature": 0}, "oracle bradley_terry: temperature must be a number above 0, not 0"),
        ({"reward": "vader", "temperature": NAN}, "oracle bradley_terry: temperature must be a number above 0, not"),
        ({"reward": "vader", "temperature": True}, "oracle bradley_terry: temperature must be a number above 0, not"),
        ({"reward": "vader", "hard": 1}, "oracle bradley_terry: hard must be true or false, not 1"),
        ({"reward": "vader", "hard": True, "temperature": 2}, "oracle bradley_terry: temperature changes nothing"),
        ({"reward": "vader", "temprature": 2}, "oracle bradley_terry: unknown key 'temprature'; did you mean 'temp"),
    ],
)
def test_mistakes_are_named(keys, message):
    with pytest.raises(UserError) as caught:
        get_oracle("bradley_terry", **keys)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_descriptions_name_what_decides():
    described = {
        get_oracle("bradley_terry", reward="vader").describe(),
        get_oracle("bradley_terry", reward="length").describe(),
        get_oracle("bradley_terry", reward="length", temperature=2).describe(),
        get_oracle("bradley_terry", reward="length", hard=True).describe(),
        get_oracle("tabular", table=ROCK_PAPER_SCISSORS).describe(),
        get_oracle("tabular", table={"responses": ["a"], "matrix": [[0.5]]}).describe(),
    }
    assert len(described) == 6 and not any("\n" in line for line in described)


class Biased:
    """A back-end with a taste for the first place, worked out by hand below; it keeps what it was asked."""

    def __init__(self, table: dict[tuple[str, str], float]):
        self.table, self.asked = table, []

    def __call__(self, prompts, first, second):
        self.asked += list(zip(prompts, first, second, strict=True))
        return [self.table[a, b] for a, b in zip(first, second, strict=True)]


def test_both_orders_are_asked_once_and_their_mean_is_taken():
    """P(a, b) = (0.9 + 1 - 0.6) / 2 = 0.65: of the 0.9 and 0.6 for whoever comes first, 0.25 are the place's."""
    ask = Biased({("a", "b"): 0.9, ("b", "a"): 0.6})
    messages = [{"role": "user", "content": "q"}]
    prompts, first, second = ["p", "p", "p", "p", messages], ["a", "b", "a", "c", "b"], ["b", "a", "b", "c", "a"]
    found = symmetric(ask)(prompts, first, second)
    assert found == pytest.approx([0.65, 0.35, 0.65, 0.5, 0.35], abs=1e-15)
    assert found[0] + found[1] == 1.0 and found[0] == found[2]
    asked = sorted((str(p), a, b) for p, a, b in ask.asked)
    assert asked == sorted((str(p), *order) for p in ("p", messages) for order in (("a", "b"), ("b", "a")))


def test_equal_texts_are_never_asked():
    def ask(*_):
        raise AssertionError("asked")

    assert symmetric(ask)(["p", "q"], ["a", ""], ["a", ""]) == [0.5, 0.5]
    assert symmetric(ask)([], [], []) == []


def test_one_order_is_asked_where_that_is_enough():
    ask = Biased({("a", "b"): 0.9})
    assert symmetric(ask, both_orders=False)(["p", "p"], ["b", "a"], ["a", "b"]) == [1 - 0.9, 0.9]
    assert ask.asked == [("p", "a", "b")]


def test_no_number_in_either_order_is_none():
    ask = Biased({("a", "b"): NAN, ("b", "a"): 0.6, ("c", "d"): 0.2, ("d", "c"): NAN})
    found = symmetric(ask)(["p"] * 4, ["a", "b", "c", "d"], ["b", "a", "d", "c"])
    assert all(math.isnan(p) for p in found)


def test_any_two_orders_sum_to_one_exactly():
    """Also where 1 - p is rounded: awkward fractions, tiny ones, denormals."""
    values = [0.1, 1 / 3, 0.7, 1e-17, 5e-324, 0.0, 1.0, 0.4999999999999999]
    for p, q in itertools.product(values, values):
        oracle = symmetric(Biased({("a", "b"): p, ("b", "a"): q}))
        (one,), (other,) = oracle(["p"], ["a"], ["b"]), oracle(["p"], ["b"], ["a"])
        assert one + other == 1.0 and 0 <= one <= 1 and 0 <= other <= 1


def test_answers_that_are_no_probabilities_are_refused():
    with pytest.raises(ValueError, match=r"1\.5 is not a probability"):
        symmetric(Biased({("a", "b"): 1.5, ("b", "a"): 0.0}))(["p"], ["a"], ["b"])
    with pytest.raises(ValueError, match="2 pairs but 1 answers"):
        symmetric(lambda *_: [0.5])(["p"], ["a"], ["b"])
    with pytest.raises(ValueError, match="1 prompts but 2 responses"):
        symmetric(lambda *_: [0.5])(["p"], ["a", "b"], ["b", "a"])


@pytest.mark.parametrize("probability", [0.05, 0.25, 0.5])
def test_noise_has_its_rate(probability):
    for seed in range(5):
        flipped = sum(flip_labels(range(4000), probability, seed))
        assert binomtest(flipped, 4000, probability).pvalue > 1e-4


def test_noise_depends_on_the_row_and_the_seed_alone():
    whole = flip_labels(range(1000), 0.25, 3)
    assert flip_labels(range(1000), 0.25, 3) == whole
    parts = [flip_labels(range(start, min(start + 64, 1000)), 0.25, 3) for start in range(0, 1000, 64)]
    assert list(itertools.chain(*parts)) == whole
    assert flip_labels(reversed(range(1000)), 0.25, 3) == whole[::-1]
    other = flip_labels(range(1000), 0.25, 4)
    both = sum(a and b for a, b in zip(whole, other, strict=True))
    assert binomtest(both, 1000, 0.25**2).pvalue > 1e-4  # another seed is another draw
    # From the command sha256sum: of the digests of "label noise 0 0" … "label noise 0 11", these begin below 40 hex.
    assert [row for row, flip in enumerate(flip_labels(range(12), 0.25, 0)) if flip] == [3, 5, 6]


def test_more_noise_flips_the_same_rows_and_further_ones():
    little, much = flip_labels(range(500), 0.1, 1), flip_labels(range(500), 0.4, 1)
    assert all(b for a, b in zip(little, much, strict=True) if a) and sum(much) > sum(little)
    assert not any(flip_labels(range(100), 0.0, 1)) and all(flip_labels(range(100), 1.0, 1))


@pytest.mark.parametrize("probability", [-0.1, 1.1, NAN])
def test_noise_is_a_probability(probability):
    with pytest.raises(ValueError, match="is not in"):
        flip_labels(range(3), probability, 0)
