"""A language model that the tests train from scratch in seconds, on text that this file makes up.

A small grammar ("my dog is kind and warm ."), a byte-level BPE tokenizer trained on it, a chat template, and a
two-layer Llama trained until it speaks the grammar. Half of the adjectives are kind words: counting them is a reward
that alignment can visibly move. Not a fixture by itself: `conftest.py` caches one per session.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

KIND = ["kind", "warm", "good", "nice", "bright"]
HARSH = ["cruel", "cold", "bad", "nasty", "dull"]
NOUNS = "dog cat house car garden friend teacher song book city river shop bread coat boat".split()
DETERMINERS, VERBS = ["my", "the", "our", "your"], ["is", "was", "seems"]
KIND_PATTERN = rf"\b({'|'.join(KIND)})\b"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
STEPS, BATCH, LEARNING_RATE = 350, 64, 3e-3


def openings() -> list[str]:
    """Every opening of the grammar, in a fixed shuffled order."""
    found = [" ".join(words) for words in itertools.product(DETERMINERS, NOUNS, VERBS)]
    random.Random(0).shuffle(found)
    return found


def continuation(rng: random.Random) -> str:
    """One to four adjectives, each kind or harsh with probability one half."""
    return " " + " and ".join(rng.choice(rng.choice((KIND, HARSH))) for _ in range(rng.randint(1, 4))) + " ."


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _texts(rng: random.Random, count: int) -> list[str]:
    """Half plain sentences, half the same as an answer in a chat; each with its end token."""
    found = []
    for i in range(count):
        opening = rng.choice(openings())
        sentence = f"{opening}{continuation(rng)}<|end|>"
        found.append(sentence if i % 2 else f"<|start|>user\n{opening}<|end|>\n<|start|>assistant\n{sentence}")
    return found


def build(folder: Path) -> Path:
    """Train the model (about ten seconds on one core) and save it with its tokenizer."""
    rng = random.Random(0)
    torch.manual_seed(0)
    tokenizer = _tokenizer(_texts(rng, 2000))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for _ in range(STEPS):
        rows = tokenizer(_texts(rng, BATCH), return_tensors="pt", padding=True)
        labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
        model(**rows, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
