"""Pools on disk: N samples of each of Q prompts, and what judges say of them. No estimator here (`best_of_n`).

    POOL/manifest.json            every setting that decides the samples
    POOL/shards/00000.jsonl       a block of prompts, a row each: prompt, token ids, texts, whether they ended
    POOL/scores/KEY/              scores of one reward: reward.json says of which, 00000.jsonl has those of shard 0

A shard is drawn from seeds of its own and is written whole or not at all, so that a run that was killed goes on where
it stopped and ends with the same files (on the same kind of device, with the same versions). Scores likewise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment.errors import UserError
from alignment.files import iterate_json_lines, read_json_object, write_json, write_json_lines
from alignment.rewards.base import Prompt
from evaluation.plans import Generation, ModelSource, load_source_tokenizer, say

FORMAT = 1
SAMPLES_PER_SHARD = 4096

Score = Callable[[Sequence[Prompt], Sequence[str]], Any]


@dataclass(frozen=True)
class Pool:
    """A pool's folder and manifest."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def prompts(self) -> int:
        """Q."""
        return int(self.manifest["prompts"])

    @property
    def n(self) -> int:
        """Samples per prompt."""
        return int(self.manifest["n"])

    @property
    def shards(self) -> list[range]:
        """The numbers of the prompts in each shard."""
        step = int(self.manifest["prompts_per_shard"])
        return [range(start, min(start + step, self.prompts)) for start in range(0, self.prompts, step)]

    def file(self, shard: int) -> Path:
        return self.folder / "shards" / f"{shard:05d}.jsonl"

    def read(self, shard: int) -> tuple[list[Prompt], list[list[str]]]:
        """Prompts of a shard, as they were given to the model, and their n responses each.

        Raises:
            UserError: the file is not what sampling writes.
        """
        found = list(iterate_json_lines(self.file(shard)))
        for where, row in found:
            lengths = {name: len(row.get(name) or ()) for name in ("ids", "responses", "finished")}
            if set(lengths.values()) != {self.n} or not isinstance(row.get("prompt"), str):
                raise UserError(
                    f"{where}: {self.n} samples are needed, got {lengths}; delete the file and sample again"
                )
        if len(found) != len(self.shards[shard]):
            raise UserError(
                f"{self.file(shard)}: {len(found)} prompts instead of {len(self.shards[shard])}; delete the file and "
                "sample again"
            )
        return [self.given(row["prompt"]) for _, row in found], [row["responses"] for _, row in found]

    def given(self, text: str) -> Prompt:
        """A prompt as the model is given it: the text, or with `chat` what a user says."""
        return [{"role": "user", "content": text}] if self.manifest["chat"] else text


def open_pool(folder: Path) -> Pool:
    """A complete pool.

    Raises:
        UserError: no pool, or samples are missing.
    """
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise UserError(f"{folder}: no manifest.json there; `best_of_n.py sample … --pool {folder}` makes a pool")
    pool = Pool(folder, read_json_object(manifest))
    if pool.manifest.get("format") != FORMAT:
        raise UserError(f"{manifest}: format {pool.manifest.get('format')!r}, not {FORMAT}: sample into a new folder")
    missing = [number for number in range(len(pool.shards)) if not pool.file(number).is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(pool.shards)} shards are missing; run the same `sample` command again"
        )
    return pool


def sample_pool(
    source: ModelSource,
    prompts: Sequence[str],
    folder: Path,
    n: int,
    *,
    generation: Generation | None = None,
    seed: int = 1,
    chat: bool = False,
    prompts_per_shard: int | None = None,
) -> Pool:
    """Draw n samples of each prompt into a folder, or finish what an earlier call began.

    Args:
        source: the model, as `evaluation.plans` loads it.
        prompts: texts; with `chat`, what a user says.
        folder: of the pool.
        n: samples per prompt.
        generation: how they are drawn; at most `batch_size` at once.
        seed: every shard's seeds derive from it.
        chat: prompts go through the chat template.
        prompts_per_shard: None: as many as make 4,096 samples.

    Raises:
        UserError: greedy sampling, a folder with something else in it, other settings than the pool's, or another
            process at work on it.
    """
    import torch

    from alignment.models import load_model
    from alignment.trainers.frozen import model_digest

    generation = generation or Generation()
    if generation.temperature <= 0:
        raise UserError("temperature: must be above 0 for a pool; greedy samples of a prompt are all the same")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    manifest = {
        "format": FORMAT,
        "model": source.name,
        **{key: value for key, value in source.load.items() if key != "name_or_path"},
        "prompts": len(prompts),
        "prompts_sha256": _sha256(list(prompts)),
        "n": n,
        "chat": chat,
        **asdict(generation),
        "seed": seed,
        "prompts_per_shard": prompts_per_shard or max(1, SAMPLES_PER_SHARD // n),
        "device": device,
    }
    _refuse_changes(folder, manifest)  # what can be said without the weights is said first
    tokenizer = load_source_tokenizer(source, chat)
    model: Any = load_model(**source.load)
    if device == "cuda":
        model.cuda()
    manifest["model_sha256"] = model_digest(model)  # the name alone does not say which weights it stands for
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _refuse_changes(folder, manifest)
        pool = Pool(folder, manifest)
        write_json(folder / "manifest.json", manifest)
        for part in (folder, folder / "shards"):
            _remove_unfinished(part)
        _draw(pool, model, tokenizer, prompts, generation)
    return open_pool(folder)


def _draw(pool: Pool, model: Any, tokenizer: Any, prompts: Sequence[str], generation: Generation) -> None:
    """Write the shards that are not there yet."""
    from tqdm import tqdm

    from alignment.models.sampling import Sample, sample

    done = sum(len(block) for number, block in enumerate(pool.shards) if pool.file(number).is_file()) * pool.n
    with tqdm(total=pool.prompts * pool.n, initial=done, desc="sampling", unit=" samples") as bar:
        for number, block in enumerate(pool.shards):
            if pool.file(number).is_file():
                continue
            given = [pool.given(prompts[i]) for i in block]
            drawn: list[list[Sample]] = [[] for _ in block]
            for start in range(0, pool.n, generation.batch_size):  # `sample` draws all of a prompt's at once
                size = min(generation.batch_size, pool.n - start)
                seed = _seed(int(pool.manifest["seed"]), number, start)
                more = sample(model, tokenizer, given, size, **asdict(generation), seed=seed)
                drawn = [mine + new for mine, new in zip(drawn, more, strict=True)]
                bar.update(size * len(block))
            rows = [
                {
                    "prompt": prompts[i],
                    "ids": [s.ids for s in samples],
                    "responses": [s.text for s in samples],
                    "finished": [s.finished for s in samples],
                }
                for i, samples in zip(block, drawn, strict=True)
            ]
            write_json_lines(pool.file(number), rows)


def _seed(seed: int, shard: int, start: int) -> int:
    """A seed for one call of `sample`: different and unrelated for every part of the pool."""
    return int(np.random.SeedSequence([seed, shard, start]).generate_state(1, np.uint64)[0] >> np.uint64(1))


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

    named = {**identity, "pool_sha256": _sha256(dict(pool.manifest))}
    folder = pool.folder / "scores" / _sha256(named)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _remove_unfinished(folder)
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


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _refuse_changes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """UserError where the folder holds a pool of other settings, or something that is no pool."""
    file = folder / "manifest.json"
    if not file.is_file():
        if folder.exists() and (not folder.is_dir() or any(p.suffix != ".tmp" for p in folder.iterdir())):
            raise UserError(f"{folder}: exists and is not a pool; give a new folder")
        return
    stored = read_json_object(file)
    for key in manifest:
        if stored.get(key) != manifest[key]:
            raise UserError(
                f"{file}: {key} is {stored.get(key)!r} there and {manifest[key]!r} now; a pool has one setting: give "
                "the same again, or a new folder"
            )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process is writing there; wait for it") from None
    else:
        yield
    finally:
        os.close(handle)


def _remove_unfinished(folder: Path) -> None:
    """What a killed process was writing; nobody else writes here now."""
    leftovers = list(folder.glob(".*.tmp"))
    for file in leftovers:
        file.unlink()
    if leftovers:
        say(f"{folder}: removed {len(leftovers)} unfinished file{'' if len(leftovers) == 1 else 's'}")
