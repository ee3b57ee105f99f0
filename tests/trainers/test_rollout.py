"""Which prompts are sampled when, and samples of an earlier run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import UserError
from alignment.trainers.online import OnlinePreferenceTrainer
from alignment.trainers.rollout import PromptOrder, Replay
from tests.trainers.building_online import Kindness, Preference, online, record, samples


@pytest.mark.parametrize(
    ("prompts", "batch", "per_rollout", "inner"),
    [(10, 4, 8, 2), (8, 4, 4, 1), (3, 4, 8, 3), (1, 2, 4, 1), (64, 8, 16, 4), (9, 3, 9, 1)],
)
def test_every_prompt_once_an_epoch_and_every_place_once_a_pass(prompts, batch, per_rollout, inner):
    order = PromptOrder(prompts, batch, per_rollout, inner, seed=7)
    rollouts = -(-prompts // per_rollout)
    epochs = []
    for epoch in range(3):
        visits = [row for r in range(rollouts) for row in order.rows(epoch * rollouts + r)]
        assert len(visits) == rollouts * per_rollout and set(visits) == set(range(prompts))
        assert sum(Counter(visits).values()) - prompts == order.repeated
        assert visits[:prompts] != list(range(prompts)) or prompts < 4
        assert len(set(visits[:prompts])) == prompts  # repeats come last
        epochs.append(visits[:prompts])
    assert prompts < 4 or epochs[0] != epochs[1] != epochs[2] != epochs[0]
    per_pass = per_rollout // batch
    step = 0
    for rollout in range(2 * rollouts):
        passes = []
        for _ in range(inner):
            found = [order.step(step + i) for i in range(per_pass)]
            step += per_pass
            assert {number for number, _ in found} == {rollout} and all(len(places) == batch for _, places in found)
            passes.append([place for _, places in found for place in places])
            assert sorted(passes[-1]) == list(range(per_rollout))
        assert passes[0] == list(range(per_rollout))
        assert per_rollout < 8 or len({tuple(p) for p in passes}) == inner
    assert step == 2 * order.steps_per_epoch
    assert PromptOrder(prompts, batch, per_rollout, inner, 7).rows(1) == order.rows(1)
    assert prompts < 8 or PromptOrder(prompts, batch, per_rollout, inner, 8).rows(0) != order.rows(0)


def test_trained_prompts_are_those_of_the_order(tiny, tmp_path):
    """Steps train on the places that the order says, whatever the passes they are cut into."""
    args = {"max_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    seen: list[list[int]] = []

    class Watching(OnlinePreferenceTrainer):
        def _prepare_inputs(self, generation_batch):
            seen[-1].append([r.row for r in self._micro_batches[self._micro]])
            return super()._prepare_inputs(generation_batch)

        def begin_step(self):
            seen.append([])
            super().begin_step()

    how = {"per_rollout": 8, "inner_epochs": 2}
    trainer = online(tiny, tmp_path, "p3o", how, reward=Kindness(), args=args, kind=Watching)
    trainer.train()
    rows = [row["row"] for row in samples(tmp_path)]
    assert len(seen) == 4 and all(len(step) == 4 and all(len(part) == 1 for part in step) for step in seen)
    trained = [[row for part in step for row in part] for step in seen]
    assert [*trained[0], *trained[1]] == rows and sorted([*trained[2], *trained[3]]) == sorted(rows)
    assert [*trained[2], *trained[3]] != rows


def test_the_order_is_that_of_data_seed(tiny, tmp_path):
    def order(**seeds: int) -> list[int]:
        trainer = online(tiny, tmp_path, "p3o", {"per_rollout": 8}, reward=Kindness(), args=seeds)
        return trainer.order.rows(0)

    assert order(seed=1, data_seed=7) == order(seed=2, data_seed=7) == order(seed=7) != order(seed=1)


def test_samples_of_another_run_are_refused(tiny, tokenizer, tmp_path):
    def attempt(file: Path, how: dict[str, Any] | None = None, **more: Any) -> str:
        with pytest.raises(UserError) as refused:
            online(
                tiny,
                tmp_path / "run",
                more.pop("objective", "egpo"),
                {"opponent": 0.0, "replay": file} | (how or {}),
                oracle=Preference(),
                **more,
            ).train()
        return str(refused.value)

    file = record(tokenizer, tmp_path / "good.jsonl", 1, {0: 1})
    assert "has not the prompts of rollout 0" in attempt(file, args={"seed": 1})
    assert "has not the prompts of rollout 1" in attempt(file, args={"max_steps": 2})
    assert "has not the prompts of rollout 0" in attempt(file, {"look_ahead": True})  # no second phase
    assert "2 responses a prompt" in attempt(file, {"opponent": None}, objective="online_ipo2")
    assert "and the objective needs 3 and an opponent" in attempt(file, {"samples": 3})
    lines = [json.loads(line) for line in file.read_text().splitlines()]

    def written(change) -> Path:
        edited = tmp_path / "edited.jsonl"
        changed = [json.loads(json.dumps(line)) for line in lines]
        change(changed[1])
        edited.write_text("".join(json.dumps(line) + "\n" for line in changed))
        return edited

    other = "the file is of other prompts or another tokenizer"
    assert other in attempt(written(lambda row: row.update(prompt="another question")))
    assert other in attempt(written(lambda row: row["responses"].__setitem__(0, [5, 6, 7])))
    assert other in attempt(written(lambda row: row["responses"].__setitem__(1, [10**6])))
    assert other in attempt(written(lambda row: row.update(opponent=[5])))
    for change in (
        lambda row: row.pop("responses"),
        lambda row: row.update(extra=1),
        lambda row: row.update(rollout="first"),
        lambda row: row.update(spans=[[1, 2]]),
        lambda row: row["responses"].__setitem__(0, ["kind"]),
        lambda row: row["responses"].__setitem__(0, 5),
    ):
        assert "edited.jsonl:2: is no line of a rollouts.jsonl" in attempt(written(change))
    assert "a response is empty" in attempt(written(lambda row: row["responses"].__setitem__(0, [])))
    assert "a response is empty" in attempt(written(lambda row: row.update(opponent=[])))
    assert Replay(file).records(0, 0, [r["row"] for r in lines], 2, True)[0].numbers == {}
