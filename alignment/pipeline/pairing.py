"""Stage `pairs`: which judged samples become preferences, and a count of everything that does not.

    pairs/pairs.jsonl         rows of `alignment.data.preferences` with token ids, and where each came from
    pairs/counts.json         samples, pairs, and what was dropped; the mean judgement of all samples

Nothing is judged here: the same samples and judgements give the same pairs.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignment.data.sampled import log_odds_in_all_or_none, strengths, with_label_noise
from alignment.errors import UserError
from alignment.files import iterate_json_lines, read_json_object, write_json, write_json_lines
from alignment.pipeline.judging import penalised
from alignment.pipeline.prompts import seed_of
from alignment.recipes import IterateRecipe
from alignment.recipes.iterate import IterateSection

Columns = dict[str, float]  # of one response: reward, or preference and log_odds
Choice = tuple[int, int, Columns, Columns]  # chosen, rejected, and their columns
REASONS = ("short", "unjudged", "ties", "upset", "identical")


def choices(
    settings: IterateSection, row: dict[str, Any], judged: dict[str, Any], draw: Sequence[float], counts: Counter[str]
) -> Iterator[Choice]:
    """The pairs of one prompt.

    Args:
        row: of the pool: `ids`, `responses`, `finished`.
        judged: of `judging`.
        draw: numbers in [0, 1), one for each pair of an iid pairing, where labels are drawn.
        counts: what is dropped is counted here by reason.
    """
    if settings.pairing == "tournament":
        found = _of_tournament(settings, row, judged, counts)
    elif settings.pairing == "iid":
        found = _independent(settings, row, judged, draw, counts)
    else:
        found = _extremes(settings, row, judged, counts)
    for chosen, rejected, better, worse in found:
        if row["ids"][chosen] == row["ids"][rejected] or row["responses"][chosen] == row["responses"][rejected]:
            counts["identical"] += 1
            continue
        yield chosen, rejected, better, worse


def _columns(settings: IterateSection, row: dict[str, Any], judged: dict[str, Any]) -> dict[int, Columns]:
    """The reward (less the length penalty) of each sample that could be scored; nothing where an oracle judged."""
    if "rewards" not in judged:
        return {}
    values = {
        i: penalised(judged["rewards"][i], len(row["ids"][i]), settings.length_penalty) for i in judged["considered"]
    }
    return {i: {"reward": value} for i, value in values.items() if not math.isnan(value)}


def _extremes(
    settings: IterateSection, row: dict[str, Any], judged: dict[str, Any], counts: Counter[str]
) -> Iterator[Choice]:
    """The best against the worst: by reward, or by mean probability of winning; of equals the first and the last."""
    numbers = judged["considered"]
    if len(numbers) < 2:
        counts["short"] += 1
        return
    columns = _columns(settings, row, judged)
    values = {i: c["reward"] for i, c in columns.items()}
    if "comparisons" in judged:
        place = {i: n for n, i in enumerate(numbers)}
        asked = [(place[i], place[j], math.nan if p is None else p) for i, j, p in judged["comparisons"]]
        for i, strength in zip(numbers, strengths([row["responses"][i] for i in numbers], asked), strict=True):
            if not math.isnan(strength.win):
                values[i] = strength.win
                odds = {} if strength.log_odds is None else {"log_odds": strength.log_odds}
                columns[i] = {"preference": strength.preference, **odds}
    if len(values) < 2:
        counts["unjudged"] += 1
        return
    best, worst = max(values, key=values.__getitem__), min(reversed(values), key=values.__getitem__)
    if values[best] - values[worst] <= settings.min_gap:
        counts["ties"] += 1
        return
    yield best, worst, columns[best], columns[worst]


def _of_tournament(
    settings: IterateSection, row: dict[str, Any], judged: dict[str, Any], counts: Counter[str]
) -> Iterator[Choice]:
    """Winner and loser, if the winner really beats the loser when they meet."""
    if judged["finalists"] is None:
        counts["unjudged" if judged["comparisons"] else "short"] += 1
        return
    winner, loser = judged["finalists"]
    _, _, p = judged["comparisons"][-1]
    if p <= 0.5:
        counts["ties" if p == 0.5 else "upset"] += 1
        return
    columns = _columns(settings, row, judged)
    yield winner, loser, columns.get(winner, {}), columns.get(loser, {})


def _independent(
    settings: IterateSection, row: dict[str, Any], judged: dict[str, Any], draw: Sequence[float], counts: Counter[str]
) -> Iterator[Choice]:
    """Samples 1 and 2, 3 and 4, …; the label is the likelier one, or drawn with the probability."""
    columns = _columns(settings, row, judged)
    answers = {(i, j): p for i, j, p in judged["comparisons"]}
    for k in range(len(row["ids"]) // 2):
        i, j = 2 * k, 2 * k + 1
        if (i, j) not in answers:
            counts["short"] += 1
            continue
        p = answers[i, j]
        if p is None:
            counts["unjudged"] += 1
        elif settings.labels == "likelier" and p == 0.5:
            counts["ties"] += 1
        else:
            first = draw[k] < p if settings.labels == "drawn" else p > 0.5
            a, b = (i, j) if first else (j, i)
            yield a, b, columns.get(a, {}), columns.get(b, {})


def write_pairs(recipe: IterateRecipe, folder: Path, iteration: int, out: Path) -> None:
    """OUT/pairs.jsonl and OUT/counts.json from the samples and judgements of an iteration.

    Raises:
        UserError: no pair is left.
    """
    settings, seed = recipe.iterate, seed_of(recipe.generation.seed, iteration, "labels")
    counts: Counter[str] = Counter({"prompts": 0, "samples": 0, "unfinished": 0, **dict.fromkeys(REASONS, 0)})
    calibration, rows = _calibration(folder), []
    rewards: list[float] = []
    tokens = different = 0
    for number, (row, judged) in enumerate(_judged_rows(folder)):
        counts["prompts"] += 1
        counts["samples"] += len(row["ids"])
        counts["unfinished"] += len(row["ids"]) - sum(row["finished"])
        rewards += [reward for reward in judged.get("rewards", ()) if reward is not None]
        tokens += sum(map(len, row["ids"]))
        different += len(set(row["responses"]))
        draw = [_uniform(seed, number, k) for k in range(len(row["ids"]) // 2)]
        extra = {**(calibration[number] if calibration else {}), "iteration": iteration, "prompt_number": number}
        rows += [_pair(row, choice) | extra for choice in choices(settings, row, judged, draw, counts)]
    if not rows:
        raise UserError(f"iteration {iteration}: no pair is left of {dict(counts)}: {_remedy(counts)}")
    rows = log_odds_in_all_or_none(rows) if recipe.oracle is not None else rows
    rows, counts["flipped"] = with_label_noise(rows, settings.label_noise, seed)
    counts["pairs"] = len(rows)
    write_json_lines(out / "pairs.jsonl", _as_chats(rows))
    means = {"mean_tokens": tokens / counts["samples"], "different": different / counts["samples"]}
    means |= {"mean_reward": math.fsum(rewards) / len(rewards)} if rewards else {}
    write_json(out / "counts.json", {"iteration": iteration, **_who(folder), **counts, **means})
    print("  " + ", ".join(f"{count} {name}" for name, count in counts.items() if count), flush=True)


def _pair(row: dict[str, Any], choice: Choice) -> dict[str, Any]:
    """A row of preferences from a prompt's samples."""
    chosen, rejected, better, worse = choice
    return {
        "prompt": row["prompt"],
        "chosen": row["responses"][chosen],
        "rejected": row["responses"][rejected],
        "prompt_ids": row["prompt_ids"],
        "chosen_ids": row["ids"][chosen],
        "rejected_ids": row["ids"][rejected],
        **{f"{name}_chosen": value for name, value in better.items()},
        **{f"{name}_rejected": value for name, value in worse.items()},
        "sample_chosen": chosen,
        "sample_rejected": rejected,
    }


def _who(folder: Path) -> dict[str, Any]:
    """Who sampled and who judged."""
    pool = read_json_object(folder / "samples" / "manifest.json")
    sampler = {key: pool[key] for key in ("model", "model_sha256", "seed") if key in pool}
    return {"judge": read_json_object(folder / "judged" / "judge.json")["judge"], "sampler": sampler}


def _judged_rows(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for file in sorted((folder / "judged").glob("*.jsonl")):
        samples = iterate_json_lines(folder / "samples" / "shards" / file.name)
        for (_, row), (_, judged) in zip(samples, iterate_json_lines(file), strict=True):
            yield row, judged


def _calibration(folder: Path) -> list[dict[str, Any]]:
    """One response of the reference to each prompt, where they were drawn."""
    files = sorted((folder / "calibration" / "shards").glob("*.jsonl"))
    rows = [row for file in files for _, row in iterate_json_lines(file)]
    return [{"calibration": row["responses"][0], "calibration_ids": row["ids"][0]} for row in rows]


def _uniform(seed: int, prompt: int, pair: int) -> float:
    """In [0, 1), the same for the same pair however the work is split."""
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt} {pair}".encode()).digest()[:6], "big") / 2**48


def _as_chats(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """To a prompt of messages belong answers of messages."""
    if isinstance(rows[0]["prompt"], str):
        return rows
    answers = ("chosen", "rejected", "calibration")
    return [row | {a: [{"role": "assistant", "content": row[a]}] for a in answers if a in row} for row in rows]


def _remedy(counts: Counter[str]) -> str:
    if counts["short"] and counts["unfinished"]:
        return "raise generation.max_new_tokens, or set iterate.unfinished: keep"
    if counts["identical"] or counts["ties"]:
        return "raise iterate.samples, or look whether the judge tells the responses apart"
    return "look whether the judge can score these responses"
