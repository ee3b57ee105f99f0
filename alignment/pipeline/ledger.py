"""What a run has completed: stages and the SHA-256 of their files, in its manifest; and who may work on it.

Knows nothing of what a stage does.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.files import read_json_object, write_json

# Of a training run what counts is the model and how it came about; checkpoints may be deleted to save space.
LASTING = {"train": ("final", "metrics.jsonl")}
UNFINISHED = ".unfinished"
PATIENCE = 60.0  # seconds that processes of a killed driver are given to end


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a stage's files."""
    total = hashlib.sha256()
    parts = LASTING.get(folder.name)
    roots = [folder] if parts is None else [folder / part for part in parts]
    files = sorted(
        file for root in roots for file in ([root] if root.is_file() else root.rglob("*")) if file.is_file()
    )
    for file in files:
        total.update(f"{file.relative_to(folder)}\0".encode())
        with file.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


class Ledger:
    """The manifest of a run; each change is on disk before the next begins.

    Args:
        run: the run's folder.
        facts: of a fresh run; what a resumed one was begun with stays.
    """

    def __init__(self, run: Path, facts: Mapping[str, Any]) -> None:
        self.run, self.file = run, run / "manifest.json"
        begun = read_json_object(self.file) if self.file.is_file() else {}
        self.manifest: dict[str, Any] = {**facts, **begun, "recipe": facts["recipe"]}
        self.manifest.setdefault("stages", {})
        write_json(self.file, self.manifest)

    def done(self, name: str) -> bool:
        """Whether the stage in folder RUN/`name` is complete; one that was renamed and not yet noted is noted.

        Raises:
            UserError: its files are not those that it was completed with.
        """
        folder, noted = self.run / name, self.manifest["stages"].get(name)
        if noted is None:
            if folder.is_dir():
                self._note(name, digest(folder))
            return folder.is_dir()
        found = digest(folder) if folder.is_dir() else "none"
        if found != noted["sha256"]:
            what = "has changed since it was completed" if folder.is_dir() else "is gone"
            later = list(self.manifest["stages"])
            raise UserError(
                f"{folder}: {what}, and what follows was made from it: put it back, or remove {self.run} and start "
                f"afresh ({len(later) - later.index(name) - 1} later stages)"
            )
        return True

    def complete(self, name: str, seconds: float) -> None:
        """RUN/`name`.unfinished becomes RUN/`name`, and is noted."""
        folder = self.run / name
        Path(f"{folder}{UNFINISHED}").rename(folder)
        self._note(name, digest(folder), round(seconds, 1))

    def _note(self, name: str, sha256: str, seconds: float | None = None) -> None:
        self.manifest["stages"][name] = {"sha256": sha256, **({} if seconds is None else {"seconds": seconds})}
        write_json(self.file, self.manifest)

    def note(self, **facts: Any) -> None:
        """Add facts to the manifest."""
        self.manifest |= facts
        write_json(self.file, self.manifest)


@contextlib.contextmanager
def alone(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however it ends.

    Raises:
        UserError: another process still holds it after `patience` seconds.
    """
    handle, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"{folder}: another process is at work there; wait for it, or stop it") from None
                time.sleep(0.2)
        yield
    finally:
        os.close(handle)
