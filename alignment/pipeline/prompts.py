"""Stage `prompts`: the prompts of every iteration, fresh ones each time, none lost and none asked twice."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment.data import overlap
from alignment.data.messages import TextRules
from alignment.data.pipeline import Prepared, write_rejected
from alignment.data.prompt_files import read_prompts as read_text_prompts
from alignment.data.prompts import prepare_prompts
from alignment.errors import UserError
from alignment.files import iterate_json_lines, read_json_object, write_json, write_json_lines
from alignment.models import load_tokenizer
from alignment.models.chat import pin_date
from alignment.recipes import IterateRecipe
from alignment.rewards import get_oracle, get_reward
from alignment.runs.lifecycle import tokenizer_arguments
from alignment.runs.opening import dated, refuse_unfit


def seed_of(seed: int, iteration: int, role: str) -> int:
    """A seed for one purpose of one iteration, unrelated to all others."""
    return int.from_bytes(hashlib.sha256(f"{role} {iteration} {seed}".encode()).digest()[:7], "big")


def shares(total: int, iterations: int, each: int | None = None) -> list[int]:
    """How many of `total` prompts each iteration gets: `each`, or as evenly as can be with none left over.

    Raises:
        ValueError: there are too few.
    """
    needed = iterations * (each or 1)
    if total < needed:
        raise ValueError(f"{total} prompts for {iterations} iterations of {each or 1} are {needed - total} too few")
    if each is not None:
        return [each] * iterations
    return [total // iterations + (t < total % iterations) for t in range(iterations)]


def write_prompts(recipe: IterateRecipe, out: Path) -> None:
    """OUT/prompts.jsonl: `iteration`, `prompt` and `prompt_ids` of every prompt, and what could not be used.

    Each source is shuffled by training.seed. One is shared out; of several each is an iteration's. The judge is made
    here, too: what is wrong with it is said before hours of sampling, and every iteration has the same.

    Raises:
        UserError: too few prompts, or some that the evaluation asks.
    """
    tokenizer = load_tokenizer(recipe.model.name_or_path, **tokenizer_arguments(recipe))
    pin_date(tokenizer)
    settings, sources = recipe.iterate, recipe.data.prompts
    found = [
        prepare_prompts(
            source.name,
            source.limit,
            tokenizer,
            longest=recipe.data.max_length - recipe.generation.max_new_tokens,
            answers=False,
            max_rejected_share=recipe.data.max_rejected_share,
            rules=TextRules.of(recipe.data),
        )
        for source in sources
    ]
    refuse_unfit(recipe, tokenizer, [p.dataset for p in found], new_tokens=recipe.generation.max_new_tokens)
    found = [_not_judged_on(recipe, prepared, str(s.name)) for prepared, s in zip(found, sources, strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    write_rejected(out, *found)
    for prepared in found:
        for line in prepared.summary():
            print(f"  {line}", flush=True)
    fresh = _fresh(found)
    rows = _shared_out(recipe, fresh)
    write_json_lines(out / "prompts.jsonl", rows)
    counts = Counter(row["iteration"] for row in rows)
    read, once = sum(len(prepared.dataset) for prepared in found), sum(map(len, fresh))
    facts = {"usable": read, "repeated": read - once, "not_asked": once - len(rows)}
    asked = {str(t): counts[t] for t in sorted(counts)}
    rest = {"iterations": asked, "judge": judge_of(recipe).describe(), **dated(tokenizer)}
    write_json(out / "counts.json", facts | rest)
    print(f"  {settings.iterations} iterations of {', '.join(map(str, asked.values()))}", flush=True)
    for name in ("repeated", "not_asked"):
        if facts[name]:
            print(f"  {facts[name]} prompts {name.replace('_', ' ')}", flush=True)


def _not_judged_on(recipe: IterateRecipe, found: Prepared, name: str) -> Prepared:
    """The prompts, apart from those that the evaluation asks."""
    asked = recipe.evaluation
    if asked is None or recipe.data.overlap == "allow":
        return found
    judged = overlap.judged_on(None, read_text_prompts(asked.prompts, asked.limit), asked.prompts)
    if recipe.data.overlap == "drop":
        return overlap.without(found, judged)
    overlap.refuse(found.dataset["prompt"], judged, name)
    return found


def _fresh(found: Sequence[Prepared]) -> list[list[dict[str, Any]]]:
    """The rows of each source; a prompt that stood before, there or in another source, is left out."""
    seen: set[str] = set()
    parts: list[list[dict[str, Any]]] = []
    for prepared in found:
        parts.append([])
        for row in prepared.dataset:
            key = overlap.prompt_hash(row["prompt"])
            if key not in seen:
                parts[-1].append(row)
            seen.add(key)
    return parts


def _shared_out(recipe: IterateRecipe, found: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    settings, order = recipe.iterate, random.Random(recipe.training.seed)
    for part in found:
        order.shuffle(part)
    try:
        if len(found) == 1:
            each = shares(len(found[0]), settings.iterations, settings.prompts_per_iteration)
            parts = [found[0][sum(each[:t]) : sum(each[: t + 1])] for t in range(settings.iterations)]
        else:
            limit = settings.prompts_per_iteration
            parts = [part[: shares(len(part), 1, limit)[0]] for part in found]
    except ValueError as error:
        names = ", ".join(str(source.name) for source in recipe.data.prompts)
        remedy = "lower iterate.prompts_per_iteration or iterate.iterations, or bring more"
        raise UserError(f"data.prompts: {names}: {error}; {remedy}") from None
    return [
        {"iteration": t, "prompt": row["prompt"], "prompt_ids": row["prompt_ids"]}
        for t, part in enumerate(parts, start=1)
        for row in part
    ]


def judge_of(recipe: IterateRecipe) -> Any:
    """The recipe's reward or oracle."""
    if recipe.reward is not None:
        return get_reward(recipe.reward.name, **recipe.reward.options)
    assert recipe.oracle is not None  # the recipe says so
    return get_oracle(recipe.oracle.name, **recipe.oracle.options)


def judge_at_the_start(run: Path) -> str:
    """How the judge described itself when the run began."""
    return str(read_json_object(run / "prompts" / "counts.json")["judge"])


def read_prompts(run: Path, iteration: int) -> list[dict[str, Any]]:
    """The rows of one iteration."""
    file = run / "prompts" / "prompts.jsonl"
    return [row for _, row in iterate_json_lines(file) if row["iteration"] == iteration]
