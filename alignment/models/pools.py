"""Pools on disk: n samples of each of Q prompts, drawn by one process or by all of a launch. No judging here.

    POOL/manifest.json            every setting that decides the samples
    POOL/shards/00000.jsonl       a block of prompts, a row each: `prompt` (text or messages, as the model was given
                                  it), `prompt_ids`, `ids`, `responses`, `finished` (False: cut at the token limit)

A shard is drawn from seeds of its own and is written whole or not at all. A run that was killed goes on where it
stopped and ends with the same files, and so does a run of another number of processes (on the same kind of device,
with the same versions and, on CPUs, threads). How samples are drawn is a backend's business (`backends`).
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alignment.errors import UserError
from alignment.files import iterate_json_lines, json_digest, read_json_object, write_json, write_json_lines
from alignment.locks import alone, is_leftover, make_folder, remove_unfinished
from alignment.models.backends import Backend, TransformersBackend
from alignment.models.chat import DATE, pin_date, pinned_date
from alignment.models.sampling import Generation, Prompt, Sample, prompt_ids

if TYPE_CHECKING:
    from accelerate import PartialState

FORMAT = 2
SAMPLES_PER_SHARD = 4096
ALIKE, LONG = 8, 8  # prompts without two different samples, of so many tokens at least, that show a deaf server
_PER_SAMPLE = ("ids", "responses", "finished")


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
        """Where a shard is, or will be."""
        return self.folder / "shards" / f"{shard:05d}.jsonl"

    def missing(self) -> list[int]:
        """The numbers of the shards that are not there yet."""
        return [number for number in range(len(self.shards)) if not self.file(number).is_file()]

    def rows(self, shard: int) -> list[dict[str, Any]]:
        """The rows of a shard, one a prompt, in order, with the keys at the top of this file.

        Raises:
            UserError: the file is not what sampling writes.
        """
        found = list(iterate_json_lines(self.file(shard)))
        for where, row in found:
            lengths = {name: len(row.get(name) or ()) for name in _PER_SAMPLE}
            if set(lengths.values()) != {self.n} or not isinstance(row.get("prompt"), str | list):
                raise UserError(
                    f"{where}: {self.n} samples are needed, got {lengths}; delete the file and sample again"
                )
        if len(found) != len(self.shards[shard]):
            raise UserError(
                f"{self.file(shard)}: {len(found)} prompts instead of {len(self.shards[shard])}; delete the file and "
                "sample again"
            )
        return [row for _, row in found]

    def read(self, shard: int) -> tuple[list[Prompt], list[list[str]]]:
        """Prompts of a shard, as they were given to the model, and their n responses each.

        Raises:
            UserError: the file is not what sampling writes.
        """
        rows = self.rows(shard)
        return [row["prompt"] for row in rows], [row["responses"] for row in rows]

    def unfinished(self) -> int:
        """How many samples of a complete pool were cut at the token limit."""
        rows = (row for shard in range(len(self.shards)) for row in self.rows(shard))
        return sum(not finished for row in rows for finished in row["finished"])


def open_pool(folder: Path) -> Pool:
    """A complete pool.

    Raises:
        UserError: no pool, or samples are missing.
    """
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise UserError(f"{folder}: no manifest.json there; `scripts/sample.py … --output {folder}` makes a pool")
    pool = Pool(folder, read_json_object(manifest))
    if pool.manifest.get("format") != FORMAT:
        raise UserError(f"{manifest}: format {pool.manifest.get('format')!r}, not {FORMAT}: sample into a new folder")
    if missing := pool.missing():
        raise UserError(
            f"{folder}: {len(missing)} of {len(pool.shards)} shards are missing; run the same command again"
        )
    return pool


def sample_pool(
    load: Mapping[str, Any],
    tokenizer: Any,
    prompts: Sequence[Prompt],
    folder: Path,
    n: int,
    *,
    generation: Generation,
    seed: int,
    name: str = "",
    prompts_per_shard: int | None = None,
    backend: Backend | None = None,
    progress: str = "sampling",
) -> Pool:
    """Draw n samples of each prompt into a folder, or finish what an earlier call began.

    All processes of an `accelerate launch` call this together; shard number s is drawn by process s % world. Each
    process loads a whole copy of the model: nothing is sharded, whatever the launch's configuration says of DeepSpeed
    or FSDP, so a model must fit one device. Files do not depend on the number of processes.

    Args:
        load: arguments of `alignment.models.load_model`.
        tokenizer: of the model.
        prompts: texts or chat messages, as they are to be given to the model; equal ones are drawn independently.
        folder: of the pool.
        n: samples per prompt.
        generation: how they are drawn; at most `batch_size` at once, which is part of what a seed means.
        seed: every shard's seeds derive from it.
        name: what the manifest calls the model; its `name_or_path` unless given.
        prompts_per_shard: None: as many as make 4,096 samples.
        backend: what draws; transformers with `load` unless given.
        progress: label of the main process's progress bar.

    Raises:
        UserError: no prompts, several greedy samples, a folder with something else in it, other settings than the
            pool's, another process at work on it, or a backend that fails. Before anything is drawn it is raised on
            all processes; later, on the one that fails.
    """
    from accelerate import PartialState

    from alignment.models.loading import settle_accelerator

    _refuse_greed(generation, n)
    if not prompts:
        raise UserError(f"{folder}: no prompts to sample")
    settle_accelerator()
    state = PartialState()
    backend = backend or TransformersBackend(load, tokenizer)
    date = _settle_date(tokenizer, folder, state)
    manifest = {
        "format": FORMAT,
        "model": name or str(load["name_or_path"]),
        **backend.describe(),
        "prompts": len(prompts),
        "prompts_sha256": json_digest(list(prompts)),
        "template_sha256": json_digest(getattr(tokenizer, "chat_template", None)),
        **({} if date is None else {DATE: date}),
        "n": n,
        **asdict(generation),
        "seed": seed,
        "prompts_per_shard": prompts_per_shard or max(1, SAMPLES_PER_SHARD // n),
    }
    _by_main(state, lambda: _refuse_changes(folder, manifest))  # what can be said without the weights is said first
    manifest |= backend.open(state.device, state.is_main_process)
    with contextlib.ExitStack() as held:

        def claim() -> None:
            make_folder(folder)
            held.enter_context(alone(folder))
            _refuse_changes(folder, manifest)
            write_json(folder / "manifest.json", manifest)
            for part in (folder, folder / "shards"):
                remove_unfinished(part)

        _by_main(state, claim)
        _warn_of_idle(Pool(folder, manifest), state)
        _draw(Pool(folder, manifest), backend, tokenizer, prompts, generation, state, progress)
    return open_pool(folder)


def _settle_date(tokenizer: Any, folder: Path, state: PartialState) -> str | None:
    """The date that the chat template writes in all of a pool: the tokenizer's, or the one that the pool began on."""
    file = folder / "manifest.json"
    begun = read_json_object(file).get(DATE) if file.is_file() and pinned_date(tokenizer) is None else None
    dates: list[str | None] = [pin_date(tokenizer, begun)]
    if state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(dates, from_process=0)
        pin_date(tokenizer, dates[0])
    return dates[0]


def _refuse_greed(generation: Generation, n: int) -> None:
    """UserError for several samples of a prompt that would all be the same, and for what is no number."""
    for key in ("temperature", "top_p"):
        if not 0 <= getattr(generation, key) < math.inf:
            raise UserError(f"{key}: must be a number, at least 0, not {getattr(generation, key):g}")
    if n > 1 and generation.greedy:
        raise UserError(f"{generation.greedy}: greedy samples of a prompt are all the same; ask for one")


def _warn_of_idle(pool: Pool, state: PartialState) -> None:
    if state.is_main_process and len(pool.shards) < state.num_processes:
        text = (
            f"warning: {state.num_processes} processes share {len(pool.shards)} shards; fewer prompts per shard help"
        )
        print(text, file=sys.stderr, flush=True)


def _by_main(state: PartialState, action: Callable[[], None]) -> None:
    """Let the main process act while the others wait; what it refuses, all refuse."""
    refusal: list[str | None] = [None]
    if state.is_main_process:
        try:
            action()
        except UserError as error:
            refusal = [str(error)]
    if state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(refusal, from_process=0)
    if refusal[0] is not None:
        raise UserError(refusal[0])


def _draw(
    pool: Pool,
    backend: Backend,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    generation: Generation,
    state: PartialState,
    progress: str,
) -> None:
    """Write this process's shards that are not there yet, and wait for the others'; the bar counts everybody's."""
    from tqdm import tqdm

    def there() -> int:
        absent = set(pool.missing())
        return sum(len(block) for number, block in enumerate(pool.shards) if number not in absent) * pool.n

    total = pool.prompts * pool.n
    repeats = _Repeats(str(pool.manifest.get("base_url")), generation)
    mine = [number for number in pool.missing() if number % state.num_processes == state.process_index]
    hidden = {} if state.is_main_process else {"disable": True}  # else TQDM_DISABLE counts
    with tqdm(total=total, initial=there(), desc=progress, unit="sample", **hidden) as bar:
        for number in mine:
            given = [prompts[i] for i in pool.shards[number]]
            ids = [prompt_ids(tokenizer, prompt) for prompt in given]
            drawn: list[list[Sample]] = [[] for _ in given]
            for start in range(0, pool.n, generation.batch_size):  # a backend draws all of a prompt's at once
                size = min(generation.batch_size, pool.n - start)
                part = _seed(int(pool.manifest["seed"]), number, start)
                more = backend.draw(given, ids, size, generation, part)
                drawn = [samples + new for samples, new in zip(drawn, more, strict=True)]
                bar.update(size * len(given))
            if pool.manifest.get("backend") == "endpoint":
                repeats.see(drawn)
            write_json_lines(pool.file(number), map(_row, given, ids, drawn))
            if state.is_main_process:
                bar.n = there()
                bar.refresh()
        state.wait_for_everyone()
        bar.n = there()


class _Repeats:
    """Watches a server's samples for a temperature that it ignores: every sample of every prompt is then the same.

    What would be the same anyway does not count: answers of a few tokens, and temperatures near greedy. One prompt
    with two different samples ends the watch. `ALIKE` prompts without any are no accident: at a temperature of 1/2 or
    more a model repeats a whole answer of `LONG` tokens for one prompt, not for each.
    """

    def __init__(self, base_url: str, generation: Generation) -> None:
        self.base_url, self.temperature, self.alike = base_url, generation.temperature, 0
        self.watching = generation.temperature >= 0.5 and generation.top_p >= 0.5 and generation.top_k != 1

    def see(self, drawn: Sequence[Sequence[Sample]]) -> None:
        """Look at one shard's samples, by prompt.

        Raises:
            UserError: `ALIKE` prompts or more, and none with two different samples.
        """
        for samples in drawn if self.watching else ():
            if len({sample.text for sample in samples}) > 1:
                self.watching = False
                return
            self.alike += len(samples) > 1 and min(len(sample.ids) for sample in samples) >= LONG
        if self.watching and self.alike >= ALIKE:
            raise UserError(
                f"sampling: base_url {self.base_url}: each of {self.alike} prompts got one answer again and again "
                f"at temperature {self.temperature:g}: the server ignores temperature or repeats a stored answer; "
                "`transformers serve` samples only with do_sample: true in the model's generation_config.json"
            )


def _row(prompt: Prompt, ids: list[int], samples: list[Sample]) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "prompt_ids": ids,
        "ids": [s.ids for s in samples],
        "responses": [s.text for s in samples],
        "finished": [s.finished for s in samples],
    }


def _seed(seed: int, shard: int, start: int) -> int:
    """A seed for one call of a backend: different and unrelated for every part of the pool."""
    return int(np.random.SeedSequence([seed, shard, start]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _refuse_changes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """UserError where the folder holds a pool of other settings, or something that is no pool."""
    file = folder / "manifest.json"
    if not file.is_file():
        if folder.exists() and (not folder.is_dir() or any(not is_leftover(p) for p in folder.iterdir())):
            raise UserError(f"{folder}: exists and is not a pool; give a new folder")
        return
    stored = read_json_object(file)
    for key in manifest:
        if stored.get(key) != manifest[key]:
            raise UserError(
                f"{file}: {key} is {stored.get(key)!r} there and {manifest[key]!r} now; a pool has one setting: give "
                "the same again, or a new folder"
            )
