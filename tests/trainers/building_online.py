"""What the tests of on-policy training share: judges, a trainer on the tiny model, samples as a run records them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import RLOOConfig

from alignment.models import load_model, load_tokenizer
from alignment.objectives import get_objective
from alignment.trainers.online import OnlinePreferenceTrainer, Rollouts
from alignment.trainers.rollout import PromptOrder, Record, append_rollout
from tests import tiny_lm
from tests.trainers.building import arguments

OPENINGS = tiny_lm.openings()[:8]
KIND = set(tiny_lm.KIND)
VPO = {"mode": "online", "calibration": "given", "beta": 0.1, "alpha": 1e-3}


class Kindness:
    """Kind words of a response; NaN for the prompts in `silent`."""

    name = "kindness"

    def __init__(self, *silent: str):
        self.silent = silent

    def score(self, prompts, responses):
        return [
            math.nan if prompt in self.silent else float(len([w for w in response.split() if w in KIND]))
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def describe(self):
        return "kind words"


class Length(Kindness):
    """Characters of a response, in tens."""

    name = "length in tens"

    def score(self, prompts, responses):
        told = super().score(prompts, responses)
        return [len(said) / 10 + 0 * kind for said, kind in zip(responses, told, strict=True)]


class Preference:
    """A logistic preference for kind words."""

    name = "preference"

    def probability(self, prompts, first, second):
        one, two = (Kindness().score(prompts, side) for side in (first, second))
        return [1 / (1 + math.exp(b - a)) for a, b in zip(one, two, strict=True)]

    def describe(self):
        return "kind words, compared"


def settings(folder: Path, **more: Any) -> RLOOConfig:
    given = arguments(folder, gradient_accumulation_steps=1, num_generations=2, max_completion_length=8)
    given |= {"max_steps": 1, "learning_rate": 1e-3} | more
    return RLOOConfig(**given, generation_batch_size=2 * given["per_device_train_batch_size"])


def online(
    tiny: Path, folder: Path, objective: str, how: dict[str, Any] | None = None, given: Any = None, **more: Any
) -> OnlinePreferenceTrainer:
    """A trainer on the tiny model; `how` makes `Rollouts`, `given` the objective, `args` the arguments."""
    kind = more.pop("kind", OnlinePreferenceTrainer)
    tokenizer, args = load_tokenizer(str(tiny)), more.pop("args", {})
    rows = more.pop("rows", None) or [{"prompt": opening} for opening in OPENINGS]
    rows = [row | {"prompt_ids": tokenizer(row["prompt"]).input_ids} for row in rows]
    model = more.pop("model", None)
    model = load_model(str(tiny)) if model is None else model
    folder.mkdir(exist_ok=True)
    how = {"per_rollout": 4} | (how or {})
    built = get_objective(objective, **(given or {}))
    return kind(model, built, settings(folder, **args), Dataset.from_list(rows), tokenizer, Rollouts(**how), **more)


def scrambled(tiny: Path, size: float = 0.1):
    """The tiny model with noise on its weights: it babbles."""
    model, generator = load_model(str(tiny)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def token_logps(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log π of every token of a response: one unpadded row, differentiable, in float64 from the logits on."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
    steps = range(len(prompt), len(prompt) + len(response))
    text = prompt + response
    return torch.stack([logits[t - 1, text[t]] - torch.logsumexp(logits[t - 1], 0) for t in steps])


def says(tokenizer, row: int, texts: list[str], opponent: str | None = None) -> Record:
    """A recorded prompt: these texts as token ids, each with its end token."""

    def ids(text: str) -> list[int]:
        return [*tokenizer(text).input_ids, tokenizer.eos_token_id]

    prompt = tokenizer.decode(tokenizer(OPENINGS[row]).input_ids)
    record = Record(row, [ids(t) for t in texts], texts, [True] * len(texts), prompt)
    if opponent is not None:
        record.opponent, record.opponent_text = ids(opponent), opponent
    return record


def text(seed: int) -> str:
    """A continuation of the grammar."""
    words = [*tiny_lm.KIND, *tiny_lm.HARSH]
    return " " + " and ".join(words[(seed * 7 + j * 3) % 10] for j in range(1 + seed % 3)) + " ."


def record(tokenizer, file: Path, rollouts: int, phases: dict[int, int], per_rollout: int = 4) -> Path:
    """A file of samples for `rollouts` rollouts; phase → which texts (the same number, the same texts)."""
    order = PromptOrder(len(OPENINGS), per_rollout, per_rollout, 1, 42)
    for rollout in range(rollouts):
        for phase, which in phases.items():
            seeds = [1000 * which + 31 * rollout + 5 * i for i in range(per_rollout)]
            rows = order.rows(rollout)
            told = [
                says(tokenizer, row, [text(s), text(s + 1)], text(s + 2)) for row, s in zip(rows, seeds, strict=True)
            ]
            append_rollout(file, rollout, phase, told)
    return file
