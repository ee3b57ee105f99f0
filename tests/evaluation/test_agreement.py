"""Agreement of raters: κ, accuracy, F1 and length bias by hand, joins by text, and the program."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from alignment.errors import UserError
from evaluation.agreement import (
    FIRST,
    SECOND,
    TIE,
    Key,
    Labelled,
    agreement,
    app,
    class_scores,
    cohen_kappa,
    compare_raters,
    confusion,
    describe,
    join,
    length_bias,
    majority,
    read_labelled,
    summarise,
    verdict,
)

NAN = float("nan")


def test_labels_are_alpaca_eval_s():
    values = [1, 2, 0, 1.5, 1.2, 1.9, None, NAN, 3, -1]
    assert [verdict(v, "f") for v in values] == [FIRST, SECOND, TIE, TIE, FIRST, SECOND, None, None, None, None]
    for bad in ("2", True, [1]):
        with pytest.raises(UserError, match="^f: a label must be 1"):
            verdict(bad, "f")


def test_kappa_by_hand():
    """20 agreed firsts, 15 agreed seconds, 5 and 10 disagreed: p_o = .7, p_e = .5 * .6 + .5 * .4 = .5, κ = .4."""
    table = np.array([[0, 0, 0], [0, 20, 5], [0, 10, 15.0]])
    assert agreement(table) == pytest.approx(0.7)
    assert cohen_kappa(table) == pytest.approx(0.4)
    assert cohen_kappa(np.diag([3.0, 4, 5])) == 1
    assert cohen_kappa(np.outer([1, 2, 3], [2, 2, 6.0])) == pytest.approx(0)  # independent raters
    assert math.isnan(cohen_kappa(np.diag([0, 7.0, 0])))  # one verdict alone: chance explains all


def test_scores_of_a_judge_by_hand():
    """Truth by rows: ties 2 (said tie 1, first 1), firsts 4 (said first 3, second 1), seconds 4 (all said second).

    Precision 1/1, 3/4, 4/5; recall 1/2, 3/4, 1; F1 2/3, 3/4, 8/9.
    """
    got = class_scores(np.array([[1, 1, 0], [0, 3, 1], [0, 0, 4.0]]))
    assert got["accuracy"] == pytest.approx(0.8)
    assert got["macro_precision"] == pytest.approx((1 + 3 / 4 + 4 / 5) / 3)
    assert got["macro_recall"] == pytest.approx((1 / 2 + 3 / 4 + 1) / 3)
    assert got["macro_f1"] == pytest.approx((2 / 3 + 3 / 4 + 8 / 9) / 3)
    never = class_scores(np.array([[0, 2, 0], [0, 2, 0], [0, 0, 0.0]]))  # ties are never said; no second occurs
    assert (never["accuracy"], never["macro_precision"], never["macro_recall"]) == (0.5, 0.25, 0.5)


def test_a_class_that_is_said_and_never_true_counts():
    """Firsts 4 (said first 3, tie 1), seconds 4 (all said): precision 0, 1, 1; recall 0, 3/4, 1; F1 0, 6/7, 1."""
    got = class_scores(np.array([[0, 0, 0], [1, 3, 0], [0, 0, 4.0]]))
    assert got["macro_precision"] == pytest.approx(2 / 3)
    assert got["macro_recall"] == pytest.approx((3 / 4 + 1) / 3)
    assert got["macro_f1"] == pytest.approx((6 / 7 + 1) / 3)


def test_majority_and_missing_verdicts():
    raters = [
        [FIRST, FIRST, FIRST, None, None],
        [FIRST, SECOND, SECOND, SECOND, None],
        [SECOND, TIE, SECOND, None, None],
    ]
    assert majority(raters) == [FIRST, TIE, SECOND, SECOND, None]
    assert confusion(raters[0], raters[1]).sum() == 3


def test_length_bias_by_hand():
    """Longer preferred, shorter preferred, equal lengths (one half), and a tie, which is not decided."""
    keys = [("p", "", "a", "bb"), ("p", "", "aaa", "bb"), ("q", "", "aa", "bb"), ("q", "", "a", "bb")]
    hits, prompts = length_bias([SECOND, SECOND, FIRST, TIE], keys, "characters")
    assert hits.tolist() == [1, 0, 0.5] and prompts == [("p", ""), ("p", ""), ("q", "")]
    words, _ = length_bias([FIRST], [("p", "", "a b", "ccccccc")], "words")
    assert words.tolist() == [1]


def test_texts_are_joined_in_either_order_and_repeats_one_by_one():
    """A pair that stands twice meets the judge's two rows in order; a turned row's verdict is turned; ties stay."""
    keys = [("p", "", "a", "b"), ("p", "", "a", "b"), ("q", "", "a", "b"), ("r", "", "a", "b"), ("s", "", "a", "b")]
    judged = [("p", "", "a", "b"), ("q", "", "b", "a"), ("p", "", "b", "a"), ("r", "", "b", "a")]
    found, joined = join(keys, judged, [FIRST, FIRST, FIRST, TIE])
    assert (found, joined) == ([FIRST, SECOND, SECOND, TIE, None], 4)


def test_intervals_follow_prompts():
    """Half of the prompts' 30 rows agree, the others' do not: a resample of 40 prompts agrees on k of 40.

    Of two prompts, Wilson's interval is that of two trials, z^2 = 3.84: (1/2 -+ z sqrt(1/8 + z^2/16) + z^2/4) /
    (1 + z^2/2); of κ nothing is known.
    """
    first = [FIRST, SECOND] * 30
    second = first[:30] + [FIRST + SECOND - v for v in first[30:]]
    got = compare_raters(first, second, ["p"] * 30 + ["q"] * 30)
    z = 1.959963984540054
    half = z * math.sqrt(1 / 8 + z * z / 16) / (1 + z * z / 2)
    assert (got["agreement"], got["agreement_interval"]) == (0.5, pytest.approx([0.5 - half, 0.5 + half]))
    assert (got["kappa"], got["kappa_interval"]) == (pytest.approx(0), None)
    prompts = [f"{k} {k % 2}" for k in range(40) for _ in range(30)]
    first = [FIRST, SECOND] * 600
    second = [v if p.endswith("0") else FIRST + SECOND - v for v, p in zip(first, prompts, strict=True)]
    got = compare_raters(first, second, prompts)
    assert got["agreement_interval"] == pytest.approx([0.35, 0.65], abs=0.026)  # quantiles of Binomial(40, 1/2) / 40
    assert got["kappa_interval"] == pytest.approx([-0.3, 0.3], abs=0.051)
    alike = compare_raters(first, first, prompts)
    assert alike["kappa"] == 1 and alike["kappa_interval"] is None
    assert alike["agreement_interval"] == pytest.approx([40 / (40 + z * z), 1])  # n / (n + z^2)
    with pytest.raises(UserError, match="no row in common"):
        compare_raters([None], [FIRST], ["p"])


def row(k: int, **labels) -> dict:
    return {"instruction": f"i{k}", "input": "", "response1": "a", "response2": "b" * (1 + k % 3), **labels}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """Ten rows of two raters who differ once; a judge of eight of them who is right on six and silent on one."""
    people = [row(k, x=1 + k % 2, y=1 + k % 2 if k else 0) for k in range(10)]
    people[1]["response1"] = True  # what a converter made of the answer "True"
    judge = []
    for k in range(8):
        one = {"instruction": f"i{k}", "output_1": "a" if k != 1 else "True", "output_2": "b" * (1 + k % 3)}
        judge.append(one | {"preference": None if k == 7 else 2 - k % 2 if k == 6 else 1 + k % 2})
    return write(tmp_path / "people.json", people), write(tmp_path / "judge.json", judge)


def test_the_program_end_to_end(files, tmp_path):
    """Raters: 9 of 10 alike. Majority: row 0 a tie (1 against 0), else 1 + k % 2; the judge says 1 there, wrong, and
    is wrong on row 6, silent on row 7: right on 1 to 5, 5 of 7."""
    people, judge = files
    words = ["--humans", people, "--rater", "x", "--rater", "y", "--judge", judge]
    done = CliRunner().invoke(app, [*map(str, words), "--json", "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "out" / "agreement.json").read_text())
    assert (result["rows"], result["prompts"]) == (10, 10)
    assert result["majority"] == {"first": 4, "second": 5, "tie": 1}
    assert result["raters"][0]["agreement"] == pytest.approx(0.9)
    found = result["judge"]
    assert (found["pairs"], found["without_verdict"], found["rows"]) == (8, 1, 7)
    assert found["accuracy"] == pytest.approx(5 / 7) and found["rows_not_joined"] == 2
    text = CliRunner().invoke(app, list(map(str, words))).stdout
    assert (
        "| x and y | 10 | 90.0 % |" in text
        and "accuracy 0.7143" in text
        and "joined 8 of 10 rows, 1 of 8 without a verdict" in text
    )


def labelled(rows: list[tuple[Key, int]]) -> Labelled:
    return Labelled([key for key, _ in rows], {"x": [v for _, v in rows]})


def test_one_instruction_with_two_inputs_is_two_prompts(tmp_path):
    """The judge's rows stand in the other order: joined without `input` it were wrong on both."""
    people = [row(0, x=1) | {"input": "u"}, row(0, x=2) | {"input": "v"}]
    humans = read_labelled(write(tmp_path / "people.json", people), ["x"])
    judge = read_labelled(write(tmp_path / "judge.json", people[::-1]), ["x"])
    assert [key[:2] for key in humans.keys] == [("i0", "u"), ("i0", "v")]
    found = summarise(humans, judge)
    assert (found["prompts"], found["judge"]["accuracy"]) == (2, 1)


def test_a_judge_s_file_without_input_is_joined_where_that_is_clear():
    """p has an input and r none: both join. q stands with two: which of them was judged nobody knows."""
    keys = [
        ("p", "u", "a", "b"),
        ("q", "u", "a", "b"),
        ("q", "v", "b", "a"),
        ("r", "", "a", "b"),
        ("p", "u", "b", "a"),
    ]
    judged = [("p", "", "b", "a"), ("q", "", "a", "b"), ("r", "", "a", "b"), ("p", "", "a", "b")]
    assert join(keys, judged, [FIRST] * 4) == ([SECOND, None, None, FIRST, SECOND], 3)
    assert join(keys, [*judged, ("s", "w", "a", "b")], [FIRST] * 5) == ([None, None, None, FIRST, None], 1)
    found = summarise(labelled([(key, FIRST) for key in keys]), labelled([(key, FIRST) for key in judged]))
    assert (found["judge"]["pairs"], found["judge"]["rows_not_joined"]) == (3, 2)
    assert "joined 3 of 5 rows, 0 of 3 without a verdict" in describe(found)


def test_every_interval_is_over_prompts():
    """Thirty pairs of p, thirty of q; a resample has one or the other or both. The second text is the longer one."""
    keys = [(prompt, "", "a" * k, "b" * (k + 1)) for prompt in "pq" for k in range(30)]
    turns = [FIRST, SECOND] * 30
    like_turns_on_p = turns[:30] + [FIRST + SECOND - v for v in turns[30:]]
    longer_on_p = [SECOND] * 30 + [FIRST] * 30
    people = Labelled(keys, {"x": turns, "y": like_turns_on_p})
    assert summarise(people)["prompts"] == 2
    of_two = pytest.approx([0.0945, 0.9055], abs=1e-4)  # Wilson's of two trials; of sixty rows it were [.38, .62]
    assert summarise(people)["raters"][0]["agreement_interval"] == of_two
    one, judge = (labelled(list(zip(keys, said, strict=True))) for said in (turns, like_turns_on_p))
    assert summarise(one, judge)["judge"]["agreement_interval"] == of_two
    biased = labelled(list(zip(keys, longer_on_p, strict=True)))
    assert summarise(biased, judge)["longer_preferred"]["characters"]["interval"] == of_two
    assert summarise(judge, biased)["judge"]["longer_preferred"]["characters"]["interval"] == of_two


def test_mistakes_are_one_line(files, tmp_path):
    people, judge = files
    short = write(tmp_path / "short.json", [{"instruction": "i"}])
    with pytest.raises(UserError, match=r"people.json: row 1: no 'z' in this row"):
        read_labelled(people, ["z"])
    with pytest.raises(UserError, match=r"short.json: row 1: instruction, output_1 and output_2"):
        read_labelled(short, [])
    other = write(tmp_path / "other.json", [row(0, p=1) | {"response1": "z"}])
    with pytest.raises(UserError, match="--judge: none of its pairs is among the humans'"):
        summarise(read_labelled(people, ["x"]), read_labelled(other, ["p"]))
    done = CliRunner().invoke(app, ["--humans", str(people), "--rater", "x"])
    assert isinstance(done.exception, UserError) and "two raters, or one and --judge" in str(done.exception)
    done = CliRunner().invoke(app, ["--humans", str(people), "--rater", "x", "--rater", "x"])
    assert isinstance(done.exception, UserError) and str(done.exception) == "--rater 'x': given twice"
