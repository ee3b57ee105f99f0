"""`OnlinePreferenceTrainer`: what is learned from, against autograd and plain forwards; what of TRL is relied on."""

from __future__ import annotations

import inspect

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed as transformers_deepspeed
from trl import RLOOTrainer
from trl.models.utils import unwrap_model_for_generation

from alignment.errors import UserError
from alignment.files import read_json_object
from alignment.models import load_model
from alignment.trainers.online import OnlinePreferenceTrainer
from alignment.trainers.rollout import PromptOrder
from tests.trainers.building import logged
from tests.trainers.building_online import OPENINGS, Kindness, Length, online, samples, scrambled, token_logps


@pytest.mark.parametrize("silent", [0, 1, 3])
@pytest.mark.parametrize("version", ["unclipped", "v1", "v2"])
def test_first_step_of_p3o_is_its_gradient_over_prompts_that_have_a_score(tiny, tokenizer, tmp_path, version, silent):
    """One step of SGD moves the weights by rate * mean of (r1 - r2) grad(s1 - s2)/2 over the prompts that could be
    scored, although two passes hold unequal numbers of them."""
    rows = PromptOrder(len(OPENINGS), 4, 4, 1, 42).rows(0)
    unscored = [OPENINGS[row] for row in rows[:silent]]
    args = {
        "optim": "sgd",
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    trainer = online(
        tiny, tmp_path, "p3o", given={"version": version, "beta": 0.3}, reward=Length(*unscored), args=args
    )
    trainer.train()
    assert logged(trainer, "skipped/unscored") == [silent / 4]
    found = samples(tmp_path)
    assert [bool(row["skipped"]) for row in found] == [row["row"] in rows[:silent] for row in found]
    model, terms = AutoModelForCausalLM.from_pretrained(tiny), []
    for row in found[silent:]:
        prompt = tokenizer(OPENINGS[row["row"]]).input_ids
        s1, s2 = (token_logps(model, prompt, ids).sum() for ids in row["responses"])
        r1, r2 = (len(said) / 10 for said in row["texts"])
        terms.append((r1 - r2) * (s1 - s2) / 2)
    gradients = torch.autograd.grad(torch.stack(terms).mean(), list(model.parameters()))
    scale = max(float(g.abs().max()) for g in gradients)
    assert scale > 1e-2
    for after, before, gradient in zip(trainer.model.parameters(), model.parameters(), gradients, strict=True):
        assert float(((after - before).detach() / 1e-2 - gradient).abs().max()) < 1e-3 * scale


def test_nothing_that_can_be_judged_is_an_error(tiny, tmp_path):
    with pytest.raises(UserError, match="none of 4 prompts can be learned from .unscored."):
        online(tiny, tmp_path / "p3o", "p3o", reward=Kindness(*OPENINGS)).train()
    with pytest.raises(UserError, match="none of 4 prompts can be learned from .tie."):
        online(tiny, tmp_path / "dpo", "dpo", reward=Flat()).train()


class Flat(Kindness):
    """The same score for all, from the second call on where `once`."""

    def __init__(self, once: bool = False):
        super().__init__()
        self.once = once

    def score(self, prompts, responses):
        told, self.once = [float(len(said) if self.once else 1) for said in responses], False
        return told


def test_a_later_rollout_of_ties_changes_nothing(tiny, tmp_path):
    """A policy that has learned may tie everywhere: no error, no gradient, and the share is logged."""
    args = {"max_steps": 2, "optim": "sgd", "save_strategy": "steps", "save_steps": 1}
    trainer = online(tiny, tmp_path, "dpo", reward=Flat(once=True), args=args)
    trainer.train()
    assert logged(trainer, "skipped/tie")[0] < 1 == logged(trainer, "skipped/tie")[1]
    assert logged(trainer)[1] == logged(trainer, "grad_norm")[1] == 0 < logged(trainer, "grad_norm")[0]
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1").state_dict()
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_ties_are_targets_of_an_objective_that_regresses_on_the_gap(tiny, tmp_path):
    trainer = online(tiny, tmp_path, "reward_aware_rpo", reward=Flat(), args={"max_steps": 1})
    trainer.train()
    same = [row["responses"][0] == row["responses"][1] for row in samples(tmp_path)]
    assert not all(same) and logged(trainer, "skipped/tie") == [sum(same) / len(same)]


def test_log_probs_of_samples_are_those_of_a_plain_forward(tiny, tokenizer, tmp_path):
    """Under the policy that drew them (of the rollout's beginning, not its end) and under the start."""
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 3e-3}
    how = {"inner_epochs": 2}
    trainer = online(tiny, tmp_path, "p3o", how, reward=Kindness(), args=args)
    trainer.train()
    start, middle = (AutoModelForCausalLM.from_pretrained(f) for f in (tiny, tmp_path / "checkpoint-2"))
    found, gaps = samples(tmp_path), []
    assert [row["rollout"] for row in found] == [0] * 4 + [1] * 4
    for row in found:
        prompt = tokenizer(OPENINGS[row["row"]]).input_ids
        for name, ids in zip(("first", "second"), row["responses"], strict=True):
            reference, policy = (
                float(token_logps(m, prompt, ids).sum()) for m in (start, middle if row["rollout"] else start)
            )
            assert row["numbers"][f"ref_{name}"] == pytest.approx(reference, abs=1e-3)
            assert row["numbers"][f"behaviour_{name}"] == pytest.approx(policy, abs=1e-3)
            gaps.append((row["rollout"], policy - reference))
        for ids, said, ended in zip(row["responses"], row["texts"], row["finished"], strict=True):
            assert ended == (ids[-1] == tokenizer.eos_token_id) and tokenizer.eos_token_id not in ids[:-1]
            assert said == tokenizer.decode(ids, skip_special_tokens=True)
    later = [gap for rollout, gap in gaps if rollout]
    assert max(map(abs, later)) > 1e-2
    assert logged(trainer, "samples/kl")[1] == pytest.approx(sum(later) / len(later), abs=1e-3)


def test_numbers_of_a_log_line_are_numbers(tiny, tmp_path):
    """One-token responses have no pairs of tokens; a missing number would end training where lines are written."""
    trainer = online(tiny, tmp_path, "p3o", reward=Kindness(), args={"max_completion_length": 1})
    trainer.train()
    assert all(len(ids) == 1 for row in samples(tmp_path) for ids in row["responses"])
    (line,) = [row for row in trainer.state.log_history if "loss" in row]
    assert all(isinstance(value, float | int) for value in line.values())


class Mute(OnlinePreferenceTrainer):
    """A back-end that gives a response without a token, as one with stop words may."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        return [[], *super()._generate_single_turn(prompt_ids, images, multimodal_fields)[1:]]


def test_an_empty_response_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="the model gave an empty response"):
        online(tiny, tmp_path, "p3o", reward=Kindness(), kind=Mute).train()


def test_another_model_is_not_taken_for_the_start(tiny, tmp_path):
    for says_so, folder in ((True, "one"), (None, "two"), (False, "three")):
        trainer = online(
            tiny,
            tmp_path / folder,
            "p3o",
            reward=Kindness(),
            ref_model=scrambled(tiny, 0.02),
            start_is_reference=says_so,
        )
        if says_so:
            with pytest.raises(UserError, match="step-0 check"):
                trainer.train()
        else:
            trainer.train()


def test_a_checkpoint_inside_a_rollout_must_hold_it(tiny, tmp_path):
    """Drawing it again, from weights that have moved on, would be another run."""
    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    how = {"per_rollout": 8}
    online(tiny, tmp_path, "p3o", how, reward=Kindness(), args=args).train()
    (tmp_path / "checkpoint-1" / "rollout.jsonl").unlink()
    with pytest.raises(UserError, match="falls inside rollout 0 and does not hold it"):
        online(tiny, tmp_path, "p3o", how, reward=Kindness(), args=args).train(str(tmp_path / "checkpoint-1"))


def test_dropout_of_the_model_and_of_an_adapter_is_off(tiny, tmp_path):
    """RLOOConfig leaves it on: the samples would be one policy's and their log-probs another's."""
    model = get_peft_model(
        load_model(str(tiny)), LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    )
    trainer = online(tiny, tmp_path, "p3o", reward=Kindness(), model=model)
    assert {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    trainer.train()
    assert logged(trainer, "objective/log_ratio")[0] == pytest.approx(0.0, abs=1e-4)


def test_tables_of_completions_show_each_responses_own_judgement(tiny, tmp_path):
    trainer = online(tiny, tmp_path, "p3o", reward=Kindness(), args={"log_completions": False})
    trainer.train()
    shown = dict(zip(trainer._logs["completion"], trainer._logs["rewards"]["judgement"], strict=True))
    texts = [text for row in samples(tmp_path) for text in row["texts"]]
    assert set(shown) <= set(texts) and len(set(shown.values())) > 1
    assert list(shown.values()) == Kindness().score(["" for _ in shown], list(shown))


def test_trl_still_has_what_on_policy_training_relies_on(tiny, tmp_path):
    """Contract with TRL 1.16's RLOOTrainer and transformers: methods by their arguments, attributes on a trainer."""
    relied_on = {
        "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields"),
        "_prepare_inputs": ("generation_batch",),
        "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
        "training_step": ("model", "inputs", "num_items_in_batch"),
        "_save_checkpoint": ("model", "trial"),
        "_get_learning_rate": (),
        "_clip_grad_norm": ("model",),
        "log": ("logs", "start_time"),
    }
    for name, arguments in relied_on.items():
        found = inspect.signature(getattr(RLOOTrainer, name)).parameters
        assert tuple(found)[1:] == arguments, f"RLOOTrainer.{name} now takes {tuple(found)}"
    # What drawing exchanges for a while is what generation reads.
    reads = inspect.getsource(RLOOTrainer._generate_single_turn)
    for name in ("model_wrapped", "generation_config", "generation_kwargs", "num_generations", "_last_loaded_step"):
        assert f"self.{name}" in reads, name
    trainer = online(tiny, tmp_path, "p3o", reward=Kindness())
    assert trainer.num_generations == 2 and trainer.eos_token_ids == [trainer.processing_class.eos_token_id]
    assert trainer.generation_config.max_new_tokens == 8 and trainer.generation_kwargs["do_sample"] is True
    assert set(trainer._metrics) == {"train", "eval"} and isinstance(trainer._metrics["train"]["any"], list)
    for column in (trainer._logs["prompt"], trainer._logs["completion"], trainer._logs["rewards"]["any"]):
        column.append("")
    assert list(inspect.signature(unwrap_model_for_generation).parameters)[:2] == ["model", "accelerator"]
    assert hasattr(transformers_deepspeed, "_hf_deepspeed_config_weak_ref")
    assert read_json_object(tiny / "config.json")["eos_token_id"] == trainer.processing_class.eos_token_id


def test_the_launchers_precision_must_be_the_recipes(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state()
    with pytest.raises(UserError, match="launcher's mixed precision is 'bf16'"):
        online(tiny, tmp_path, "p3o", reward=Kindness())
    AcceleratorState._reset_state()


def test_a_model_that_takes_no_shared_rows_gets_paired_ones(tiny, tmp_path):
    model = load_model(str(tiny))
    model.config._attn_implementation = "flash_attention_2"  # takes no 4-D mask
    with pytest.warns(UserWarning, match="layout shared_prefix is not possible"):
        trainer = online(tiny, tmp_path, "p3o", reward=Kindness(), model=model)
    assert trainer.collator.layout == "paired"
