"""Prompts that are both trained and judged on, found by hash: of the prompt, and of the whole row.

Two prompts are the same if the user says the same words in them: spaces, the other side and system messages do not
matter, nor whether it is a question alone, a conversation, a Human/Assistant transcript or Alpaca's frame. Two rows
are the same if prompt and both responses are, in either order.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.data.forms import questions
from alignment.data.preferences import same_prompt
from alignment.errors import UserError
from alignment.files import read_text, write_text

if TYPE_CHECKING:
    from datasets import Dataset

    from alignment.data.pipeline import Prepared

TRAINED = "training_prompts.txt"  # of a run: what later evaluations are compared with
DIGITS = 16  # of a prompt's hash there: two of a million prompts share them with probability 3e-8


@dataclass(frozen=True)
class Judged:
    """What a run is judged on: prompt hash -> where it stands, and the hashes of whole rows."""

    prompts: dict[str, str]
    rows: frozenset[str] = frozenset()


def asked(prompt: Any) -> str:
    """What the user says in a prompt, one turn a line; all of it where there is no user."""
    texts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt if m["role"] == "user"]
    return "\n".join(same_prompt(question) for text in texts for question in questions(text)) or _words(prompt)


def _words(response: Any) -> str:
    """A response's words; of several messages, who says them as well."""
    if isinstance(response, str):
        return same_prompt(response)
    if len(response) == 1:
        return same_prompt(response[0]["content"])
    return "\n".join(f"{m['role']}: {same_prompt(m['content'])}" for m in response)


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def prompt_hash(prompt: Any) -> str:
    """The same for prompts, texts or messages, in which the user says the same."""
    return _hash(asked(prompt))


def row_hash(row: dict[str, Any]) -> str:
    """The same for rows with the same prompt and responses, whichever of them is preferred."""
    return _hash(asked(row["prompt"]), *sorted([_words(row["chosen"]), _words(row["rejected"])]))


def write_trained(run: Path, hashes: Iterable[str]) -> None:
    """Keep the hashes of the prompts that a run trains on: a line of `DIGITS` hex digits each, sorted."""
    write_text(run / TRAINED, "".join(f"{line}\n" for line in sorted({found[:DIGITS] for found in hashes})))


def trained_among(run: Path, prompts: Sequence[Any]) -> tuple[int, list[int]] | None:
    """How many different prompts a run was trained on, and the places of those in `prompts`; None if it kept none."""
    if not (run / TRAINED).is_file():
        return None
    hashes = set(read_text(run / TRAINED).split())
    return len(hashes), [i for i, prompt in enumerate(prompts) if prompt_hash(prompt)[:DIGITS] in hashes]


def judged_on(held_out: Dataset | None, prompts: Iterable[Any] = (), where: str = "evaluation.prompts") -> Judged:
    """Hashes of the held-out rows and of the prompts that a win rate is measured on.

    Args:
        held_out: rows of data.eval.
        prompts: of evaluation.prompts.
        where: what messages call the latter.
    """
    found = {prompt_hash(prompt): where for prompt in prompts}
    if held_out is None:
        return Judged(found)
    columns = held_out.select_columns(["prompt", "chosen", "rejected"])
    return Judged(
        {prompt_hash(row["prompt"]): "data.eval" for row in columns} | found,
        frozenset(row_hash(row) for row in columns),
    )


def refuse_two_kinds(trained: Prepared, held_out: Prepared | None) -> None:
    """Stop if training rows are chat messages and held-out rows text, or the other way round.

    Raises:
        UserError: names a source of each.
    """
    if held_out is None or not len(trained.dataset) or not len(held_out.dataset):
        return
    text, other = (isinstance(prepared.dataset[0]["prompt"], str) for prepared in (trained, held_out))
    if text != other:
        kinds = ("text", "chat messages") if text else ("chat messages", "text")
        raise UserError(
            f"data.eval: {held_out.sources[0]['source']} has {kinds[1]}, and {trained.sources[0]['source']} of "
            f"data.train {kinds[0]}: judge on rows of the kind that is trained on; set chat: true (or false) for one"
        )


def refuse(trained: Sequence[Any], judged: Judged, what: object = "data.train") -> None:
    """Stop if a prompt is both trained and judged on.

    Args:
        trained: prompts, texts or messages.
        judged: from `judged_on`.
        what: what the message calls the trained ones.

    Raises:
        UserError: names how many there are, the first one, and where it stands.
    """
    found = [(prompt, where) for prompt in trained if (where := judged.prompts.get(prompt_hash(prompt)))]
    if found:
        prompt, where = found[0]
        raise UserError(
            f"data.overlap: {len(found)} of {len(trained)} prompts of {what} are also judged on, such as "
            f"{asked(prompt)[:60]!r} of {where}: judge on prompts that training does not see, or set data.overlap "
            "to drop (the training rows) or allow"
        )


def without(prepared: Prepared, judged: Judged) -> Prepared:
    """The training rows whose prompts are not judged on; the others are counted in a note and `overlap`."""
    answered = "chosen" in prepared.dataset.column_names  # prompts alone are no whole rows
    rows = prepared.dataset.select_columns(["prompt", *(("chosen", "rejected") if answered else ())])
    shared = [prompt_hash(row["prompt"]) in judged.prompts for row in rows]
    count = sum(shared)
    if not count:
        return prepared
    if count == len(rows):
        raise UserError(f"data.overlap: all {count} training rows have prompts that are judged on; none is left")
    whole = sum(row_hash(row) in judged.rows for row in rows) if answered else 0
    rest = [i for i, drop in enumerate(shared) if not drop]
    kept = prepared.dataset.select(rest, keep_in_memory=True)
    places = tuple(prepared.places[i] for i in rest) if prepared.places else ()
    note = (
        f"{count} rows of {prepared.role} dropped: their prompts are judged on ({whole} are whole rows of data.eval)"
    )
    notes = (*prepared.notes, note)
    return dataclasses.replace(prepared, dataset=kept, overlap=count, notes=notes, places=places)
