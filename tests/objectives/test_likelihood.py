"""Likelihood rewards: every oracle of their specification, by listing chains of thought and answers."""

import itertools
import math

import mpmath
import pytest
import torch

from alignment.objectives import GroupLogps, get_objective
from tests.objectives.enumerated import DOUBLE, differences, draw

REWARDS = ("logprob", "avglogprob", "prob", "avgprob")
ANSWER = (2, 0)  # the reference answer's two tokens, of a vocabulary of three


class World:
    """Three chains of thought, then an answer of two tokens: one vector of parameters, everything listed."""

    chains = 3
    parameters = draw(3 + 3 * 3 + 3 * 3 * 3, seed=1)

    @staticmethod
    def split(vector):
        """log pi(z), `[3]`; of the first token given z, `[3, 3]`; of the second given z and the first, `[3, 3, 3]`."""
        chain, first, second = vector.split([3, 9, 27])
        return chain.log_softmax(0), first.view(3, 3).log_softmax(1), second.view(3, 3, 3).log_softmax(2)

    @classmethod
    def answer(cls, vector):
        """log-probabilities of the reference answer's tokens after each chain, `[3, 2]`."""
        _, first, second = cls.split(vector)
        return torch.stack([first[:, ANSWER[0]], second[:, ANSWER[0], ANSWER[1]]], 1)

    @classmethod
    def samples(cls, vector):
        """log pi(z, a) of all 27 samples, and whether a is the reference answer."""
        chain, first, second = cls.split(vector)
        logp = (chain[:, None, None] + first[:, :, None] + second).flatten()
        right = torch.zeros(3, 3, 3, dtype=DOUBLE)
        right[:, ANSWER[0], ANSWER[1]] = 1
        return logp, right.flatten()


def tuples(count, size):
    return torch.tensor(list(itertools.product(range(count), repeat=size)))


def expected_gradient(objective, size, vector=World.parameters):
    """Minus the mean gradient of the loss over all groups of `size` samples of the policy."""
    leaf = vector.clone().requires_grad_()
    if objective.reward == "base":
        logp, right = World.samples(leaf)
        rows = tuples(27, size)
        groups = GroupLogps(cot=logp[rows], verified=right[rows])
    else:
        logp = World.split(leaf)[0]
        rows = tuples(3, size)
        mask = torch.ones(len(rows), 1, 2, dtype=torch.bool)
        groups = GroupLogps(cot=logp[rows], answer=World.answer(leaf)[rows], answer_mask=mask)
    chance = logp.detach()[rows].sum(1).exp()
    assert chance.sum().item() == pytest.approx(1)
    return -torch.autograd.grad((chance * objective.loss(groups)).sum(), leaf)[0]


def value(reward, vector):
    """J = E_z R(z), from its definition."""
    tokens = World.answer(vector)
    worth = {
        "logprob": tokens.sum(1), "avglogprob": tokens.sum(1) / 2, "prob": tokens.exp().prod(1),
        "avgprob": tokens.exp().sum(1) / 2,
    }[reward]  # fmt: skip
    return (World.split(vector)[0].exp() * worth).sum()


def jepo_value(size, vector):
    """E log (1/G) sum_i pi(a* | z_i) over groups of G."""
    rows = tuples(3, size)
    chance = World.split(vector)[0][rows].sum(1).exp()
    return (chance * World.answer(vector).exp().prod(1)[rows].mean(1).log()).sum()


def group(rows, mask=None, **more):
    """One prompt's group from token log-probabilities, `[G, A]`."""
    answer = torch.as_tensor(rows, dtype=DOUBLE)[None]
    mask = torch.ones(1, 1, answer.shape[2], dtype=torch.bool) if mask is None else mask
    given = {"cot": torch.linspace(-3, -1, answer.shape[1], dtype=DOUBLE)[None], "answer": answer, "answer_mask": mask}
    return GroupLogps(**(given | more))


def slopes(objective, groups):
    """dL/d(cot) and, where it exists and is used, dL/d(answer); zeros where the loss does not read it."""
    leaves = {
        name: column.clone().requires_grad_() for name, column in groups.columns().items() if name in ("cot", "answer")
    }
    total = objective.loss(GroupLogps(**(groups.columns() | leaves))).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [
        torch.zeros_like(leaf) if slope is None else slope for leaf, slope in zip(leaves.values(), found, strict=True)
    ]


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("size", [2, 3])
def test_b1_the_mean_gradient_is_that_of_the_expected_reward(reward, size) -> None:
    exact = differences(lambda vector: value(reward, vector), World.parameters)
    got = expected_gradient(get_objective("likelihood", reward=reward), size)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-8)
    without = expected_gradient(get_objective("likelihood", reward=reward, answer_grad=False), size)
    assert (without - exact).abs().max() > 0.02, "the answer's own gradient is part of the objective's"
    torch.testing.assert_close(without[:3], exact[:3], rtol=0, atol=1e-8)  # the chains' part is the same


@pytest.mark.parametrize("size", [2, 3])
def test_b1_jepo_is_the_gradient_of_the_expected_log_mean(size) -> None:
    exact = differences(lambda vector: jepo_value(size, vector), World.parameters)
    got = expected_gradient(get_objective("likelihood", reward="jepo"), size)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-8)
    without = expected_gradient(get_objective("likelihood", reward="jepo", answer_grad=False), size)
    assert (without - exact).abs().max() > 0.02


def test_b1_base_and_prob_have_the_same_expectation() -> None:
    """E_a 1{a = a*} = pi(a* | z): sampling the answer instead of scoring it costs variance, not bias."""
    exact = differences(lambda vector: value("prob", vector), World.parameters)
    got = expected_gradient(get_objective("likelihood", reward="base"), 2)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-9)
    scaled = expected_gradient(get_objective("likelihood", reward="base", scale=100.0), 2)
    torch.testing.assert_close(scaled, 100 * exact, rtol=0, atol=1e-7)


def test_b2_leave_one_out_by_hand() -> None:
    verified = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=DOUBLE)
    groups = GroupLogps(cot=torch.zeros(1, 4, dtype=DOUBLE), verified=verified)
    (slope,) = slopes(get_objective("likelihood", reward="base"), groups)
    expected = torch.tensor([[1, -1 / 3, -1 / 3, -1 / 3]], dtype=DOUBLE)
    torch.testing.assert_close(-4 * slope, expected, rtol=0, atol=1e-15)
    assert slope.sum().abs() < 1e-15


def test_b2_a_shift_of_the_rewards_leaves_the_chains_alone_but_not_the_reward_s_gradient() -> None:
    rows = draw(4, 3, seed=2) - 2
    shift = torch.tensor([0.0, 0.0, 0.25], dtype=DOUBLE)  # the last token, in every sample
    objective = get_objective("likelihood", reward="logprob")
    plain, moved = slopes(objective, group(rows)), slopes(objective, group(rows + shift))
    torch.testing.assert_close(moved[0], plain[0], rtol=0, atol=1e-14)
    # log-probability + 0.25 multiplies prob, and its gradient in the answer, by e^0.25
    objective = get_objective("likelihood", reward="prob")
    plain, moved = slopes(objective, group(rows)), slopes(objective, group(rows + shift))
    torch.testing.assert_close(moved[1], math.exp(0.25) * plain[1])


def test_b3_two_tokens_by_hand() -> None:
    tokens = [[math.log(0.9), math.log(0.5)]] * 2
    expected = {"prob": 0.45, "logprob": -0.798508, "avglogprob": -0.399254, "avgprob": 0.7, "jepo": -0.798508}
    for reward, worth in expected.items():
        found = get_objective("likelihood", reward=reward).statistics(group(tokens))
        assert found["reward"].mean().item() == pytest.approx(worth, abs=1e-6)
        assert math.exp(-found["answer_logprob_per_token"].mean().item()) == pytest.approx(1.490712, abs=1e-6)
        assert found["answer_logprob"].tolist() == pytest.approx([math.log(0.45)] * 2)


GOLDEN_CHANCE = torch.tensor([0.7, 0.3], dtype=DOUBLE)
GOLDEN_TOKENS = torch.tensor([[0.9, 0.5], [0.2, 0.8]], dtype=DOUBLE).log()


@pytest.mark.parametrize(
    ("reward", "worth", "slope"),
    [
        ("logprob", -1.10873, 0.21716),
        ("avglogprob", -0.55436, 0.10858),
        ("prob", 0.363, 0.0609),
        ("avgprob", 0.64, 0.042),
    ],
)
def test_b4_golden_world(reward, worth, slope) -> None:
    rows = tuples(2, 3)
    leaf = GOLDEN_CHANCE.log().requires_grad_()
    logp = leaf.log_softmax(0)
    mask = torch.ones(len(rows), 1, 2, dtype=torch.bool)
    groups = GroupLogps(cot=logp[rows], answer=GOLDEN_TOKENS[rows], answer_mask=mask)
    chance = GOLDEN_CHANCE[rows].prod(1)
    objective = get_objective("likelihood", reward=reward)
    mean = (chance * objective.statistics(groups)["reward"].view(-1, 3).mean(1)).sum().item()
    assert mean == pytest.approx(worth, abs=1e-5)
    got = -torch.autograd.grad((chance * objective.loss(groups)).sum(), leaf)[0]
    assert got.tolist() == pytest.approx([slope, -slope], abs=1e-5)


def test_b4_the_bound_grows_with_the_group_and_stays_below_the_marginal() -> None:
    objective, found = get_objective("likelihood", reward="jepo"), []
    for size in (2, 4):
        rows = tuples(2, size)
        groups = GroupLogps(
            cot=torch.zeros(rows.shape, dtype=DOUBLE),
            answer=GOLDEN_TOKENS[rows],
            answer_mask=torch.ones(len(rows), 1, 2),
        )
        found.append((GOLDEN_CHANCE[rows].prod(1) * objective.statistics(groups)["reward"]).sum().item())
    assert found == pytest.approx([-1.05493, -1.03203], abs=1e-5)
    assert -1.10873 < found[0] < found[1] < math.log(0.7 * 0.45 + 0.3 * 0.16)


def jepo_advantages(values, dtype=DOUBLE):
    groups = group(torch.tensor(values, dtype=DOUBLE)[:, None]).map(
        lambda column: column.to(dtype) if column.is_floating_point() else column
    )
    return (-slopes(get_objective("likelihood", reward="jepo"), groups)[0][0]).tolist()


def test_b5_jepo_s_advantages() -> None:
    assert jepo_advantages([-1.7, -1.7, -1.7]) == pytest.approx([0, 0, 0], abs=1e-15)
    assert jepo_advantages([-1.3, -2.0]) == pytest.approx([0.410039, -0.289961], abs=1e-6)
    assert jepo_advantages([-1.3, -2.0])[0] == pytest.approx(math.log((math.exp(0.7) + 1) / 2), abs=1e-15)
    assert jepo_advantages([-301.3, -302.0]) == pytest.approx(jepo_advantages([-1.3, -2.0]), abs=1e-13)
    others = jepo_advantages([-5.0, -105.0, -105.0, -105.0])
    assert others == pytest.approx([100 - math.log(4), *[math.log(3 / 4)] * 3], abs=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-12), (torch.float32, 2e-6)])
def test_b5_jepo_s_advantages_do_not_cancel(dtype, tolerance) -> None:
    """At 50 digits: one dominant value, values of a long answer, and near ties."""
    for values in ([-1.0, -400.0, -410.0, -500.0], [-900.25, -900.5, -901.0], [-3.0, -3.0, -3.0000001, -40.0]):
        values = torch.tensor(values, dtype=dtype).double().tolist()
        got = jepo_advantages(values, dtype)
        with mpmath.workdps(400):
            powers = [mpmath.exp(mpmath.mpf(each)) for each in values]
            full = mpmath.log(mpmath.fsum(powers) / len(values))
            for index, each in enumerate(got):
                rest = mpmath.fsum(powers[:index] + powers[index + 1 :]) / (len(values) - 1)
                assert each == pytest.approx(float(full - mpmath.log(rest)), rel=tolerance, abs=tolerance)


def test_b6_the_weights_of_jepo_s_answers() -> None:
    objective = get_objective("likelihood", reward="jepo")
    weights = -slopes(objective, group(draw(5, 2, seed=3)))[1][0]
    torch.testing.assert_close(weights.sum(0), torch.ones(2, dtype=DOUBLE))
    assert bool((weights > 0).all())
    equal = -slopes(objective, group([[-1.0, -2.0]] * 5))[1][0]
    torch.testing.assert_close(equal, torch.full((5, 2), 0.2, dtype=DOUBLE))


def test_b7_one_token_and_one_chain() -> None:
    one = group(draw(4, 1, seed=4) - 1)
    for average, whole in (("avglogprob", "logprob"), ("avgprob", "prob")):
        objectives = [get_objective("likelihood", reward=name) for name in (average, whole)]
        torch.testing.assert_close(objectives[0].loss(one), objectives[1].loss(one), rtol=1e-15, atol=0)
    same = group([[-0.5, -1.5]] * 4)  # a deterministic policy: the same chain four times
    chain, answer = slopes(get_objective("likelihood", reward="logprob"), same)
    assert chain.abs().max() == 0
    torch.testing.assert_close(answer, torch.full((1, 4, 2), -0.25, dtype=DOUBLE), rtol=0, atol=0)


def test_b8_per_answer_and_per_token_agree_where_lengths_do() -> None:
    rows = draw(2, 3, 4, seed=5) - 2
    for lengths, same in (((3, 3), True), ((4, 1), False)):
        mask = torch.arange(4)[None, None] < torch.tensor(lengths)[:, None, None]
        groups = GroupLogps(cot=torch.zeros(2, 3, dtype=DOUBLE), answer=rows, answer_mask=mask)
        found = get_objective("likelihood").statistics(groups)
        per_answer = found["answer_logprob_per_token"].mean().item()
        per_token = found["answer_logprob"].sum().item() / (3 * sum(lengths))
        assert (abs(per_answer - per_token) < 1e-12) is same


# --- samples without the answer's form -------------------------------------------------------------------------------

SHARES = torch.tensor([0.2, 0.4, 0.4], dtype=DOUBLE)  # of right, wrong and malformed samples
ANSWERS = torch.tensor([0.9, 0.3], dtype=DOUBLE)  # pi(a* | z) after a right and a wrong chain


def bandit_update(objective, size=4, answer=None):
    """Expected -dL/d(logits) of a policy over right, wrong and malformed, by listing all 3^size groups.

    Args:
        answer: parameters of log pi(a* | z), `[2]`, after a right and a wrong chain; None: a verifier.

    Returns:
        `[3]`, and with `answer` also `[2]`.
    """
    rows = tuples(3, size)
    logits = SHARES.log().requires_grad_()
    formed, columns = rows < 2, {}
    if answer is None:
        columns["verified"] = (rows == 0).to(DOUBLE)
    else:
        padded = torch.cat([answer, torch.full((1,), math.nan, dtype=DOUBLE)])  # nothing stands behind a malformed one
        columns = {"answer": padded[rows][..., None], "answer_mask": torch.ones(len(rows), 1, 1)}
    groups = GroupLogps(cot=logits.log_softmax(0)[rows], valid=formed, **columns)
    mean = (SHARES[rows].prod(1) * objective.loss(groups)).sum()
    leaves = [logits] if answer is None else [logits, answer]
    return [-slope for slope in torch.autograd.grad(mean, leaves)]


def test_base_gives_a_malformed_sample_the_reward_zero() -> None:
    """The paper's 0 for unparsable: p_k (R_k - E R) = .2 (1 - .2), .4 (0 - .2), .4 (0 - .2)."""
    (got,) = bandit_update(get_objective("likelihood", reward="base"))
    assert got.tolist() == pytest.approx([0.16, -0.08, -0.08], abs=1e-12)
    (scaled,) = bandit_update(get_objective("likelihood", reward="base", scale=100.0))
    assert scaled.tolist() == pytest.approx([16, -8, -8], abs=1e-10)


@pytest.mark.parametrize("reward", ["prob", "avgprob"])
def test_prob_may_give_a_malformed_sample_zero_or_leave_it_out(reward) -> None:
    """Zero: the gradient of E R. Drop: that of E[R | valid], times P(two of four are valid) = 1 - .4^4 - 4 .6 .4^3."""
    answer = ANSWERS.log().requires_grad_()
    chain, own = bandit_update(get_objective("likelihood", reward=reward, malformed="zero"), answer=answer)
    mean = 0.2 * 0.9 + 0.4 * 0.3
    assert chain.tolist() == pytest.approx([0.2 * (0.9 - mean), 0.4 * (0.3 - mean), 0.4 * (0 - mean)], abs=1e-12)
    assert own.tolist() == pytest.approx([0.2 * 0.9, 0.4 * 0.3], abs=1e-12)  # d E R / d log pi(a*)
    chain, own = bandit_update(get_objective("likelihood", reward=reward), answer=answer)
    two, mean = 1 - 0.4**4 - 4 * 0.6 * 0.4**3, (0.2 * 0.9 + 0.4 * 0.3) / 0.6
    expected = [two / 3 * (0.9 - mean), two * 2 / 3 * (0.3 - mean), 0]
    assert chain.tolist() == pytest.approx(expected, abs=1e-12)
    assert own.tolist() == pytest.approx([two / 3 * 0.9, two * 2 / 3 * 0.3], abs=1e-12)


def test_what_is_logged_of_malformed_samples() -> None:
    """`valid` is the share with the form, whatever counts; the reward's mean has the zeros."""
    groups = group([[math.log(0.5)], [math.log(0.3)], [math.nan], [math.nan]], valid=torch.tensor([[1, 1, 0, 0]]))
    for malformed, worth in (("zero", (0.5 + 0.3) / 4), ("drop", (0.5 + 0.3) / 2)):
        found = get_objective("likelihood", reward="prob", malformed=malformed).statistics(groups)
        assert found["valid"].mean().item() == 0.5
        assert found["reward"].mean().item() == pytest.approx(worth)
        assert found["answer_logprob"].tolist() == pytest.approx([math.log(0.5), math.log(0.3)])


def test_a_reward_of_zero_is_refused_where_it_is_the_best() -> None:
    for reward in ("logprob", "avglogprob", "jepo"):
        with pytest.raises(ValueError, match=f"likelihood: malformed='zero': reward='{reward}' is a log-probability"):
            get_objective("likelihood", reward=reward, malformed="zero")
    with pytest.raises(ValueError, match="likelihood: malformed='drop': base counts a sample without"):
        get_objective("likelihood", reward="base", malformed="drop")
    derived = [get_objective("likelihood", reward=name).malformed for name in ("logprob", "prob", "base")]
    assert derived == ["drop", "drop", "zero"]


EVERY = [{"reward": reward, "answer_grad": grad} for reward in (*REWARDS, "jepo") for grad in (True, False)]
EVERY += [{"reward": reward, "malformed": "zero"} for reward in ("prob", "avgprob")]
EVERY.append({"reward": "base"})
DROPPING = [keywords for keywords in EVERY if get_objective("likelihood", **keywords).malformed == "drop"]


def named(keywords):
    return "-".join(map(str, keywords.values()))


@pytest.fixture(params=EVERY, ids=named)
def objective(request):
    return get_objective("likelihood", **request.param)


@pytest.fixture(params=DROPPING, ids=named)
def dropping(request):
    """Those that leave malformed samples out."""
    return get_objective("likelihood", **request.param)


@pytest.fixture(params=EVERY[:-1], ids=named)
def with_answer(request):
    """All but base, which reads no answer."""
    return get_objective("likelihood", **request.param)


def mixed(valid=True):
    """Two prompts, four samples, three tokens at most; verdicts and validity mixed."""
    mask = torch.tensor([[[True, True, True]], [[True, False, False]]])
    verified = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]], dtype=DOUBLE)
    flags = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]]) if valid else None
    cot = draw(2, 4, seed=7) - 9
    return GroupLogps(cot=cot, answer=draw(2, 4, 3, seed=6) - 2, answer_mask=mask, verified=verified, valid=flags)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_masked_or_not_valid_is_never_read(objective, poison) -> None:
    clean = mixed()
    answer, cot, verified = clean.answer.clone(), clean.cot.clone(), clean.verified.clone()
    answer[~clean.answer_mask.expand_as(answer)] = poison
    for column in (answer, verified, *([cot] if objective.malformed == "drop" else [])):
        column[clean.valid == 0] = poison
    dirty = GroupLogps(**(clean.columns() | {"answer": answer, "cot": cot, "verified": verified}))
    torch.testing.assert_close(objective.loss(dirty), objective.loss(clean), rtol=0, atol=0)
    for got, expected in zip(slopes(objective, dirty), slopes(objective, clean), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert all(bool(each.isfinite().all()) for each in objective.statistics(dirty).values())


def test_padding_of_a_short_answer_changes_nothing(with_answer) -> None:
    """The second prompt's answer has one token of three: the same loss and slopes without the other two."""
    whole = mixed()
    short = {name: column[1:, ..., :1] if "answer" in name else column[1:] for name, column in whole.columns().items()}
    torch.testing.assert_close(with_answer.loss(whole)[1:], with_answer.loss(GroupLogps(**short)), rtol=1e-14, atol=0)
    got, expected = slopes(with_answer, whole), slopes(with_answer, GroupLogps(**short))
    torch.testing.assert_close(got[0][1:], expected[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(got[1][1:, :, :1], expected[1], rtol=1e-14, atol=0)
    assert got[1][1:, :, 1:].abs().max() == 0


def test_a_sample_that_is_not_valid_leaves_both_terms_and_the_baseline(dropping) -> None:
    """A group with it equals the smaller group without it, in value and slopes."""
    whole = mixed()
    for row, keep in ((0, [0, 2, 3]), (1, [1, 2])):
        small = GroupLogps(
            cot=whole.cot[[row]][:, keep], answer=whole.answer[[row]][:, keep],
            answer_mask=whole.answer_mask[[row]], verified=whole.verified[[row]][:, keep],
        )  # fmt: skip
        torch.testing.assert_close(dropping.loss(whole)[[row]], dropping.loss(small), rtol=1e-14, atol=1e-14)
        for big, little in zip(slopes(dropping, whole), slopes(dropping, small), strict=True):
            torch.testing.assert_close(big[[row]][:, keep], little, rtol=1e-14, atol=1e-14)
            left_out = [index for index in range(4) if index not in keep]
            assert big[row, left_out].abs().max() == 0


@pytest.mark.parametrize("valid", [[0, 0, 0, 0], [0, 1, 0, 0]])
def test_a_group_with_fewer_than_two_valid_samples_contributes_exactly_nothing(dropping, valid) -> None:
    groups = mixed()
    flags = torch.tensor([valid, [1, 1, 1, 1]], dtype=torch.bool)
    groups = GroupLogps(**(groups.columns() | {"valid": flags}))
    loss = dropping.loss(groups)
    assert loss[0].item() == 0 and loss[1].item() != 0
    for slope in slopes(dropping, groups):
        assert slope[0].abs().max() == 0 and bool(slope.isfinite().all())
    found = dropping.statistics(groups)
    assert found["skipped"].tolist() == [1, 0]
    assert found["valid"].mean().item() == (sum(valid) + 4) / 8
    assert all(bool(each.isfinite().all()) for each in found.values())


def test_an_empty_answer_teaches_nothing(with_answer) -> None:
    groups = mixed(valid=False)
    mask = groups.answer_mask.clone()
    mask[0] = False
    groups = GroupLogps(**(groups.columns() | {"answer_mask": mask}))
    assert with_answer.loss(groups)[0].item() == 0
    assert all(slope[0].abs().max() == 0 and bool(slope.isfinite().all()) for slope in slopes(with_answer, groups))
    left_out = float(with_answer.malformed == "drop")  # else all of the group count, with reward 0
    assert with_answer.statistics(groups)["skipped"].tolist() == [left_out, 0]
    nothing = GroupLogps(**(groups.columns() | {"answer": groups.answer[..., :0], "answer_mask": mask[..., :0]}))
    assert with_answer.loss(nothing).tolist() == [0, 0]


def test_a_group_of_one_is_refused(objective) -> None:
    groups = GroupLogps(**{name: column[:, :1] for name, column in mixed().columns().items()})
    with pytest.raises(ValueError, match="likelihood: its leave-one-out baseline needs at least 2 samples.*got 1"):
        objective.loss(groups)


def test_the_answer_s_gradient_alone_is_dropped(with_answer) -> None:
    """answer_grad off: the same value, the same slopes of the chains, none of the answer."""
    settings = with_answer.hyperparameters | {"answer_grad": not with_answer.answer_grad}
    other = get_objective("likelihood", **settings)
    torch.testing.assert_close(with_answer.loss(mixed()), other.loss(mixed()), rtol=0, atol=0)
    mine, theirs = slopes(with_answer, mixed()), slopes(other, mixed())
    torch.testing.assert_close(mine[0], theirs[0], rtol=0, atol=0)
    assert bool(mine[1].any()) is with_answer.answer_grad


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
def test_extremes_stay_finite_in_every_precision(objective, dtype) -> None:
    """Answers of probability 1, e^-3000 and e^-1e6, beside one another."""
    answer = torch.tensor([[[0.0, 0.0], [-1000.0, -2000.0], [-1e6, 0.0]], [[-1e6, -1e6]] * 3])
    groups = GroupLogps(
        cot=torch.tensor([[0.0, -5000.0, -1e5]] * 2).to(dtype), answer=answer.to(dtype),
        answer_mask=torch.ones(2, 1, 2), verified=torch.tensor([[1, 0, 0], [0, 0, 0]]),
    )  # fmt: skip
    wide = DOUBLE if dtype is DOUBLE else torch.float32
    found = [objective.loss(groups), *slopes(objective, groups), *objective.statistics(groups).values()]
    assert all(bool(each.isfinite().all()) and each.dtype == wide for each in found)


def test_single_precision_agrees_with_double(objective) -> None:
    exact = mixed()
    single = exact.map(lambda column: column.float() if column.is_floating_point() else column)
    torch.testing.assert_close(objective.loss(single).double(), objective.loss(exact), rtol=1e-5, atol=1e-5)
    for got, expected in zip(slopes(objective, single), slopes(objective, exact), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_long_answer_gives_prob_no_gradient_and_logprob_all() -> None:
    rows = torch.full((3, 400), -1.0, dtype=torch.float32) - torch.arange(3)[:, None] / 10
    groups = GroupLogps(cot=torch.zeros(1, 3), answer=rows[None], answer_mask=torch.ones(1, 1, 400))
    assert all(slope.abs().max() == 0 for slope in slopes(get_objective("likelihood", reward="prob"), groups))
    assert slopes(get_objective("likelihood", reward="logprob"), groups)[0].abs().max() > 10


def test_what_is_needed_and_what_is_refused() -> None:
    objective, base = get_objective("likelihood"), get_objective("likelihood", reward="base")
    assert (objective.needs, objective.judge) == (("answer",), "none")
    assert (base.needs, base.judge) == (("verified",), "verifier")
    cot = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="objective 'likelihood' needs answer: the batch lacks 'answer' "):
        objective.loss(GroupLogps(cot=cot, verified=cot))
    with pytest.raises(ValueError, match="objective 'likelihood' needs answer: the batch lacks 'answer_mask' "):
        objective.loss(GroupLogps(cot=cot, answer=torch.zeros(2, 3, 4)))
    with pytest.raises(ValueError, match="objective 'likelihood' needs verified: the batch lacks 'verified' "):
        base.statistics(GroupLogps(cot=cot, answer=torch.zeros(2, 3, 4), answer_mask=torch.ones(2, 1, 4)))
    with pytest.raises(ValueError, match="likelihood: reward='prob' does not read scale"):
        get_objective("likelihood", reward="prob", scale=2.0)
    with pytest.raises(ValueError, match="likelihood: answer_grad must be one of true . false, got 'off'"):
        get_objective("likelihood", answer_grad="off")
