"""Two systems' responses to the same prompts, judged and summarised: the content of `win_rate.json`.

Not the program (`evaluation.win_rate`) and not the statistics (`evaluation.statistics`): this joins the two. It loads
no model and touches no file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignment.errors import UserError
from alignment.rewards import RewardFunction
from evaluation.statistics import Interval, MeanDifference, WinRate, mean_difference, preferences, win_rate

LEVEL = 0.95
FEW_PROMPTS = 30  # under this many, and where the bootstrap has width 0, Wilson's interval is shown beside it


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
    """`result` is the content of win_rate.json, `rows` that of samples.jsonl."""

    result: dict[str, Any]
    rows: list[dict[str, Any]]


def describe_judge(judge: RewardFunction) -> dict[str, Any]:
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


def compare(
    prompts: Sequence[str], model: Side, baseline: Side, judge: RewardFunction, *, resamples: int, seed: int
) -> Comparison:
    """Judge both sides and summarise.

    Args:
        prompts: the n prompts; both sides have n groups of samples in this order.
        model: the system whose win rate is reported.
        baseline: what it is compared with.
        judge: the reward that decides every pair of samples.
        resamples: bootstrap resamples over prompts.
        seed: seed of the resampling.

    Raises:
        UserError: the judge could not score a single pair.
    """
    scores = score_side(judge, prompts, model), score_side(judge, prompts, baseline)
    try:
        rate = win_rate(*scores, resamples=resamples, seed=seed, level=LEVEL)
        means = mean_difference(*scores, resamples=resamples, seed=seed, level=LEVEL)
    except ValueError:
        raise UserError(
            f"judge {judge.name}: could not score a single pair of responses (all scores are NaN)"
        ) from None
    result = {
        "model": model.name,
        "baseline": baseline.name,
        **_rate_fields(rate),
        "mean_score": _mean_fields(means),
        "mean_characters": {"model": _mean_length(model), "baseline": _mean_length(baseline)},
        "cut_at_token_limit": {"model": _share_cut(model), "baseline": _share_cut(baseline)},
        "samples_per_prompt": {"model": _sizes(model), "baseline": _sizes(baseline)},
        "judge": describe_judge(judge),
        "bootstrap": {"resamples": resamples, "seed": seed, "unit": "prompt"},
    }
    rows = [
        _row(*item) for item in zip(prompts, _samples(model, scores[0]), _samples(baseline, scores[1]), strict=True)
    ]
    return Comparison(result, rows)


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
        "prompts": rate.prompts,
        "prompts_excluded": rate.prompts_excluded,
        "prompt_outcomes": dict(zip(("wins", "ties", "losses"), rate.prompt_outcomes, strict=True)),
        "pairs": rate.pairs,
        "pairs_excluded": rate.pairs_excluded,
        "pair_outcomes": dict(zip(("wins", "ties", "losses"), rate.pair_outcomes, strict=True)),
    }


def _mean_fields(means: MeanDifference) -> dict[str, Any]:
    difference: Interval = means.difference
    return {
        "model": means.mean_a,
        "baseline": means.mean_b,
        "difference": difference.estimate,
        "difference_interval": [difference.low, difference.high],
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


def _samples(side: Side, scores: Sequence[Sequence[float]]) -> list[list[dict[str, Any]]]:
    """Per prompt, one object per sample."""
    finished: Sequence[Sequence[bool | None]] = side.finished or [[None] * len(group) for group in side.responses]
    return [
        [{"response": r, "score": s, "finished": f} for r, s, f in zip(*group, strict=True)]
        for group in zip(side.responses, scores, finished, strict=True)
    ]


def _row(prompt: str, model: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """One prompt of samples.jsonl; `win_rate` and `score_change` are NaN (null) where nothing could be scored."""
    a, b = (np.array([sample["score"] for sample in side], dtype=np.float64) for side in (model, baseline))
    a_scored, b_scored = a[~np.isnan(a)], b[~np.isnan(b)]
    if not (a_scored.size and b_scored.size):
        share = change = math.nan
    else:
        share, change = float(preferences(a_scored, b_scored).mean()), float(a_scored.mean() - b_scored.mean())
    return {"prompt": prompt, "win_rate": share, "score_change": change, "model": model, "baseline": baseline}


def percent(share: float) -> str:
    """`0.6523` as `65.2 %`."""
    return f"{100 * share:.1f} %"


def percent_interval(interval: Sequence[float]) -> str:
    """`[0.60, 0.70]` as `60.0 to 70.0 %`."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def needs_wilson(result: dict[str, Any]) -> bool:
    """Whether the bootstrap interval alone would mislead: few prompts, or all of them came out alike."""
    return result["prompts"] < FEW_PROMPTS or result["interval"][0] == result["interval"][1]


def judge_sentence(result: dict[str, Any]) -> str:
    """What judged, and whether the model was trained on it."""
    description = str(result["judge"]["description"])
    judged = {
        True: " This judge IS the reward that the model was trained on: the win rate shows that training worked, "
        "not that people would prefer the result.",
        False: " The model was not trained on this judge.",
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


def describe(result: dict[str, Any]) -> str:
    """The readable block that the program prints."""
    outcomes, pairs, mean = result["prompt_outcomes"], result["pair_outcomes"], result["mean_score"]
    percent_level = f"{100 * result['level']:.0f} %"
    bootstrap = f"{result['bootstrap']['resamples']:,} resamples, seed {result['bootstrap']['seed']}"
    lines = [
        f"Win rate  {percent(result['win_rate'])}  ({percent_level} interval {percent_interval(result['interval'])})",
        f"  model       {result['model']}",
        f"  baseline    {result['baseline']}",
        f"  prompts     {result['prompts']}, {samples_phrase(result)}; every sample meets every sample of the other "
        f"side; bootstrap over prompts, {bootstrap}",
        f"  prompts won {outcomes['wins']}, tied {outcomes['ties']}, lost {outcomes['losses']}; "
        f"sample pairs won {pairs['wins']}, tied {pairs['ties']}, lost {pairs['losses']}",
        f"  ties        count one half above; dropped: {_dropped_phrase(result)}",
        f"  mean score  {mean['model']:.4g} against {mean['baseline']:.4g}: difference {mean['difference']:+.4g} "
        f"({percent_level} interval {mean['difference_interval'][0]:+.4g} to {mean['difference_interval'][1]:+.4g})",
        f"  test        {p_phrase(result['p_value'])} (two-sided sign-flip permutation over prompts)",
        f"  length      {result['mean_characters']['model']:.0f} against {result['mean_characters']['baseline']:.0f} "
        f"characters{_cut_phrase(result)}",
        f"  judge       {judge_sentence(result)}",
    ]
    if needs_wilson(result):
        lines.insert(
            1, f"  Wilson      {percent_interval(result['wilson_interval'])}: read this one, with {_why(result)}"
        )
    if result["pairs_excluded"]:
        left_out = f"{result['pairs_excluded']} sample pairs and {result['prompts_excluded']} whole prompts left out"
        lines.append(f"  not scored  {left_out}")
    for key in ("sampling_note", "overlap_note"):
        if result.get(key):
            lines.append(f"  {key.removesuffix('_note'):<11} {result[key]}")
    return "\n".join(lines)


def _why(result: dict[str, Any]) -> str:
    if result["prompts"] < FEW_PROMPTS:
        return "so few prompts a bootstrap interval is too narrow"
    return "all prompts alike a bootstrap interval has no width"


def _dropped_phrase(result: dict[str, Any]) -> str:
    if result["win_rate_ties_dropped"] is None:
        return "nothing is left, every pair is a tie"
    return f"{percent(result['win_rate_ties_dropped'])} ({percent_interval(result['interval_ties_dropped'])})"


def _cut_phrase(result: dict[str, Any]) -> str:
    cut = result["cut_at_token_limit"]
    if cut["model"] is None or cut["baseline"] is None:
        return ""
    return f"; cut at the token limit: {percent(cut['model'])} against {percent(cut['baseline'])}"
