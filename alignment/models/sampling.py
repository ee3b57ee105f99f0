"""Text from a model: n continuations per prompt, as token ids that are never decoded and encoded again.

Not a server and not the on-policy trainer's path. Used by the self-sampled preferences and by the win rate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Sample:
    """One continuation: its token ids (with the end token where the model gave it), its text, whether it ended."""

    ids: list[int]
    text: str
    finished: bool


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: text as it stands, messages through the chat template with the generation prompt."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt).input_ids)
    encoded: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}


def _cut(row: list[int], ends: set[int]) -> tuple[list[int], bool]:
    """A generated row up to and including its first end token: found by position, since pad may equal the end."""
    for position, token in enumerate(row):
        if token in ends:
            return row[: position + 1], True
    return row, False


@contextlib.contextmanager
def _own_defaults_only(model: PreTrainedModel) -> Iterator[None]:
    """`generate` fills what a caller leaves open from the file that came with the model (repetition penalty, min-p,
    beams …); samples of the model itself need that file out of the way."""
    from accelerate.utils import is_peft_model
    from transformers import GenerationConfig

    inner: Any = model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]
    shipped, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = shipped


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    n: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int = 64,
    seed: int = 0,
    progress: str | None = None,
) -> list[list[Sample]]:
    """Draw n continuations per prompt from the model as it is (temperature 1, untruncated, unless said otherwise).

    Args:
        model: a causal language model; its mode is restored afterwards.
        prompts: texts, or chat messages.
        n: continuations per prompt.
        max_new_tokens: tokens; a continuation that has not ended by then is cut (`finished` is False).
        temperature: 0 means greedy.
        top_p, top_k: nucleus and top-k truncation; 1.0 and 0 mean none.
        batch_size: rows per forward pass; more is faster until memory is full. Part of what a seed means.
        seed: of these draws alone: the global generator is left as it was.
        progress: label of a progress bar; None shows none.

    Returns:
        One list of n samples per prompt, in the order of `prompts`.
    """
    from tqdm import tqdm
    from transformers import GenerationConfig

    encoded = [prompt_ids(tokenizer, p) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (len(encoded[i]), i))  # like lengths together: little padding
    per_batch = max(1, batch_size // n)
    ends = _end_ids(model, tokenizer)
    greedy = temperature == 0
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        num_return_sequences=n,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends),
        **({} if greedy else {"temperature": temperature, "top_p": top_p, "top_k": top_k}),
    )
    found: list[list[Sample]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    bar = tqdm(total=len(prompts), desc=progress, disable=not progress)
    with torch.random.fork_rng(devices=devices), _own_defaults_only(model), bar:
        torch.manual_seed(seed)
        for start in range(0, len(order), per_batch):
            batch = order[start : start + per_batch]
            rows = tokenizer.pad(
                {"input_ids": [encoded[i] for i in batch]}, padding=True, padding_side="left", return_tensors="pt"
            ).to(model.device)
            generate: Any = model.generate
            generated = generate(**rows, generation_config=config)[:, rows["input_ids"].size(1) :].tolist()
            for position, row in enumerate(generated):
                ids, finished = _cut(row, ends)
                text = str(tokenizer.decode(ids, skip_special_tokens=True))
                found[batch[position // n]].append(Sample(ids, text, finished))
            bar.update(len(batch))
    model.train(was_training)
    return found
