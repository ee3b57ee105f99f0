"""The papers' formulas in mpmath at 50 digits, written with probabilities and before any simplification.

Nothing here is shared with the objectives: no log-sigmoid, no margin, no log-ratio. Probabilities are exp(s), odds are
odds, f' is the numerical derivative of f. That is what makes agreement a proof and not a restatement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mpmath import mp, mpf

Point = dict[str, Any]  # column name -> mpf; integers, texts and, of the degree columns, lists stay what they are
DIGITS = 50


def _p(point: Point, column: str) -> Any:
    """The probability whose logarithm is the column."""
    return mp.exp(point[column])


def _u(point: Point, response: str) -> Any:
    """pi/ref of a response."""
    return _p(point, response) / _p(point, f"ref_{response}")


def _preferred(strength_chosen: Any, strength_rejected: Any) -> Any:
    """Bradley-Terry probability that the first of two positive strengths wins."""
    return strength_chosen / (strength_chosen + strength_rejected)


def _dpo_win(point: Point, h: Point) -> Any:
    return _preferred(_u(point, "chosen") ** h["beta"], _u(point, "rejected") ** h["beta"])


def dpo(point: Point, h: Point) -> Any:
    """Cross-entropy between labels flipped with probability e and the Bradley-Terry model of the implicit reward."""
    win, eps = _dpo_win(point, h), h["label_smoothing"]
    return -(1 - eps) * mp.log(win) - eps * mp.log(1 - win)


def robust(point: Point, h: Point) -> Any:
    """The combination a l(kept) + b l(flipped) whose mean under flips with rate e is l(kept)."""
    win, eps = _dpo_win(point, h), h["label_smoothing"]
    a, b = mp.lu_solve(mp.matrix([[1 - eps, eps], [eps, 1 - eps]]), mp.matrix([1, 0]))
    return -a * mp.log(win) - b * mp.log(1 - win)


def ipo(point: Point, h: Point) -> Any:
    ratios = [_u(point, "chosen"), _u(point, "rejected")]
    if h["normalization"] == "mean":
        lengths = [point["chosen_length"], point["rejected_length"]]
        ratios = [mp.root(ratio, length) for ratio, length in zip(ratios, lengths, strict=True)]
    return (mp.log(ratios[0] / ratios[1]) - 1 / h["tau"] / 2) ** 2


def hinge(point: Point, h: Point) -> Any:
    return max(mpf(0), 1 - mp.log((_u(point, "chosen") / _u(point, "rejected")) ** h["beta"]))


def rpo(point: Point, h: Point) -> Any:
    base = {"chosen": "chosen", "given": "calibration"}[h["baseline"]]
    if h["form"] == "sum":
        penalty = h["eta"] * h["beta"] * mp.log(1 / _p(point, base))
    else:
        penalty = h["eta"] * mp.log(1 / mp.root(_p(point, base), point[f"{base}_length"]))
    return mp.log(1 / _dpo_win(point, h)) + penalty


def reward_aware_rpo(point: Point, h: Point) -> Any:
    model = [_u(point, "chosen") ** h["beta"], _u(point, "rejected") ** h["beta"]]
    judge = [mp.exp(h["scale"] * point["reward_chosen"]), mp.exp(h["scale"] * point["reward_rejected"])]
    if h["form"] == "sq":
        return mp.log((model[0] / model[1]) / (judge[0] / judge[1])) ** 2
    pair = [_preferred(*judge), _preferred(*model)]
    p, q = pair if h["form"] == "bwd_kl" else pair[::-1]
    return p * mp.log(p / q) + (1 - p) * mp.log((1 - p) / (1 - q))


def _generator(divergence: str, alpha: Any) -> Callable[[Any], Any]:
    """f of the f-divergence sum ref f(pi/ref)."""
    if divergence == "reverse_kl":
        return lambda u: u * mp.log(u)
    if divergence == "forward_kl":
        return lambda u: -mp.log(u)
    if divergence == "jsd":
        return lambda u: u * mp.log(u) - (u + 1) * mp.log((u + 1) / 2)
    return lambda u: (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))


def f_dpo(point: Point, h: Point) -> Any:
    f = _generator(h["divergence"], h["alpha"])
    rewards = [h["beta"] * mp.diff(f, _u(point, response)) for response in ("chosen", "rejected")]
    return mp.log(1 / _preferred(mp.exp(rewards[0]), mp.exp(rewards[1])))


def vpo(point: Point, h: Point) -> Any:
    """Bradley-Terry likelihood minus sign alpha J*, J* = -beta E_cal[log pi/ref]: optimism maximises J*."""
    response = {"chosen": "chosen", "rejected": "rejected", "given": "calibration"}[h["calibration"]]
    value = -h["beta"] * mp.log(_u(point, response))
    sign = {"online": 1, "offline": -1}[h["mode"]]
    return mp.log(1 / _dpo_win(point, h)) - sign * h["alpha"] * value


def inpo(point: Point, h: Point) -> Any:
    """Exponents tau/eta and 1 - tau/eta on the odds of the pair under reference and previous policy."""
    odds = {name: _p(point, f"{name}chosen") / _p(point, f"{name}rejected") for name in ("", "ref_", "prev_")}
    share = h["tau"] / h["eta"]
    target = odds["ref_"] ** share * odds["prev_"] ** (1 - share) * mp.exp(1 / (2 * h["eta"]))
    return mp.log(odds[""] / target) ** 2


def sppo(point: Point, h: Point) -> Any:
    """The logarithm of how far pi/ref is, as a factor, from the Gibbs weight of the response, unnormalised."""
    off = [_u(point, y) / mp.exp(point[f"preference_{y}"] - mpf(1) / 2) ** h["eta"] for y in ("chosen", "rejected")]
    return sum(mp.log(factor) ** 2 for factor in off) / 2


def gpo(point: Point, h: Point) -> Any:
    """As sppo; the weight is a power of the geometric mean of the odds of winning."""
    off = [_u(point, y) / mp.exp(point[f"log_odds_{y}"]) ** h["eta"] for y in ("chosen", "rejected")]
    return sum(mp.log(factor) ** 2 for factor in off) / 2


def _geometric_mean(point: Point, response: str) -> Any:
    return mp.root(_p(point, response), point[f"{response}_length"])


def simpo(point: Point, h: Point) -> Any:
    chosen, rejected = (_geometric_mean(point, response) ** h["beta"] for response in ("chosen", "rejected"))
    return mp.log(1 / _preferred(chosen, rejected * mp.exp(h["gamma"])))


def orpo(point: Point, h: Point) -> Any:
    chosen, rejected = (_geometric_mean(point, response) for response in ("chosen", "rejected"))
    odds = [chosen / (1 - chosen), rejected / (1 - rejected)]
    return mp.log(1 / chosen) + h["lam"] * mp.log(1 / _preferred(*odds))


def cpo(point: Point, h: Point) -> Any:
    chosen, rejected = _p(point, "chosen") ** h["beta"], _p(point, "rejected") ** h["beta"]
    likelihood = _p(point, "chosen") if h["form"] == "sum" else _geometric_mean(point, "chosen")
    return mp.log(1 / _preferred(chosen, rejected)) + h["nll_weight"] * mp.log(1 / likelihood)


def dpop(point: Point, h: Point) -> Any:
    """The reward of chosen is divided by max(1, ref/pi)^lam inside the Bradley-Terry model."""
    handicap = max(mpf(1), 1 / _u(point, "chosen")) ** h["lam"]
    chosen, rejected = (_u(point, "chosen") / handicap) ** h["beta"], _u(point, "rejected") ** h["beta"]
    return mp.log(1 / _preferred(chosen, rejected))


def spo(point: Point, h: Point) -> Any:
    """The base's loss plus gamma times the mean surprise, over the copies that exist, at the right degree."""
    base = h | {name.removeprefix("base_"): value for name, value in h.items() if name.startswith("base_")}
    surprises = []
    for logits, degree in zip(point["degree_logits"], point["degree_labels"], strict=True):
        if degree >= 0:
            weights = [mp.exp(logit) for logit in logits]
            surprises.append(mp.log(sum(weights) / weights[degree]))
    mean = mp.fsum(surprises) / len(surprises) if surprises else 0
    return FORMULAS[h["base"]](point, base) + h["gamma"] * mean


FORMULAS: dict[str, Callable[[Point, Point], Any]] = {
    formula.__name__: formula
    for formula in (
        *(dpo, robust, ipo, hinge, rpo, reward_aware_rpo, f_dpo, vpo, inpo, sppo, gpo, simpo, orpo, cpo, dpop, spo),
    )
}


def _exact(value: Any) -> Any:
    """Floats as `mpf`, in nested lists too."""
    if isinstance(value, list):
        return [_exact(item) for item in value]
    return mpf(value) if isinstance(value, float) else value


def evaluate(name: str, columns: Mapping[str, Any], hyperparameters: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The loss of one pair and its derivatives by chosen, rejected and calibration, all `mpf` at 50 digits."""
    with mp.workdps(DIGITS):
        point = {key: _exact(value) for key, value in columns.items()}
        h = {key: _exact(value) for key, value in hyperparameters.items()}
        formula = FORMULAS[name]
        derivatives = {
            column: mp.diff(lambda value, column=column: formula(point | {column: value}, h), point[column])
            for column in ("chosen", "rejected", "calibration")
        }
        return formula(point, h), derivatives
