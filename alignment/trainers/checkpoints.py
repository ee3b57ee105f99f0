"""Whole checkpoints: each ends with a list of its files, and only a whole one is resumed from."""

from __future__ import annotations

from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback

from alignment.errors import UserError
from alignment.files import read_json_object, write_json

CHECKPOINT_FILES = "files.json"


def last_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint to resume from: a process may have been killed while it wrote the last one.

    Raises:
        UserError: there is none.
    """
    found = _checkpoints(run)
    if not found:
        raise UserError(f"--resume: {run} holds no checkpoint; set training.save_strategy=steps, or start afresh")
    problems = [_what_is_missing(checkpoint) for checkpoint in found]
    whole = next((c for c, problem in zip(found, problems, strict=True) if problem is None), None)
    if whole is None:
        raise UserError(f"--resume: no checkpoint of {run} is whole: {found[0].name} {problems[0]}; start afresh")
    if whole != found[0] and PartialState().is_main_process:
        print(f"{found[0].name} {problems[0]}: resuming from {whole.name}", flush=True)
    return whole


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint; None where there is none."""
    return next((c for c in _checkpoints(run) if _what_is_missing(c) is None), None)


def _checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def _what_is_missing(checkpoint: Path) -> str | None:
    """What `CheckpointFiles` listed and is not there, whole; None where all of it is."""
    listed = checkpoint / CHECKPOINT_FILES
    if not listed.is_file():
        return f"has no {CHECKPOINT_FILES}, which is written last"
    for name, size in read_json_object(listed).items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            return f"lacks {name}" if not file.is_file() else f"has a damaged {name}"
    return None


class CheckpointFiles(TrainerCallback):
    """Ends every checkpoint with a list of its files and their sizes, when all processes have written theirs: resuming
    without an optimizer state, say, would silently begin with a fresh one."""

    def on_save(self, args, state, control, **kwargs):  # noqa: D102 - transformers' hook
        PartialState().wait_for_everyone()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            write_json(folder / CHECKPOINT_FILES, {str(f.relative_to(folder)): f.stat().st_size for f in files})
