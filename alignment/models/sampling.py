"""Text from a model: n continuations per prompt, as token ids that are never decoded and encoded again.

Not a server, not the on-policy trainer's path, and nothing on disk (`pools`). Used by pools, by the self-sampled
preferences and by the win rate. Importing it imports nothing heavy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignment.errors import UserError
from alignment.models.chat import chat_ids
from alignment.models.ends import ends_of
from alignment.models.limits import limits_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Generation:
    """How responses are drawn; the meaning of each is `sample`'s.

    1024 new tokens lie between MT-Bench's (512, later 1024: FastChat's gen_model_answer.py) and AlpacaEval's 2048
    (its configurations of local models, such as zephyr-7b-beta).
    """

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 64

    @property
    def greedy(self) -> str:
        """The setting that makes all samples of a prompt the same; empty where none does."""
        keys = {"temperature": self.temperature == 0, "top_p": self.top_p == 0, "top_k": self.top_k == 1}
        return next((f"{key}: {getattr(self, key):g}" for key, same in keys.items() if same), "")


@dataclass(frozen=True)
class Sample:
    """One continuation: its token ids (with the end token where the model gave it), its text, whether it ended."""

    ids: list[int]
    text: str
    finished: bool


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt | Sequence[int]) -> list[int]:
    """Token ids of a prompt: text as it stands, messages through the chat template with the generation prompt.

    Token ids are returned as they are.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt).input_ids)
    given: Any = prompt
    if given and isinstance(given[0], int):
        return list(given)
    return list(chat_ids(tokenizer, [given], generation=True)[0])


def _cut(row: list[int], ends: set[int]) -> tuple[list[int], bool]:
    """A generated row up to and including its first end token: found by position, since pad may equal the end."""
    for position, token in enumerate(row):
        if token in ends:
            return row[: position + 1], True
    return row, False


@contextlib.contextmanager
def own_defaults_only(model: PreTrainedModel) -> Iterator[None]:
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


def _shared_prompts(model: PreTrainedModel, rows: dict[str, torch.Tensor], n: int, pad: int) -> Any | None:
    """The key-value cache of all but the last token of each prompt, computed once per prompt and repeated n times.

    `generate` itself computes it, so that masks and positions are its own. A prompt's last token stays out: it gives
    the first token's logits.

    Args:
        rows: `input_ids` and `attention_mask`, `[prompts, tokens]`, padded on the left.

    Returns:
        A cache of `n * prompts` rows; None where this model's is not plain keys and values (sliding windows, states).
    """
    from transformers import GenerationConfig
    from transformers.cache_utils import DynamicCache, DynamicLayer

    config = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=pad, return_dict_in_generate=True)
    generate: Any = model.generate
    cache = generate(**rows, generation_config=config).past_key_values
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.crop(-1)
    cache.batch_repeat_interleave(n)
    return cache


class _Sampler:
    """Continues padded prompts n times each, with one pass over each prompt where the model's cache allows it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int, **settings: Any) -> None:
        from transformers import GenerationConfig

        from alignment.models.finite import FiniteScores

        self.scores = FiniteScores()
        self.model, self.tokenizer, self.n = model, tokenizer, n
        self.ends = set(ends_of(tokenizer, model.generation_config).ids)
        self.pad: Any = tokenizer.pad_token_id
        self.config = GenerationConfig(pad_token_id=self.pad, eos_token_id=sorted(self.ends), **settings)
        self.share = n > 1

    def draw(self, prompts: list[list[int]]) -> list[list[Sample]]:
        """n samples of each prompt (token ids), drawn with the global generator.

        Raises:
            UserError: the model's scores behind a prompt are not finite.
        """
        padded = self.tokenizer.pad({"input_ids": prompts}, padding=True, padding_side="left", return_tensors="pt")
        rows = {name: padded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        cache = None
        if self.share and rows["input_ids"].size(1) > 1:  # a single token is all last token
            cache = _shared_prompts(self.model, rows, self.n, self.pad)
            self.share = cache is not None  # asked of a model once
        repeated = {name: value.repeat_interleave(self.n, dim=0) for name, value in rows.items()}
        generate: Any = self.model.generate
        generated = generate(
            **repeated, past_key_values=cache, generation_config=self.config, logits_processor=[self.scores]
        )
        if bad := self.scores.take():
            prompt = str(self.tokenizer.decode(prompts[bad[0] // self.n]))
            name = self.model.config._name_or_path or "the model"
            raise UserError(
                f"{name}: its next-token scores behind the prompt {prompt[-60:]!r} are not finite: its weights are "
                "damaged, or its dtype is too coarse (try float32)"
            )
        found = [self._sample(row) for row in generated[:, rows["input_ids"].size(1) :].tolist()]
        return [found[i : i + self.n] for i in range(0, len(found), self.n)]

    def _sample(self, row: list[int]) -> Sample:
        ids, finished = _cut(row, self.ends)
        return Sample(ids, str(self.tokenizer.decode(ids, skip_special_tokens=True)), finished)


def _refuse_long(model: PreTrainedModel, prompt: int, new: int) -> None:
    """UserError where learned positions end before the longest continuation."""
    limits = limits_of(model)
    if limits.learned and limits.positions is not None and prompt + new > limits.positions:
        raise UserError(
            f"the model has {limits.positions} positions: a prompt of {prompt} tokens and max_new_tokens {new} are "
            f"{prompt + new}; set max_new_tokens to {max(1, limits.positions - prompt)} or less"
        )


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt | Sequence[int]],
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
        prompts: texts, chat messages, or token ids.
        n: continuations per prompt.
        max_new_tokens: tokens; a continuation that has not ended by then is cut (`finished` is False).
        temperature: 0 means greedy: one continuation is computed and stands n times, since all would be the same.
        top_p, top_k: nucleus and top-k truncation; 1.0 and 0 mean none.
        batch_size: rows per forward pass; more is faster until memory is full. Part of what a seed means.
        seed: of these draws alone: the global generator is left as it was.
        progress: label of a progress bar; None shows none.

    Returns:
        One list of n samples per prompt, in the order of `prompts`.

    Raises:
        UserError: the model's learned positions end before a continuation does.
    """
    import torch
    from tqdm import tqdm

    greedy = temperature == 0
    draws = 1 if greedy else n
    settings = {} if greedy else {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampler = _Sampler(model, tokenizer, draws, max_new_tokens=max_new_tokens, do_sample=not greedy, **settings)
    encoded = [prompt_ids(tokenizer, p) for p in prompts]
    _refuse_long(model, max(map(len, encoded), default=0), max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: (len(encoded[i]), i))  # like lengths together: little padding
    per_batch = max(1, batch_size // draws)
    found: list[list[Sample]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    bar = tqdm(total=len(prompts), desc=progress, disable=not progress)
    with torch.no_grad(), torch.random.fork_rng(devices=devices), own_defaults_only(model), bar:
        torch.manual_seed(seed)
        for start in range(0, len(order), per_batch):
            batch = order[start : start + per_batch]
            for i, samples in zip(batch, sampler.draw([encoded[i] for i in batch]), strict=True):
                found[i] = samples * (n // draws)
            bar.update(len(batch))
    model.train(was_training)
    return found
