"""Weights that a saved model or adapter lacks are errors, not random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from alignment.errors import UserError
from alignment.models.loading import load_model

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
