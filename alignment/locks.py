"""Folders that one program works in at a time, and what a killed one leaves there.

For programs that can be started again: their files are written whole or not at all (`files.write_text`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from alignment.errors import UserError


@contextlib.contextmanager
def alone(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """One program at a time in a folder; the lock goes with the process, however it ends.

    Args:
        folder: must exist.
        patience: seconds to wait for another one to end.

    Raises:
        UserError: another one still holds it.
    """
    handle, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise UserError(f"{folder}: another process is writing there; wait for it") from None
                time.sleep(0.2)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def sole_user(run: Path) -> Iterator[None]:
    """One program at a time with a run's folder, which may be moved aside meanwhile; the lock ends with the process.

    The lock is `.NAME.lock` beside the folder, with the number of the process that holds it; it is removed at the end.
    Where nothing can be written beside the folder, the folder itself is locked: nothing can be moved there.

    Raises:
        UserError: another program trains, resumes or evaluates there.
    """
    run = run.resolve()
    file = run.with_name(f".{run.name}.lock")
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(file, run)
    except OSError:  # what cannot be written is said where the run begins
        with alone(run) if run.is_dir() else contextlib.nullcontext():
            yield
        return
    try:
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        file.unlink(missing_ok=True)  # before the lock goes: who waits for this file makes a new one
        os.close(handle)


def _locked(file: Path, run: Path) -> int:
    """A locked handle of the file that stands at this path now; the last holder may have removed the one opened."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 20).decode().strip() or "unknown"
            os.close(handle)
            raise UserError(
                f"{run}: another program (process {holder}) works in this run; wait for it, or stop it"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), file.stat()):
                return handle
        os.close(handle)


def make_folder(folder: Path) -> None:
    """The folder with its parents, unless it is there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from None


def is_leftover(file: Path) -> bool:
    """Whether a file is what `files.write_text` was writing when it was killed."""
    return file.name.startswith(".") and file.suffix == ".tmp"


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process was writing; nobody else writes there now."""
    leftovers = [file for file in folder.iterdir() if is_leftover(file)] if folder.is_dir() else []
    for file in leftovers:
        file.unlink()
    if leftovers:
        text = f"{folder}: removed {len(leftovers)} unfinished file{'' if len(leftovers) == 1 else 's'}"
        print(text, file=sys.stderr, flush=True)
