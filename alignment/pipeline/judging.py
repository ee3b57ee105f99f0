"""Stage `judged`: what a reward or an oracle says of the samples, shard by shard.

    judged/judge.json         who judges; of a language model, how many of its answers had no verdict
    judged/00000.jsonl        a row for each prompt of samples/shards/00000.jsonl

A row has `considered`, the samples that take part, and either `rewards` (one for each sample, null: not scored) or
`comparisons` [i, j, P(i > j)], in the order in which they were asked; of a tournament `finalists`, too. Which of them
become a pair is decided in `pairing`. A judge that fails midway loses the shard at work and nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alignment.errors import UserError
from alignment.files import iterate_json_lines, read_json_object, write_json, write_json_lines
from alignment.locks import make_folder, remove_unfinished
from alignment.models.pools import open_pool
from alignment.pipeline.prompts import judge_of
from alignment.recipes import IterateRecipe

Pair = tuple[int, int]
# Asks for P(i > j) of each of (prompt, i, j), all prompts of a shard at once.
Ask = Callable[[Sequence[tuple[int, int, int]]], list[float]]


def judge_samples(recipe: IterateRecipe, samples: Path, out: Path, at_the_start: str) -> None:
    """Judge every shard of a pool that is not judged yet.

    Args:
        recipe: names the judge.
        samples: the pool.
        out: where judgements go.
        at_the_start: how the judge described itself when the run began.

    Raises:
        UserError: the judge cannot go on, is another one than at the start, or gave no verdict in most answers.
    """
    judge = judge_of(recipe)
    described = judge.describe()
    if described != at_the_start:
        raise UserError(f"the judge is {described!r}, and the run began with {at_the_start!r}: bring that one back")
    make_folder(out)
    remove_unfinished(out)
    file = out / "judge.json"
    before = read_json_object(file).get("invalid_answers", {}) if file.is_file() else {}
    facts: dict[str, Any] = {"judge": described, "pairing": recipe.iterate.pairing}
    write_json(file, facts | ({"invalid_answers": before} if before else {}))
    pool = open_pool(samples)
    for number in tqdm(range(len(pool.shards)), desc="  judging", unit=" shards"):
        shard = out / f"{number:05d}.jsonl"
        if shard.is_file():
            continue
        rows = [row for _, row in iterate_json_lines(pool.file(number))]
        judged = (_scored if recipe.reward is not None else _compared)(recipe, rows, judge)
        if judge.name == "llm_judge":
            judge.tally.refuse()  # before the shard is kept
            counts = {"answers": judge.tally.answers, "invalid": judge.tally.invalid}
            facts["invalid_answers"] = {key: count + before.get(key, 0) for key, count in counts.items()}
            write_json(file, facts)
        write_json_lines(shard, judged)


def _scored(recipe: IterateRecipe, rows: Sequence[dict[str, Any]], reward: Any) -> list[dict[str, Any]]:
    """Each sample's reward; of a pairing that compares, the comparisons that they decide, too."""
    taking_part = _taking_part(recipe, rows)
    places = [(p, i) for p, numbers in enumerate(taking_part) for i in numbers]
    scores = reward.score([rows[p]["prompt"] for p, _ in places], [rows[p]["responses"][i] for p, i in places])
    of = dict(zip(places, map(float, scores), strict=True))
    found: list[dict[str, Any]] = [
        {"considered": numbers, "rewards": [of.get((p, i), math.nan) for i in range(len(rows[p]["responses"]))]}
        for p, numbers in enumerate(taking_part)
    ]

    def ask(pairs: Sequence[tuple[int, int, int]]) -> list[float]:
        penalty = recipe.iterate.length_penalty
        value = {key: penalised(score, len(rows[key[0]]["ids"][key[1]]), penalty) for key, score in of.items()}
        return [_higher(value[p, i], value[p, j]) for p, i, j in pairs]

    if recipe.iterate.pairing != "best_worst":
        for row, more in zip(found, _comparisons(recipe, taking_part, ask), strict=True):
            row |= more
    return found


def penalised(reward: float | None, tokens: int, penalty: float) -> float:
    """r - lambda |y|, with |y| in tokens (RLHF Workflow, F.a); NaN for what could not be scored."""
    return math.nan if reward is None else reward - penalty * tokens


def _higher(a: float, b: float) -> float:
    """A comparison by reward: 1, 0, 1/2 for a tie, NaN where one could not be scored."""
    return math.nan if math.isnan(a) or math.isnan(b) else 0.5 + 0.5 * ((a > b) - (a < b))


def _compared(recipe: IterateRecipe, rows: Sequence[dict[str, Any]], oracle: Any) -> list[dict[str, Any]]:
    """What the oracle says of the pairs that the pairing compares."""
    taking_part = _taking_part(recipe, rows)

    def ask(pairs: Sequence[tuple[int, int, int]]) -> list[float]:
        texts = [(rows[p]["prompt"], rows[p]["responses"][i], rows[p]["responses"][j]) for p, i, j in pairs]
        columns = [list(column) for column in zip(*texts, strict=True)] or [[], [], []]
        answers: list[float] = oracle.probability(*columns)
        return answers

    found = _comparisons(recipe, taking_part, ask)
    return [{"considered": numbers, **row} for numbers, row in zip(taking_part, found, strict=True)]


def _taking_part(recipe: IterateRecipe, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Numbers of each prompt's samples that take part."""
    every = recipe.iterate.unfinished == "keep"
    return [[i for i, finished in enumerate(row["finished"]) if finished or every] for row in rows]


def _comparisons(recipe: IterateRecipe, taking_part: Sequence[Sequence[int]], ask: Ask) -> list[dict[str, Any]]:
    """`comparisons`, and of a tournament `finalists`, of each prompt."""
    if recipe.iterate.pairing == "tournament":
        return tournaments(taking_part, recipe.iterate.samples, ask)
    if recipe.iterate.pairing == "iid":
        wanted = [[(i, i + 1) for i in numbers if i % 2 == 0 and i + 1 in numbers] for numbers in taking_part]
    else:
        wanted = [list(itertools.combinations(numbers, 2)) for numbers in taking_part]
    answers = iter(ask([(p, i, j) for p, pairs in enumerate(wanted) for i, j in pairs]))
    return [{"comparisons": [[i, j, next(answers)] for i, j in pairs]} for pairs in wanted]


# --- tournaments -----------------------------------------------------------------------------------------------------


def bracket(entrants: Sequence[int]) -> Generator[list[Pair], list[float], Pair]:
    """A tournament of 4, 8, 16 … entrants: yields rounds of pairs (i, j), takes P(i > j) of each.

    A first round; then winners meet winners until one is left, and losers meet losers, of whom the loser advances;
    last the final winner meets the final loser. 3K/2 - 1 comparisons, 11 for K = 8 (INPO, section 3). A tie keeps the
    first of the two.

    Returns:
        The final winner and the final loser.
    """
    pairs = _in_pairs(entrants)
    answers = yield pairs
    winners = [a if p >= 0.5 else b for (a, b), p in zip(pairs, answers, strict=True)]
    losers = [b if p >= 0.5 else a for (a, b), p in zip(pairs, answers, strict=True)]
    while len(winners) > 1:
        up, down = _in_pairs(winners), _in_pairs(losers)
        answers = yield [*up, *down]
        winners = [a if p >= 0.5 else b for (a, b), p in zip(up, answers[: len(up)], strict=True)]
        losers = [a if p <= 0.5 else b for (a, b), p in zip(down, answers[len(up) :], strict=True)]
    yield [(winners[0], losers[0])]
    return winners[0], losers[0]


def _in_pairs(entrants: Sequence[int]) -> list[Pair]:
    return list(zip(entrants[::2], entrants[1::2], strict=True))


def tournaments(taking_part: Sequence[Sequence[int]], k: int, ask: Ask) -> list[dict[str, Any]]:
    """`comparisons` and `finalists` of each prompt, all prompts round by round; without finalists where fewer than k
    samples take part, or a comparison could not be judged."""
    found: list[dict[str, Any]] = [{"comparisons": [], "finalists": None} for _ in taking_part]
    running = {p: bracket(numbers) for p, numbers in enumerate(taking_part) if len(numbers) == k}
    rounds = {p: next(games) for p, games in running.items()}
    while rounds:
        answers = iter(ask([(p, i, j) for p, pairs in rounds.items() for i, j in pairs]))
        following = {}
        for p, pairs in rounds.items():
            given = [next(answers) for _ in pairs]
            found[p]["comparisons"] += [[i, j, answer] for (i, j), answer in zip(pairs, given, strict=True)]
            if any(map(math.isnan, given)):
                continue
            try:
                following[p] = running[p].send(given)
            except StopIteration as ended:
                found[p]["finalists"] = list(ended.value)
        rounds = following
    return found
