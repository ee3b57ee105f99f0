"""Weights that a saved model or adapter lacks are errors, not random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from alignment.errors import UserError
from alignment.models.loading import load_model
from alignment.models.reward_model import load_reward_model

KEY = "model.layers.0.mlp.down_proj.weight"


def _model(tied: bool = False) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )


def _edit(file: Path, key: str, value: torch.Tensor | None) -> None:
    weights = load_file(file)
    weights.pop(key, None)
    if value is not None:
        weights[key] = value
    save_file(weights, file, metadata={"format": "pt"})


def _adapter(model: Any, folder: Path, **settings: Any) -> None:
    """A LoRA adapter of `model`, whose weights are those of `folder`/base, in `folder`/adapter."""
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **settings))
    wrapped.peft_config["default"].base_model_name_or_path = str(folder / "base")
    wrapped.save_pretrained(folder / "adapter")


@pytest.mark.parametrize("value", [None, torch.zeros(8, 5)])
def test_refuses_a_missing_or_misshapen_weight(tmp_path: Path, value: torch.Tensor | None) -> None:
    _model().save_pretrained(tmp_path)
    _edit(tmp_path / "model.safetensors", KEY, value)
    with pytest.raises(UserError, match=f"1 weights .* first {KEY}"):
        load_model(tmp_path)


def test_tied_loads_and_unexpected_warns(tmp_path: Path) -> None:
    _model(tied=True).save_pretrained(tmp_path)
    load_model(tmp_path)
    _edit(tmp_path / "model.safetensors", "model.extra.weight", torch.zeros(2))
    with pytest.warns(UserWarning, match="1 saved weights, first model.extra.weight"):
        load_model(tmp_path)


def test_refuses_an_adapter_without_one_of_its_weights(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    load_model(tmp_path / "base", adapter=str(tmp_path / "adapter"))
    _edit(file, min(load_file(file)), None)
    with pytest.raises(UserError, match="1 weights .*lora_A"):
        load_model(tmp_path / "base", adapter=str(tmp_path / "adapter"))


def test_refuses_an_adapter_without_a_module_that_it_saves_whole(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path / "base")
    _adapter(load_model(tmp_path / "base"), tmp_path, modules_to_save=["lm_head"])
    load_model(tmp_path / "adapter")
    _edit(tmp_path / "adapter/adapter_model.safetensors", "base_model.model.lm_head.weight", None)
    with pytest.raises(UserError, match="1 weights are missing .*lm_head"):
        load_model(tmp_path / "adapter")


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("outputs", [None, 1])
def test_an_adapter_without_a_head_is_no_reward_model(tmp_path: Path, task: str | None, outputs: int | None) -> None:
    _model().save_pretrained(tmp_path / "base")
    _adapter(load_model(tmp_path / "base"), tmp_path, task_type=task)
    with pytest.raises(UserError, match="not a reward model: the adapter has no head"):
        load_reward_model(tmp_path / "adapter", outputs=outputs)


def test_a_reward_adapter_brings_its_head(tmp_path: Path) -> None:
    """As TRL's RewardTrainer saves one, on a language model and without a file of ours."""
    _model().save_pretrained(tmp_path / "base")
    scores = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    _adapter(scores, tmp_path, task_type="SEQ_CLS")
    ids = torch.tensor([[3, 4, 5]])
    expected = scores.eval()(input_ids=ids).logits
    found = load_reward_model(tmp_path / "adapter")
    torch.testing.assert_close(found(input_ids=ids).logits, expected, rtol=0, atol=0)
    _edit(tmp_path / "adapter/adapter_model.safetensors", "base_model.model.score.weight", None)
    with pytest.raises(UserError, match="1 weights are missing .*score"):
        load_reward_model(tmp_path / "adapter")


def test_a_reward_model_does_not_start_from_an_adapter(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path / "base")
    _adapter(load_model(tmp_path / "base"), tmp_path, task_type="CAUSAL_LM")
    adapter = str(tmp_path / "adapter")
    with pytest.raises(UserError, match="model.name_or_path: a reward model starts from full weights"):
        load_reward_model(adapter, outputs=1, fresh_head=True)
    with pytest.raises(UserError, match="model.adapter: a reward model starts from full weights"):
        load_reward_model(tmp_path / "base", outputs=1, fresh_head=True, adapter=adapter)
