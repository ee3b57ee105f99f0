"""Kinds of PEFT adapters: what merges comes out as it was trained; what does not is refused in time, truly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.errors import UserError
from alignment.models import load_model
from alignment.models.adapters import PROMPTS, why_not_merged, why_not_trained
from alignment.models.export import export
from tests.models.test_export import run_of
from tests.trainers.building import config, trainer_for

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
CAUSAL = "CAUSAL_LM"
UNMERGED = [
    PromptTuningConfig(num_virtual_tokens=3, task_type=CAUSAL),
    PrefixTuningConfig(num_virtual_tokens=3, task_type=CAUSAL),
    PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type=CAUSAL),
    AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type=CAUSAL),
    LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)], task_type=CAUSAL),
    LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, task_type=CAUSAL),
]


def trained(base: Path, folder: Path, kind: PeftConfig, **loading) -> torch.Tensor:
    """Save an adapter with weights of its own; returns the logits of base and adapter."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(base, **loading), kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def tied(tiny, tmp_path_factory) -> Path:
    """The tiny model with one matrix for embedding and head, as the small models of most families have."""
    folder = tmp_path_factory.mktemp("tied")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def test_an_adapter_on_a_tied_embedding_leaves_the_head_alone(tied, tmp_path):
    kind = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type=CAUSAL)
    wanted = trained(tied, tmp_path / "a", kind)
    export(tmp_path / "a", tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(tied)
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, wanted, atol=1e-4)
        assert not torch.allclose(before(IDS).logits, wanted, atol=0.1)
    assert torch.equal(plain.lm_head.weight, before.lm_head.weight)
    assert not torch.equal(plain.model.embed_tokens.weight, before.model.embed_tokens.weight)


def test_ia3_on_a_quantised_base_is_merged(tiny, tmp_path):
    kind = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], task_type=CAUSAL)
    wanted = trained(tiny, tmp_path / "a", kind, quantization="nf4")
    section = {"name_or_path": str(tiny), "dtype": "float32", "quantization": "nf4"}
    export(run_of(tmp_path / "a", tmp_path / "run", model=section), tmp_path / "out")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
    assert torch.allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("kind", UNMERGED, ids=lambda kind: kind.peft_type.value)
def test_what_cannot_be_merged_is_said_in_a_line_whose_remedy_works(tiny, tmp_path, kind):
    wanted = trained(tiny, tmp_path / "a", kind)
    with pytest.raises(UserError, match=f"use it as it is: PEFT loads the folder as an adapter on {tiny}") as refused:
        export(tmp_path / "a", tmp_path / "out")
    assert "cannot" in str(refused.value) and "--dtype" not in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "a").eval()
        assert torch.allclose(loaded(IDS).logits, wanted, atol=1e-4)


def test_kinds_are_pefts_own():
    prompts = {k.value for k, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(c, PromptLearningConfig)}
    assert set(PROMPTS) == prompts
    for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        written = {"peft_type": kind}
        assert (why_not_merged(written) is None) == issubclass(tuner, BaseTuner), kind
        assert (why_not_trained(written) is None) == (kind.value not in prompts), kind


def test_training_refuses_virtual_tokens_and_says_what_stays_an_adapter(tiny, tmp_path):
    with pytest.raises(UserError, match="adapter: PROMPT_TUNING puts virtual tokens .* train a LoRA adapter"):
        trainer_for(tiny, tmp_path, args=config(tmp_path / "run"), peft_config=UNMERGED[0])
    with pytest.warns(UserWarning, match="stays an adapter .* cannot merge ADAPTION_PROMPT, since it learns tokens"):
        trainer_for(tiny, tmp_path, args=config(tmp_path / "run"), peft_config=UNMERGED[3])


def test_an_adapter_that_changes_the_start_is_named(tiny, tmp_path):
    kind = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora", task_type=CAUSAL)
    trainer = trainer_for(tiny, tmp_path, args=config(tmp_path / "run"), peft_config=kind)
    with pytest.raises(UserError, match=r"a fresh adapter does not start at zero \(PEFT's init_lora_weights"):
        trainer.train()
