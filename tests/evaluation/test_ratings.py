"""Bradley–Terry ratings: closed forms, another optimiser, clusters, what has no ratings, and control of style."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit
from typer.testing import CliRunner

from alignment.errors import UserError
from evaluation.ratings import ELO, app, circles, compare_pairs, describe, rate, rate_files
from evaluation.style import FEATURES, markdown_counts, style_differences, tokens

RNG = np.random.default_rng


def games(*counts):
    """(first, second, share) arrays from (first, second, share, times)."""
    rows = [row[:3] for row in counts for _ in range(row[3])]
    first, second, share = (np.array(column) for column in zip(*rows, strict=True))
    return first.astype(np.intp), second.astype(np.intp), share.astype(np.float64)


def test_two_players_have_a_closed_form():
    """6 wins and 2 ties of 10 are a share of .7: θ = ±logit(.7)/2 about the mean, logit(.7) from the anchor."""
    pairs = games((0, 1, 1.0, 6), (0, 1, 0.5, 2), (1, 0, 1.0, 2))
    found = rate(["a", "b"], *pairs, resamples=0)
    assert [found.theta[n].estimate for n in "ab"] == pytest.approx([-logit(0.7) / 2, logit(0.7) / 2])
    anchored = rate(["a", "b"], *pairs, anchor="a", resamples=0)
    assert [anchored.theta[n].estimate for n in "ab"] == pytest.approx([0, logit(0.7)])
    assert expit(anchored.theta["b"].estimate) == pytest.approx(0.7)


def test_soft_preferences_count_as_they_are():
    found = rate(["a", "b"], *games((0, 1, 0.9, 1), (0, 1, 0.4, 1)), anchor="a", resamples=0)
    assert found.theta["b"].estimate == pytest.approx(logit(0.65))


def test_many_players_against_another_optimiser():
    rng = RNG(0)
    first, second = rng.integers(0, 5, 400), rng.integers(0, 5, 400)
    first, second = first[first != second], second[first != second]
    truth = np.array([-1, -0.5, 0, 0.5, 1.0])
    share = (rng.random(len(first)) < expit(truth[second] - truth[first])).astype(float)

    def loss(theta):
        z = theta[second] - theta[first]
        return np.sum(np.logaddexp(0, z) - share * z) + theta.sum() ** 2  # sum 0 is free of charge

    expected = minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-8}).x
    names = list("abcde")
    found = rate(names, first, second, share, resamples=0)
    assert [found.theta[n].estimate for n in names] == pytest.approx(expected - expected.mean(), abs=1e-5)


def test_the_interval_has_the_delta_method_s_width():
    """θ = logit(share) of n independent games has standard deviation 1 / sqrt(n p (1 - p))."""
    pairs = games((0, 1, 1.0, 280), (0, 1, 0.0, 120))
    found = rate(["a", "b"], *pairs, anchor="a", resamples=2000).theta["b"]
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(1 / math.sqrt(400 * 0.7 * 0.3), rel=0.1)


def test_prompts_that_repeat_widen_the_interval():
    """Ten equal games of each prompt are one game: the interval is sqrt(10) times as wide as of independent ones."""
    rng = RNG(1)
    once = (rng.random(100) < 0.65).astype(float)
    share, prompts = np.repeat(once, 10), np.repeat(np.arange(100), 10).tolist()
    pairs = np.zeros(1000, dtype=np.intp), np.ones(1000, dtype=np.intp), share
    wide = rate(["a", "b"], *pairs, clusters=prompts, anchor="a", resamples=1000).theta["b"]
    narrow = rate(["a", "b"], *pairs, anchor="a", resamples=1000).theta["b"]
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(math.sqrt(10), rel=0.15)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([(0, 1, 0.5, 3), (2, 3, 0.5, 3)], "no finite ratings: c, d was never compared with a, b"),
        ([(0, 1, 0.5, 3), (0, 2, 1.0, 3), (2, 3, 0.5, 1)], "no finite ratings: c, d won every pair against a, b"),
    ],
)
def test_what_has_no_finite_ratings_is_said_in_words(counts, message):
    with pytest.raises(UserError) as caught:
        rate(list("abcd"), *games(*counts))
    assert str(caught.value).startswith(message)


def test_resamples_without_finite_ratings_are_counted():
    """b lost 1 of 10 games: a resample has no lost game with chance .9^10 = .35."""
    found = rate(["a", "b"], *games((0, 1, 1.0, 9), (0, 1, 0.0, 1)), resamples=1000)
    assert found.resamples + found.resamples_left_out == 1000
    assert found.resamples_left_out / 1000 == pytest.approx(0.9**10, abs=0.05)


def test_pairs_and_circles():
    """Rock, paper, scissors, each winning 9 of 12 prompts against its prey: 2^-12 sign patterns by the binomial."""
    first, second, share, prompts = [], [], [], []
    for a, b in ((0, 1), (1, 2), (2, 0)):
        for k in range(12):
            first.append(a), second.append(b), share.append(float(k < 9)), prompts.append(k)
    arrays = np.array(first), np.array(second), np.array(share)
    pairs = compare_pairs(["rock", "paper", "scissors"], *arrays, prompts)
    p = 2 * sum(math.comb(12, k) for k in range(9, 13)) / 2**12
    assert [row["p_value"] for row in pairs] == pytest.approx([p] * 3)
    assert [row["p_holm"] for row in pairs] == pytest.approx([3 * p] * 3)
    assert [row["win_rate"] for row in pairs] == [0.75, 0.25, 0.75]  # paper, scissors against rock, …
    assert circles(pairs) == 1
    found = rate(["rock", "paper", "scissors"], *arrays, resamples=0)
    assert [v.estimate for v in found.theta.values()] == pytest.approx([0, 0, 0], abs=1e-9)


def test_a_half_is_no_side_of_a_circle():
    """b beats a and c beats b; c with 50 % of a closes no circle, with less it does, from either side."""
    won = [{"first": "a", "second": "b", "win_rate": 0.75}, {"first": "b", "second": "c", "win_rate": 0.75}]
    ends = [("a", "c", 0.5), ("c", "a", 0.5), ("a", "c", 0.4), ("c", "a", 0.6), ("a", "c", 0.6)]
    assert [circles([*won, {"first": f, "second": s, "win_rate": w}]) for f, s, w in ends] == [0, 0, 1, 1, 0]


def test_style_of_a_text_by_hand():
    text = "# Head\n\n- one\n* two\n3. three\n**bold** and __more__\n```\n# not\n- these\n**ones**\n```"
    assert markdown_counts(text) == {"headers": 1, "lists": 3, "bold": 2}
    assert tokens("It's 2, no?") == 7  # It ' s 2 , no ?
    assert markdown_counts("```\n# never closed") == {"headers": 0, "lists": 0, "bold": 0}


def test_style_differences_by_hand():
    """Tokens 1 against 3 and 2 against 2: (3 - 1) / 4 = 1/2 and 0; root mean square sqrt(1/8)."""
    first, second = ["a", "a b"], ["a b c", "c d"]
    got = style_differences(first, second, ["length"])[:, 0]
    assert got == pytest.approx([0.5 / math.sqrt(1 / 8), 0])
    everything = style_differences(first, ["# a b c", "**c d**"])
    assert everything.shape == (2, 4)
    assert style_differences(["# a b c", "**c d**"], first) == pytest.approx(-everything)
    assert style_differences(["", "x"], ["", "x"]).tolist() == [[0.0] * 4] * 2  # nothing differs
    # Bold in the second pair alone, so its value is sqrt(2) root mean squares whatever its density.
    assert everything[1, FEATURES.index("bold")] == pytest.approx(math.sqrt(2))


def test_lengths_are_relative_and_markdown_is_dense():
    """Tokens 1 and 3, 2 and 3: 2/4 and 1/5, as 5 to 2. A header in 2 tokens (# a) and in 8: densities 1/3 and 1/9,
    differences (1/3)/(4/3) = 1/4 and (1/9)/(10/9) = 1/10, as 5 to 2; by counts both were alike."""
    one, two = style_differences(["a", "a b"], ["a b c", "a b c"], ["length"])[:, 0]
    assert one / two == pytest.approx(5 / 2)
    one, two = style_differences(["a", "a"], ["# a", "# a b c d e f g"], ["headers"])[:, 0]
    assert one / two == pytest.approx(5 / 2)


def styled_games(rng, n=3000):
    """b is no better than a, but its answers are longer (style column 0) and carry as many headers (column 1)."""
    style = np.column_stack([rng.normal(1.0, 1.0, n), rng.normal(0.0, 1.0, n)])
    share = (rng.random(n) < expit(1.2 * style[:, 0] - 0.6 * style[:, 1])).astype(float)
    return np.zeros(n, dtype=np.intp), np.ones(n, dtype=np.intp), share, style


def test_style_is_controlled_column_by_column():
    """Each choice of columns controls these and no others: by length alone b's lead goes, by headers it stays."""
    first, second, share, style = styled_games(RNG(2))
    raw = rate(["a", "b"], first, second, share, anchor="a", resamples=0)
    assert raw.theta["b"].estimate > 0.6
    both = rate(
        ["a", "b"], first, second, share, style=style, features=["length", "headers"], anchor="a", resamples=50
    )
    assert both.theta["b"].estimate == pytest.approx(0, abs=0.12)
    assert both.style["length"].estimate == pytest.approx(1.2, abs=0.15)
    assert both.style["headers"].estimate == pytest.approx(-0.6, abs=0.15)
    assert both.style["length"].low < both.style["length"].estimate < both.style["length"].high
    length = rate(["a", "b"], first, second, share, style=style[:, :1], features=["length"], anchor="a", resamples=0)
    headers = rate(["a", "b"], first, second, share, style=style[:, 1:], features=["headers"], anchor="a", resamples=0)
    assert abs(length.theta["b"].estimate) < 0.12 and headers.theta["b"].estimate > 0.6
    assert list(length.style) == ["length"] and list(headers.style) == ["headers"]


def test_style_that_names_the_system_cannot_be_told_apart():
    first, second, share, _ = styled_games(RNG(3), 50)
    with pytest.raises(UserError, match="style and systems cannot be told apart"):
        rate(["a", "b"], first, second, share, style=np.ones((50, 1)), features=["length"])


@pytest.fixture
def files(tmp_path):
    """Three systems, a round robin over 12 prompts in two files; the longer text wins but for every fourth prompt."""
    texts = {"short": "a b", "middle": "a b c d", "long": "a b c d e f g"}
    rows = []
    for one, two in (("short", "middle"), ("middle", "long"), ("short", "long")):
        for k in range(12):
            row = {"instruction": f"i{k}", "output_1": texts[one], "generator_1": one, "output_2": texts[two]}
            rows.append(row | {"generator_2": two, "preference": 1 if k % 4 == 0 else 2})
    rows.append(rows[0] | {"preference": None})
    (tmp_path / "a.json").write_text(json.dumps(rows[:20]))
    (tmp_path / "b.json").write_text(json.dumps(rows[20:]))
    return tmp_path / "a.json", tmp_path / "b.json"


def test_the_program_end_to_end(files, tmp_path):
    """Against the score equations: at the maximum a system's expected wins are its wins."""
    out = tmp_path / "out"
    done = CliRunner().invoke(app, [*map(str, files), "--bootstrap", "100", "--json", "--output", str(out)])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == json.loads((out / "ratings.json").read_text())
    assert (out / "ratings.md").read_text().startswith("| system | Elo |")
    assert [row["name"] for row in result["systems"]] == ["long", "middle", "short"]
    theta = {row["name"]: row["theta"] for row in result["systems"]}
    # Long won 18 of its 24 games.
    assert 12 * (expit(theta["long"] - theta["middle"]) + expit(theta["long"] - theta["short"])) == pytest.approx(18)
    assert result["systems"][0]["elo"] == pytest.approx(ELO * theta["long"])
    assert (result["annotations"], result["annotations_left_out"], result["prompts"]) == (36, 1, 12)
    assert math.exp(400 / ELO) == pytest.approx(10)  # 400 points are odds of ten to one
    text = describe(result)
    assert "no significant difference (Holm over 3 pairs): long and middle" in text


def test_the_program_s_anchor_and_style(files):
    found = rate_files(files, anchor="middle", resamples=100)
    middle = next(row for row in found["systems"] if row["name"] == "middle")
    assert (middle["theta"], middle["win_rate"], middle["interval"]) == (0, 0.5, [0, 0])
    assert (found["style"], found["style_left_out"]) == ({}, {})
    plain = rate_files(files, anchor="middle", style=["markdown"], resamples=100)
    assert plain["systems"] == found["systems"]  # no text has any markdown
    assert plain["style_left_out"] == {"headers": 0, "lists": 0, "bold": 0}
    assert "style bold: differs in 0 pairs only, left out" in describe(plain)
    for given, message in (
        ({"anchor": "midle"}, "--anchor 'midle': no such system; did you mean 'middle'?"),
        ({"style": ["lenght"]}, "--style 'lenght': unknown; did you mean 'length'?"),
    ):
        with pytest.raises(UserError) as caught:
            rate_files(files, **given)
        assert str(caught.value) == message


def battle(instruction: str, share: float, one: str = "a b", two: str = "a b c", **more) -> dict:
    row = {"instruction": instruction, "output_1": one, "generator_1": "x", "output_2": two, "generator_2": "y"}
    return {**row, "preference": 1 + share, **more}


def rated(tmp_path, rows: list[dict], **given) -> dict:
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return rate_files([tmp_path / "rows.json"], **{"anchor": "x", "resamples": 400, **given})


@pytest.mark.parametrize("style", [(), ("length",)])
def test_the_program_resamples_and_tests_prompts(tmp_path, style):
    """Each of 60 pairs nine times over: under its own prompt nothing is learnt, under nine the interval is a third.

    42 of 60 prompts won: 2^-60 sign patterns give p = 2 P(Bin(60, 1/2) >= 42) whatever the copies.
    """
    once = [battle(f"i{k}", float(k % 10 < 7), two="a b c" + " d" * (k % 4)) for k in range(60)]
    same = [row for row in once for _ in range(9)]
    others = [row | {"instruction": f"{row['instruction']} {k % 9}"} for k, row in enumerate(same)]
    found = [rated(tmp_path, rows, style=style) for rows in (once, same, others)]
    widths = [np.diff(next(s for s in one["systems"] if s["name"] == "y")["interval"])[0] for one in found]
    assert widths[1] / widths[0] == pytest.approx(1, rel=0.2) and widths[2] / widths[0] == pytest.approx(
        1 / 3, rel=0.2
    )
    assert [one["prompts"] for one in found] == [60, 60, 540] and list(found[1]["style"]) == list(style)
    p = 2 * sum(math.comb(60, k) for k in range(42, 61)) / 2**60
    assert found[0]["pairs"][0]["p_value"] == found[1]["pairs"][0]["p_value"] == pytest.approx(p)
    p = 2 * sum(math.comb(540, k) for k in range(9 * 42, 541)) / 2**540
    assert found[2]["pairs"][0]["p_value"] == pytest.approx(p)


def test_a_system_against_itself_says_nothing(tmp_path):
    rows = [battle(f"i{k}", float(k % 3 > 0)) for k in range(12)]
    itself = [battle(f"j{k}", 1.0, generator_2="x") for k in range(5)] + [battle("k", 0.5, generator_1="y")]
    found = rated(tmp_path, rows + itself)
    assert (found["annotations"], found["annotations_left_out"], found["prompts"]) == (12, 6, 12)
    assert [one["games"] for one in found["systems"]] == [12, 12]
    with pytest.raises(UserError, match="rows.json: no usable pair of two different systems"):
        rated(tmp_path, itself)


def test_a_feature_that_differs_in_nine_pairs_is_left_out_and_in_ten_is_not(tmp_path):
    for count, left_out in ((9, {"length": 9}), (10, {})):
        rows = [battle(f"i{k}", float(k % 3 > 0), two="a b c" if k < count else "c d") for k in range(30)]
        found = rated(tmp_path, rows, style=["length"])
        assert (found["style_left_out"], len(found["style"])) == (left_out, 1 - len(left_out))


def test_resamples_that_are_all_alike_are_no_interval(tmp_path):
    """One prompt: every resample is the whole. An interval of no width would say that the rating is known exactly."""
    rows = [battle("one", share) for share in (1.0, 0.0, 1.0, 1.0)]
    found = rated(tmp_path, rows)
    one, anchor = found["systems"]
    assert one["interval"] == one["elo_interval"] == one["win_rate_interval"] == [None, None]
    assert anchor["interval"] == [0, 0]  # by definition
    assert describe(found).count("| not known |") == 1
    assert "1 prompts: intervals that resample fewer than 30 are too narrow" in describe(found)
