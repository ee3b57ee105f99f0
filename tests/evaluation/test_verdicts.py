"""One rule says what a rate, its interval and its test let one claim, and every page and table keeps to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from alignment.rewards import get_reward
from evaluation.annotations import parse_annotations
from evaluation.comparison import Side, compare, describe, needs_wilson, read_interval
from evaluation.estimates import standard_error, win_rate
from evaluation.head_to_head import facts, summarise
from evaluation.intervals import effective_count, share_interval, wilson_interval
from evaluation.outputs import with_length_control, write_output
from evaluation.report import calibration_verdict, describe_result
from evaluation.verdicts import sentence, verdict

Z = 1.959963984540054


def compared(won: int, lost: int, tied: int = 0):
    """A model against a baseline on that many prompts, one sample each; the longer text wins."""
    texts = ["xx"] * won + ["x"] * tied + [""] * lost
    sides = Side("final", [[text] for text in texts]), Side("start", [["x"]] * len(texts))
    prompts = [f"prompt {i}" for i in range(len(texts))]
    return compare(prompts, *sides, get_reward("length"), resamples=100, seed=0)


def test_for_every_outcome_of_up_to_25_prompts_the_claim_is_the_interval_s_and_the_exact_test_s():
    """k of n won outright. Wilson's limits solve |k/n - q| = z sqrt(q (1 - q) / n): one half is out of the interval
    where |k/n - 1/2| > z / (2 sqrt n). The exact test is the binomial one."""
    said = set()
    for n in range(1, 26):
        for k in range(n + 1):
            found = win_rate([[1.0]] * k + [[0.0]] * (n - k), [[0.0]] * k + [[1.0]] * (n - k), resamples=50)
            assert found.p_value == pytest.approx(stats.binomtest(k, n).pvalue, rel=1e-9)
            out = abs(k / n - 0.5) > Z / (2 * math.sqrt(n))
            assert (found.wilson.low > 0.5 or found.wilson.high < 0.5) == out
            sure = out and stats.binomtest(k, n).pvalue <= 0.05
            expected = ("better" if k > n / 2 else "worse") if sure else "no significant difference"
            expected = expected if n >= 20 else "too few prompts to tell"
            got = verdict(n, found.wilson.low, found.wilson.high, found.p_value)
            assert got == expected and sentence(n, found.wilson.low, found.wilson.high, found.p_value).startswith(got)
            said.add(got)
    assert said == {"better", "worse", "no significant difference", "too few prompts to tell"}


def test_the_reason_is_the_one_that_holds():
    assert sentence(40, 0.4, 0.6, 0.5).endswith("the interval contains one half")
    assert sentence(40, 0.51, 0.7, 0.06).endswith("the test's p-value is above 0.05")
    assert sentence(40, 0.3, 0.49, 0.05) == (
        "worse than the baseline by this judge: the interval lies below one half, and the test agrees"
    )
    assert sentence(19, 0.9, 1.0, 0.0001) == "too few prompts to tell: 19, and a claim needs 20"


@pytest.mark.parametrize(
    ("won", "lost", "tied", "said"),
    [
        (4, 0, 0, "too few prompts to tell"),
        (22, 0, 0, "better"),
        (0, 22, 0, "worse"),
        (16, 6, 0, "no significant difference"),  # Wilson's lower limit is 51.8 %, p = 0.0525
        (0, 0, 40, "no significant difference"),
        (40, 0, 0, "better"),
    ],
)
def test_terminal_markdown_and_pages_say_the_same(won, lost, tied, said, tmp_path):
    found = compared(won, lost, tied)
    result, n = found.result, won + lost + tied
    low, high = (f"{100 * limit:.1f}" for limit in read_interval(result))
    assert needs_wilson(result) and float(high) > float(low)
    assert describe_result(result)["verdict"].startswith(said)
    assert f"interval {low} to {high} %)" in describe(result).splitlines()[0]
    write_output(tmp_path, with_length_control(found))
    page, text = ((tmp_path / f"win_rate.{end}").read_text() for end in ("html", "md"))
    assert f"({low} to {high} %) over start: {said} by this judge" in page
    assert f"| verdict | {said}" in text and f"interval {low} to {high} %)" in text.splitlines()[0]
    rows = parse_annotations(found.annotations)
    theirs = dict(facts(summarise(rows, resamples=100)))
    assert theirs["verdict"].startswith(said)
    assert theirs["win rate, ties one half"].endswith("({:.2f} to {:.2f})".format(
        *(100 * limit for limit in read_interval(result))
    ).replace("(", "interval "))  # fmt: skip
    assert n == result["prompts"]


@pytest.mark.parametrize(("won", "lost", "tied"), [(25, 0, 0), (0, 25, 0), (0, 0, 25), (1, 0, 0)])
def test_an_error_that_measures_nothing_is_null(won, lost, tied):
    """All alike, or one prompt: the spread of the outcomes is 0 or unknown, and says nothing of the error."""
    found = compared(won, lost, tied)
    result, theirs = found.result, summarise(parse_annotations(found.annotations), resamples=100)
    assert result["standard_error"] is None and result["minimal_detectable_difference"] is None
    assert result["mean_score"]["difference_interval"] is None
    for key in ("standard_error", "clustered_standard_error", "minimal_detectable_difference"):
        assert theirs[key] is None, key
    for limits in (result["interval_ties_dropped"], theirs["interval_ties_dropped"]):
        assert limits is None or limits[1] - limits[0] > 0.01


def test_a_length_controlled_error_without_difficulty_is_null_with_a_note():
    """All predictions are the same number, whose spread is rounding; with difficulties they differ."""
    rng = np.random.default_rng(0)
    lengths, won = rng.integers(1, 30, (120, 2)), rng.random(120) < 0.7
    rows = [
        {"instruction": f"i{k}", "output_1": "x" * int(a), "output_2": "y" * int(b), "generator_1": "b",
         "generator_2": "m", "preference": 1.0 + float(won[k])}
        for k, (a, b) in enumerate(lengths)
    ]  # fmt: skip
    plain = summarise(parse_annotations(rows), resamples=100)
    low, high = plain["length_controlled_interval"]
    assert high - low > 10 and plain["lc_standard_error"] is None
    assert "read the interval" in plain["length_control"]["standard_error_note"]
    hard = {f"i{k}": float(rng.normal()) for k in range(120)}
    with_difficulty = summarise(parse_annotations(rows), difficulty=hard, resamples=100)
    if with_difficulty["length_control"]["coefficients"]["difficulty"]:
        assert with_difficulty["lc_standard_error"] > 0
        assert "standard_error_note" not in with_difficulty["length_control"]


def test_weights_count_as_many_trials_as_they_are_worth():
    assert effective_count([1] * 7) == 7 and effective_count([3, 3]) == 2
    assert effective_count([2, 1, 1]) == pytest.approx(16 / 6)
    draws = np.linspace(0, 1, 1001)
    assert share_interval(0.5, draws, np.ones(30)).low == pytest.approx(0.025)  # enough prompts: the bootstrap's
    assert share_interval(0.5, draws, np.ones(29)) == wilson_interval(0.5, 29)
    assert share_interval(1.0, np.ones(9), np.ones(500)) == wilson_interval(1.0, 500)  # all alike
    assert standard_error(np.array([0.1 + 0.2, 0.3])) is None  # alike up to rounding
    assert standard_error(np.array([0.0, 1.0])) == pytest.approx(math.sqrt(0.5) / math.sqrt(2))


def test_the_calibration_sentence_does_not_contradict_its_numbers():
    """Of one bin the error is |N(0, 1)|: its 95 % point is 1.96, its mean sqrt(2 / pi) = 0.798."""
    assert calibration_verdict(0.05, 0.06, 0.05) == "no more than chance explains"
    above = calibration_verdict(0.13, 0.08, 0.13)
    assert above == "above that, but chance can reach 0.1968: too little to tell"
    limit = 0.1 * Z / math.sqrt(2 / math.pi)
    assert calibration_verdict(limit * 1.01, 0.1, limit) == "over-confident"
    assert calibration_verdict(0.3, 0.05, -0.2) == "under-confident"
    assert calibration_verdict(0.3, 0.05, 0.01) == "over-confident on some pairs, under-confident on others"
    assert calibration_verdict(0.5, 0.0, 0.5) == "over-confident" and "chance" in calibration_verdict(0.0, 0.0, 0.0)
