"""Log-probabilities from shared rows and from paired rows, against one plain forward pass per response."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from alignment.models import scoring
from alignment.models.scoring import build_rows, repaired, sequence_logps, why_not_shared

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": LlamaConfig(**SIZE, num_key_value_heads=2),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=128),
    "qwen2": Qwen2Config(**SIZE, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZE, **HEADS),
    "mistral window": MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=6),
    "gemma3 hybrid": Gemma3TextConfig(
        **SIZE, **HEADS, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
}


def make(name: str, attention: str = "sdpa"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention).eval()
    for parameter in model.parameters():  # larger weights than at initialisation: mistakes show
        parameter.data.mul_(3.0) if parameter.dim() > 1 else None
    return model


def pairs(n: int = 5, k: int = 2, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, 97, (length,), generator=generator).tolist()

    return [ids(2, 14) for _ in range(n)], [[ids(1, 11) for _ in range(k)] for _ in range(n)]


def plain(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log π(response | prompt) with nothing clever: one row, all logits, the definition of softmax."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
    first = max(len(prompt), 1)
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    text = prompt + response
    return torch.stack([probabilities[t - 1, text[t]].log() for t in range(first, len(text))]).sum()


def scored(model, prompts, responses, layout: str, pad: int = 0) -> torch.Tensor:
    rows = build_rows(prompts, responses, pad, layout)
    return sequence_logps(model, model.config, model.dtype, rows, len(responses[0]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_layouts_equal_one_plain_pass_per_response(name, attention):
    model = make(name, attention)
    prompts, responses = pairs(k=3)
    expected = torch.stack(
        [torch.stack([plain(model, p, r) for r in g]) for p, g in zip(prompts, responses, strict=True)]
    )
    for layout in ("shared_prefix", "paired"):
        found = scored(model, prompts, responses, layout)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)


def test_layouts_agree_to_a_relative_millionth_and_so_do_their_gradients():
    model = make("llama")
    prompts, responses = pairs(n=16)
    gradients = []
    sums = []
    for layout in ("shared_prefix", "paired"):
        model.zero_grad()
        found = scored(model, prompts, responses, layout)
        (found[:, 0] - 0.5 * found[:, 1]).sum().backward()
        sums.append(found.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert ((sums[0] - sums[1]).abs() / sums[1].abs()).max() < 1e-6
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-5


def test_padding_token_and_company_change_nothing():
    model = make("llama")
    prompts, responses = pairs()
    responses[0][0][-1] = 7  # the end token of a response is the pad token itself
    for layout in ("shared_prefix", "paired"):
        base = scored(model, prompts, responses, layout, pad=7)
        torch.testing.assert_close(scored(model, prompts, responses, layout, pad=0), base, rtol=0, atol=0)
        alone = torch.cat([scored(model, [p], [r], layout) for p, r in zip(prompts, responses, strict=True)])
        torch.testing.assert_close(alone, base, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", [[], [5]])
def test_prompts_of_no_and_of_one_token(prompt):
    """Without a prompt nothing precedes a response's first token: it is not scored, as in TRL."""
    model = make("llama")
    responses = [[[9, 8, 7, 6], [11, 12]]]
    expected = torch.stack([plain(model, prompt, r) for r in responses[0]])
    for layout in ("shared_prefix", "paired"):
        found = scored(model, [prompt], responses, layout)[0].double()
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


def test_repaired_rows_are_the_paired_rows():
    prompts, responses = pairs(k=3)
    prompts[0] = prompts[0][:1]
    shared, paired = (build_rows(prompts, responses, 0, layout) for layout in ("shared_prefix", "paired"))
    rebuilt = repaired(shared, 3, 0)
    for key in scoring.ROW_KEYS:
        assert torch.equal(rebuilt[key], paired[key])


def test_traps_are_visible(monkeypatch):
    """Each guard matters: without it the shared layout is off by far more than rounding."""
    model = make("mistral window")
    prompts, responses = pairs()
    right = scored(model, prompts, responses, "paired")

    def off() -> float:
        return float((scored(model, prompts, responses, "shared_prefix") - right).detach().abs().max())

    assert off() < 1e-4
    mask = scoring.branch_mask
    with monkeypatch.context() as patch:  # responses see each other
        patch.setattr(scoring, "branch_mask", lambda s, p, window=None: mask(s.clamp(max=1), p, window))
        assert off() > 0.05
    with monkeypatch.context() as patch:  # the sliding window is lost
        patch.setattr(scoring, "branch_mask", lambda s, p, window=None: mask(s, p, None))
        assert off() > 0.05
    row = scoring._row
    with monkeypatch.context() as patch:  # positions run on instead of restarting
        patch.setattr(scoring, "_row", lambda p, g: (lambda r: (r[0], list(range(len(r[0]))), r[2], r[3]))(row(p, g)))
        model.config.sliding_window = None
        assert off() > 0.05


def test_models_that_cannot_share_say_why():
    assert why_not_shared(CONFIGS["llama"]) is None
    assert "ALiBi" in (why_not_shared(make_config(BloomConfig(hidden_size=32, n_layer=1, n_head=4))) or "")
    flash = LlamaConfig(**SIZE)
    flash._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in (why_not_shared(flash) or "")
    chunked = LlamaConfig(**SIZE)
    chunked._attn_implementation = "sdpa"
    chunked.layer_types = ["chunked_attention", "full_attention"]
    assert "chunked_attention" in (why_not_shared(chunked) or "")


def make_config(config):
    config._attn_implementation = "sdpa"
    return config


def test_head_runs_on_scored_positions_only():
    """The widest response, not the prompt, decides how many positions the LM head computes."""
    model = make("llama")
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    scored(model, [[5] * 40, [6] * 30], [[[7] * 3, [8] * 2], [[9] * 2, [10] * 4]], "shared_prefix")
    assert seen == [6]
