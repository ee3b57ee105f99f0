"""PreferenceTrainer step by step: batches and their order, metrics, evaluation, resuming."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from alignment.errors import UserError
from alignment.models import load_model
from alignment.objectives import get_objective
from alignment.runs.lifecycle import plan_batches
from alignment.trainers.collation import LengthGroupedSampler, train_sampler
from alignment.trainers.metrics import DisplacementAlarm, Totals, agreement
from tests.trainers.building import config, logged, preferences, trainer_for


def test_declared_batch_is_kept_or_refused():
    assert plan_batches(8, 8, 1) == (8, 1)
    assert plan_batches(8, 8, 2) == (4, 1)
    assert plan_batches(24, 8, 2) == (6, 2)
    assert plan_batches(7, 4, 1) == (1, 7)
    for g, d, w in [(8, 3, 2), (128, 16, 8), (6, 4, 3)]:
        per_device, accumulation = plan_batches(g, d, w)
        assert per_device * accumulation * w == g and per_device <= d
    with pytest.raises(UserError, match="declare 9"):
        plan_batches(8, 8, 3)


def test_sampler_visits_all_once_groups_lengths_and_ignores_the_world():
    lengths = [(i * 37) % 101 + 1 for i in range(203)]
    sampler = LengthGroupedSampler(lengths, batch_size=8, seed=3)
    order = list(sampler)
    # 203 pairs make 25 batches of 8 and 3 more: 5 pairs are visited twice, so that every batch is whole.
    assert len(order) == len(sampler) == 208 and set(order) == set(range(203))
    batches = [order[i : i + 8] for i in range(0, 208, 8)]
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(batches)
    assert spread < 10  # a random batch of 8 spreads over about 80
    assert max(lengths) in [lengths[i] for i in batches[0]]
    assert list(LengthGroupedSampler(lengths, 8, 3)) == order
    sampler.set_epoch(1)
    assert list(sampler) != order
    assert set(LengthGroupedSampler(lengths, 8, 3, group=False)) == set(range(203))
    assert len(list(LengthGroupedSampler([5, 1, 9], 8, 0))) == 8  # fewer pairs than a batch


@pytest.mark.parametrize("warm_up", [False, True])
def test_the_longest_batch_is_never_the_one_of_rate_zero(warm_up):
    """Lengths 1 to 40 in batches of 4: {37 … 40} is the longest. HF's schedules begin warm-up at rate 0."""
    order = list(LengthGroupedSampler(list(range(1, 41)), 4, seed=0, warm_up=warm_up))
    batches = [{i + 1 for i in order[at : at + 4]} for at in range(0, 40, 4)]
    assert batches.index({37, 38, 39, 40}) == (1 if warm_up else 0)
    args = SimpleNamespace(train_batch_size=2, gradient_accumulation_steps=2, world_size=1, seed=1, data_seed=0)
    args.warmup_steps = 0.1 if warm_up else 0.0
    assert list(train_sampler(args, list(range(1, 41)), True)) == order


def test_means_are_over_pairs_not_over_batches():
    totals = Totals()
    tokens = {"real_tokens": torch.ones(1), "padded_tokens": torch.ones(1)}
    totals.add({"accuracy": torch.tensor([1.0]), **tokens})
    totals.add({"accuracy": torch.tensor([0.0, 0.0, 0.0]), **tokens})
    # Two processes with the same counts: sums and counts double, the mean of 1, 0, 0, 0 stays 1/4.
    assert totals.reduce(lambda t: t * 2)["accuracy"] == pytest.approx(0.25)
    assert totals.reduce(lambda t: t) == {}


def test_accuracy_is_agreement_with_the_label_and_ties_count_one_half():
    chosen, rejected = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 2.0, 0.0])
    label = torch.tensor([0.9, 0.2, 0.2, 0.5, 1.0])
    expected = [[1, 1, 0, 0, 0.5], [1, 0, 1, 0.5, 0.5]]
    assert [agreement(chosen, rejected, given).tolist() for given in (None, label)] == expected
    assert agreement(chosen[:, None], rejected[:, None], label).flatten().tolist() == expected[1]  # of one judge
    assert agreement(chosen[:3], rejected[:3], torch.tensor([0.5] * 3)).tolist() == [0.5] * 3


def test_alarm_speaks_once_when_chosen_falls(capsys):
    from transformers import TrainerControl, TrainerState

    alarm, state = DisplacementAlarm(5.0), TrainerState()
    for fallen in (0.1, -4.9, -5.1, -9.0):
        alarm.on_log(None, state, TrainerControl(), logs={"displacement/chosen": fallen})
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "5.1 nats less likely" in said


def test_training_then_resuming_equals_training_through(tiny, tmp_path):
    def run(folder: str, checkpoint=None, **more):
        args = config(tmp_path / folder, max_steps=6, learning_rate=1e-3, save_strategy="steps", save_steps=3, **more)
        trainer = trainer_for(tiny, tmp_path, args=args)
        trainer.train(resume_from_checkpoint=checkpoint)
        return logged(trainer), {k: v.clone() for k, v in trainer.model.state_dict().items()}

    losses, weights = run("through")
    resumed, same = run("again", str(tmp_path / "through" / "checkpoint-3"))
    assert resumed == losses  # the log of the first three steps is in the checkpoint
    assert all(torch.equal(weights[k], same[k]) for k in weights)


def test_resuming_with_other_weights_under_the_same_name_is_refused(tiny, tmp_path):
    """The trap: the reference of a resumed run is whatever now lies on disk."""
    args = config(tmp_path, save_strategy="steps", save_steps=2)
    trainer_for(tiny, tmp_path, args=args).train()
    other = load_model(tiny)
    with torch.no_grad():
        other.lm_head.weight *= 1.1
    args = config(tmp_path, max_steps=6)
    with pytest.raises(UserError, match="weights behind .* have changed"):
        trainer_for(tiny, tmp_path, model=other, args=args).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_a_resumed_run_may_have_no_gradient_left(tiny, tmp_path):
    """Hinge is done with a pair once its margin is 1 / beta: the usual end of a run, not a mistake."""
    args = config(tmp_path, save_strategy="steps", save_steps=5, learning_rate=3e-3)
    easy = get_objective("hinge", beta=100.0)
    trainer_for(tiny, tmp_path, easy, args=args).train()
    resumed = trainer_for(tiny, tmp_path, easy, args=config(tmp_path, max_steps=8, learning_rate=1e-9))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert logged(resumed)[-1] == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_in_a_later_epoch_visits_that_epochs_pairs(tiny, tmp_path, processes):
    """The trap: accelerate's wrappers around a resumed loader keep the epoch from reaching the sampler."""
    from accelerate.data_loader import prepare_data_loader, skip_first_batches
    from torch.utils.data import DataLoader
    from transformers import TrainerControl, TrainerState

    from alignment.trainers.metrics import EpochOrder

    def order(epoch: float, skip: int) -> list[int]:
        trainer = trainer_for(tiny, tmp_path)
        sampler = trainer._get_train_sampler()
        loader = prepare_data_loader(
            DataLoader(range(32), batch_size=4, sampler=sampler),
            num_processes=processes,
            process_index=0,
            put_on_device=False,
        )
        loader = skip_first_batches(loader, skip) if skip else loader
        EpochOrder(trainer).on_train_begin(None, TrainerState(epoch=epoch), TrainerControl())
        loader.set_epoch(int(epoch))  # as transformers' Trainer does
        return [int(i) for batch in loader for i in batch]

    whole = order(1.0, 0)
    assert whole != order(0.0, 0)
    assert order(1.25, 2) == whole[8:]


def test_what_is_not_a_number_is_infinitely_far_off():
    from alignment.models.scoring import relative_gap

    assert relative_gap(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    assert relative_gap(torch.tensor([-10.1]), torch.tensor([-10.0])) == pytest.approx(0.01, rel=1e-4)


def test_displacement_without_a_reference_survives_resuming(tiny, tmp_path):
    def run(folder: str, checkpoint=None):
        args = config(tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-3)
        trainer = trainer_for(tiny, tmp_path, "simpo", args=args)
        trainer.train(resume_from_checkpoint=checkpoint)
        return logged(trainer, "displacement/chosen")

    through = run("through")
    assert len(through) == 4 and abs(through[-1]) > 0.01
    assert run("through", str(tmp_path / "through" / "checkpoint-2")) == pytest.approx(through, abs=1e-6)


def test_evaluation_reports_the_objective_on_held_out_pairs(tiny, tmp_path):
    data = preferences(40)
    held_out = data.select(range(32, 40))
    trainer = trainer_for(
        tiny,
        tmp_path,
        train_dataset=data.select(range(32)),
        eval_dataset=held_out,
        args=config(tmp_path, max_steps=30, learning_rate=1e-3),
    )
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.6 and after["eval_rewards/accuracies"] == 1.0


def test_evaluation_is_a_mean_over_pairs_however_they_are_batched(tiny, tmp_path):
    """Five pairs: a mean of the means of two, two and one would weigh the last as much as four others."""
    rows, found = preferences(16), []
    for size in (2, 3, 5):
        args = config(tmp_path, per_device_eval_batch_size=size, learning_rate=1e-3)
        trainer = trainer_for(tiny, tmp_path, args=args, train_dataset=rows, eval_dataset=rows.select(range(5)))
        trainer.train()
        found.append(trainer.evaluate()["eval_loss"])
    assert found[0] == pytest.approx(found[2], rel=1e-5) and found[1] == pytest.approx(found[2], rel=1e-5)
    batch = trainer.collator(list(trainer.eval_dataset))
    with torch.no_grad():
        margins = trainer.pair_logps(trainer.model, batch).margin
    expected = -torch.nn.functional.logsigmoid(trainer.objective.beta * margins).mean()
    assert found[2] == pytest.approx(float(expected), rel=1e-5)
    assert trainer.state.log_history[-1]["eval_loss"] == pytest.approx(found[2], rel=1e-6)


def test_accumulation_changes_nothing(tiny, tmp_path):
    """Losses are per pair, so 4 x 2 pairs and 1 x 8 pairs are one step."""
    series = []
    for size, steps in ((8, 1), (2, 4)):
        args = config(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, learning_rate=1e-3
        )
        trainer = trainer_for(tiny, tmp_path, args=args)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        series.append(logged(trainer))
    assert series[0] == pytest.approx(series[1], abs=1e-5)


def test_pairs_that_do_not_fill_the_last_batch_weigh_the_same_however_it_is_split(tiny, tmp_path):
    series = []
    for size, steps in ((8, 1), (2, 4)):
        args = config(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            learning_rate=1e-3,
            max_steps=-1,
            num_train_epochs=2,
        )
        trainer = trainer_for(tiny, tmp_path, args=args, train_dataset=preferences(11))
        trainer.train()
        series.append(logged(trainer))
    assert len(series[0]) == 4
    assert series[0] == pytest.approx(series[1], abs=1e-5)


def test_gradient_checkpointing_changes_nothing(tiny, tmp_path):
    series = []
    for on in (False, True):
        trainer = trainer_for(tiny, tmp_path, args=config(tmp_path, gradient_checkpointing=on, learning_rate=1e-3))
        trainer.train()
        series.append(logged(trainer))
    assert series[0] == pytest.approx(series[1], abs=1e-5)


def test_model_card_and_checkpoint_survive(tiny, tmp_path):
    args = config(tmp_path / "run", save_strategy="steps", save_steps=5)
    trainer_for(tiny, tmp_path, args=args).train()
    checkpoint = tmp_path / "run" / "checkpoint-5"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 5
    assert (tmp_path / "run" / "README.md").is_file()
