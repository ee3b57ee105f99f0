"""Preference strength: held-out margins against planted flips, the head's optimum, bands and treatments by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import mpmath
import numpy as np
import pytest
from typer.testing import CliRunner

from alignment.cli import app
from alignment.data.strength import (
    Bands,
    band_of,
    by_strength,
    cross_fitted_margins,
    fit_head,
    flip,
    flip_auroc,
    oriented,
    prompt_folds,
    strength,
    treat,
)
from alignment.errors import UserError
from alignment.files import write_json_lines
from tests import tiny_lm
from tests.data.building import prepared
from tests.trainers.test_reward_model import without_pad_token


def world(n: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of chosen and rejected, [n, width] each, and which of the rows state the opposite of the truth (25 %).

    The truth is a linear score with margins of about 3 log-odds; the larger one is chosen, then a quarter is flipped.
    """
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, n, width))
    truth = (first - second) @ rng.normal(size=width) > 0
    flipped = rng.permutation(n) < n // 4
    right = (truth != flipped)[:, None]
    return np.where(right, first, second), np.where(right, second, first), flipped


def in_sample(chosen, rejected, l2):
    """Margins of one head on the very rows that it was fitted on: what held-out folds are there to avoid."""
    difference = chosen - rejected
    scale = np.sqrt((difference**2).mean(axis=0))
    return difference / scale @ fit_head(difference / scale, np.ones(len(chosen)), l2)


def folds_of(n: int, folds: int = 5) -> np.ndarray:
    return np.arange(n) % folds


# Planted flips


def test_held_out_strength_finds_planted_flips_and_an_untrained_head_does_not():
    chosen, rejected, flipped = world(1000, 30, seed=0)
    mu, sigma = strength(cross_fitted_margins(chosen, rejected, folds_of(1000), members=5, seed=0))
    assert flip_auroc(mu, flipped) > 0.9
    assert (sigma > 0).all()
    untrained = (chosen - rejected) @ np.random.default_rng(1).normal(size=30)
    assert abs(flip_auroc(untrained, flipped) - 0.5) < 0.15
    # Bands do their work: more than three quarters of the rows that are flipped were wrong, a quarter of all were.
    done = treat([{"prompt": "p", "chosen": "a", "rejected": "b"}] * 1000, mu, sigma, Bands())
    turned = [row["strength"]["row"] - 1 for row in done.rows if row["chosen"] == "b"]
    assert len(turned) == 200 and flipped[turned].mean() > 0.75


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_margins_of_a_head_that_saw_the_rows_hide_the_flips(seed):
    """Rows have up to four words that no other row has, by which a head learns their labels by heart, wrong or not.

    (With as many of them in every row, or none, a head that saw the rows gives all wrong labels a positive margin but
    ranks them no worse: its margins are shifted alike.)
    """
    chosen, rejected, flipped = world(300, 10, seed)
    counts = np.random.default_rng(seed).integers(0, 5, 300)
    own = np.repeat(np.eye(300), counts, axis=1)
    chosen, rejected = np.hstack([chosen, own]), np.hstack([rejected, 0 * own])
    held_out, _ = strength(cross_fitted_margins(chosen, rejected, folds_of(300), members=3, seed=0, l2=1.0))
    seen = in_sample(chosen, rejected, l2=1.0)
    assert (seen[flipped] > 0).mean() > 0.7  # believed
    assert (held_out[flipped] > 0).mean() < 0.25
    assert flip_auroc(held_out, flipped) > 0.85
    assert flip_auroc(seen, flipped) < 0.75


def test_a_row_has_no_part_in_its_own_margin():
    chosen, rejected, _ = world(60, 8, seed=3)
    before = cross_fitted_margins(chosen, rejected, folds_of(60), members=3, seed=0)
    changed_chosen, changed_rejected = chosen.copy(), rejected.copy()
    changed_chosen[[10, 15]] = rejected[[10, 15]]  # rows 10 and 15 share fold 0; row 15 becomes very different
    changed_rejected[10] = chosen[10]
    changed_rejected[15] = 50.0
    after = cross_fitted_margins(changed_chosen, changed_rejected, folds_of(60), members=3, seed=0)
    same_fold = [i for i in range(0, 60, 5) if i not in (10, 15)]
    assert np.array_equal(after[:, same_fold], before[:, same_fold])
    assert np.allclose(after[:, 10], -before[:, 10], rtol=1e-12)  # the same head, the row turned round
    others = [i for i in range(60) if i % 5]
    assert (
        np.abs(after[:, others] - before[:, others]) > 1e-3
    ).mean() > 0.75  # not those whose bootstrap drew neither


def test_turning_all_rows_round_negates_their_margins():
    chosen, rejected, _ = world(60, 8, seed=4)
    label = np.linspace(0, 1, 60)
    one = cross_fitted_margins(chosen, rejected, folds_of(60), 2, 0, label=label)
    other = cross_fitted_margins(rejected, chosen, folds_of(60), 2, 0, label=1 - label)
    assert np.allclose(one, -other, atol=1e-8) and np.abs(one).max() > 0.5


def test_members_differ_are_reproducible_and_one_is_the_plain_fit():
    chosen, rejected, _ = world(60, 8, seed=5)
    one = cross_fitted_margins(chosen, rejected, folds_of(60), 3, seed=1)
    assert np.array_equal(one, cross_fitted_margins(chosen, rejected, folds_of(60), 3, seed=1))
    assert np.array_equal(one[:2], cross_fitted_margins(chosen, rejected, folds_of(60), 2, seed=1))
    assert all(np.abs(a - b).max() > 1e-2 for a, b in itertools.combinations(one, 2))
    assert np.abs(one - cross_fitted_margins(chosen, rejected, folds_of(60), 3, seed=2)).max() > 1e-2
    single = cross_fitted_margins(chosen, rejected, folds_of(60), 1, seed=1)
    assert np.array_equal(single, cross_fitted_margins(chosen, rejected, folds_of(60), 1, seed=2))
    # In other units, and with a feature that never differs, the same margins.
    units = np.logspace(-3, 3, 8)
    scaled = [np.hstack([f * units, np.ones((60, 1))]) for f in (chosen, rejected)]
    assert np.allclose(cross_fitted_margins(*scaled, folds_of(60), 1, seed=1), single, atol=1e-6)


# The head


def test_the_head_is_at_its_stationary_point():
    """Solved independently in high precision from the gradient's own formula."""
    x = np.array([[1.0, 0.5], [-0.3, 2.0], [0.7, -1.1], [2.0, 0.1]])
    p, l2 = np.array([1.0, 0.2, 0.9, 0.6]), 0.05

    def gradient(*w):
        found = [l2 * w[0], l2 * w[1]]
        for row, label in zip(x.tolist(), p.tolist(), strict=True):
            d = w[0] * row[0] + w[1] * row[1]
            for j in range(2):
                found[j] += (1 / (1 + mpmath.exp(-d)) - label) * row[j] / 4
        return found

    solved = mpmath.findroot(gradient, (0, 0))
    assert fit_head(x, p, l2) == pytest.approx([float(v) for v in solved], abs=1e-4)


def test_smoothed_labels_put_the_margin_at_log_odds():
    """a = .1: D* = log((1 - a) / a) = 2.197225."""
    smoothed = treat([{"prompt": "p", "chosen": "a", "rejected": "b"}], *np.ones((2, 1)), Bands(middle="smooth"))
    label = smoothed.rows[0]["label"]
    head = fit_head(np.ones((1, 1)), np.array([label]), l2=1e-9)
    assert head == pytest.approx([2.197225], abs=1e-4)


# mu, sigma


def test_strength_by_hand():
    margins = np.array([[1.0, -2.0, 4.0], [3.0, -2.0, 0.0]])
    mu, sigma = strength(margins, standardise=False)
    assert mu.tolist() == [2.0, -2.0, 2.0]
    assert sigma.tolist() == [1.0, 0.0, 2.0]  # population: sqrt(((1-2)^2 + (3-2)^2) / 2)


def test_one_model_or_equal_models_have_no_deviation():
    margins = np.array([[1.0, -2.0, 4.0]])
    for given in (margins, np.repeat(margins, 4, axis=0)):
        mu, sigma = strength(given)
        assert mu == pytest.approx(margins[0]) and sigma == pytest.approx(0, abs=1e-12)


def test_standardised_models_weigh_alike_and_keep_their_zero():
    margins = np.array([[1.0, -2.0, 4.0], [3.0, -2.0, 0.5]])
    scaled = margins * np.array([[1.0], [100.0]])
    (mu, sigma), (mu_scaled, sigma_scaled) = strength(margins), strength(scaled)
    assert mu_scaled / mu == pytest.approx(mu_scaled[0] / mu[0])
    assert sigma_scaled / sigma == pytest.approx(mu_scaled[0] / mu[0])
    # A model that is another one in other units agrees with it.
    assert strength(margins[[0, 0]] * np.array([[1.0], [7.0]]))[1] == pytest.approx(0, abs=1e-12)
    # All prefer chosen: so does mu, however far the margins' mean is from 0.
    assert (strength(np.array([[5.0, 6.0, 7.0], [1.0, 1.5, 1.2]]))[0] > 0).all()


def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    mu, flipped = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.3
    pairs = [(a, b) for a in mu[flipped] for b in mu[~flipped]]
    assert flip_auroc(mu, flipped) == pytest.approx(sum((a < b) + (a == b) / 2 for a, b in pairs) / len(pairs))
    assert flip_auroc(np.array([-1.0, 2.0, 3.0]), np.array([True, False, False])) == 1.0
    with pytest.raises(ValueError, match="AUROC needs flipped rows and others"):
        flip_auroc(mu, np.zeros(40, dtype=bool))


# Bands and treatments

ROW = {
    "prompt": "p",
    "chosen": "a",
    "rejected": "b",
    "prompt_ids": [1],
    "chosen_ids": [2],
    "rejected_ids": [3, 4],
    "reward_chosen": 1.0,
    "reward_rejected": 0.5,
    "prev_chosen": -1.0,
    "prev_rejected": -2.0,
    "label": 0.8,
    "margin": 0.7,
    "calibration": "c",
}


def test_flipping_states_the_opposite_and_undoes_itself():
    flipped = flip(ROW)
    assert flipped == {
        "prompt": "p",
        "chosen": "b",
        "rejected": "a",
        "prompt_ids": [1],
        "chosen_ids": [3, 4],
        "rejected_ids": [2],
        "reward_chosen": 0.5,
        "reward_rejected": 1.0,
        "prev_chosen": -2.0,
        "prev_rejected": -1.0,
        "label": 0.8,
        "margin": -0.7,
        "calibration": "c",
    }
    assert flip(flipped) == ROW
    bare = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert flip(flip(bare)) == bare != flip(bare)


def test_orienting_says_the_same():
    assert oriented(ROW) is ROW
    doubted = ROW | {"label": 0.3}
    assert oriented(doubted) == flip(ROW) | {"label": pytest.approx(0.7)}


def test_bands_are_shares_by_rank():
    mu = np.array([5.0, -3.0, 0.1, -0.2, 9.0, 2.0, 3.0, 4.0, 6.0, 7.0])
    low = ["middle", "lowest", "low", "lowest", "high", "low", "middle", "middle", "middle", "middle"]
    assert band_of(mu, Bands()) == low
    # Equal strengths rank in the order of the rows; shares are rounded down, whatever floating point makes of them.
    assert band_of(np.zeros(10), Bands()) == ["lowest"] * 2 + ["low"] * 2 + ["middle"] * 5 + ["high"]
    assert band_of(np.zeros(3), Bands()) == ["middle"] * 3
    assert band_of(np.zeros(90), Bands(lowest_share=0.7)).count("lowest") == 63
    assert band_of(np.zeros(4), Bands(lowest_share=0.5, low_share=0.25, high_share=0.25)).count("middle") == 0


def rows(n: int, **more) -> list[dict]:
    return [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} | more for i in range(n)]


def plain(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "strength"}


def test_default_treatments_row_by_row():
    mu = np.array([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    done = treat(rows(10), mu, np.full(10, 0.25), Bands())
    expected = rows(10)
    for i in (0, 1):
        expected[i] |= {"chosen": f"b{i}", "rejected": f"a{i}"}
    expected[2]["label"], expected[3]["label"] = 1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5))
    expected[9]["label"] = 0.9
    assert [plain(row) for row in done.rows] == [
        row | ({"label": pytest.approx(row["label"], abs=1e-12)} if "label" in row else {}) for row in expected
    ]
    assert done.rows[3]["strength"] == {"mu": 0.5, "sigma": 0.25, "band": "low", "row": 4}
    assert done.lines() == ["lowest: flip 2", "low: soft 2", "middle: keep 5", "high: smooth 1"]


def test_where_all_members_agree_with_the_labels_nothing_is_flipped():
    agreed = np.repeat(np.linspace(0.5, 3, 20)[None], 5, axis=0)
    mu, sigma = strength(agreed)
    assert sigma == pytest.approx(0, abs=1e-12)
    done = treat(rows(20), mu, sigma, Bands(low="keep", high="keep"))
    assert [plain(row) for row in done.rows] == rows(20)
    assert done.counts["lowest"] == {"keep": 4}


def test_the_other_treatments():
    mu = np.array([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    done = treat(rows(10), mu, np.zeros(10), Bands(lowest="drop", low="margin", high="keep"))
    assert [plain(row) for row in done.rows] == [
        row | {"margin": {2: -0.5, 3: 0.5}.get(i, 0.0)} for i, row in enumerate(rows(10)) if i >= 2
    ]
    assert done.counts["lowest"] == {"drop": 2}
    # A margin that a row brings is only overwritten where it is asked for; smoothing mixes a label with its opposite.
    done = treat(rows(10, margin=0.3, label=0.8), mu, np.zeros(10), Bands(lowest="soft", low="margin"))
    assert [row["margin"] for row in done.rows] == [0.3, 0.3, -0.5, 0.5, *[0.3] * 6]
    assert done.rows[9]["label"] == pytest.approx(0.9 * 0.8 + 0.1 * 0.2)
    assert done.rows[0]["label"] == pytest.approx(1 / (1 + math.exp(2)))
    assert rows(10)[0] == {"prompt": "p0", "chosen": "a0", "rejected": "b0"}


def test_what_comes_out_is_read_as_preference_rows(tmp_path):
    mu = np.array([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    done = treat(rows(10), mu, np.zeros(10), Bands())
    write_json_lines(tmp_path / "treated.jsonl", done.rows)
    found = prepared(str(tmp_path / "treated.jsonl"))
    assert found.counts == {}
    assert found.dataset["chosen"][:3] == ["b0", "b1", "a2"]
    label = [1.0, 1.0, 1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5)), *[1.0] * 5, 0.9]
    assert list(found.dataset["label"]) == pytest.approx(label)


def test_folds_keep_prompts_together():
    given = [{"prompt": f"p {i // 3}"} for i in range(60)] + [{"prompt": [{"role": "user", "content": "p  0"}]}]
    folds = prompt_folds(given, 4, seed=0)
    for i in range(20):
        assert len(set(folds[3 * i : 3 * i + 3])) == 1
    assert folds[60] == folds[0]  # the same words
    assert sorted(np.bincount(folds[:60:3]).tolist()) == [5, 5, 5, 5]
    assert np.array_equal(folds, prompt_folds(given, 4, seed=0))
    assert not np.array_equal(folds, prompt_folds(given, 4, seed=1))


def test_mistakes_are_named():
    chosen, rejected, _ = world(20, 3, seed=0)
    for keys, message in [
        ({"lowest": "flp"}, "bands: lowest must be one of flip, soft, margin, smooth, drop, keep, not 'flp'"),
        ({"lowest_share": 0.9}, "bands: shares must be from 0 to 1 and at most 1 together"),
        ({"lowest_share": -0.1}, "bands: shares must be from 0 to 1"),
        ({"smoothing": 0.5}, "bands: smoothing must be at least 0 and below .5, not 0.5"),
    ]:
        with pytest.raises(UserError, match="^" + message.replace("(", r"\(")):
            Bands(**keys)
    with pytest.raises(UserError, match="folds must be from 2 to the number of prompts, 2, not 3"):
        prompt_folds(rows(2), 3, 0)
    with pytest.raises(UserError, match="members must be at least 1 and l2 above 0, not 0 and 0.1"):
        cross_fitted_margins(chosen, rejected, folds_of(20), 0, 0, l2=0.1)
    with pytest.raises(UserError, match="all rows are in one fold"):
        cross_fitted_margins(chosen, rejected, folds_of(20, 1), 1, 0)
    with pytest.raises(ValueError, match="20 rows of features, 20 labels, 19 folds"):
        cross_fitted_margins(chosen, rejected, folds_of(19), 1, 0)
    chosen[7, 1] = math.nan
    with pytest.raises(UserError, match=r"the features of row 8 \(1 rows in all\) are not finite numbers"):
        cross_fitted_margins(chosen, rejected, folds_of(20), 1, 0)
    with pytest.raises(UserError, match="the margin of model 2 on row 1 is not a finite number"):
        strength(np.array([[1.0, 2.0], [math.inf, 1.0]]))
    with pytest.raises(UserError, match="model 2 gives every row the same margin"):
        strength(np.array([[1.0, 2.0], [0.0, 0.0]]))
    with pytest.raises(UserError, match="bands: no row is left"):
        treat(rows(3), np.zeros(3), np.zeros(3), Bands(middle="drop"))


# From text to treated rows, with the features of a real model


def _features(model, tokenizer, row: dict, column: str) -> np.ndarray:
    """Mean of the last hidden states over the response."""
    import torch

    start = len(tokenizer(row["prompt"]).input_ids)
    with torch.no_grad():
        ids = torch.tensor([tokenizer(row["prompt"] + row[column]).input_ids])
        return model(ids, output_hidden_states=True).hidden_states[-1][0, start:].mean(0).numpy()


def test_from_texts_to_treated_rows(tiny):
    from alignment.models import load_model, load_tokenizer

    rng, truth = random.Random(0), []
    given: list[dict] = []
    for i in range(400):
        kind, harsh = f" {rng.choice(tiny_lm.KIND)} and", f" {rng.choice(tiny_lm.HARSH)} and"
        wrong = i % 4 == 0
        truth.append(wrong)
        pair = {"prompt": tiny_lm.openings()[i % 180], "chosen": harsh if wrong else kind}
        given.append(pair | {"rejected": kind if wrong else harsh})
    given[5] = flip(given[5]) | {"label": 0.0}  # the same statement, written the other way round
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    chosen, rejected = (
        np.stack([_features(model, tokenizer, row, column) for row in given]) for column in ("chosen", "rejected")
    )
    done = by_strength(given, chosen, rejected, Bands(lowest_share=0.25), members=3)
    mu = np.array([row["strength"]["mu"] for row in done.rows])
    assert flip_auroc(mu, np.array(truth)) > 0.9
    kinder = [any(word in row["chosen"] for word in tiny_lm.KIND) for row in done.rows]
    assert sum(kinder) > 360  # 300 before
    assert kinder[5] and done.rows[5]["label"] >= 0.5 and mu[5] > 0


# The command


def planted(file: Path) -> np.ndarray:
    """Rows of the grammar in which the kind one is chosen, or in every fourth row the harsh one; which ones."""
    rng, flipped = random.Random(1), np.arange(180) % 4 == 1
    rows = []
    for opening, wrong in zip(tiny_lm.openings(), flipped, strict=True):
        kinds = (tiny_lm.KIND, tiny_lm.HARSH)
        pair = [" " + " and ".join(rng.choices(words, k=rng.randint(1, 3))) + " ." for words in kinds]
        chosen, rejected = reversed(pair) if wrong else pair
        rows.append({"prompt": opening, "chosen": chosen, "rejected": rejected})
    write_json_lines(file, rows)
    return flipped


def command(tiny: Path, rows: Path, out: Path, *more: str):
    words = ["data", "strength", "recipes/quickstart/reward_model.yaml", str(out), f"model.name_or_path={tiny}"]
    return CliRunner().invoke(app, [*words, f"data.train={rows}", "data.eval=null", *more, "--members", "3"])


def test_the_command_finds_planted_flips(tiny, tmp_path):
    """AUROC five standard errors above chance: sqrt((n + m + 1) / (12 n m)) (Mann-Whitney), n = 45, m = 135."""
    flipped = planted(tmp_path / "rows.jsonl")
    done = command(tiny, tmp_path / "rows.jsonl", tmp_path / "out.jsonl")
    assert done.exit_code == 0, done.output
    assert "lowest: " in done.output and f"rows: {tmp_path / 'out.jsonl'}" in done.output
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["strength"]["row"] for row in rows] == list(range(1, 181))
    mu = np.array([row["strength"]["mu"] for row in rows])
    lower = (mu[flipped][:, None] < mu[~flipped]).mean()  # no ties: every pair of a flipped row and another one
    assert lower > 0.5 + 5 * math.sqrt(181 / (12 * 45 * 135))
    kind = [any(word in row["chosen"] for word in tiny_lm.KIND) for row in rows]
    assert np.mean(kind) > 0.75 + 0.05  # of what was planted, some has been turned round
    again = command(tiny, tmp_path / "rows.jsonl", tmp_path / "out.jsonl")
    assert isinstance(again.exception, UserError) and "out.jsonl: exists; name a new file" in str(again.exception)


def test_the_command_takes_the_recipes_pad_token(tiny, tmp_path):
    """A tokenizer without padding besides EOS: the key that the message names is read."""
    planted(tmp_path / "rows.jsonl")
    model = without_pad_token(tiny, tmp_path / "padless")
    refused = command(model, tmp_path / "rows.jsonl", tmp_path / "a.jsonl")
    assert isinstance(refused.exception, UserError)
    assert "name an unused one in reward_model.pad_token" in str(refused.exception)
    taken = command(model, tmp_path / "rows.jsonl", tmp_path / "a.jsonl", "reward_model.pad_token='<|other|>'")
    assert taken.exit_code == 0, taken.output
    plain = command(tiny, tmp_path / "rows.jsonl", tmp_path / "b.jsonl")  # token 0 pads there, too
    assert plain.exit_code == 0 and (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
