"""Numbers that are not finite and runs that no longer learn, in every kind of trainer: what stops, where, and why."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from alignment.data.preferences import read_rows
from alignment.errors import UserError
from alignment.files import read_json_object, write_json_lines
from alignment.models import load_model, load_tokenizer
from alignment.models.sampling import sample
from alignment.objectives import get_objective
from alignment.recipes import RecipeError
from alignment.runs import preferences as run
from alignment.trainers import finite
from tests.runs.building_runs import recipe, rows, train
from tests.trainers.building import config, logged, preferences, trainer_for
from tests.trainers.building_online import Kindness, Preference, online

BAD = 11  # the row, from 0, of 16
WORD = "purple"  # of that row alone


@pytest.fixture(scope="module")
def damaged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one word's embedding NaN; scores of texts without the word are as they were."""
    folder = tmp_path_factory.mktemp("damaged")
    model, tokenizer = load_model(str(tiny)), load_tokenizer(str(tiny))
    tokenizer.add_tokens([WORD])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    head = model.get_output_embeddings().weight.data
    head[-1] = head[tokenizer.pad_token_id]  # never drawn
    model.get_input_embeddings().weight.data[-1] = math.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("dpo", ["objective.name=dpo"]),
        ("dpo", ["objective.name=hinge"]),
        ("dpo", ["objective={name: simpo}", "reference={}"]),
        ("sft", []),
        ("reward_model", []),
    ],
    ids=["dpo", "hinge", "simpo", "sft", "reward_model"],
)
def test_a_row_that_is_no_number_stops_before_the_step(damaged, tmp_path, kind, more):
    made = recipe(kind, damaged, tmp_path, *more, given=rows(BAD, WORD))
    with pytest.raises(UserError) as stopped:
        train(made)
    folder = tmp_path / "run"
    lines = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row] if folder.is_dir() else []
    taken = len(lines)  # steps before the bad one
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in lines)
    message, named = str(stopped.value), f"{tmp_path / 'rows.jsonl'}: row {BAD + 1}"
    assert message.startswith(f"step {taken + 1}: the loss of {named} is not a finite number; training stopped")
    assert "\n" not in message and not (folder / "final").exists()
    if taken:
        last = folder / f"checkpoint-{taken}"
        assert f"--resume goes on from {last}" in message
        weights = load_file(last / "model.safetensors")
        bad = {name: int((~value.isfinite()).sum()) for name, value in weights.items()}
        assert sum(bad.values()) == weights["model.embed_tokens.weight"].size(1)  # the word's own embedding


def test_a_skipped_step_leaves_weights_moments_and_schedule_as_if_it_were_not(damaged, tmp_path):
    """The same run on the sound model with its optimizer's step held back at that step, by hand."""
    quiet, given = ["training.save_strategy=no"], rows(BAD, WORD)
    made = recipe("dpo", damaged, tmp_path, "training.on_nan=skip", *quiet, given=given)
    train(made)
    lines = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    (step,) = (row["step"] for row in lines if row["loss"] is None)
    assert [row.get("skipped_steps", 0) for row in lines] == [float(row["step"] >= step) for row in lines]
    assert read_json_object(tmp_path / "run" / "manifest.json")["skipped_steps"] == 1

    sound, model = tmp_path / "sound", load_model(str(damaged))
    model.get_input_embeddings().weight.data[-1] = 0.0
    model.save_pretrained(sound)
    load_tokenizer(str(damaged)).save_pretrained(sound)

    class HoldBack(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 == step:
                model.zero_grad(set_to_none=True)

    other = recipe("dpo", sound, tmp_path, f"training.output_dir={tmp_path / 'held'}", *quiet, given=given)
    args = run.run_arguments(other, tmp_path / "held", 1)
    tokenizer = load_tokenizer(str(sound))
    trainer = run.build_trainer(other, args, run.given_rows(other, "train", tokenizer).dataset, None, tokenizer)
    trainer.add_callback(HoldBack())
    trainer.train()
    mine = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for name, value in trainer.model.state_dict().items():
        last = -1 if name == "model.embed_tokens.weight" else None
        torch.testing.assert_close(mine[name][:last], value[:last], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["dpo", "simpo", "sft"])
def test_a_held_out_row_that_is_no_number_stops_at_the_evaluation(damaged, tmp_path, kind):
    """Row 12 of 16 is the fourth of the second pass of eight."""
    held_out = [row | {"prompt": f"{row['prompt']} the"} for row in rows(BAD, WORD)]
    if kind == "sft":
        held_out = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in held_out]
    write_json_lines(tmp_path / "held_out.jsonl", held_out)
    more = ["objective={name: simpo}", "reference={}"] if kind == "simpo" else []
    more += [f"data.eval={tmp_path / 'held_out.jsonl'}", "training.eval_strategy=steps", "training.eval_steps=2"]
    made = recipe("sft" if kind == "sft" else "dpo", damaged, tmp_path, "training.max_steps=2", *more)
    with pytest.raises(UserError) as stopped:
        train(made)
    named = f"{tmp_path / 'held_out.jsonl'}: row {BAD + 1}"
    assert str(stopped.value).startswith(f"step 2: the loss of {named} is not a finite number, and")
    assert str(stopped.value).endswith(f"The last whole checkpoint is {tmp_path / 'run' / 'checkpoint-1'}")
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize("kind", ["dpo", "sft", "reward_model"])
def test_skipping_ends_where_no_row_is_sound(tiny, tmp_path, kind):
    model = load_model(str(tiny))
    model.model.norm.weight.data[0] = math.nan
    model.save_pretrained(tmp_path / "broken")
    load_tokenizer(str(tiny)).save_pretrained(tmp_path / "broken")
    made = recipe(kind, tmp_path / "broken", tmp_path, "training.on_nan=skip", "training.save_strategy=no")
    with pytest.raises(UserError, match=r"^step 3: the loss of .*No row of the last 3 steps was sound: the model is"):
        train(made)
    assert not (tmp_path / "run" / "final").exists()


def test_skipping_goes_on_while_some_rows_are_sound(tiny, tmp_path):
    trainer = trainer_for(tiny, tmp_path, on_nan="skip")

    def steps(begin: int, *good: bool) -> list[bool]:
        taken = []
        for trainer.state.global_step in range(begin, begin + 5):
            trainer._watch.passes = [finite.Pass(torch.tensor(good), None)]
            taken.append(trainer.may_step(math.nan))
        return taken

    assert steps(0, True, False) == [False] * 5
    with pytest.raises(UserError, match=r"^step 8: the loss"):
        steps(5, False, False)
    trainer._watch.unsound = 0
    with pytest.raises(UserError, match=r"^step 13: the gradient is not finite"):  # and no row is to blame
        steps(10, True, True)


def test_a_run_whose_every_step_was_skipped_has_no_result(damaged, tmp_path):
    """All rows in each of two steps, and one of them bad."""
    batch = ["training.global_batch_size=16", "training.per_device_train_batch_size=8", "training.num_train_epochs=2"]
    made = recipe("sft", damaged, tmp_path, "training.on_nan=skip", *batch, given=rows(BAD, WORD))
    with pytest.raises(UserError, match=r"^step 2: every step was skipped, and nothing was learned"):
        train(made)
    assert not (tmp_path / "run" / "final").exists()


def test_a_log_prob_that_is_no_number_stops_though_the_loss_is_zero_there(tiny, tmp_path):
    """A hinge far behind its margin: relu(1 - beta * inf) = 0, without a gradient."""
    args = config(tmp_path, max_steps=2)
    trainer = trainer_for(tiny, tmp_path, "hinge", args=args, train_dataset=preferences(8), start_is_reference=False)
    rejected = [-10.0] * 5 + [math.inf] + [-10.0] * 2
    data = trainer.train_dataset.add_column("ref_chosen", [-10.0] * 8).add_column("ref_rejected", rejected)
    trainer.train_dataset = data
    with pytest.raises(UserError, match=r"step \d: the loss of row 6 of the training data is not a finite number"):
        trainer.train()


def test_a_gradient_that_is_no_number_stops_though_the_loss_is_one(tiny, tmp_path):
    trainer = trainer_for(tiny, tmp_path)
    weight = trainer.model.model.layers[0].mlp.down_proj.weight
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(UserError, match=r"step 1: the gradient is not finite; training stopped before"):
        trainer.train()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_weights_that_are_no_numbers_are_not_saved(tiny, tmp_path):
    class Break(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 == 3:
                model.model.norm.weight.data[0] = math.inf

    args = config(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=3)
    trainer = trainer_for(tiny, tmp_path, args=args, callbacks=[Break()])
    with pytest.raises(
        UserError, match=r"step 3: model.norm.weight has weights that are not finite; nothing is saved"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(value.isfinite().all() for value in load_file(tmp_path / "checkpoint-2" / "model.safetensors").values())


def test_more_damage_in_a_parameter_that_had_some_is_not_saved(damaged, tmp_path):
    class Break(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 == 2:
                model.get_input_embeddings().weight.data[0, 0] = math.inf

    args = config(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    trainer = trainer_for(damaged, tmp_path, args=args, callbacks=[Break()])
    with pytest.raises(UserError, match=r"step 2: model.embed_tokens.weight has weights that are not finite"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


# --- runs that no longer learn ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["dpo", "ipo", "simpo", "p3o", "egpo"])
def test_a_run_whose_rate_has_spoilt_the_model_stops(tiny, tmp_path, objective):
    more = {"learning_rate": 1e6, "max_steps": 8}
    if objective in ("p3o", "egpo"):
        judge = {"reward": Kindness()} if objective == "p3o" else {"oracle": Preference()}
        trainer = online(tiny, tmp_path / "run", objective, args=more, **judge)
    else:
        trainer = trainer_for(tiny, tmp_path, objective, args=config(tmp_path, **more))
    with pytest.raises(UserError, match="the gradient has been exactly 0 for 3 steps, although the loss asks"):
        trainer.train()
    assert logged(trainer, "grad_norm")[1:] == [0.0, 0.0]  # the third is not logged: it is not taken


@pytest.mark.parametrize("kind", ["dpo", "sft", "reward_model"])
def test_one_weight_with_a_flipped_exponent_bit_stops(tiny, tmp_path, kind):
    model = load_model(str(tiny))
    model.model.norm.weight.data[:] = 1e30
    model.save_pretrained(tmp_path / "flipped")
    load_tokenizer(str(tiny)).save_pretrained(tmp_path / "flipped")
    made = recipe(kind, tmp_path / "flipped", tmp_path)
    with pytest.raises(UserError, match="exactly 0 for 3 steps|is not a finite number|is not finite"):
        train(made)
    assert not (tmp_path / "run" / "final").exists()


def test_a_hinge_behind_its_margin_has_no_gradient_and_may_go_on(tiny, tmp_path):
    trainer = trainer_for(
        tiny, tmp_path, get_objective("hinge", beta=1000.0), args=config(tmp_path, learning_rate=1e-2, max_steps=12)
    )
    trainer.train()
    norms = logged(trainer, "grad_norm")
    assert any(norms[i : i + 3] == [0.0] * 3 for i in range(len(norms) - 2)), norms


def test_pairs_that_are_learned_beyond_rounding_may_go_on(tiny, tmp_path):
    """80 nats ahead, a pair pushes with e^-80 = 2e-35; the squares of its gradient are 0 in float32."""
    args = config(tmp_path, max_steps=4)
    objective = get_objective("dpo", beta=1.0)
    trainer = trainer_for(tiny, tmp_path, objective, args=args, train_dataset=preferences(8), start_is_reference=False)
    columns = {"ref_chosen": [-90.0] * 8, "ref_rejected": [-10.0] * 8}
    for name, values in columns.items():
        trainer.train_dataset = trainer.train_dataset.add_column(name, values)
    trainer.train()
    assert logged(trainer, "grad_norm") == [0.0] * 4


# --- sampling --------------------------------------------------------------------------------------------------------


def on_policy(damaged: Path, folder: Path, **more):
    prompts = [{"prompt": "my dog is"}, {"prompt": f"my {WORD} is"}, {"prompt": "my cat is"}, {"prompt": "his dog is"}]
    args = more.pop("args", {"max_steps": 2})
    return online(damaged, folder, "p3o", rows=prompts, reward=Kindness(), args=args, **more)


def test_a_prompt_that_cannot_be_sampled_is_named(damaged, tmp_path):
    with pytest.raises(UserError, match="step 1: the model's next-token scores behind prompt 2 are not finite"):
        on_policy(damaged, tmp_path / "run").train()


def test_steps_with_a_prompt_that_cannot_be_sampled_are_skipped(damaged, tmp_path):
    """Four prompts, two a step: one of two steps has the bad one, whatever the order."""
    args = {"per_device_train_batch_size": 2, "max_steps": 2}
    trainer = on_policy(damaged, tmp_path / "run", on_nan="skip", args=args)
    trainer.train()
    assert sorted(map(math.isfinite, logged(trainer))) == [False, True]
    assert trainer.skipped_steps == 1
    assert trainer.model.get_input_embeddings().weight[:-1].isfinite().all()


def test_sampling_a_damaged_model_is_one_line(damaged):
    model, tokenizer = load_model(str(damaged)), load_tokenizer(str(damaged))
    assert len(sample(model, tokenizer, ["my dog is"], 2, max_new_tokens=4)) == 1
    with pytest.raises(UserError, match=f"next-token scores behind the prompt 'my {WORD} is' are not finite"):
        sample(model, tokenizer, ["my dog is", f"my {WORD} is"], 2, max_new_tokens=4)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.learning_rate=1e6", "training.learning_rate"),
        ("training.logging_nan_inf_filter=true", "write on_nan"),
        ("training.on_nan=ignore", "training.on_nan"),
    ],
)
@pytest.mark.parametrize("kind", ["dpo", "sft", "reward_model"])
def test_recipes_that_would_hide_it_are_refused(tiny, tmp_path, kind, override, said):
    with pytest.raises(RecipeError, match=said):
        recipe(kind, tiny, tmp_path, override)


def test_shards_are_read_as_this_process_holds_them():
    model = torch.nn.Linear(3, 2)
    model.bias.data[1] = -math.inf
    model.weight.requires_grad_(False)[0, :2] = math.nan
    assert finite.non_finite(model) == {"weight": 2, "bias": 1}
    assert finite.non_finite(model, trainable=True) == {"bias": 1}
