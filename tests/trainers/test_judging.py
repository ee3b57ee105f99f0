"""What samples are worth, and what cannot be judged."""

from __future__ import annotations

import math

import pytest
from transformers.integrations import deepspeed as transformers_deepspeed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from alignment.errors import UserError
from alignment.trainers import judging
from alignment.trainers.rollout import Record
from tests.trainers.building import logged
from tests.trainers.building_online import VPO, Kindness, Length, Preference, online


def told(*groups: tuple[str, str]) -> list[Record]:
    return [Record(i, [[1], [2]], list(texts), [True, True]) for i, texts in enumerate(groups)]


def test_labels_ties_and_what_cannot_be_judged():
    records = told((" kind", " cold"), (" cold", " kind"), (" kind", " kind"), (" warm", " kind"), (" a", " kind"))
    prompts = ["p", "p", "p", "p", "silent"]
    judging.label_pairs(records, prompts, Kindness("silent"), None)
    assert [r.skipped for r in records] == ["", "", judging.TIE, judging.TIE, judging.UNSCORED]
    assert [r.numbers["label"] for r in records[:2]] == [1.0, 0.0]
    assert [r.numbers["reward_first"] for r in records[:4]] == [1.0, 0.0, 1.0, 1.0]
    records = told((" kind", " cold"), (" kind", " warm"), (" kind", " kind"))
    judging.label_pairs(records, ["p"] * 3, Length(), None, keep_ties=True)
    assert [r.skipped for r in records] == ["", "", judging.TIE]  # equal lengths are a target, equal texts no pair
    assert [r.numbers["label"] for r in records[:2]] == [0.5, 0.5]
    records = told((" kind", " cold"), (" cold", " cold"))
    judging.label_pairs(records, ["p", "p"], None, Preference())
    assert records[0].numbers["label"] == pytest.approx(1 / (1 + math.exp(-1)))
    assert [r.skipped for r in records] == ["", judging.TIE]


def test_label_noise_turns_labels_round_by_place():
    n = 2000

    def labels(noise: float, part: slice = slice(None), seed: int = 0) -> list[float]:
        records, places = told(*[(" kind", " cold")] * n)[part], list(range(n))[part]
        judging.label_pairs(records, ["p"] * len(records), Kindness(), None, noise, places, seed)
        assert not any(r.skipped for r in records)
        return [r.numbers["label"] for r in records]

    assert labels(0.0) == [1.0] * n and labels(1.0) == [0.0] * n
    some = labels(0.3)
    assert set(some) == {0.0, 1.0}
    assert abs(some.count(0.0) - 0.3 * n) < 5 * math.sqrt(n * 0.3 * 0.7)
    assert labels(0.3, slice(0, 700)) + labels(0.3, slice(700, n)) == some  # however processes share them
    assert labels(0.3, seed=1) != some


def test_preferences_are_against_the_opponent_and_duels_against_each_other():
    records = told((" kind warm", " cold"))
    records[0].opponent_text = " kind"
    judging.judge_samples(records, ["p"], ("preference",), None, Preference())
    judging.judge_samples(records, ["p"], ("duel",), None, Preference())
    sigmoid = [1 / (1 + math.exp(-x)) for x in (1, -1, 2)]
    names = ("preference_first", "preference_second", "preference")
    assert [records[0].numbers[n] for n in names] == pytest.approx(sigmoid)


def test_a_wrong_number_of_scores_is_said():
    class Short(Kindness):
        def score(self, prompts, responses):
            return [0.0]

    with pytest.raises(UserError, match="reward kindness: 2 responses but 1 scores"):
        judging.judge_samples(told((" a", " b")), ["p"], ("reward",), Short(), None)


def test_judges_load_whole_models_under_zero3():
    """transformers shards what is loaded while it knows of a ZeRO-3 configuration; within a judge it must not."""
    configuration = transformers_deepspeed.HfDeepSpeedConfig(
        {"zero_optimization": {"stage": 3}, "train_batch_size": 1}
    )
    try:
        assert is_deepspeed_zero3_enabled()
        with judging._unsharded():
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled()
        with pytest.raises(RuntimeError), judging._unsharded():
            raise RuntimeError
        assert is_deepspeed_zero3_enabled()
    finally:
        transformers_deepspeed.unset_hf_deepspeed_config()
        del configuration


def test_drift_of_the_calibration_responses_stops_training(tiny, tmp_path, capsys):
    """alpha so large that the optimistic term pushes the reference's responses away; the limit says how far."""
    given, args = VPO | {"alpha": 50.0}, {"max_steps": 12, "learning_rate": 1e-3}
    how = {"calibration": True}
    free = online(tiny, tmp_path / "free", "vpo", how, given, reward=Length(), args=args)
    free.train()
    drifts = logged(free, "calibration/drift")
    assert free.state.global_step == 12 and drifts[0] == pytest.approx(0, abs=1e-4) and drifts[-1] < -2
    assert "calibration responses" not in capsys.readouterr().out
    held = online(tiny, tmp_path / "held", "vpo", how | {"drift": 1.0}, given, reward=Length(), args=args)
    held.train()
    assert held.state.global_step == next(i for i, d in enumerate(drifts, start=1) if d < -1) < 12
    assert "rollout.drift 1" in capsys.readouterr().out
