"""What a rollout's samples are worth: rewards, preferences, labels or a verifier's verdicts, written into the records.

What cannot be judged is marked (`Record.skipped`), counted and left out of the loss; it never counts as 0. Not who
judges (`alignment.rewards`) and not how samples become a batch (`batches.py`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

from alignment.errors import UserError
from alignment.rewards.base import PreferenceOracle, Prompt, RewardFunction
from alignment.rewards.oracles import flip_labels
from alignment.trainers.rollout import Record

UNSCORED, TIE = "unscored", "tie"


def judge_samples(
    records: Sequence[Record],
    prompts: Sequence[Prompt],
    needs: Sequence[str],
    reward: RewardFunction | None,
    oracle: PreferenceOracle | None,
) -> None:
    """Add what an objective on two samples needs: `reward_*`, `preference_*` (against y'') or `preference`."""
    first, second = ([record.texts[j] for record in records] for j in (0, 1))
    if "reward" in needs:
        assert reward is not None  # the recipe's check
        scores = _scores(reward, [*prompts, *prompts], [*first, *second])
        _put(records, {"reward_first": scores[: len(first)], "reward_second": scores[len(first) :]})
    if "preference" in needs:
        assert oracle is not None
        opponents = [record.opponent_text for record in records]
        with _unsharded():
            won = oracle.probability([*prompts, *prompts], [*first, *second], [*opponents, *opponents])
        _put(records, {"preference_first": won[: len(first)], "preference_second": won[len(first) :]})
    if "duel" in needs:
        assert oracle is not None
        with _unsharded():
            _put(records, {"preference": oracle.probability(prompts, first, second)})


def label_pairs(
    records: Sequence[Record],
    prompts: Sequence[Prompt],
    reward: RewardFunction | None,
    oracle: PreferenceOracle | None,
    noise: float = 0.0,
    places: Sequence[int] = (),
    seed: int = 0,
    keep_ties: bool = False,
) -> None:
    """Add `label`, the probability that the first sample is the better one, and rewards where a reward judges.

    A reward decides: 1 or 0; equal ones are a tie, which is left out, or with `keep_ties` has label 0.5. An oracle's
    probability is taken as it is: the expected loss under a drawn label. Equal texts are always left out. `noise`
    turns a label round with that probability, by `seed` and `places`.
    """
    first, second = ([record.texts[j] for record in records] for j in (0, 1))
    if reward is not None:
        scores = _scores(reward, [*prompts, *prompts], [*first, *second])
        ahead, behind = scores[: len(first)], scores[len(first) :]
        labels = [
            math.nan if a != a or b != b else (a > b) + 0.5 * (a == b) for a, b in zip(ahead, behind, strict=True)
        ]
        _put(records, {"reward_first": ahead, "reward_second": behind})
        for record, a, b in zip(records, ahead, behind, strict=True):
            if a == b and not record.skipped and not (keep_ties and record.texts[0] != record.texts[1]):
                record.skipped = TIE
    else:
        assert oracle is not None
        with _unsharded():
            labels = oracle.probability(prompts, first, second)
        for record in records:
            if record.texts[0] == record.texts[1]:
                record.skipped = TIE
    if noise:
        flips = flip_labels(places, noise, seed)
        labels = [1 - p if flip else p for p, flip in zip(labels, flips, strict=True)]
    _put(records, {"label": labels})


def _scores(reward: RewardFunction, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    with _unsharded():
        scores = reward.score(prompts, texts)
    if len(scores) != len(texts):
        raise UserError(f"reward {reward.name}: {len(texts)} responses but {len(scores)} scores")
    return [float(score) for score in scores]


def _put(records: Sequence[Record], columns: dict[str, list[float]]) -> None:
    for name, values in columns.items():
        for record, value in zip(records, values, strict=True):
            record.numbers[name] = float(value)
            if not math.isfinite(value) and not record.skipped:
                record.skipped = UNSCORED


@contextlib.contextmanager
def _unsharded() -> Iterator[None]:
    """A judge's own models load whole: with ZeRO-3 under way, transformers would shard what is loaded."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept
