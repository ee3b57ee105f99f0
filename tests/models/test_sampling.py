"""Samples: from the model's own distribution, reproducible, cut at the end token, indifferent to their company."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from alignment.models import load_model, load_tokenizer
from alignment.models.sampling import _cut, prompt_ids, sample
from tests import tiny_lm

PROMPTS = ["my dog is", "the city", "our bread seems warm and", "your boat is"]
POISON = GenerationConfig(repetition_penalty=9.0, min_p=0.9, num_beams=3)


@pytest.fixture(scope="module")
def speaker(tiny):
    return load_model(tiny), load_tokenizer(tiny)


def texts(found):
    return [[s.text for s in group] for group in found]


def next_token_probabilities(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)


def test_a_seed_reproduces_and_another_differs(speaker):
    settings = {"max_new_tokens": 10}
    first, again, other = (texts(sample(*speaker, PROMPTS, 3, seed=s, **settings)) for s in (1, 1, 2))
    assert first == again != other
    assert len(first) == 4 and all(len(group) == 3 for group in first)
    assert any(len(set(group)) > 1 for group in first)  # the n samples of a prompt are separate draws


def test_the_global_generator_and_the_models_mode_are_left_alone(speaker):
    model, tokenizer = speaker
    model.train()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    shipped = model.generation_config
    sample(model, tokenizer, PROMPTS, 2, max_new_tokens=5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model.generation_config is shipped
    model.eval()


@pytest.mark.parametrize("shipped", [GenerationConfig(), POISON], ids=["nothing", "settings"])
def test_first_tokens_follow_the_models_softmax(tiny, shipped):
    """Also where the model ships generation settings of its own, which `generate` would mix in."""
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    model.generation_config = shipped
    draws = sample(model, tokenizer, [PROMPTS[0]], 4000, max_new_tokens=1, batch_size=4000, seed=11)[0]
    counts = torch.bincount(torch.tensor([s.ids[0] for s in draws]), minlength=len(tokenizer)).double()
    expected = 4000 * next_token_probabilities(model, prompt_ids(tokenizer, PROMPTS[0]))
    common = expected >= 5
    assert 5 <= int(common.sum()) < len(tokenizer)
    observed = [*counts[common].tolist(), float(counts[~common].sum())]
    wanted = [*expected[common].tolist(), float(expected[~common].sum())]
    assert chisquare(observed, wanted).pvalue > 0.001


def test_temperature_and_truncation_do_what_they_say(speaker):
    model, tokenizer = speaker
    probabilities = next_token_probabilities(model, prompt_ids(tokenizer, PROMPTS[0]))
    likeliest = set(probabilities.topk(3).indices.tolist())

    def drawn(**settings) -> list[int]:
        draws = sample(model, tokenizer, [PROMPTS[0]], 500, max_new_tokens=1, batch_size=500, seed=1, **settings)
        return [s.ids[0] for s in draws[0]]

    assert set(drawn(top_k=3)) == likeliest
    ranked = probabilities.sort(descending=True)
    nucleus = ranked.indices[: int((ranked.values.cumsum(0) < 0.3).sum()) + 1].tolist()
    assert set(drawn(top_p=0.3)) == set(nucleus)
    sharpened = probabilities**4 / (probabilities**4).sum()
    share = drawn(temperature=0.25).count(int(ranked.indices[0])) / 500
    assert share == pytest.approx(float(sharpened[ranked.indices[0]]), abs=0.07)  # three standard errors


def test_greedy_is_argmax_whatever_the_batch(speaker):
    """One token at a time, alone, without a cache: what greedy decoding is by definition."""
    model, tokenizer = speaker
    ends = {tokenizer.eos_token_id}
    expected = []
    for prompt in PROMPTS:
        ids, start = prompt_ids(tokenizer, prompt), len(prompt_ids(tokenizer, prompt))
        while len(ids) - start < 10 and not (ids[start:] and ids[-1] in ends):
            ids.append(int(next_token_probabilities(model, ids).argmax()))
        expected.append(ids[start:])
    assert len({len(prompt_ids(tokenizer, p)) for p in PROMPTS}) > 1  # so that a batch is padded
    for batch_size in (1, 2, 64):
        found = sample(model, tokenizer, PROMPTS, 1, max_new_tokens=10, temperature=0, batch_size=batch_size)
        assert [group[0].ids for group in found] == expected


def test_greedy_draws_are_one_draw_repeated(speaker):
    once, thrice = (sample(*speaker, PROMPTS, n, max_new_tokens=8, temperature=0) for n in (1, 3))
    assert thrice == [group * 3 for group in once]


def padded(tokenizer, prompts: list[str]):
    ids = {"input_ids": [prompt_ids(tokenizer, p) for p in prompts]}
    return tokenizer.pad(ids, padding=True, padding_side="left", return_tensors="pt")


def drawn_by_transformers(model, tokenizer, prompts: list[str], n: int, seed: int) -> list[list[list[int]]]:
    """Ids of n continuations per prompt by `generate` alone, every prompt computed n times; without end and pad."""
    rows = padded(tokenizer, prompts)
    config = GenerationConfig(
        max_new_tokens=8, do_sample=True, top_k=0, num_return_sequences=n,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generated = model.generate(**rows, generation_config=config)[:, rows["input_ids"].size(1) :].tolist()
    plain = [without_special(tokenizer, row) for row in generated]
    return [plain[i : i + n] for i in range(0, len(plain), n)]


def without_special(tokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if i not in (tokenizer.eos_token_id, tokenizer.pad_token_id)]


def with_window(tokenizer) -> MistralForCausalLM:
    """A random model that sees the last three tokens only: its cache drops what came before."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=3, initializer_range=0.5, max_position_embeddings=64,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("prompts", [["my", "the"], ["my dog is", "our dog is"], ["my", *PROMPTS]], ids=len)
@pytest.mark.parametrize("window", [False, True], ids=["shared", "fallback"])
def test_prompts_are_computed_once_and_give_the_same_draws(speaker, prompts, window):
    """Equal to the plain way token by token; a model whose cache cannot be shared takes the plain way."""
    model, tokenizer = (with_window(speaker[1]), speaker[1]) if window else speaker
    prompts = sorted(prompts, key=lambda p: len(prompt_ids(tokenizer, p)))  # the order in which a batch is drawn
    expected = drawn_by_transformers(model, tokenizer, prompts, 8, seed=3)
    passes: list[tuple[int, ...]] = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: passes.append(tuple(inputs[0].shape)))
    found = sample(model, tokenizer, prompts, 8, max_new_tokens=8, seed=3)
    hook.remove()
    assert [[without_special(tokenizer, s.ids) for s in group] for group in found] == expected
    longest = max(len(prompt_ids(tokenizer, p)) for p in prompts)
    first = [] if longest == 1 else [(len(prompts), longest)]  # one token has nothing before it to share
    assert passes[: len(first) + 1] == [*first, (8 * len(prompts), longest if window else 1)]


def test_the_end_token_is_found_by_position_even_where_pad_is_the_end_token(tiny):
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    drawn = [s for group in sample(model, tokenizer, PROMPTS, 16, max_new_tokens=6, seed=2) for s in group]
    assert {s.finished for s in drawn} == {True, False}
    for one in drawn:
        assert one.ids.count(end) == one.finished and (one.ids[-1] == end) == one.finished
        assert one.finished or len(one.ids) == 6
        assert tokenizer.eos_token not in one.text
        assert one.text == tokenizer.decode(one.ids, skip_special_tokens=True)


def test_cut_by_position():
    assert _cut([5, 6, 2, 2, 2], {2}) == ([5, 6, 2], True)
    assert _cut([5, 9, 6, 2], {2, 9}) == ([5, 9], True)
    assert _cut([2, 2], {2}) == ([2], True)
    assert _cut([5, 6, 7], {2}) == ([5, 6, 7], False)


def test_chat_prompts_go_through_the_template(speaker):
    model, tokenizer = speaker
    chat = [{"role": "user", "content": "my dog is"}]
    written = "<|start|>user\nmy dog is<|end|>\n<|start|>assistant\n"
    assert prompt_ids(tokenizer, chat) == tokenizer(written, add_special_tokens=False)["input_ids"]
    answers = sample(model, tokenizer, [chat], 8, max_new_tokens=16, seed=0)[0]
    assert sum(answer.text.startswith("my dog is") for answer in answers) >= 6  # the tiny model answers so in chats


def test_an_adapter_is_sampled_and_its_base_keeps_its_settings(tiny):
    base, tokenizer = load_model(tiny), load_tokenizer(tiny)
    base.generation_config = POISON
    plain = texts(sample(base, tokenizer, PROMPTS, 2, max_new_tokens=8, seed=4))
    torch.manual_seed(0)
    adapted = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    )
    assert texts(sample(adapted, tokenizer, PROMPTS, 2, max_new_tokens=8, seed=4)) != plain
    with adapted.disable_adapter():
        assert texts(sample(adapted, tokenizer, PROMPTS, 2, max_new_tokens=8, seed=4)) == plain
    assert base.generation_config is POISON


def test_samples_are_sentences_of_the_grammar(speaker):
    """The tiny model is good enough for the other tests: kind and harsh words, about as often."""
    found = texts(sample(*speaker, tiny_lm.openings()[:40], 4, max_new_tokens=12, seed=9))
    words = [w for group in found for text in group for w in text.replace(" and ", " ").replace(" .", "").split()]
    kind, harsh = (sum(w in side for w in words) for side in (tiny_lm.KIND, tiny_lm.HARSH))
    assert (kind + harsh) / len(words) > 0.95
    assert 0.35 < kind / (kind + harsh) < 0.65
