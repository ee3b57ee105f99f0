"""Log-probabilities under frozen models (reference, previous iterate), computed once and kept on disk.

    logps, kept = frozen_logps(accelerator, score, lengths, 8, parts, tolerance, "reference")      # [n, k], nats

A kept table is found under a SHA-256 of everything that decides its numbers: the token ids after truncation (hence
data, order, template and `max_length`), every weight and the configuration of the model that scores, the dtype of
weights and of computation, versions. It is the *content* that is hashed, not names, paths or dates, so an edited file
or a model that was overwritten is another key. A few rows are scored again whenever a table is loaded; if they differ
it is computed anew, with a warning. All processes share the work, the main process reads and writes the file.

Not here: how a row is scored (`scoring.py`), which model that is (`offline.py`), SHA-256 of a model (`models.digest`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather, reduce
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from alignment.errors import UserError
from alignment.files import json_digest
from alignment.models.gguf import cache_root
from alignment.models.scoring import relative_gap

FORMAT = "1"  # part of the key: raise it when the same inputs give other numbers
CHECKED_ROWS = 4

Score = Callable[[list[int]], torch.Tensor]  # row numbers → their log-probs, [len, k]


def rows_digest(rows: Iterable[Sequence[list[int]]]) -> str:
    """SHA-256 of token ids, row by row and response by response, as they are scored (after truncation)."""
    digest = hashlib.sha256()
    for row in rows:
        for ids in row:
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(array("q", ids).tobytes())
    return digest.hexdigest()


def cache_file(parts: dict[str, Any]) -> Path:
    """Where the table of these parts of a key lies."""
    everything = parts | {"format": FORMAT, **{name: version(name) for name in ("torch", "transformers")}}
    key = json_digest(everything)
    return cache_root() / "logps" / f"{key[:32]}.safetensors"


def frozen_logps(
    accelerator: Accelerator | PartialState,
    score: Score,
    lengths: Sequence[int],
    per_device: int,
    parts: dict[str, Any],
    tolerance: Callable[[], float],
    label: str,
) -> tuple[torch.Tensor, bool]:
    """The table of all rows, from the cache or computed by all processes together.

    Args:
        accelerator: of the trainer, or the processes' state before there is one.
        score: log-probs of given rows on this process; every process makes the same number of calls.
        lengths: tokens of each of the n rows, to batch like with like.
        per_device: rows per call.
        parts: of the key; any JSON values.
        tolerance: relative difference at which a loaded table is not that of this model; asked after `score`.
        label: of the model, for progress and warnings.

    Returns:
        `[n, k]` float32 on the CPU, and whether it was kept from before.
    """
    file = cache_file(parts)
    table = _read(file) if accelerator.is_main_process else None
    if accelerator.num_processes > 1:
        (table,) = broadcast_object_list([table], from_process=0)
    if table is not None and len(table) == len(lengths):
        rows = sorted({round(i * (len(lengths) - 1) / max(CHECKED_ROWS - 1, 1)) for i in range(CHECKED_ROWS)})
        gap = relative_gap(score(rows).cpu(), table[rows])
        off = reduce(torch.tensor(float(gap > tolerance()), device=accelerator.device), reduction="sum")
        if float(off) == 0:
            return table, True
        _say(accelerator, f"warning: {file}: kept {label} log-probs differ from this model's; computing them again")
    table = _computed(accelerator, score, lengths, per_device, label)
    if accelerator.is_main_process:
        _write(file, table, parts)
    accelerator.wait_for_everyone()
    return table, False


def _computed(
    accelerator: Accelerator | PartialState, score: Score, lengths: Sequence[int], per_device: int, label: str
) -> torch.Tensor:
    """Longest first: memory runs out at once or never. A last part that does not divide is filled by repeats."""
    world, rank = accelerator.num_processes, accelerator.process_index
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[torch.Tensor] = []
    starts = range(0, len(order), per_device * world)
    for start in tqdm(starts, desc=f"  {label} log-probs", disable=not accelerator.is_main_process):
        part = order[start : start + per_device * world]
        share = -(-len(part) // world)
        filled = part + part[:1] * (share * world - len(part))
        scored = gather(score(filled[rank * share : (rank + 1) * share]))
        found.append(scored[: len(part)].float().cpu())
    table = torch.empty_like(torch.cat(found))
    table[order] = torch.cat(found)
    return table


def _read(file: Path) -> torch.Tensor | None:
    if not file.is_file():
        return None
    try:
        return load_file(file)["logps"]
    except (SafetensorError, KeyError) as error:
        print(f"warning: {file}: damaged ({error}); computing it again", file=sys.stderr, flush=True)
        return None


def _write(file: Path, table: torch.Tensor, parts: dict[str, Any]) -> None:
    """By rename: a run that starts meanwhile sees the whole table or none."""
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logps": table.contiguous()}, beside, metadata={"parts": json.dumps(parts, sort_keys=True)})
        os.replace(beside, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}; ALIGNMENT_CACHE names another place") from None
    finally:
        beside.unlink(missing_ok=True)


def _say(accelerator: Accelerator | PartialState, text: str) -> None:
    if accelerator.is_main_process:
        print(text, file=sys.stderr, flush=True)
