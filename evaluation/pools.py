"""What judges say of a pool's samples, on disk beside them; and a pool of a `ModelSource`. No estimator (`best_of_n`).

    POOL/                         prompts and samples: `alignment.models.pools`
    POOL/scores/KEY/              scores of one reward: reward.json says of which, 00000.jsonl has those of shard 0

A shard's scores are written whole or not at all, so that a scoring that was killed goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment.data.prompt_files import refuse_unrendered
from alignment.errors import UserError
from alignment.files import iterate_json_lines, json_digest, write_json, write_json_lines
from alignment.locks import alone, remove_unfinished
from alignment.models.pools import Pool, open_pool, sample_pool
from alignment.models.sampling import Generation
from alignment.processes import connect
from alignment.rewards.base import Prompt
from evaluation.plans import ModelSource, load_tokenizer_of

__all__ = ["Pool", "identity_of", "open_pool", "sample_source", "stored_scores"]

Score = Callable[[Sequence[Prompt], Sequence[str]], Any]


def sample_source(
    source: ModelSource,
    prompts: Sequence[Prompt],
    folder: Path,
    n: int,
    *,
    generation: Generation | None = None,
    seed: int = 1,
    chat: bool = False,
    prompts_per_shard: int | None = None,
) -> Pool:
    """`sample_pool` of a model as `evaluation.plans` loads it.

    Args:
        source: the model.
        prompts: texts or messages; with `chat`, texts are what a user says.
        folder, n, generation, seed, prompts_per_shard: as of `alignment.models.pools.sample_pool`.
        chat: prompts go through the chat template.

    Raises:
        UserError: as of `sample_pool`; or a tokenizer without a chat template, with `chat`.
    """
    tokenizer = load_tokenizer_of(source, chat)
    given = [[{"role": "user", "content": p}] if chat and isinstance(p, str) else p for p in prompts]
    refuse_unrendered([(prompt, f"prompt {number}") for number, prompt in enumerate(given, start=1)], tokenizer)
    connect()
    return sample_pool(
        source.load,
        tokenizer,
        given,
        folder,
        n,
        generation=generation or Generation(),
        seed=seed,
        name=source.name,
        prompts_per_shard=prompts_per_shard,
    )


def stored_scores(pool: Pool, identity: Mapping[str, Any], score: Score, progress: str) -> NDArray[np.float64]:
    """`[k, Q, N]` scores of all samples; what has been scored before is read back.

    Each different response to a prompt is scored once, so that equal responses have equal scores.

    Args:
        pool: a complete one.
        identity: everything that decides the scores; other scores are stored under another key.
        score: `(prompts, responses)` → `[n]` or `[k, n]`, NaN for what could not be scored.
        progress: label of the progress bar.

    Raises:
        UserError: a stored file is not what this writes, or another process is at work on it.
    """
    from tqdm import tqdm

    named = {**identity, "pool_sha256": json_digest(dict(pool.manifest))}
    folder = pool.folder / "scores" / json_digest(named)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        remove_unfinished(folder)
        write_json(folder / "reward.json", named)
        total, tables = pool.prompts * pool.n, []
        with tqdm(total=total, desc=progress, unit=" responses") as bar:
            for number, block in enumerate(pool.shards):
                file = folder / f"{number:05d}.jsonl"
                if not file.is_file():
                    table = _score_shard(pool, number, score)
                    write_json_lines(file, [{"scores": rows} for rows in table.transpose(1, 0, 2).tolist()])
                tables.append(_read_scores(file, len(block), pool.n))
                bar.update(len(block) * pool.n)
    return np.concatenate(tables, axis=1)


def _score_shard(pool: Pool, number: int, score: Score) -> NDArray[np.float64]:
    """`[k, prompts of the shard, n]`."""
    prompts, responses = pool.read(number)
    unique = [(i, text) for i, texts in enumerate(responses) for text in dict.fromkeys(texts)]
    place = {pair: column for column, pair in enumerate(unique)}
    found = np.atleast_2d(np.asarray(score([prompts[i] for i, _ in unique], [t for _, t in unique]), dtype=np.float64))
    columns = np.array([[place[i, text] for text in texts] for i, texts in enumerate(responses)])
    table: NDArray[np.float64] = found[:, columns]
    return table


def _read_scores(file: Path, prompts: int, n: int) -> NDArray[np.float64]:
    rows = [row.get("scores") for _, row in iterate_json_lines(file)]
    try:
        table = np.array(rows, dtype=np.float64)  # null, which stands for NaN in JSON, becomes NaN
    except (TypeError, ValueError):
        table = np.empty(0)
    if table.ndim != 3 or (table.shape[0], table.shape[2]) != (prompts, n):
        raise UserError(f"{file}: {prompts} rows of {n} scores per member are needed; delete the file and score again")
    return table.transpose(1, 0, 2)


def identity_of(reward: Any) -> dict[str, Any]:
    """Everything that decides a reward's scores: its keys, and its description, which says which version judges."""
    keys = {field.name: getattr(reward, field.name) for field in dataclasses.fields(reward) if field.init}
    keys.pop("batch_size", None)  # scores do not depend on it
    return {"reward": reward.name, "description": reward.describe(), "keys": keys}
