"""Limits and equivalences between objectives, invariances, and boundaries inside one objective.

Each relation is one function of the class under test; partners come from the registry. They catch what a wrong formula
and a wrong golden number could share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from alignment.objectives.base import Objective
from alignment.objectives.batch import PairLogps
from alignment.objectives.conformance.batches import (
    DOUBLE,
    Make,
    close,
    pairs,
    random_batch,
    require,
    same,
    slopes,
    with_columns,
)
from alignment.objectives.conformance.degrees import DEGREE_RELATIONS
from alignment.objectives.conformance.formulas import evaluate
from alignment.objectives.registry import get_objective

Relation = Callable[[Make], None]


def equals(keywords: dict[str, Any], other: str, other_keywords: dict[str, Any], atol: float = 1e-11) -> Relation:
    """The class with `keywords` is the other objective, values and slopes."""
    return lambda cls: same(cls(**keywords), get_objective(other, **other_keywords), pairs(), atol=atol)


def _shift(objective: Objective, *names: str) -> None:
    """Adding the same number to the columns `names` changes nothing."""
    batch = random_batch(7, seed=42)
    moved = {name: batch.columns()[name] + 3.25 for name in names}
    close(
        objective.loss(with_columns(batch, **moved)), objective.loss(batch), f"loss after shifting {', '.join(names)}"
    )


def ignores_shift(*names: str, **keywords: Any) -> Relation:
    """Invariance to a prompt's constant: added to both policy columns, to all four, or to both rewards."""
    return lambda cls: _shift(cls(**keywords), *names)


POLICY = ("chosen", "rejected")
FOUR = ("chosen", "rejected", "ref_chosen", "ref_rejected")


def dpo_swap(cls: Make) -> None:
    """L(m) - L(-m) = -(1 - 2e) beta m."""
    for beta, eps in ((0.1, 0.0), (0.5, 0.2)):
        objective, batch = cls(beta=beta, label_smoothing=eps), pairs()
        swapped = PairLogps(batch.rejected, batch.chosen, batch.ref_rejected, batch.ref_chosen)
        close(objective.loss(batch) - objective.loss(swapped), -(1 - 2 * eps) * beta * batch.margin, "swap of w and l")


def cdpo_stationary(cls: Make) -> None:
    """With e = 0.1 and beta = 0.1 the loss is least at m = logit(0.9)/0.1 = 21.9722457734, at the entropy of e."""
    zero = torch.zeros(1, dtype=DOUBLE)
    batch = PairLogps(zero + 21.9722457734, zero, zero, zero)
    objective = cls(beta=0.1, label_smoothing=0.1)
    close(slopes(objective, batch)["chosen"], zero, "slope at the stationary margin", atol=1e-11)
    entropy = -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))
    close(objective.loss(batch), zero + entropy, "loss at the stationary margin")


def robust_tail(cls: Make) -> None:
    """As m grows the slope tends to -beta e/(1 - 2e): unbounded below."""
    zero = torch.zeros(1, dtype=DOUBLE)
    batch = PairLogps(zero + 800, zero, zero, zero)
    slope = slopes(cls(beta=0.1, label_smoothing=0.1), batch)["chosen"]
    close(slope, zero - 0.1 * 0.1 / 0.8, "slope at m = 800")


def ipo_equal_lengths(cls: Make) -> None:
    """For equal lengths T: mean(tau) = sum(tau/T)/T^2."""
    batch = pairs()
    tokens = torch.full_like(batch.chosen, 8.0)
    batch = with_columns(batch, chosen_length=tokens, rejected_length=tokens)
    mean, total = cls(tau=0.4, normalization="mean"), cls(tau=0.05, normalization="sum")
    close(mean.loss(batch), total.loss(batch) / 64, "mean form against sum form")


def rpo_vpo(cls: Make) -> None:
    """rpo(eta) = offline vpo(alpha = eta, calibration=chosen) - eta beta s_ref(w)."""
    batch = pairs()
    constant = -0.05 * 0.1 * batch.column("ref_chosen")
    same(cls(beta=0.1, eta=0.05), get_objective("vpo", beta=0.1, alpha=0.05), batch, constant)


def vpo_rpo(cls: Make) -> None:
    """The same relation from the other side."""
    batch = pairs()
    constant = 0.05 * 0.1 * batch.column("ref_chosen")
    same(cls(beta=0.1, alpha=0.05), get_objective("rpo", beta=0.1, eta=0.05), batch, constant)


def rpo_rejected(cls: Make) -> None:
    """The likelihood term leaves the rejected branch alone; on the chosen one it adds -eta beta."""
    batch = pairs()
    got, plain = slopes(cls(beta=0.1, eta=0.3), batch), slopes(get_objective("dpo", beta=0.1), batch)
    close(got["rejected"], plain["rejected"], "slope by rejected against dpo")
    close(got["chosen"], plain["chosen"] - 0.03, "slope by chosen against dpo")
    require(bool((got["chosen"].abs() >= 0.03 - 1e-12).all()), "the push on chosen falls below eta beta")


def rpo_given_is_chosen(cls: Make) -> None:
    """A calibration column that holds the chosen response gives the value of baseline=chosen."""
    batch = pairs()
    batch = with_columns(batch, calibration=batch.chosen, calibration_length=batch.column("chosen_length"))
    for form in ("sum", "mean"):
        given, chosen = cls(form=form, baseline="given", eta=0.2), cls(form=form, baseline="chosen", eta=0.2)
        close(given.loss(batch), chosen.loss(batch), f"baseline=given, form={form}")


def vpo_signs(cls: Make) -> None:
    """Offline raises the calibration log-probability, online lowers it, by alpha beta (XPO's alpha) exactly."""
    batch = pairs()
    for mode, expected in (("offline", -0.005), ("online", 0.005)):
        got = slopes(cls(beta=0.1, alpha=0.05, mode=mode, calibration="given"), batch)["calibration"]
        close(got, torch.full_like(got, expected), f"slope by calibration, {mode}")


def reward_aware_limits(cls: Make) -> None:
    """bwd_kl tends to dpo(beta = KL penalty) as the reward gap grows; every form is 0 with zero slope at m' = D."""
    batch = pairs()
    sure = with_columns(batch, reward_chosen=torch.full_like(batch.chosen, 80.0), reward_rejected=0 * batch.chosen)
    same(cls(beta=0.1, form="bwd_kl"), get_objective("dpo", beta=0.1), sure, atol=1e-9)
    gap = 0.1 * batch.margin
    met = with_columns(batch, reward_chosen=gap, reward_rejected=torch.zeros_like(gap))
    for form in ("sq", "bwd_kl", "fwd_kl"):
        objective = cls(beta=0.1, form=form)
        close(objective.loss(met), torch.zeros_like(gap), f"{form} at m' = D", atol=1e-12)
        close(slopes(objective, met)["chosen"], torch.zeros_like(gap), f"{form} slope at m' = D", atol=1e-12)


def f_dpo_extension(cls: Make) -> None:
    """Beyond exponent 10 the score is the tangent: value and slope continuous, slope e^10, no dead zone."""
    for keywords, order in (({"divergence": "forward_kl"}, 1.0), ({"divergence": "alpha", "alpha": 0.5}, 0.5)):
        objective = cls(beta=1.0, **keywords)
        z = torch.tensor([-9.999999, -10.0, -10.000001, -10.5, -50.0, -800.0], dtype=DOUBLE) / order
        z.requires_grad_()
        reward, _ = objective.rewards(PairLogps(z, torch.zeros_like(z), torch.zeros_like(z), torch.zeros_like(z)))
        (slope,) = torch.autograd.grad(reward.sum(), z)
        tangent = (1 - math.exp(10) * (1 + (-order * z.detach() - 10))) / order
        close(reward[1:].detach(), tangent[1:], f"{keywords}: score beyond the cap", rtol=1e-9)
        close(slope[1:], torch.full_like(slope[1:], math.exp(10)), f"{keywords}: slope beyond the cap")
        require(abs(float(slope[0] / slope[2]) - 1) < 1e-5, f"{keywords}: the slope jumps at the cap")


def f_dpo_trl(cls: Make) -> None:
    """TRL >= 0.29 writes c for 1 - alpha: margin of (e^((c-1) z))/(c-1); c = 0.3 is alpha = 0.7."""
    batch = random_batch(7, seed=43)
    with torch.no_grad():
        ratio = [batch.log_ratio_chosen, batch.log_ratio_rejected]
        score = [torch.exp(-0.7 * z) / -0.7 for z in ratio]
        expected = torch.log1p(torch.exp(-0.1 * (score[0] - score[1])))
    close(cls(beta=0.1, divergence="alpha", alpha=0.7).loss(batch), expected, "TRL's coefficient 0.3")


def inpo_mixed(cls: Make) -> None:
    """inpo = ipo(tau = eta) with ref^(tau/eta) prev^(1 - tau/eta) fed as the reference."""
    batch = pairs()
    mixed = {
        f"ref_{name}": 0.25 * batch.column(f"ref_{name}") + 0.75 * batch.column(f"prev_{name}") for name in POLICY
    }
    other = with_columns(batch, **mixed)
    same(cls(eta=0.2, tau=0.05), get_objective("ipo", tau=0.2), batch, other_batch=other)


def inpo_first_iteration(cls: Make) -> None:
    """While the previous iterate is the reference, inpo is ipo(tau = eta) for every tau."""
    batch = pairs()
    first = with_columns(batch, **{f"prev_{name}": batch.column(f"ref_{name}") for name in POLICY})
    for tau in (0.0, 0.07, 0.2):
        same(cls(eta=0.2, tau=tau), get_objective("ipo", tau=0.2), first)


def inpo_default_tau(cls: Make) -> None:
    """tau is eta/3 unless given."""
    close(cls(eta=0.3).loss(pairs()), cls(eta=0.3, tau=0.1).loss(pairs()), "default tau", rtol=1e-12)


def sppo_ties(cls: Make) -> None:
    """Responses that win half the time pull back to the reference: half the squared distance, whatever the step."""
    batch = pairs()
    half = torch.full_like(batch.chosen, 0.5)
    tied = with_columns(batch, preference_chosen=half, preference_rejected=half)
    apart = torch.stack([batch.chosen - batch.column("ref_chosen"), batch.rejected - batch.column("ref_rejected")])
    for eta in (0.5, 1000.0):
        close(cls(eta=eta).loss(tied), apart.square().sum(0) / 2, f"loss of ties at eta = {eta:g}")


def exchangeable(cls: Make) -> None:
    """The two responses are regressed alike: which one is called chosen changes nothing, and so no label does."""
    batch, objective = pairs(), cls(eta=2.0)
    names = [name for name in batch.columns() if "chosen" in name]
    swap = {name: batch.column(name.replace("chosen", "rejected")) for name in names}
    swap |= {name.replace("chosen", "rejected"): batch.column(name) for name in names}
    close(objective.loss(with_columns(batch, **swap)), objective.loss(batch), "exchanged responses", rtol=1e-13)
    soft = with_columns(batch, label=torch.linspace(0, 1, len(batch.chosen), dtype=DOUBLE))
    close(objective.loss(soft), objective.loss(batch), "soft labels", rtol=1e-13)


def gpo_sppo(cls: Make) -> None:
    """A log-odds of P - 1/2 is sppo's target."""
    batch = pairs()
    names = ("chosen", "rejected")
    better = {f"log_odds_{name}": batch.column(f"preference_{name}") - 0.5 for name in names}
    same(cls(eta=3.0), get_objective("sppo", eta=3.0), with_columns(batch, **better))


def gpo_unit(cls: Make) -> None:
    """Only eta times the log-odds matters: odds squared at half the step are the same target."""
    batch = pairs()
    double = {f"log_odds_{name}": 2 * batch.column(f"log_odds_{name}") for name in ("chosen", "rejected")}
    close(cls(eta=1.5).loss(with_columns(batch, **double)), cls(eta=3.0).loss(batch), "odds squared, half the step")


def met_targets(cls: Make) -> None:
    """Loss and slopes are 0 where each log-ratio is its target; then the rewards are P - 1/2, or the log-odds."""
    batch = pairs()
    for eta in (0.5, 40.0):
        objective = cls(eta=eta)
        offset, kind = (0.5, "preference") if "preference" in objective.needs else (0.0, "log_odds")
        better = [batch.column(f"{kind}_{name}") - offset for name in ("chosen", "rejected")]
        met = with_columns(
            batch,
            chosen=batch.column("ref_chosen") + eta * better[0],
            rejected=batch.column("ref_rejected") + eta * better[1],
        )
        close(objective.loss(met), torch.zeros_like(batch.chosen), "loss at the targets", atol=1e-20)
        for reward, wanted in zip(objective.rewards(met), better, strict=True):
            close(reward, wanted, "reward at the targets", atol=1e-10)


def simpo_is_dpo(cls: Make) -> None:
    """gamma = 0 and one token each: dpo with a uniform reference."""
    batch = pairs()
    one, flat = torch.ones_like(batch.chosen), torch.full_like(batch.chosen, -3.0)
    single = with_columns(batch, chosen_length=one, rejected_length=one, ref_chosen=flat, ref_rejected=flat)
    same(cls(beta=0.3, gamma=0.0), get_objective("dpo", beta=0.3), single)


def cpo_is_rpo(cls: Make) -> None:
    """cpo = rpo(eta = nll_weight/beta) with a uniform reference."""
    flat = torch.full_like(pairs().chosen, -3.0)
    batch = with_columns(pairs(), ref_chosen=flat, ref_rejected=flat)
    same(cls(beta=0.5, nll_weight=0.2), get_objective("rpo", beta=0.5, eta=0.4), batch)


def orpo_nll(cls: Make) -> None:
    """lam = 0 leaves the mean negative log-likelihood of chosen."""
    batch = pairs()
    close(cls(lam=0.0).loss(batch), -batch.chosen / batch.column("chosen_length"), "lam = 0")


def dpop_region(cls: Make) -> None:
    """dpo where chosen has not fallen below the reference; just below, the push on chosen is 1 + lam times dpo's."""
    batch = pairs()
    above = batch.map(lambda column: column[batch.log_ratio_chosen > 0])
    same(cls(beta=0.1, lam=7.0), get_objective("dpo", beta=0.1), above)
    zero = torch.zeros(1, dtype=DOUBLE)
    below = PairLogps(zero - 1e-9, zero, zero, zero)
    close(
        slopes(cls(beta=0.1, lam=7.0), below)["chosen"], zero - 0.05 * 8, "slope just below the reference", rtol=1e-7
    )


def dpo_labels(cls: Make) -> None:
    """A constant label 1 - e is label_smoothing = e: the cross-entropy formula of cDPO at 50 digits."""
    batch = random_batch(5, seed=45)
    for eps in (0.1, 0.4):
        soft = with_columns(batch, label=torch.full_like(batch.chosen, 1 - eps))
        h = {"beta": 0.3, "label_smoothing": eps}
        rows = [{name: value[i].tolist() for name, value in batch.columns().items()} for i in range(5)]
        laws = [evaluate("dpo", row, h) for row in rows]
        expected = torch.tensor([float(value) for value, _ in laws], dtype=DOUBLE)
        close(cls(beta=0.3).loss(soft), expected, f"label {1 - eps:g} against label_smoothing {eps:g}")
        slope = torch.tensor([float(by["chosen"]) for _, by in laws], dtype=DOUBLE)
        close(slopes(cls(beta=0.3), soft)["chosen"], slope, f"slope with label {1 - eps:g}")


def robust_labels(cls: Make) -> None:
    """Labels that are right with probability 1 - e, and robust(e): the loss of dpo on clean labels."""
    batch = pairs()
    soft = with_columns(batch, label=torch.full_like(batch.chosen, 0.8))
    same(cls(beta=0.5, label_smoothing=0.2), get_objective("dpo", beta=0.5), soft, other_batch=batch)


def ipo_labels(cls: Make) -> None:
    """Label p moves ipo's target to (2p - 1)/(2 tau)."""
    batch, p = pairs(), 0.7
    got = slopes(cls(tau=0.2), with_columns(batch, label=torch.full_like(batch.chosen, p)))["chosen"]
    close(got, 2 * (batch.margin - (2 * p - 1) / 0.4), "slope with label 0.7")


_HALF = {"beta": 0.5}
RELATIONS: dict[str, dict[str, Relation]] = {
    "dpo": {
        "= robust(0)": equals(_HALF, "robust", {"beta": 0.5, "label_smoothing": 0.0}),
        "= f_dpo(reverse_kl)": equals(_HALF, "f_dpo", _HALF),
        "swap symmetry": dpo_swap,
        "cDPO stationary margin": cdpo_stationary,
        "soft label = smoothing": dpo_labels,
        "prompt constant": ignores_shift(*POLICY),
        "constant on all four": ignores_shift(*FOUR),
    },
    "robust": {
        "label_smoothing 0 = dpo": equals({"beta": 0.5, "label_smoothing": 0.0}, "dpo", _HALF),
        "tail slope": robust_tail,
        "flip rate as soft label = dpo": robust_labels,
        "prompt constant": ignores_shift(*POLICY),
    },
    "ipo": {
        "equal lengths": ipo_equal_lengths,
        "soft label moves the target": ipo_labels,
        "prompt constant": ignores_shift(*POLICY),
    },
    "hinge": {"prompt constant": ignores_shift(*POLICY, beta=0.5), "constant on all four": ignores_shift(*FOUR)},
    "rpo": {
        "eta 0 = dpo": equals({"beta": 0.5, "eta": 0.0}, "dpo", _HALF),
        "eta 0, mean = dpo": equals({"beta": 0.5, "eta": 0.0, "form": "mean"}, "dpo", _HALF),
        "= vpo offline + constant": rpo_vpo,
        "slopes against dpo": rpo_rejected,
        "given = chosen": rpo_given_is_chosen,
    },
    "reward_aware_rpo": {
        "limits": reward_aware_limits,
        "prompt constant": ignores_shift(*POLICY),
        "reward constant": ignores_shift("reward_chosen", "reward_rejected", form="fwd_kl"),
    },
    "f_dpo": {
        "reverse_kl = dpo": equals(_HALF, "dpo", _HALF),
        "alpha -> 0 = dpo": equals(_HALF | {"divergence": "alpha", "alpha": 1e-9}, "dpo", _HALF, atol=1e-6),
        "alpha -> 1 = forward_kl": lambda cls: same(
            cls(beta=0.1, divergence="alpha", alpha=1 - 1e-12),
            cls(beta=0.1, divergence="forward_kl"),
            random_batch(7, seed=44),
            rtol=1e-8,
        ),
        "linear extension": f_dpo_extension,
        "TRL's convention": f_dpo_trl,
        "constant on all four": ignores_shift(*FOUR, divergence="jsd"),
    },
    "vpo": {
        "alpha 0 = dpo": equals({"beta": 0.5, "alpha": 0.0}, "dpo", _HALF),
        "alpha 0, online = dpo": equals({"beta": 0.5, "alpha": 0.0, "mode": "online"}, "dpo", _HALF),
        "= rpo + constant": vpo_rpo,
        "signs": vpo_signs,
    },
    "inpo": {
        "= ipo on mixed reference": inpo_mixed,
        "first iteration = ipo": inpo_first_iteration,
        "tau = eta: ipo": equals({"eta": 0.2, "tau": 0.2}, "ipo", {"tau": 0.2}),
        "default tau": inpo_default_tau,
        "prompt constant": ignores_shift(*POLICY, eta=0.1),
    },
    "sppo": {
        "ties pull to the reference": sppo_ties,
        "exchanged responses": exchangeable,
        "0 at its targets": met_targets,
        "constant on a response": ignores_shift("chosen", "ref_chosen", eta=2.0),
    },
    "gpo": {
        "log-odds P - 1/2 = sppo": gpo_sppo,
        "unit of the log-odds": gpo_unit,
        "exchanged responses": exchangeable,
        "0 at its targets": met_targets,
        "constant on a response": ignores_shift("rejected", "ref_rejected", eta=2.0),
    },
    "simpo": {"one token = dpo": simpo_is_dpo},
    "orpo": {"lam 0 = NLL": orpo_nll},
    "cpo": {"= rpo, uniform reference": cpo_is_rpo},
    "dpop": {"lam 0 = dpo": equals({"beta": 0.5, "lam": 0.0}, "dpo", _HALF), "two regions": dpop_region},
    "spo": DEGREE_RELATIONS,
}
