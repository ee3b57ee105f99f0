"""PreferenceTrainer against TRL's own trainer, and the traps of the field: references, step 0, rows."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from trl import DPOTrainer

from alignment.errors import UserError
from alignment.models import load_model, load_tokenizer
from alignment.objectives import get_objective
from alignment.trainers.collation import PairCollator
from alignment.trainers.offline import PreferenceTrainer
from tests.trainers.building import LORA, config, logged, preferences, trainer_for


class SameOrder:
    """TRL's trainer visiting the pairs in our order: what is compared is the loss, not the shuffle."""

    def __init__(self, ours: PreferenceTrainer):
        self.order = list(ours._get_train_sampler())

    def __call__(self, train_dataset=None):
        return self.order


def up_to_end(row, end):
    return {key: row[key][: row[key].index(end) + 1] for key in ("chosen_ids", "rejected_ids")}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("layout", ["shared_prefix", "paired"])
def test_same_losses_as_trl_step_by_step(tiny, tmp_path, layout, chat):
    data = preferences(chat=chat)
    ours = trainer_for(tiny, tmp_path / "ours", layout=layout, train_dataset=data)
    theirs = DPOTrainer(
        str(tiny), args=config(tmp_path / "trl"), train_dataset=data, processing_class=load_tokenizer(str(tiny))
    )
    if chat:  # TRL also scores the line end that the template writes behind a reply's end
        theirs.train_dataset = theirs.train_dataset.map(
            up_to_end, fn_kwargs={"end": theirs.processing_class.eos_token_id}
        )
    theirs._get_train_sampler = SameOrder(ours)
    for trainer in (ours, theirs):
        trainer.train()
    assert len(logged(ours)) == 5
    assert logged(ours) == pytest.approx(logged(theirs), abs=1e-4)
    for key in ("rewards/margins", "logps/chosen", "logps/rejected"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=1e-3, abs=1e-3), key
    # At the start every pair is a tie: one half, where TRL counts 0.
    assert logged(ours, "rewards/accuracies") == [0.5, *logged(theirs, "rewards/accuracies")[1:]]
    assert logged(theirs, "rewards/accuracies")[0] == 0
    assert max(logged(ours)[1:]) < logged(ours)[0]  # and something was learned meanwhile


def test_trl_still_has_what_we_rely_on():
    """Contract with TRL 1.16: when it moves one of these, this names it before anything subtle happens."""
    relied_on = {
        "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
        "_precompute_ref_logps": ("dataset", "name", "batch_size"),
        "_set_signature_columns_if_needed": (),
        "_get_train_sampler": ("train_dataset",),
        "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
        "compute_ref_log_probs": ("model", "inputs"),
        "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys"),
        "log": ("logs", "start_time"),
    }
    for name, arguments in relied_on.items():
        method = vars(DPOTrainer).get(name) or getattr(DPOTrainer, name)
        found = method.__code__.co_varnames[1 : method.__code__.co_argcount]
        assert found == arguments, f"DPOTrainer.{name} now takes {found}"
    assert DPOTrainer.loss_is_scaled_for_ga is False


# --- the reference ----------------------------------------------------------------------------------------------


def test_reference_is_the_model_in_memory_not_the_one_on_disk(tiny, tmp_path):
    """The trap: TRL reads `config._name_or_path` again, so a model changed in memory starts elsewhere."""
    model = load_model(str(tiny))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    theirs = DPOTrainer(
        copy.deepcopy(model), args=config(tmp_path), train_dataset=preferences(), processing_class=load_tokenizer(tiny)
    )
    theirs.train()
    assert abs(logged(theirs)[0] - 0.6931) > 0.01  # the trap is there
    ours = trainer_for(tiny, tmp_path, model=model)
    ours.train()
    assert logged(ours)[0] == pytest.approx(0.693147, abs=1e-5)
    assert logged(ours, "rewards/margins")[0] == pytest.approx(0, abs=1e-5)


def test_fresh_adapter_has_its_base_as_reference(tiny, tmp_path):
    args = config(tmp_path, learning_rate=1e-3, max_steps=20)
    trainer = trainer_for(tiny, tmp_path, peft_config=LORA, args=args, eval_dataset=preferences())
    assert trainer.ref_model is None
    trainer.train()
    assert logged(trainer, "rewards/margins")[0] == 0
    assert trainer.evaluate()["eval_loss"] < 0.692  # low rank, small steps


def test_existing_adapter_is_its_own_reference(tiny, tmp_path):
    """The trap: disabling the adapter yields the base model, so training on top of one starts at the wrong loss."""
    torch.manual_seed(0)
    adapted = get_peft_model(
        load_model(str(tiny)), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    model = load_model(str(tiny), adapter=str(tmp_path / "adapter"), trainable_adapter=True)
    assert isinstance(model, PeftModel)
    trainer = trainer_for(tiny, tmp_path, model=model)
    batch = trainer.collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad(), model.disable_adapter():
        base = trainer._score(model, batch)
    assert float((base - trainer._score_frozen("ref", model, batch)).abs().max()) > 0.1  # adapter and base do differ
    trainer.train()
    assert logged(trainer, "rewards/chosen")[0] == pytest.approx(0, abs=1e-5)
    assert logged(trainer)[-1] != pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo"])
def test_objectives_without_reference_load_none(tiny, tmp_path, name):
    trainer = trainer_for(tiny, tmp_path, name, eval_dataset=preferences())
    assert trainer.ref_model is None
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    # Displacement is measured on fixed rows against the start, so it begins at 0 … after one small step.
    assert abs(logged(trainer, "displacement/chosen")[0]) < 0.5
    assert len(logged(trainer, "displacement/chosen")) == 5


# --- step 0 -----------------------------------------------------------------------------------------------------


def test_step_zero_check_stops_a_wrong_reference(tiny, tmp_path):
    other = load_model(str(tiny))
    with torch.no_grad():
        other.lm_head.weight += 0.05 * torch.randn(
            other.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    with pytest.raises(UserError, match="reference and starting model differ"):
        trainer_for(tiny, tmp_path, ref_model=other, start_is_reference=True).train()
    trainer_for(tiny, tmp_path, ref_model=other).train()  # a reference that is meant to differ is fine


def test_step_zero_check_stops_active_dropout(tiny, tmp_path):
    model = load_model(str(tiny))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    args = config(tmp_path, disable_dropout=False)
    with pytest.raises(UserError, match="dropout"):
        trainer_for(tiny, tmp_path, model=model, args=args, layout="paired").train()


def test_an_objective_without_gradient_is_stopped(tiny, tmp_path):
    class Flat(type(get_objective("dpo"))):
        def pair_loss(self, batch):
            return 0.0 * batch.chosen

    for steps in (5, 2):  # a run shorter than the look-out is judged at its end
        with pytest.raises(UserError, match="no gradient"):
            trainer_for(tiny, tmp_path, Flat(beta=0.1), args=config(tmp_path, max_steps=steps)).train()


@pytest.mark.parametrize(
    "batches",
    [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {"dataloader_num_workers": 1}],
    ids=["plain", "accumulation", "worker"],
)
def test_a_model_that_misreads_shared_rows_is_trained_paired(tiny, tmp_path, monkeypatch, batches):
    """The guard does not trust the list of architectures: it compares the layouts on the first batch."""
    model = load_model(str(tiny))
    forward = model.forward

    def blind_to_four_dimensions(attention_mask=None, **more):
        mask = attention_mask if attention_mask is None or attention_mask.dim() == 2 else None
        return forward(attention_mask=mask, **more)

    monkeypatch.setattr(model, "forward", blind_to_four_dimensions)
    args = config(tmp_path, **batches)
    with pytest.warns(UserWarning, match="using paired"):
        trainer = trainer_for(
            tiny, tmp_path, model=model, args=args, ref_model=load_model(tiny), start_is_reference=True
        )
        trainer.train()
    plain = trainer_for(tiny, tmp_path, args=config(tmp_path, **batches), layout="paired")
    plain.train()
    # Every step, also on batches that were collated before the layout was settled.
    assert logged(trainer) == pytest.approx(logged(plain), abs=1e-5)


def test_ties_are_no_reason_to_stop_but_no_gradient_at_all_is(tiny, tmp_path):
    """Pairs whose scores tie teach reward_aware_rpo nothing at the start: a batch of them is legitimate."""

    def rows(gap: float, n: int = 8):
        return [row | {"reward_chosen": 1.0 + gap, "reward_rejected": 1.0} for row in preferences(n).to_list()]

    mixed = Dataset.from_list(rows(0.0) + rows(1.0))
    args = config(tmp_path, per_device_train_batch_size=1, max_steps=16)
    trainer_for(tiny, tmp_path, "reward_aware_rpo", train_dataset=mixed, args=args).train()
    with pytest.raises(UserError, match="no gradient"):
        all_tied = Dataset.from_list(rows(0.0))
        trainer_for(tiny, tmp_path, "reward_aware_rpo", train_dataset=all_tied).train()


def test_launcher_and_recipe_must_agree_on_precision(tiny, tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="launcher's mixed precision is 'bf16'"):
        trainer_for(tiny, tmp_path)
    AcceleratorState._reset_state()


def test_previous_iterate_of_the_rows_needs_a_named_reference_and_is_checked(tiny, tmp_path):
    rows = [row | {"prev_chosen": -90.0, "prev_rejected": -200.0} for row in preferences().to_list()]
    data = Dataset.from_list(rows)
    with pytest.raises(UserError, match="name the reference"):
        trainer_for(tiny, tmp_path, "inpo", train_dataset=data)
    with pytest.raises(UserError, match="previous iterate and starting model differ"):
        trainer_for(tiny, tmp_path, "inpo", train_dataset=data, ref_model=load_model(tiny)).train()


# --- data -------------------------------------------------------------------------------------------------------


def test_given_token_ids_are_used_as_they_are(tiny, tmp_path):
    """Re-tokenising a decoded sample can change it: rows that bring ids are not tokenised, nor given an end token."""
    tokenizer = load_tokenizer(tiny)
    row = {"prompt": "my dog is", "chosen": " kind", "rejected": " cold"}
    letters = {k: [tokenizer.convert_tokens_to_ids(c) for c in v.replace(" ", "Ġ")] for k, v in row.items()}
    rows = [row | {f"{k}_ids": ids for k, ids in letters.items()}] * 8
    trainer = trainer_for(tiny, tmp_path, train_dataset=Dataset.from_list(rows))
    assert trainer.train_dataset[0]["chosen_ids"] == letters["chosen"] != tokenizer(" kind")["input_ids"]


def test_end_token_is_added_once_to_text_and_prompts_are_not_scored(tiny, tmp_path):
    trainer = trainer_for(tiny, tmp_path)
    tokenizer = load_tokenizer(tiny)
    row = trainer.train_dataset[0]
    assert row["chosen_ids"].count(tokenizer.eos_token_id) == 1 and row["chosen_ids"][-1] == tokenizer.eos_token_id
    batch = trainer.collator([row])
    labels = batch["row_labels"][0]
    assert labels[labels != -100].tolist() == row["chosen_ids"] + row["rejected_ids"]


def test_prompts_that_fill_max_length_are_counted_and_all_of_them_is_an_error(tiny, tmp_path):
    rows = [{"prompt": "my dog is" * n, "chosen": " kind .", "rejected": " cold ."} for n in (1, 1, 20)]
    data = Dataset.from_list(rows)
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        trainer = trainer_for(tiny, tmp_path, train_dataset=data, args=config(tmp_path, max_length=20))
    assert len(trainer.train_dataset) == 2
    with pytest.raises(UserError, match="raise data.max_length"):
        trainer_for(tiny, tmp_path, train_dataset=data, args=config(tmp_path, max_length=2))


def test_responses_are_cut_at_max_length_from_the_end():
    """Prompt and one response together: 3 tokens of prompt leave 4 of 7 for each response."""
    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [11, 12, 13, 14, 15, 16], "rejected_ids": [21, 22]}
    for layout in ("shared_prefix", "paired"):
        batch = PairCollator(0, 7, layout)([row])
        labels = batch["row_labels"]
        assert labels[labels != -100].tolist() == [11, 12, 13, 14, 21, 22]
        assert (batch["chosen_length"].tolist(), batch["rejected_length"].tolist()) == ([4], [2])


def test_missing_column_is_named(tiny, tmp_path):
    with pytest.raises(UserError, match="needs column 'reward_chosen'"):
        trainer_for(tiny, tmp_path, "reward_aware_rpo")
    with pytest.raises(UserError, match="needs column 'calibration'"):
        trainer_for(tiny, tmp_path, get_objective("vpo", beta=0.1, alpha=0.01, mode="online"))


@pytest.mark.parametrize(("name", "column"), [("sppo", "preference"), ("gpo", "log_odds")])
def test_what_an_oracle_said_reaches_the_objective(tiny, tmp_path, name, column):
    """At the start z is 0, so that the first loss is that of the targets alone: (.3^2 + .2^2) eta^2/2."""
    half = 0.5 if name == "sppo" else 0.0
    numbers = {f"{column}_chosen": half + 0.3, f"{column}_rejected": half - 0.2}
    rows = [row | numbers for row in preferences().to_list()]
    with pytest.raises(UserError, match=f"needs column '{column}_rejected'"):
        bare = [{key: value for key, value in row.items() if key != f"{column}_rejected"} for row in rows]
        trainer_for(tiny, tmp_path, name, train_dataset=Dataset.from_list(bare))
    objective = get_objective(name, eta=10.0)
    trainer = trainer_for(tiny, tmp_path, objective, train_dataset=Dataset.from_list(rows))
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(6.5, abs=1e-3)


def test_ratings_are_no_log_odds(tiny, tmp_path):
    """UltraFeedback's score_chosen and score_rejected, from 1 to 10."""
    rows = [row | {"score_chosen": 8.0, "score_rejected": 5.5} for row in preferences().to_list()]
    with pytest.raises(UserError, match="needs column 'log_odds_chosen'.* use sppo or a soft oracle"):
        trainer_for(tiny, tmp_path, "gpo", train_dataset=Dataset.from_list(rows))


def test_calibration_text_becomes_a_third_branch(tiny, tmp_path):
    rows = [row | {"calibration": " dull ."} for row in preferences().to_list()]
    objective = get_objective("vpo", beta=0.1, alpha=0.01, mode="online")
    trainer = trainer_for(tiny, tmp_path, objective, train_dataset=Dataset.from_list(rows))
    batch = trainer.collator([trainer.train_dataset[i] for i in range(3)])
    found = trainer.pair_logps(trainer.model, batch)
    plain = PairCollator(0, None, "paired")(
        [{**r, "chosen_ids": r["calibration_ids"]} for r in trainer.train_dataset.select(range(3))]
    )
    trainer._branches = 2
    expected = trainer._score(trainer.model, plain)[:, 0]
    torch.testing.assert_close(found.calibration, expected, rtol=1e-5, atol=1e-5)
    assert found.calibration_length.tolist() == [
        len(r["calibration_ids"]) for r in trainer.train_dataset.select(range(3))
    ]
