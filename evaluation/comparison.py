"""Two systems' responses to the same prompts, judged and summarised: the content of `win_rate.json`.

Not the program (`evaluation.win_rate`) and not the statistics (`evaluation.estimates`): this joins the two. It loads
no model and touches no file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alignment.errors import UserError
from alignment.rewards import PreferenceOracle, RewardFunction
from evaluation.annotations import annotation_rows
from evaluation.estimates import (
    Array,
    MeanDifference,
    WinRate,
    mean_difference,
    minimal_detectable_difference,
    preferences,
    win_rate_of_preferences,
)
from evaluation.intervals import no_width, readable, too_narrow
from evaluation.verdicts import LEVEL, sentence


@dataclass(frozen=True)
class Side:
    """One system's responses.

    Attributes:
        name: what a reader calls it: a model's path, or a file.
        responses: per prompt, its samples' texts.
        finished: per prompt and sample, whether the end was reached before the token limit; None where unknown.
    """

    name: str
    responses: Sequence[Sequence[str]]
    finished: Sequence[Sequence[bool]] | None = None


@dataclass(frozen=True)
class Comparison:
    """`result` is the content of win_rate.json, `rows` of samples.jsonl, `annotations` of annotations.json."""

    result: dict[str, Any]
    rows: list[dict[str, Any]]
    annotations: list[dict[str, Any]] = field(default_factory=list)


def describe_judge(judge: RewardFunction | PreferenceOracle) -> dict[str, Any]:
    """Name, keys and description of a judge, as they stand in win_rate.json."""
    keys: dict[str, Any] = (
        dataclasses.asdict(judge) if dataclasses.is_dataclass(judge) and not isinstance(judge, type) else {}
    )
    return {"name": judge.name, **keys, "description": judge.describe()}


def score_side(judge: RewardFunction, prompts: Sequence[str], side: Side) -> list[list[float]]:
    """Scores of every sample, per prompt; one call of the judge."""
    flat_prompts = [prompt for prompt, group in zip(prompts, side.responses, strict=True) for _ in group]
    flat = iter(judge.score(flat_prompts, [response for group in side.responses for response in group]))
    return [[next(flat) for _ in group] for group in side.responses]


def ask_oracle(oracle: PreferenceOracle, prompts: Sequence[str], model: Side, baseline: Side) -> list[Array]:
    """Per prompt, P(model's sample > baseline's sample) of every pair, [I, J]; one call of the oracle."""
    sides = list(zip(prompts, model.responses, baseline.responses, strict=True))
    pairs = [(prompt, a, b) for prompt, ours, theirs in sides for a in ours for b in theirs]
    flat = iter(oracle.probability([p for p, _, _ in pairs], [a for _, a, _ in pairs], [b for _, _, b in pairs]))
    return [np.array([[next(flat) for _ in theirs] for _ in ours], dtype=np.float64) for _, ours, theirs in sides]


def compare(
    prompts: Sequence[str],
    model: Side,
    baseline: Side,
    judge: RewardFunction | None = None,
    *,
    oracle: PreferenceOracle | None = None,
    resamples: int,
    seed: int,
) -> Comparison:
    """Judge both sides and summarise.

    A reward decides a pair of samples as 1, 1/2 or 0; an oracle's probability enters as it is, a pair counts as won
    above 1/2, and there are no scores: `mean_score` and the samples' scores are null.

    Args:
        prompts: the n prompts; both sides have n groups of samples in this order.
        model: the system whose win rate is reported.
        baseline: what it is compared with.
        judge: the reward that decides every pair of samples; either this or `oracle`.
        oracle: what says how probably one sample is preferred to another.
        resamples: bootstrap resamples over prompts.
        seed: seed of the resampling.

    Raises:
        UserError: the judge could not score a single pair.
    """
    settings: dict[str, Any] = {"resamples": resamples, "seed": seed, "level": LEVEL}
    deciding: Any = judge or oracle
    if oracle is not None and judge is None:
        matrices = ask_oracle(oracle, prompts, model, baseline)
        scores: list[Any] = [[[None] * len(group) for group in side.responses] for side in (model, baseline)]
    elif judge is not None and oracle is None:
        scores = [score_side(judge, prompts, side) for side in (model, baseline)]
        matrices = [preferences(a, b) for a, b in zip(*scores, strict=True)]
    else:
        raise ValueError("give either judge or oracle")
    try:
        rate = win_rate_of_preferences(matrices, **settings)
        means = mean_difference(*scores, **settings) if oracle is None else None
    except ValueError:
        raise UserError(
            f"judge {deciding.name}: could not score a single pair of responses (all scores are NaN)"
        ) from None
    result = {
        "model": model.name,
        "baseline": baseline.name,
        **_rate_fields(rate),
        "discrete_win_rate": _discrete(matrices),
        **{"orders": _orders(deciding), "invalid_answers": invalid_answers(deciding)},
        "mean_score": _mean_fields(means),
        "mean_characters": {"model": _mean_length(model), "baseline": _mean_length(baseline)},
        "cut_at_token_limit": {"model": _share_cut(model), "baseline": _share_cut(baseline)},
        "samples_per_prompt": {"model": _sizes(model), "baseline": _sizes(baseline)},
        "judge": describe_judge(deciding),
        "bootstrap": {"resamples": resamples, "seed": seed, "unit": "prompt"},
    }
    samples = [_samples(side, of) for side, of in zip((model, baseline), scores, strict=True)]
    rows = [_row(*item) for item in zip(prompts, matrices, *samples, strict=True)]
    texts = (model.name, model.responses), (baseline.name, baseline.responses)
    return Comparison(result, rows, annotation_rows(prompts, matrices, *texts, deciding.name))


def _rate_fields(rate: WinRate) -> dict[str, Any]:
    dropped = rate.rate_ties_dropped
    return {
        "win_rate": rate.rate.estimate,
        "interval": [rate.rate.low, rate.rate.high],
        "level": rate.level,
        "standard_error": rate.standard_error,
        "wilson_interval": [rate.wilson.low, rate.wilson.high],
        "win_rate_ties_dropped": dropped.estimate if dropped else None,
        "interval_ties_dropped": [dropped.low, dropped.high] if dropped else None,
        "p_value": rate.p_value,
        "minimal_detectable_difference": (
            None if rate.standard_error is None else minimal_detectable_difference(rate.standard_error)
        ),
        "prompts": rate.prompts,
        "prompts_excluded": rate.prompts_excluded,
        "prompt_outcomes": dict(zip(("wins", "ties", "losses"), rate.prompt_outcomes, strict=True)),
        "pairs": rate.pairs,
        "pairs_excluded": rate.pairs_excluded,
        "pair_outcomes": dict(zip(("wins", "ties", "losses"), rate.pair_outcomes, strict=True)),
    }


def _discrete(matrices: Sequence[Array]) -> float:
    """Win rate over all pairs with every probability rounded to 0, 1/2 or 1."""
    pairs = np.concatenate([m[~np.isnan(m)] for m in matrices])
    return float(np.mean((1 + np.sign(pairs - 0.5)) / 2))


def invalid_answers(judge: Any) -> dict[str, Any] | None:
    """How many of a language model's answers had no verdict, and counted as ties; None of any other judge.

    Raises:
        UserError: most of them.
    """
    if judge is None or judge.name != "llm_judge":
        return None
    judge.tally.refuse()
    return {"answers": judge.tally.answers, "invalid": judge.tally.invalid, "share": judge.tally.invalid_share}


def _orders(deciding: Any) -> dict[str, Any] | None:
    """What a judge that was shown every pair in both orders says of its position bias; None of any other."""
    tally = deciding.tally if deciding.name == "llm_judge" else None
    if tally is None or not tally.valid_pairs:
        return None
    return {
        "pairs": tally.valid_pairs,
        "consistency": tally.consistency,
        "first_preference": tally.first_preference,
        "invalid_answers": tally.invalid,
    }


def _mean_fields(means: MeanDifference | None) -> dict[str, Any]:
    if means is None:  # an oracle gives no scores
        return dict.fromkeys(("model", "baseline", "difference", "difference_interval", "prompts"))
    difference = means.difference
    return {
        "model": means.mean_a,
        "baseline": means.mean_b,
        "difference": difference.estimate,
        "difference_interval": [difference.low, difference.high] if means.known else None,
        "prompts": means.prompts,
    }


def _mean_length(side: Side) -> float:
    return float(np.mean([len(response) for group in side.responses for response in group]))


def _share_cut(side: Side) -> float | None:
    if side.finished is None:
        return None
    return float(np.mean([not finished for group in side.finished for finished in group]))


def _sizes(side: Side) -> list[int]:
    sizes = [len(group) for group in side.responses]
    return [min(sizes), max(sizes)]


def _samples(side: Side, scores: Sequence[Sequence[float | None]]) -> list[list[dict[str, Any]]]:
    """Per prompt, one object per sample."""
    finished: Sequence[Sequence[bool | None]] = side.finished or [[None] * len(group) for group in side.responses]
    return [
        [{"response": r, "score": s, "finished": f} for r, s, f in zip(*group, strict=True)]
        for group in zip(side.responses, scores, finished, strict=True)
    ]


def _row(prompt: str, matrix: Array, model: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """One prompt of samples.jsonl; `win_rate` and `score_change` are NaN (null) where nothing could be scored.

    `score_change` is also NaN where an oracle judged; None, its samples' score, becomes NaN in an array.
    """
    a, b = (np.array([sample["score"] for sample in side], dtype=np.float64) for side in (model, baseline))
    a, b, decided = a[~np.isnan(a)], b[~np.isnan(b)], matrix[~np.isnan(matrix)]
    share = float(decided.mean()) if decided.size else math.nan
    change = float(a.mean() - b.mean()) if a.size and b.size else math.nan
    return {"prompt": prompt, "win_rate": share, "score_change": change, "model": model, "baseline": baseline}


def percent(share: float) -> str:
    """`0.6523` as `65.2 %`."""
    return f"{100 * share:.1f} %"


def percent_interval(interval: Sequence[float]) -> str:
    """`[0.60, 0.70]` as `60.0 to 70.0 %`."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; neither a bar nor a new line inside a cell ends it."""
    lines = [head, ["---"] * len(head), *rows]
    cells = ([" ".join(cell.split("\n")).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def needs_wilson(result: Mapping[str, Any]) -> bool:
    """Whether the bootstrap interval would mislead: few prompts, or all of them came out alike."""
    return too_narrow(result["prompts"], result["interval"])


def read_interval(result: Mapping[str, Any]) -> tuple[float, float]:
    """Limits of the interval to read, shares: the bootstrap's, or Wilson's where that is too narrow."""
    return readable(result["prompts"], result["interval"], result["wilson_interval"])


def verdict_sentence(result: Mapping[str, Any]) -> str:
    """What interval and test let one say of the model, in words."""
    return sentence(result["prompts"], *read_interval(result), result["p_value"])


def judge_sentence(result: dict[str, Any]) -> str:
    """What judged, and whether the model was trained on it."""
    description = str(result["judge"]["description"])
    kind = "oracle" if result["mean_score"]["difference"] is None else "reward"
    judged = {
        True: f" This judge IS the {kind} that the model was trained on: the win rate shows that training worked, "
        "not that people would prefer the result.",
        False: " This run was not trained on this judge.",
        None: "",
    }
    return f"{description}.{judged[result.get('judge_is_training_reward')]}"


def samples_phrase(result: dict[str, Any]) -> str:
    """`2 samples each`, or the ranges where they differ."""
    sizes = result["samples_per_prompt"]
    spans = [f"{low}" if low == high else f"{low} to {high}" for low, high in (sizes["model"], sizes["baseline"])]
    if spans[0] == spans[1]:
        return f"{spans[0]} sample{'' if spans[0] == '1' else 's'} each"
    return f"{spans[0]} samples against {spans[1]}"


def p_phrase(p_value: float) -> str:
    """A p-value to two digits, without pretending to more than the resamples allow."""
    return f"p = {p_value:.2g}" if p_value >= 0.0001 else "p < 0.0001"


def headline(result: dict[str, Any], against: str = "") -> str:
    """`Win rate  61.2 %  (95 % interval 55.0 to 67.1 %)`, with what never ended and what was not judged, if any.

    `against` names the baseline, where no other line does.
    """
    level, cut = f"{100 * result['level']:.0f} %", unended_phrase(result)
    rate = f"Win rate  {percent(result['win_rate'])}  ({level} interval {percent_interval(read_interval(result))})"
    rate += f" against {against}" if against else ""
    return "; ".join(filter(None, (rate, cut, unjudged_phrase(result))))


def unjudged_phrase(result: dict[str, Any]) -> str | None:
    """The share of judgements without a verdict; None where all have one."""
    invalid, left_out = result.get("invalid_answers"), result["pairs_excluded"]
    if invalid and invalid["invalid"]:
        return f"no verdict: {percent(invalid['share'])} of the judge's answers, counted as ties"
    return (
        f"not scored: {percent(left_out / (left_out + result['pairs']))} of the pairs, left out" if left_out else None
    )


def unended_phrase(result: dict[str, Any]) -> str | None:
    """The share of responses that reached the token limit before their end; None where all ended, or unknown."""
    cut = result["cut_at_token_limit"]
    if not cut["model"] and not cut["baseline"]:
        return None
    model, baseline = ("unknown" if share is None else percent(share) for share in (cut["model"], cut["baseline"]))
    limit = (result.get("sampling") or {}).get("max_new_tokens")
    within = "" if limit is None else f" within {limit} tokens"
    return f"never ended{within}: {model} of its responses, {baseline} of the baseline's"


def facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader needs beside the headline: a name of at most eleven characters, and a sentence."""
    outcomes, pairs, lengths = result["prompt_outcomes"], result["pair_outcomes"], result["mean_characters"]
    bootstrap = f"{result['bootstrap']['resamples']:,} resamples, seed {result['bootstrap']['seed']}"
    found: list[tuple[str, str | None]] = [
        ("verdict", verdict_sentence(result)),
        ("Wilson", _wilson_phrase(result)),
        ("model", result["model"]),
        ("baseline", result["baseline"]),
        (
            "prompts",
            f"{result['prompts']}, {samples_phrase(result)}; every sample meets every sample of the other side; "
            f"bootstrap over prompts, {bootstrap}",
        ),
        (
            "prompts won",
            f"{outcomes['wins']}, tied {outcomes['ties']}, lost {outcomes['losses']}; "
            f"sample pairs won {pairs['wins']}, tied {pairs['ties']}, lost {pairs['losses']}",
        ),
        ("ties", f"count one half above; dropped: {_dropped_phrase(result)}"),
        ("mean score", _mean_phrase(result)),
        (
            "test",
            f"{p_phrase(result['p_value'])} (two-sided sign-flip permutation over prompts)"
            f"{_detectable_phrase(result)}",
        ),
        ("controlled", _controlled_phrase(result)),
        ("length", f"{lengths['model']:.0f} against {lengths['baseline']:.0f} characters"),
        ("judge", judge_sentence(result)),
        ("orders", _orders_phrase(result)),
        ("not scored", _excluded_phrase(result)),
        ("sampling", result.get("sampling_note")),
        ("overlap", result.get("overlap_note")),
    ]
    return [(name, text) for name, text in found if text]


def describe(result: dict[str, Any]) -> str:
    """The readable block that the program prints."""
    return "\n".join([headline(result), *(f"  {name:<11} {text}" for name, text in facts(result))])


def _wilson_phrase(result: dict[str, Any]) -> str | None:
    if not needs_wilson(result):
        return None
    return f"the interval above is Wilson's; the bootstrap's, {percent_interval(result['interval'])}, {_why(result)}"


def _mean_phrase(result: dict[str, Any]) -> str | None:
    """Mean scores; None for an oracle, which gives none."""
    mean = result["mean_score"]
    if mean["difference"] is None:
        return None
    text = f"{mean['model']:.4g} against {mean['baseline']:.4g}: difference {mean['difference']:+.4g}"
    if mean["difference_interval"] is None:
        return f"{text} (interval not known: {_alike(mean['prompts'])})"
    low, high = mean["difference_interval"]
    return f"{text} ({100 * result['level']:.0f} % interval {low:+.4g} to {high:+.4g})"


def _orders_phrase(result: dict[str, Any]) -> str | None:
    found = result.get("orders")
    if not found:
        return None
    return (
        f"agree on {percent(found['consistency'])} of {found['pairs']} pairs; the first place is preferred with "
        f"{percent(found['first_preference'])}"
    )


def _excluded_phrase(result: dict[str, Any]) -> str | None:
    if not result["pairs_excluded"]:
        return None
    return f"{result['pairs_excluded']} sample pairs and {result['prompts_excluded']} whole prompts left out"


def _detectable_phrase(result: dict[str, Any]) -> str:
    found = result.get("minimal_detectable_difference")
    return "" if found is None else f"; detectable with 80 % power: {100 * found:.1f} points"


def _controlled_phrase(result: dict[str, Any]) -> str | None:
    """The length-controlled rate, where it was computed (`evaluation.outputs.with_length_control`)."""
    control = result.get("length_controlled")
    if control is None:
        return None
    if control["win_rate"] is None:
        return f"no estimate: {control['note']}"
    note = f"; {control['note']}" if control["note"] else ""
    interval = "" if control["interval"] is None else f" ({percent_interval(control['interval'])})"
    return f"{percent(control['win_rate'])}{interval} at equal lengths, {control['variant']}{note}"


def _why(result: dict[str, Any]) -> str:
    if no_width(result["interval"]):
        return "has no width, since all prompts came out alike"
    return "is too narrow with so few prompts"


def _alike(prompts: int) -> str:
    return "one prompt" if prompts == 1 else f"all {prompts} prompts have the same"


def _dropped_phrase(result: dict[str, Any]) -> str:
    if result["win_rate_ties_dropped"] is None:
        return "nothing is left, every pair is a tie"
    return f"{percent(result['win_rate_ties_dropped'])} ({percent_interval(result['interval_ties_dropped'])})"
