"""What a model can take is told from its configuration, and agrees with where its forward pass breaks."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
)

from alignment.models.limits import limits_of, named_limits

SMALL = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = [
    GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2),
    OPTConfig(**SMALL, max_position_embeddings=16, ffn_dim=8, word_embed_proj_dim=8),
    GPTNeoConfig(
        vocab_size=11,
        max_position_embeddings=16,
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        attention_types=[[["global"], 1]],
    ),
    RobertaConfig(**SMALL, max_position_embeddings=18, intermediate_size=8, is_decoder=True, pad_token_id=1),
    LlamaConfig(**SMALL, max_position_embeddings=16, intermediate_size=8, num_key_value_heads=2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_limits_are_where_the_forward_pass_breaks(config, tmp_path):
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config).eval()
    found = named_limits(str(tmp_path))
    assert found == limits_of(model) and found is not None
    assert (found.embedding, found.positions) == (11, 16)

    def runs(ids) -> bool:
        try:
            model(input_ids=torch.tensor([ids]))
        except (IndexError, RuntimeError):
            return False
        return True

    assert runs([5] * 16) and runs([5] * 17) is not found.learned
    assert runs([10]) and not runs([11])


def test_models_without_a_readable_configuration_have_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert named_limits(str(tmp_path)) is None
