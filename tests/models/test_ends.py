"""Training and sampling agree on where a turn ends, for every family's chat template that TRL ships."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignment.data.pipeline import prepare_rows
from alignment.data.tokens import encode
from alignment.errors import UserError
from alignment.models import load_model, load_tokenizer
from alignment.models.ends import ends_of, settle_ends
from alignment.models.sampling import sample
from tests.data.building import reply, user
from tests.runs.building_runs import recipe, train
from tests.trainers.building_online import Kindness, online

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>")
DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>")
COHERE = (
    "<|START_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
)
GPT = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>")
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>")
# Template: its family's tokens, EOS, and (read in the template by eye) the token that closes a reply.
FAMILIES = {
    **dict.fromkeys(
        ("qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8", "qwen3_instruct_2507"),
        (CHATML, "<|im_end|>", "<|im_end|>"),
    ),
    **dict.fromkeys(
        ("lfm2", "lfm2_v2", "lfm2_2_5", "lfm2_2_5_v2", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"),
        (CHATML, "<|endoftext|>", "<|im_end|>"),  # as a base model has it: EOS is not the template's end
    ),
    "nemotron_3_5_lightning": (CHATML, "<|endoftext|>", "<|im_end|>"),
    **dict.fromkeys(("llama3", "llama3_1", "llama3_2"), (LLAMA, "<|end_of_text|>", "<|eot_id|>")),
    **dict.fromkeys(("gemma", "gemma3"), (GEMMA, "<eos>", "<end_of_turn>")),
    **dict.fromkeys(
        ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "diffusion_gemma"), (GEMMA, "<eos>", "<turn|>")
    ),
    **dict.fromkeys(("phi3", "phi3_5"), (PHI, "<|endoftext|>", "<|end|>")),
    **dict.fromkeys(("deepseekv3", "deepseek_r1_distill"), (DEEPSEEK, DEEPSEEK[2], DEEPSEEK[2])),
    "cohere": (COHERE, COHERE[4], COHERE[4]),
    "cohere2": ((*COHERE, "<|START_RESPONSE|>", "<|END_RESPONSE|>"), COHERE[4], COHERE[4]),
    "gptoss": (GPT, "<|return|>", "<|return|>"),
    "muse_glimmer": (("<|start|>", "<|message|>", "<|eot|>"), "<|eot|>", "<|eot|>"),
    "glm4moe": (GLM, "<|endoftext|>", None),
}


@functools.cache
def family(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with the special tokens of the template's family."""
    special, eos, _ = FAMILIES[name]
    return tokenizer_of((TEMPLATES / f"{name}.jinja").read_text(), special, eos)


def tokenizer_of(template: str, special: tuple[str, ...], eos: str) -> PreTrainedTokenizerFast:
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bos = next((token for token in special if "bos" in token or "begin" in token), None)
    found = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos, pad_token="<pad>")
    found.add_special_tokens({"additional_special_tokens": [t for t in special if t not in (eos, bos)]})
    found.chat_template = template
    return found


ROW = {"prompt": user("What is it?"), "chosen": reply("It is good."), "rejected": reply("No.")}
TALK = [*reply("Who?"), *user("You."), *reply("It is I.")]  # a response of several messages


def text_of(tokenizer, messages) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name][2] is not None])
def test_a_response_is_the_conversation_up_to_the_end_of_its_last_turn(name):
    """Every position of prompt + response is the template's own; the response ends where sampling stops, and the
    sampler's ends stand nowhere else in it."""
    tokenizer, end = family(name), FAMILIES[name][2]
    for response in (ROW["chosen"], TALK):
        ids, _ = encode([ROW | {"chosen": response}], tokenizer, ["chosen", "rejected"])[0]
        whole = text_of(tokenizer, ROW["prompt"] + response)
        assert tokenizer.decode(ids["prompt_ids"] + ids["chosen_ids"]) == whole[: whole.rindex(end) + len(end)]
        assert whole[whole.rindex(end) + len(end) :].strip() in ("", "<|endoftext|>")
        stops = ends_of(tokenizer, GenerationConfig(eos_token_id=tokenizer.eos_token_id)).ids
        assert tokenizer.convert_ids_to_tokens(ids["chosen_ids"][-1]) == end and ids["chosen_ids"][-1] in stops
        if response is not TALK:
            assert [i for i in ids["chosen_ids"] if i in stops] == ids["chosen_ids"][-1:]
            # Nothing but thoughts (empty ones) and names of channels stands before the reply.
            assert tokenizer.decode(ids["chosen_ids"]).endswith(("It is good." + end, "<|END_RESPONSE|>" + end))
    found = prepare_rows([ROW], "here", tokenizer, max_length=2000, role="train")
    assert found.rejected == [] and len(found.dataset) == 1


def small(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eos = tokenizer.eos_token_id
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=eos, **shape))


def test_a_base_model_is_sampled_up_to_its_template_s_end():
    """EOS is <|endoftext|>, the template ends turns with <|im_end|>: a model of nearly uniform probabilities over some
    270 tokens draws both, and every sample stops at the first of either."""
    tokenizer = family("lfm2")
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    drawn = sample(small(tokenizer), tokenizer, [user("Hi")] * 4, 16, max_new_tokens=100, seed=0)
    samples = [one for group in drawn for one in group]
    assert all(not {end, eos} & {*one.ids[:-1]} for one in samples)
    assert all(one.finished == (one.ids[-1] in (end, eos)) for one in samples)
    assert {one.ids[-1] for one in samples if one.finished} == {end, eos}


def test_what_is_saved_stops_at_all_ends(tmp_path):
    """What transformers and vLLM read beside the weights has the template's end, and what the model had before."""
    tokenizer = family("llama3_1")
    model = small(tokenizer)
    more = tokenizer.convert_tokens_to_ids("<|end_header_id|>")
    model.generation_config.eos_token_id = [more]
    settle_ends(model, tokenizer)
    model.save_pretrained(tmp_path)
    kept = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert set(kept) == {more, *tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])}


@pytest.mark.parametrize("kind", ["sft", "dpo", "adapter", "p3o"])
def test_every_trainer_stops_samples_where_the_template_ends_a_turn(tiny, tmp_path, kind):
    """In what it saves, and in what it draws: a template's end that is not EOS, and EOS."""
    folder, tokenizer = tmp_path / "other", load_tokenizer(str(tiny))
    load_model(str(tiny)).save_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|start|>{% endfor %}"
    tokenizer.save_pretrained(folder)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|start|>")}
    assert len(ends) == 2
    if kind == "p3o":
        trainer = online(folder, tmp_path / "run", "p3o", reward=Kindness())
        assert {*trainer.eos_token_ids} == {*trainer.model.generation_config.eos_token_id} == ends
        return
    more = ["lora={r: 2, alpha: 4, target_modules: [q_proj]}"] * (kind == "adapter")
    run = train(recipe("sft" if kind == "sft" else "dpo", folder, tmp_path, "training.max_steps=1", *more))
    assert (run / "final" / "adapter_config.json").is_file() == (kind == "adapter")
    assert {*GenerationConfig.from_pretrained(run / "final").eos_token_id} == ends


def test_a_template_without_an_end_names_the_remedy_and_the_remedy_works(tmp_path):
    tokenizer = family("glm4moe")
    small(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"the next turn's '<\|user\|>' does; set model.end_of_turn='<\|user\|>'"):
        prepare_rows([ROW], "here", plain, max_length=2000, role="train")
    named = load_tokenizer(str(tmp_path), end_of_turn="<|user|>")
    rows = prepare_rows([ROW], "here", named, max_length=2000, role="train").dataset
    user_id = named.convert_tokens_to_ids("<|user|>")
    for column, words in (("chosen_ids", "It is good."), ("rejected_ids", "No.")):
        assert named.decode(rows[0][column]).endswith(f"{words}<|user|>")
        assert rows[0][column].count(user_id) == 1
    assert ends_of(named).ids == [user_id, named.eos_token_id]
    named.save_pretrained(tmp_path / "final")  # a run's model keeps it
    assert ends_of(load_tokenizer(str(tmp_path / "final"))).ids[0] == user_id
    for wrong, why in (("user", "4 tokens"), ("<|usr|>", "did you mean")):
        with pytest.raises(UserError, match=why):
            load_tokenizer(str(tmp_path), end_of_turn=wrong)


def test_thoughts_that_only_samples_have_are_named():
    """DeepSeek-R1's generation prompt opens a thought, a written conversation has none."""
    found = prepare_rows([ROW], "here", family("deepseek_r1_distill"), max_length=2000, role="train")
    assert any("ends with '<think>\\n' when a reply is sampled" in note for note in found.notes)
    none = prepare_rows([ROW], "here", family("lfm2"), max_length=2000, role="train")
    assert not any("when a reply is sampled" in note for note in none.notes)
