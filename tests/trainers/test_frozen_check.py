"""Whether what is called frozen is frozen: models that a trainer has had, copies that share weights, resumed runs."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from alignment.errors import UserError
from alignment.models import load_model, load_tokenizer
from alignment.trainers.frozen_check import FrozenCheck, changed, some_weights
from alignment.trainers.reference import _frozen_copy
from tests.trainers.building import LORA, arguments, config, logged, preferences, trainer_for
from tests.trainers.building_online import Kindness, online, samples

LONGER = {"max_steps": 6, "learning_rate": 1e-3}


def after_sft(tiny, folder, **settings):
    """The tiny model as TRL's supervised trainer leaves it."""
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preferences()]
    args = SFTConfig(**arguments(folder, max_steps=1, **settings))
    model, tokenizer = load_model(str(tiny)), load_tokenizer(str(tiny))
    trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return trainer.model


def loaded(tiny, weights):
    model = load_model(str(tiny))
    model.load_state_dict(weights)
    return model


def bits(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("before", ["sft", "sft in bf16", "a trainer that was only built"])
def test_a_model_that_a_trainer_has_had_trains_as_one_that_was_loaded(tiny, tmp_path, before):
    """TRL puts a `forward` on the model, which a copy would take over with its closure: the policy's weights."""
    if before == "a trainer that was only built":
        model = load_model(str(tiny))
        trainer_for(tiny, tmp_path / "first", model=model)
    else:
        model = after_sft(tiny, tmp_path / "first", bf16="bf16" in before)
    weights = bits(model)
    runs = []
    for name, start in (("used", model), ("fresh", loaded(tiny, weights))):
        trainer = trainer_for(tiny, tmp_path / name, model=start, args=config(tmp_path / name, **LONGER))
        trainer.train()
        runs.append(logged(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-6)
    assert runs[0][0] == pytest.approx(math.log(2)) and runs[0][-1] < 0.67


def test_on_policy_training_after_sft_has_a_reference_that_stays(tiny, tmp_path):
    model = after_sft(tiny, tmp_path / "sft")
    trainer = online(tiny, tmp_path / "run", "p3o", model=model, reward=Kindness(), args={"max_steps": 2})
    trainer.train()
    later = [row["numbers"] for row in samples(tmp_path / "run") if row["rollout"] == 1]
    assert max(abs(n["behaviour_first"] - n["ref_first"]) for n in later) > 0.01


def tie(trainer):
    """The reference shares its head with the policy: equal at step 0, and never again frozen."""
    trainer.ref_model.lm_head = trainer.model.lm_head
    return trainer


def test_a_reference_with_weights_of_the_policy_is_refused_before_training(tiny, tmp_path):
    trainer = tie(trainer_for(tiny, tmp_path))
    before = bits(trainer.model)
    with pytest.raises(UserError, match="reference: its log-probs change with the policy's weights"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    with pytest.raises(UserError, match="reference: its log-probs change with the policy's weights"):
        tie(online(tiny, tmp_path / "online", "p3o", reward=Kindness())).train()


def test_looking_changes_no_weight(tiny, tmp_path):
    trainer = trainer_for(tiny, tmp_path, args=config(tmp_path, learning_rate=0.0, max_steps=2))
    before = bits(trainer.model)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    odd = torch.nn.Parameter(torch.tensor([0.1, -3.0, math.nan, math.inf, 1e-38], dtype=torch.bfloat16))
    kept = odd.detach().clone()
    with changed([odd]):
        assert not torch.equal(odd[:2], kept[:2])
    assert torch.equal(odd.view(torch.int16), kept.view(torch.int16))


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_reference_that_moves_is_found_after_the_first_real_update(tiny, tmp_path, monkeypatch, warmup):
    monkeypatch.setattr(FrozenCheck, "show", lambda self, model, rows: None)
    args = config(tmp_path, lr_scheduler_type="constant_with_warmup", warmup_steps=warmup)
    trainer = tie(trainer_for(tiny, tmp_path, args=args))
    with pytest.raises(UserError, match="reference: its log-probs moved by a relative .* with the first update"):
        trainer.train()
    assert trainer.state.global_step == warmup + 1  # warm-up begins at rate 0, which moves nothing


def test_an_adapter_that_trains_its_base_moves_the_reference(tiny, tmp_path):
    """With `bias: all` PEFT trains biases of the base model, and switching the adapter off leaves them trained."""
    model = load_model(str(tiny))
    for layer in model.model.layers:
        layer.mlp.down_proj.bias = torch.nn.Parameter(torch.zeros(model.config.hidden_size))
    lora = copy.copy(LORA)
    lora.bias = "all"
    with pytest.raises(UserError, match="reference: its log-probs change"):
        trainer_for(tiny, tmp_path, model=model, peft_config=lora).train()


def test_a_policy_that_computes_with_other_weights_is_refused(tiny, tmp_path):
    used = load_model(str(tiny))
    trainer_for(tiny, tmp_path / "first", model=used)
    with pytest.raises(UserError, match="do not change with its weights|no longer depend on its weights"):
        trainer_for(tiny, tmp_path / "second", "simpo", model=copy.deepcopy(used)).train()
        trainer_for(tiny, tmp_path / "third", model=copy.deepcopy(used)).train()


def test_copies_keep_nothing_that_is_bound_to_the_original(tiny):
    model = load_model(str(tiny))
    model.forward = model.forward  # a bound method on the instance
    assert "forward" not in vars(_frozen_copy(model))
    model.scale = lambda: model.lm_head.weight.mean()
    with pytest.raises(UserError, match=r"LlamaForCausalLM\.scale is bound to this model"):
        _frozen_copy(model)
    del model.scale
    model.model.layers[0]._hf_hook = object()  # as accelerate's dispatch_model leaves one
    with pytest.raises(UserError, match="device_map"):
        _frozen_copy(model)


def test_resuming_against_another_explicit_reference_is_refused(tiny, tmp_path):
    """start.json keeps the frozen models' log-probs, too."""

    def trainer(scale: float):
        reference: PreTrainedModel = load_model(str(tiny))
        with torch.no_grad():
            reference.lm_head.weight *= scale
        args = config(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        return trainer_for(tiny, tmp_path, args=args, ref_model=reference)

    trainer(1.2).train()
    kept = json.loads((tmp_path / "start.json").read_text())
    assert kept["frozen"]["ref"] != kept["logps"]
    checkpoint = str(tmp_path / "checkpoint-2")
    trainer(1.2).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(UserError, match="--resume: the reference's log-probs are off"):
        trainer(1.3).train(resume_from_checkpoint=checkpoint)


def test_an_on_policy_run_resumes_only_against_its_reference(tiny, tmp_path):
    def trainer(scale: float):
        reference = load_model(str(tiny))
        with torch.no_grad():
            reference.lm_head.weight *= scale
        args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        return online(tiny, tmp_path / "run", "p3o", reward=Kindness(), ref_model=reference, args=args)

    trainer(1.2).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    trainer(1.2).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(UserError, match="--resume: the reference's log-probs are off"):
        trainer(1.3).train(resume_from_checkpoint=checkpoint)


def test_a_degree_head_does_not_outlive_its_trainer(tiny, tmp_path):
    """The next trainer would read the old head's logits, or save it with the model."""
    model = load_model(str(tiny))
    spo = {"args": config(tmp_path / "a", max_steps=1), "model": model}
    first = trainer_for(tiny, tmp_path / "a", spo_objective(), **spo)
    second = trainer_for(tiny, tmp_path / "b", spo_objective(), **spo | {"args": config(tmp_path / "b", max_steps=2)})
    assert second.head is not first.head and len(second.model._forward_hooks) == 1
    second.train()
    assert float(second.head.weight.abs().max()) > 0
    third = trainer_for(tiny, tmp_path / "c", model=second.model)
    third.save_model(str(tmp_path / "c"))
    assert not [name for name in load_file(tmp_path / "c" / "model.safetensors") if "degree" in name]


def spo_objective():
    from alignment.objectives import get_objective

    return get_objective("spo", base="dpo", degrees=2, removal="random")


def test_weights_that_are_changed_are_few_and_hold_both_factors_of_an_adapter():
    big, small = torch.nn.Parameter(torch.empty(2**23, device="meta")), torch.nn.Parameter(torch.empty(8))
    assert some_weights([big, small, big]) == [small] or some_weights([big, small, big])[0] is small
    assert len(some_weights([big])) == 1
    pair = [torch.nn.Parameter(torch.empty(2**n, device="meta")) for n in (18, 20)] * 10
    sizes = [p.numel() for p in some_weights(pair)]
    assert {2**18, 2**20} <= set(sizes) and sum(sizes) <= 2**22
