"""What a rollout is like, in numbers: of all its records, with no model asked. Logged by `online.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from alignment.trainers.judging import TIE, UNSCORED
from alignment.trainers.rollout import Record, distinct

RESPONSES = ("first", "second")


def rollout_numbers(records: Sequence[Record], own_samples: bool) -> dict[str, float]:
    """Name -> value; NaN where there is nothing to count.

    Args:
        records: of all processes.
        own_samples: whether the responses are plain samples of the policy, so that their mean log-ratio estimates its
            KL to the reference, in nats.
    """
    responses = [ids for r in records for ids in r.responses]
    values: dict[str, float] = {
        "samples/length": sum(map(len, responses)) / len(responses),
        "samples/finished": sum(sum(r.finished) for r in records) / len(responses),
        "samples/distinct_1": distinct(responses, 1),
        "samples/distinct_2": distinct(responses, 2),
        "samples/identical": sum(len(set(map(tuple, r.responses))) == 1 for r in records) / len(records),
    }
    for reason in (UNSCORED, TIE):
        values[f"skipped/{reason}"] = sum(r.skipped == reason for r in records) / len(records)
    values |= _moments("reward", [v for r in records for k, v in r.numbers.items() if k.startswith("reward_")])
    values |= _moments("preference", [v for r in records for k, v in r.numbers.items() if k.startswith("preference")])
    scored = [(r.numbers, n) for r in records for n in RESPONSES if f"ref_{n}" in r.numbers]
    if own_samples and scored:
        ratios = [numbers[f"behaviour_{n}"] - numbers[f"ref_{n}"] for numbers, n in scored]
        values["samples/kl"] = sum(ratios) / len(ratios)  # E_pi[log pi/ref]
    if any(r.spans for r in records):
        valid = [v for r in records for v in r.valid]
        values["samples/valid"] = sum(valid) / len(valid)
        values["samples/accuracy"] = sum(v for r in records for v in r.verified) / len(valid)
        values["samples/chain_length"] = sum(s[0] for r in records for s in r.spans) / len(valid)
    return values


def judgement(record: Record, i: int) -> float:
    """Of a record's i-th response: its reward, its probability of winning, or its verdict; NaN where it has none."""
    if record.verified:
        return record.verified[i]
    for name in (f"reward_{RESPONSES[i]}", f"preference_{RESPONSES[i]}"):
        if name in record.numbers:
            return record.numbers[name]
    won = record.numbers.get("preference", record.numbers.get("label", math.nan))
    return won if i == 0 else 1 - won


def _moments(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation of what is a number."""
    kept = [v for v in values if math.isfinite(v)]
    if not kept:
        return {}
    mean = sum(kept) / len(kept)
    return {name: mean, f"{name}/std": math.sqrt(sum((v - mean) ** 2 for v in kept) / len(kept))}
