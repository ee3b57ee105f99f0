"""One preference pair as the model sees it: token by token, what is scored, what is cut off, what is special.

Shows the row's text: that is its purpose. (`alignment data report` never does.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.text import Text

STYLES = {"prompt": "cyan", "chosen": "green", "rejected": "magenta", "cut": "red strike"}
SPECIAL = "reverse"
_SEPARATOR = ("│", "dim")


@dataclass(frozen=True)
class Branch:
    """One response: the ids that are scored, and those beyond `data.max_length`, which are cut off."""

    name: str
    scored: list[int]
    cut: list[int]


@dataclass(frozen=True)
class PairView:
    """A row of the training data in tokens.

    Attributes:
        prompt: its ids; they are read and not scored.
        branches: chosen and rejected.
        lines: facts: numbers of tokens, of BOS and EOS, the template's hash.
        problems: what is wrong with them, in words; the pipeline refuses such rows, so this is for rows that bring
            their own ids.
    """

    prompt: list[int]
    branches: tuple[Branch, Branch]
    lines: list[str]
    problems: list[str]


def pair_view(row: dict[str, Any], tokenizer: Any, max_length: int) -> PairView:
    """The row as the collator cuts it.

    Args:
        row: with prompt_ids, chosen_ids and rejected_ids.
        tokenizer: of the model.
        max_length: tokens of prompt and one response.
    """
    prompt = list(row["prompt_ids"])
    room = max_length - len(prompt)
    ids = {name: list(row[f"{name}_ids"]) for name in ("chosen", "rejected")}
    chosen, rejected = (Branch(name, found[:room], found[room:]) for name, found in ids.items())
    lines = [f"prompt: {len(prompt)} tokens, not scored; both responses follow the same ones"]
    problems = []
    for branch in (chosen, rejected):
        scored = len(branch.scored) - (not prompt)
        first = "" if prompt else " (the first has nothing before it, and is not)"
        lines.append(
            f"{branch.name}: {scored} tokens scored{first}, {len(branch.cut)} cut off at max_length {max_length}"
        )
        bos = (prompt + branch.scored).count(tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else 0
        eos = branch.scored.count(tokenizer.eos_token_id)
        where = "ends with it" if branch.scored[-1:] == [tokenizer.eos_token_id] else "does not end with it"
        lines.append(
            f"  BOS ({tokenizer.bos_token}): {bos} in prompt and response; "
            f"EOS ({tokenizer.eos_token}): {eos} in the response, which {where}"
        )
        if (prompt + branch.scored)[:2] == [tokenizer.bos_token_id] * 2:
            problems.append(f"{branch.name}: two BOS at the start")
    template = str(tokenizer.chat_template or "")
    digest = hashlib.sha256(template.encode()).hexdigest()
    used = "" if isinstance(row["prompt"], list) else "; not used, the rows are plain text"
    lines.append(f"chat template: sha256 {digest[:16]}…{used}" if template else "chat template: none")
    return PairView(prompt, (chosen, rejected), lines, problems)


def painted(view: PairView, tokenizer: Any) -> Iterator[Text]:
    """Prompt and responses with a bar between tokens: coloured on a terminal, legible without colours."""
    yield _tokens("prompt", "read, not scored", view.prompt, "prompt", tokenizer)
    for branch in view.branches:
        yield _tokens(branch.name, "scored", branch.scored, branch.name, tokenizer)
        if branch.cut:
            yield _tokens(branch.name, "cut off, never seen", branch.cut, "cut", tokenizer)


def _tokens(name: str, what: str, ids: list[int], style: str, tokenizer: Any) -> Text:
    text = Text(f"{name} ({what}): ", style="bold")
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for place, token in enumerate(ids):
        if place:
            text.append(*_SEPARATOR)
        text.append(shown(token, tokenizer), f"{STYLES[style]} {SPECIAL}" if token in special else STYLES[style])
    return text


def shown(token: int, tokenizer: Any) -> str:
    """A token as text: line ends visible, and a part of a character by its name in the vocabulary."""
    text = str(tokenizer.decode([token]))
    if not text or "\ufffd" in text:
        return str(tokenizer.convert_ids_to_tokens(token))
    return text.replace("\r", "␍").replace("\t", "␉").replace("\n", "⏎\n" if text.endswith("\n") else "⏎")
