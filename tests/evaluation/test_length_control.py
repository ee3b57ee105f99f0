"""Length control: the fit against another optimiser, its properties on simulated judges, and what it refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from evaluation.annotations import parse_annotations
from evaluation.equal_lengths import caution
from evaluation.head_to_head import compare_systems, summarise
from evaluation.length_control import (
    CS,
    Gamed,
    LengthControl,
    Refits,
    between_systems,
    choose_c,
    fit_l1,
    identical,
    length_controlled,
    standardise,
)

N = 805  # AlpacaEval's instructions


def simulate(rng, n=N, a=-1.5, b=0.7, c=0.4, drift=0.0):
    """Features and hard verdicts of a judge with known coefficients; `drift` makes the system's answers longer."""
    baseline = rng.integers(200, 3000, n)
    system = np.maximum(1, baseline + rng.normal(drift, 600, n).astype(int))
    length, gamma = standardise(baseline, system), rng.normal(size=n)
    share = (rng.random(n) < expit(a * length + b * gamma + c)).astype(float)
    return length, gamma, share


def test_standardised_lengths_by_hand():
    """Differences 1, 2, 3 (baseline minus system): sd with ddof 1 is 1."""
    assert standardise([11, 12, 13], [10, 10, 10]) == pytest.approx(np.tanh([1, 2, 3]))
    assert standardise([5, 6], [4, 5]).tolist() == [0, 0]  # always by the same amount
    assert standardise([5], [4]).tolist() == [0]


def test_an_intercept_alone_has_a_closed_form():
    """min |w| + C n (log(1 + e^w) - p w): w = logit(p - 1/(C n)) where p > 1/2 and C n (p - 1/2) > 1, else 0."""
    share, ones = np.array([1.0] * 30 + [0.0] * 10), np.ones((40, 1))
    for c in (0.2, 1.0, 50.0):
        assert fit_l1(ones, share, np.ones(40), c)[0] == pytest.approx(logit(0.75 - 1 / (40 * c)), abs=1e-6)
    assert fit_l1(ones, share, np.ones(40), 0.09)[0] == 0  # 40 * 0.09 / 4 < 1


def test_the_fit_is_a_minimum_in_every_direction():
    """Soft labels as duplicated rows with weights p and 1 - p, the objective written out and searched along lines."""
    rng = np.random.default_rng(0)
    x, p, weight = rng.normal(size=(60, 3)), rng.random(60), rng.uniform(0.1, 1, 60)
    rows, labels = np.concatenate([x, x]), np.concatenate([np.ones(60), -np.ones(60)])
    weights = np.concatenate([weight * p, weight * (1 - p)])

    def objective(w, c):
        return np.abs(w).sum() + c * np.sum(weights * np.log1p(np.exp(-labels * (rows @ w))))

    for c in (0.01, 0.3, 10.0):
        w = fit_l1(x, p, weight, c)
        slope = -c * (
            rows.T @ (weights * labels * expit(-labels * (rows @ w)))
        )  # must be -sign(w), or in [-1, 1] at 0
        assert slope[w != 0] == pytest.approx(-np.sign(w[w != 0]), abs=1e-7) and (np.abs(slope) <= 1 + 1e-7).all()
        for direction in [*np.eye(3), *rng.normal(size=(10, 3))]:
            line = minimize_scalar(lambda t, d=direction, c=c, w=w: objective(w + t * d, c), bracket=(-0.1, 0.1))
            assert objective(w, c) <= line.fun + 1e-7
    assert np.count_nonzero(fit_l1(x, p, weight, 0.01)) < 3  # the L1 norm sets some to exactly 0


def least_left_out(x, share, folds, weight=None):
    """The C of the ten with the least loss of rows that the fit has not seen, a mean of means over the folds."""
    weight = np.ones(len(share)) if weight is None else weight
    totals = []
    for c in CS:
        total = 0.0
        for fold in range(max(folds) + 1):
            kept, out = ([i for i, f in enumerate(folds) if (f == fold) == left] for left in (False, True))
            p = expit(x[out] @ fit_l1(x[kept], share[kept], weight[kept], c))
            total += np.mean(weight[out] * [-np.log(q if y else 1 - q) for q, y in zip(p, share[out], strict=True)])
        totals.append(total)
    return CS[int(np.argmin(totals))]


def test_no_fold_splits_a_prompt():
    """Four rows a prompt, all won or all lost: rows left out of their prompt would look predictable.

    A row without a verdict moves no prompt to another fold but where its prompt has no other row.
    """
    apart = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        length = np.repeat(np.tanh(rng.normal(size=30)), 4)
        share = np.repeat((rng.random(30) < 0.6).astype(float), 4)
        share[[0, 8, 9, 10, 11, 50]] = np.nan  # all of prompt 2
        known = ~np.isnan(share)
        x = np.column_stack([length, np.ones(120)])[known]
        folds = [(k // 4 - (k // 4 > 2)) % 5 for k in np.flatnonzero(known)]
        prompts = [f"p{k // 4}" for k in range(120)]
        found = length_controlled(length, share, clusters=prompts, resamples=0)
        assert found.c == least_left_out(x, share[known], folds)
        apart.append(found.c != length_controlled(length, share, resamples=0).c)
    assert any(apart)


def test_fewer_prompts_than_folds():
    """Four prompts of six rows are left out one by one; of one prompt nothing is left to fit on."""
    rng = np.random.default_rng(2)
    length, prompts = rng.uniform(-1, 1, 24), [k // 6 for k in range(24)]
    share = (rng.random(24) < expit(1 - 2 * length)).astype(float)
    found = length_controlled(length, share, clusters=prompts, resamples=0)
    assert found.c == least_left_out(np.column_stack([length, np.ones(24)]), share, prompts) > CS[0]
    with pytest.raises(ValueError, match="pairs of one prompt; length control needs several"):
        length_controlled(length, share, clusters=["p"] * 24)


def test_gamed_rows_are_dealt_to_folds_in_turn_and_the_prompts_after_them():
    """Sixty rows of a gamed file at 0.2, then two rows each of 10 prompts: prompt k is in fold (60 + k) % 5."""
    turns, dealt = [], [k % 5 for k in range(60)]
    for seed in range(8):
        rng = np.random.default_rng(seed)
        length = rng.uniform(-1, 1, 80)
        share = (rng.random(80) < expit(-2 * length)).astype(float)
        prompts, weight = [k // 2 for k in range(20)], np.repeat([0.2, 1.0], [60, 20])
        gamed = [Gamed(length[:60], None, share[:60])]
        found = length_controlled(length[60:], share[60:], gamed=gamed, clusters=prompts, resamples=0)
        x, own = np.column_stack([length, np.repeat([0.0, 1.0], [60, 20])]), [(60 + k) % 5 for k in prompts]
        assert found.c == least_left_out(x, share, [*dealt, *own], weight)
        turns.append(found.c != least_left_out(x, share, [*[0] * 60, *own], weight))
    assert any(turns)


def test_c_has_the_least_left_out_loss_of_the_ten():
    """By loops over the folds of scikit-learn's GroupKFold for groups of one size: every fifth example is left out."""
    rng = np.random.default_rng(1)
    length, gamma, share = simulate(rng, 42)
    x, weight = np.column_stack([length, gamma, np.ones(42)]), np.ones(42)
    assert choose_c(x, share, weight, np.arange(42)) == least_left_out(x, share, [k % 5 for k in range(42)])
    # Rows of weight 0 (a gamed file's count a tenth) neither fit nor judge: wrong ones change nothing.
    noise = simulate(rng, 42, a=3.0, c=-3.0)
    both = np.concatenate([x, np.column_stack([*noise[:2], np.ones(42)])])
    fold_of = choose_c(both[[i // 2 + 42 * (i % 2) for i in range(84)]],
                       np.stack([share, noise[2]], 1).ravel(), np.tile([1.0, 0.0], 42), np.arange(84))  # fmt: skip
    alone = choose_c(np.repeat(x, 2, axis=0), np.repeat(share, 2), np.tile([1.0, 0.0], 42), np.arange(84))
    assert fold_of == alone
    assert CS[0] == 1e-4 and CS[-1] == pytest.approx(1e4) and len(CS) == 10


def test_parameters_of_a_simulated_judge_are_recovered():
    """Means over 20 simulations of 805 rows, each with a standard error of about .17, .09 and .08 / sqrt(20)."""
    rng, found = np.random.default_rng(2), []
    for _ in range(20):
        length, gamma, share = simulate(rng, a=-1.5, b=0.7, c=0.4)
        got = length_controlled(length, share, difficulty=gamma, resamples=0)
        found.append([got.coefficients[k] for k in ("length", "difficulty", "system")])
    assert np.mean(found, axis=0) == pytest.approx([-1.5, 0.7, 0.4], abs=0.12)
    assert got.coefficients["length"] < -1  # negative where the judge likes length


@pytest.mark.slow
def test_the_interval_covers_the_rate_at_equal_lengths():
    rng, covered = np.random.default_rng(3), 0
    for run in range(40):
        length, gamma, share = simulate(rng, 200, drift=400)
        got = length_controlled(length, share, difficulty=gamma, resamples=100, seed=run)
        truth = float(np.mean(expit(0.7 * gamma + 0.4)))
        assert got.interval is not None
        covered += got.interval.low <= truth <= got.interval.high
    assert covered >= 34  # nominal 38 of 40


def test_swapping_the_systems_gives_the_rest():
    rng = np.random.default_rng(4)
    length, gamma, share = simulate(rng, 300, drift=300)
    one = length_controlled(length, share, difficulty=gamma, resamples=100, seed=5)
    two = length_controlled(-length, 1 - share, difficulty=gamma, resamples=100, seed=5)
    assert one.rate + two.rate == pytest.approx(1, abs=1e-9)
    assert one.interval is not None and two.interval is not None
    assert one.interval.low + two.interval.high == pytest.approx(1, abs=1e-9)
    plain = length_controlled(length, share, resamples=0), length_controlled(-length, 1 - share, resamples=0)
    assert plain[0].rate + plain[1].rate == pytest.approx(1, abs=1e-9)


def fitted(times, refits, **coefficients):
    """A fit with these coefficients, and with `refits` on resamples that drew the prompts `times`."""
    return LengthControl(0.5, 0.0, None, coefficients, 1.0, "", np.empty(0), Refits(np.array(refits), np.array(times)))


def test_systems_against_each_other_from_coefficients():
    """AlpacaEval's predict_winrate: antisymmetric, 1/2 against itself, by hand for two instructions.

    Two resamples: one drew both instructions, the other the second one twice.
    """
    gamma, times = np.array([-1.0, 2.0]), [[1.0, 1.0], [0.0, 2.0]]
    one = fitted(times, [[9, 0.1, 0.2], [9, 0.0, 1.0]], length=9.0, difficulty=0.5, system=0.3)
    two = fitted(times, [[8, 0.3, 0.0], [8, 0.5, 0.0]], length=8.0, difficulty=-0.25, system=0.1)
    by_hand = (expit(0.2 - 0.75) + expit(0.2 + 1.5)) / 2
    first, second = (expit(0.2 + 0.2) + expit(0.2 - 0.4)) / 2, expit(1.0 - 1.0)
    found = between_systems(one, two, gamma, level=1.0)
    assert found.estimate == pytest.approx(by_hand)
    assert [found.low, found.high] == pytest.approx(sorted([first, second]))
    back = between_systems(two, one, gamma, level=1.0)
    assert [back.estimate, back.low, back.high] == pytest.approx([1 - by_hand, 1 - found.high, 1 - found.low])
    assert between_systems(one, one, gamma).estimate == 0.5
    against = between_systems(fitted(times, [[0, 1.0], [0, 2.0]], length=0.0, system=1.0), identical(2), level=1.0)
    assert [against.estimate, against.low, against.high] == pytest.approx(expit([1.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="the same resamples"):
        between_systems(
            one, fitted([[2.0, 0.0], [1.0, 1.0]], [[1, 1, 1]] * 2, length=1, difficulty=1, system=1), gamma
        )
    itself = between_systems(identical(2), identical(2))  # the baseline under two names
    assert [itself.low, itself.estimate, itself.high] == [0.5, 0.5, 0.5]


def test_two_systems_at_equal_lengths_through_their_annotations():
    """The judge: sigmoid(strength + (own length - baseline's) / 20). One is stronger by .7 and shorter: it wins there.

    sigmoid(.9 - .2) = 66.8 %. Half of the second's rows are in another order, and it has rows that the first lacks.
    """
    rng, systems = np.random.default_rng(11), {}
    for name, strength, longer in (("strong", 0.9, 0), ("long", 0.2, 25)):
        rows = []
        for k in range(600 if name == "strong" else 650):
            base, own = rng.integers(20, 60), rng.integers(20, 60) + rng.integers(0, longer + 1)
            won = rng.random() < expit(strength + (own - base) / 20)
            rows.append({"instruction": f"i{k}", "output_1": "w" * base, "output_2": "w" * own, "generator_1": "b",
                         "generator_2": name, "preference": 1.0 + won})  # fmt: skip
        systems[name] = parse_annotations(rows if name == "strong" else rows[::-1])
    (pair,) = compare_systems(systems, resamples=200)
    low, high = pair["length_controlled_interval"]
    assert low < 66.8 < high and 4 < high - low < 20
    assert pair["length_controlled_winrate"] > 58 > 50 + pair["difference"]  # raw, length hides most of it
    (back,) = compare_systems({"long": systems["long"], "strong": systems["strong"]}, resamples=200)
    assert back["length_controlled_winrate"] == pytest.approx(100 - pair["length_controlled_winrate"], abs=1e-9)
    assert back["length_controlled_interval"] == pytest.approx([100 - high, 100 - low], abs=1e-9)
    (turned,) = compare_systems({name: rows[::-1] for name, rows in systems.items()}, resamples=200)
    assert turned["length_controlled_interval"] == pytest.approx([low, high], abs=1e-9)  # whatever the files' order
    alone = pair
    third = systems["long"][:300]  # shares fewer instructions with each of the two: other fits, and not these
    among = compare_systems({**systems, "third": third}, resamples=200)
    assert {key: among[0][key] for key in alone if key != "p_holm"} == {
        k: v for k, v in alone.items() if k != "p_holm"
    }
    (apart,) = compare_systems({"strong": systems["strong"], "third": third}, resamples=200)
    assert among[1]["length_controlled_interval"] == apart["length_controlled_interval"] != [low, high]
    few = {name: rows[:9] if name == "strong" else rows for name, rows in systems.items()}
    (pair,) = compare_systems(few, resamples=200)
    assert pair["length_controlled_winrate"] is None and pair["length_controlled_interval"] is None
    draws = [replace(one, preference=1.5) for one in systems["long"]]  # whose fit has no coefficient
    (pair,) = compare_systems({"strong": systems["strong"], "long": draws}, resamples=200)
    assert pair["difference"] > 5 and pair["length_controlled_winrate"] is None


def test_a_system_against_itself_is_one_half():
    row = {"instruction": "i", "output_1": "a", "output_2": "a", "generator_1": "m", "generator_2": "m"}
    found = summarise(parse_annotations([row | {"preference": 1.5}] * 12), resamples=100)
    assert found["length_controlled_winrate"] == 50 and found["lc_standard_error"] == 0
    assert found["length_control"]["variant"] == "identical"
    assert identical(3).predictions.tolist() == [0.5] * 3


def gamed_rate(rng, drift, gamed=None):
    """Raw and length-controlled rate of a system of equal quality whose answers are longer by `drift` characters."""
    baseline = rng.integers(500, 2000, N)
    system = np.maximum(1, baseline + rng.normal(drift, 300, N).astype(int))
    share = (rng.random(N) < expit((system - baseline) / 500)).astype(float)  # the judge looks at length alone
    got = length_controlled(standardise(baseline, system), share, gamed=gamed, resamples=0)
    return float(share.mean()), got.rate, (standardise(baseline, system), share)


def test_gaming_length_gains_less_under_control():
    """Verbose, same and concise answers: the spread of the raw rate shrinks to a fraction."""
    rng = np.random.default_rng(6)
    raw, controlled = zip(*[gamed_rate(rng, drift)[:2] for drift in (400, 0, -400)], strict=True)
    assert max(raw) - min(raw) > 0.3
    assert max(controlled) - min(controlled) < 0.4 * (max(raw) - min(raw))
    assert all(abs(c - 0.5) < abs(r - 0.5) for c, r in zip(controlled[::2], raw[::2], strict=True))


def test_gamed_annotations_regularise():
    """A system whose answers are always longer by the same length tells nothing of the judge's taste (d is constant):
    the plain variant cannot tell length from strength, gamed annotations of a judge who likes length can."""
    rng = np.random.default_rng(7)
    gamed = [Gamed(length, None, share) for _, _, (length, share) in (gamed_rate(rng, d) for d in (400, -400))]
    length = np.full(N, -0.9) + rng.normal(0, 0.01, N)
    share = (rng.random(N) < 0.8).astype(float)
    plain = length_controlled(length, share, resamples=0)
    held = length_controlled(length, share, gamed=gamed, resamples=0)
    assert (plain.variant, held.variant) == ("plain, without difficulty", "regularised, without difficulty")
    assert held.rate < plain.rate - 0.1 and held.coefficients["length"] < -0.5
    # Rows of weight 0.2 / 2 each count a tenth; they have no column of the system's.
    tenth = np.concatenate([np.column_stack([one.length, np.zeros(N)]) for one in gamed])
    rows = np.concatenate([tenth, np.column_stack([length, np.ones(N)])])
    weight = np.concatenate([np.full(2 * N, 0.1), np.ones(N)])
    by_hand = fit_l1(rows, np.concatenate([*(one.share for one in gamed), share]), weight, held.c)
    assert list(held.coefficients.values()) == pytest.approx(by_hand)
    # Ten copies of the gamed rows at 1/100 of the weight are the same fit.
    x = np.column_stack([gamed[0].length, np.zeros(N)])
    assert fit_l1(np.concatenate([x] * 10), np.tile(gamed[0].share, 10), np.full(10 * N, 0.01), 1.0) == pytest.approx(
        fit_l1(x, gamed[0].share, np.full(N, 0.1), 1.0), abs=1e-6
    )


def test_resamples_by_hand():
    """Two rows a prompt, one of the first prompt's without a verdict, gamed rows in every resample with weight 0.2."""
    rng = np.random.default_rng(12)
    length, gamma, share = simulate(rng, 40)
    share[0] = np.nan
    gamed, prompts = Gamed(*simulate(rng, 30)), [f"p{i // 2}" for i in range(40)]
    got = length_controlled(length, share, difficulty=gamma, gamed=[gamed], clusters=prompts, resamples=20, seed=3)
    assert got.refits is not None and got.interval is not None and got.c is not None
    assert got.refits.times.shape == (20, 20) and (got.refits.times.sum(1) == 20).all()
    assert len(np.unique(got.refits.times, axis=0)) == 20
    rows = np.column_stack([length, gamma, np.ones(40)])
    extra = np.column_stack([gamed.length, gamed.difficulty, np.zeros(30)])
    rates = []
    for w, times in zip(got.refits.coefficients, got.refits.times, strict=True):
        repeated = [i for i in range(40) for _ in range(int(times[i // 2]))]  # rows as often as their prompt was drawn
        known = [i for i in repeated if i != 0]
        x, y = np.concatenate([extra, rows[known]]), np.concatenate([gamed.share, share[known]])
        weight = np.concatenate([np.full(30, 0.2), np.ones(len(known))])
        assert w == pytest.approx(fit_l1(x, y, weight, got.c), abs=1e-6)
        rates.append(np.mean(expit(w[1] * gamma[repeated] + w[2])))
    assert [got.interval.low, got.interval.high] == pytest.approx(np.quantile(rates, [0.025, 0.975]))


def test_a_shrunk_interval_is_said():
    """Ten prompts, a slightly better system, a judge that likes length: the penalty leaves it no strength."""
    rng = np.random.default_rng(9)
    length = np.tanh(rng.normal(size=60))
    share = (rng.random(60) < expit(0.2 - 2 * length)).astype(float)
    found = length_controlled(length, share, clusters=[k // 6 for k in range(60)], resamples=100)
    strength = found.refits.coefficients[:, 1]
    assert found.collapsed == np.mean(strength == 0) and 0.5 < found.collapsed < 1 and found.rate == 0.5
    assert f"no strength of its own in {100 * found.collapsed:.0f} % of the resamples" in caution(60.0, found)
    both = replace(found, refits=Refits(np.array([[0, 0, 0], [1, 0, 0], [1, 2, 0], [0, 0, 3.0]]), np.ones((4, 10))))
    both = replace(both, coefficients={"length": 1.0, "difficulty": 1.0, "system": 1.0})
    assert both.collapsed == 0.5  # difficulty alone moves the rate, length alone does not


def test_what_cannot_be_fitted():
    with pytest.raises(ValueError, match="9 judged pairs; length control needs 10"):
        length_controlled(np.zeros(12), np.array([1.0] * 9 + [np.nan] * 3))
    with pytest.raises(ValueError, match="gamed annotations without a difficulty"):
        one = Gamed(np.zeros(3), None, np.ones(3))
        length_controlled(np.zeros(12), np.ones(12), difficulty=np.zeros(12), gamed=[one])


def test_rows_without_a_verdict_are_predicted_but_do_not_fit():
    rng = np.random.default_rng(8)
    length, gamma, share = simulate(rng, 100)
    kept = length_controlled(length[:80], share[:80], difficulty=gamma[:80], resamples=0)
    share[80:] = np.nan
    got = length_controlled(length, share, difficulty=gamma, resamples=0)
    assert got.coefficients == pytest.approx(kept.coefficients) and len(got.predictions) == 100
    b, c = got.coefficients["difficulty"], got.coefficients["system"]
    assert got.rate == pytest.approx(np.mean([expit(b * g + c) for g in gamma]))
    sd = np.std([expit(b * g + c) for g in gamma], ddof=1)
    assert got.standard_error == pytest.approx(sd / 10)


def test_variants_are_named():
    rng = np.random.default_rng(9)
    length, gamma, share = simulate(rng, 30)
    one = Gamed(length, gamma, share)
    for gamed, difficulty in itertools.product(([], [one]), (None, gamma)):
        got = length_controlled(length, share, difficulty=difficulty, gamed=gamed, resamples=0)
        kind = "regularised" if gamed else "plain"
        assert got.variant == f"{kind}, {'without' if difficulty is None else 'with'} difficulty"


def test_unanimous_pairs_have_no_estimate():
    """Separable: a logistic model's likelihood grows with its coefficients for ever (Albert and Anderson 1984)."""
    length = standardise([4.0 + k % 3 for k in range(24)], [60.0 + k % 5 for k in range(24)])
    for share, raw in ((1.0, 100.0), (0.0, 0.0)):
        found = length_controlled(length, np.full(24, share), resamples=20)
        assert found.says_nothing and found.interval is None
        assert caution(raw, found).startswith("one side won every pair")


@pytest.mark.parametrize(("sign", "side"), [(1, "longer"), (-1, "shorter")])
def test_lengths_that_differ_one_way_are_an_extrapolation(sign, side):
    ours, theirs = np.arange(24.0) + 60, np.full(24, 4.0)
    length = sign * standardise(theirs, ours)
    share = np.array([1.0, 0.0, 1.0] * 8)
    note = f"every response is {side} than the baseline's: equal lengths lie outside"
    assert caution(66.7, length_controlled(length, share, resamples=20)).startswith(note)
    length[0] = -length[0]
    assert "outside" not in (caution(66.7, length_controlled(length, share, resamples=20)) or "")
