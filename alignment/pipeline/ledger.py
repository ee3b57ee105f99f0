"""What a run has completed: stages and the SHA-256 of their files, in its manifest.

Knows nothing of what a stage does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.files import file_digest, read_json_object, write_json, write_text
from alignment.models.card import CARD

# Of a training run what counts is the model and how it came about; checkpoints may be deleted to save space.
LASTING = {"train": ("final", "metrics.jsonl")}


def unfinished(folder: Path) -> Path:
    """Where the stage that will be in `folder` is at work: under the same name, one folder aside."""
    return folder.parent / "unfinished" / folder.name


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a stage's files, apart from model cards: evaluations rewrite those."""
    total = hashlib.sha256()
    parts = LASTING.get(folder.name)
    roots = [folder] if parts is None else [folder / part for part in parts]
    files = sorted(
        file for root in roots for file in ([root] if root.is_file() else root.rglob("*")) if file.is_file()
    )
    for file in files:
        if file.name != CARD:
            total.update(f"{file.relative_to(folder)}\0".encode())
            total.update(file_digest(file).encode())
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
        moved_from = begun.get("place", str(run))
        self.manifest: dict[str, Any] = {**facts, **begun, "recipe": facts["recipe"], "place": str(run)}
        self.manifest.setdefault("stages", {})
        if moved_from != str(run):
            self._follow(moved_from)
        write_json(self.file, self.manifest)

    def _follow(self, before: str) -> None:
        """A run that was moved: stages at work say where their files are."""
        for file in self.run.glob("iteration-*/unfinished/*/manifest.json"):
            write_text(file, file.read_text(encoding="utf-8").replace(f'"{before}/', f'"{self.run}/'))

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
        """What is at work for RUN/`name` becomes it, and is noted."""
        folder = self.run / name
        unfinished(folder).rename(folder)
        self._note(name, digest(folder), round(seconds, 1))

    def _note(self, name: str, sha256: str, seconds: float | None = None) -> None:
        self.manifest["stages"][name] = {"sha256": sha256, **({} if seconds is None else {"seconds": seconds})}
        write_json(self.file, self.manifest)

    def note(self, **facts: Any) -> None:
        """Add facts to the manifest."""
        self.manifest |= facts
        write_json(self.file, self.manifest)
