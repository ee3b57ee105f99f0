"""Token ids of preference rows, as TRL 1.16's DPOTrainer makes them, and the checks that TRL leaves out.

TRL (`dpo_trainer.py`, `_prepare_dataset`): the prompt (chat: with the generation prompt) and prompt + response are
tokenised whole; the response begins where the two part, which is not always where the prompt ends; plain text gets an
EOS token unless it ends in one. Other than TRL's, a chat response stops at the token that ends its last turn
(`models.ends`): what a template writes behind it is never sampled. Ids that rows bring are used as they are. Nothing
is cut to `max_length` here: the collator cuts.

Checked per row (what TRL leaves to luck): BOS and EOS exactly once, a prompt that leaves room for a response, and
responses that still differ within `max_length`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignment.data.preferences import (
    BOS_EOS,
    PROMPT_TOO_LONG,
    SAME_AFTER_TRUNCATION,
    SAME_RESPONSES,
    UNKNOWN_FORM,
    BadRow,
)
from alignment.data.rendering import Renderer
from alignment.errors import UserError
from alignment.models.chat import render, text_ids
from alignment.models.ends import turn_of, why_endless

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Ids = list[int]


@dataclass(frozen=True)
class Markers:
    """What a tokenizer puts around text by itself.

    Attributes:
        bos: the BOS id, if it has one.
        adds_bos: it puts BOS before plain text.
        template_bos: its chat template begins with BOS.
        ends: ids that end a response: EOS, and for chat the one that ends a turn (Gemma's <end_of_turn> is not its
            EOS).
        endless: why chat responses have no end, and the remedy; empty where they have one.
    """

    bos: int | None
    adds_bos: bool
    template_bos: bool
    ends: frozenset[int]
    endless: str = ""


def markers(tokenizer: PreTrainedTokenizerBase, chat: bool) -> Markers:
    """Looked up by tokenising one made-up text or conversation.

    Raises:
        UserError: rows are chat messages and there is no chat template, or text and there is no EOS token.
    """
    from jinja2 import TemplateError

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    if not chat:
        if eos is None:
            raise UserError("model: the tokenizer has no EOS token, and responses must end with one")
        return Markers(bos, adds_bos, False, frozenset({eos}))
    if not tokenizer.chat_template:
        raise UserError(
            "data: the rows are chat messages, and the model's tokenizer has no chat template; give text rows "
            "(data.train: {name: …, chat: false} for hh and alpaca)"
        )
    try:
        turn = turn_of(tokenizer)
    except (TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model: the chat template fails on a plain question and answer ({reason})") from error
    return Markers(
        bos,
        adds_bos,
        bos is not None and turn.probe[:1] == (bos,),
        frozenset(i for i in (turn.end, eos) if i is not None),
        why_endless(tokenizer) if turn.end is None else "",
    )


def _whole(
    rows: Sequence[Row], branch: str | None, renderer: Renderer, marked: Sequence[bool], checked: bool
) -> list[Ids | BadRow]:
    """Ids of the prompts (None) or of prompt + response, tokenised whole and in one call.

    Args:
        rows: all text or all chat.
        branch: a response's column.
        renderer: of the tokenizer.
        marked: rows whose text has marks around special tokens.
        checked: refuse what the chat template does not write.
    """
    tokenizer, chat = renderer.tokenizer, not isinstance(rows[0]["prompt"], str)
    found: list[Ids | BadRow]
    if not chat:
        eos = str(tokenizer.eos_token)
        answers = ["" if branch is None else row[branch] for row in rows]
        ended = [a if branch is None or a.endswith(eos) else a + eos for a in answers]
        texts = [row["prompt"] + text for row, text in zip(rows, ended, strict=True)]
        found = list(tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"])
    else:
        conversations = [row["prompt"] if branch is None else row["prompt"] + row[branch] for row in rows]
        tools = [row.get("tools") for row in rows]
        texts = render(tokenizer, conversations, generation=branch is None, tools=tools)
        found = list(text_ids(tokenizer, texts))
        for i, text in enumerate(texts if checked else ()):
            try:
                what = "prompt" if branch is None else f"prompt and {branch}"
                renderer.check(conversations[i], tools[i], text, what)
            except BadRow as bad:
                found[i] = bad
    for i, text in enumerate(texts):
        if marked[i] and not isinstance(found[i], BadRow):
            found[i] = renderer.marked_ids(text, chat=chat)
    if not chat or branch is None:
        return found
    closed = turn_of(tokenizer).closed
    return [ids if isinstance(ids, BadRow) else closed(ids) for ids in found]


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    branches: Sequence[str],
    renderer: Renderer | None = None,
) -> list[tuple[dict[str, Ids], Ids] | BadRow]:
    """Token ids of canonical rows, all text or all chat, none of which brings ids.

    Args:
        rows: at most some thousands; they are tokenised in one call per column.
        tokenizer: with a chat template if the rows are chat messages.
        branches: chosen, rejected, and calibration where wanted; the response begins where the first of them parts
            from the prompt. Without any, prompts are tokenised alone.
        renderer: of the tokenizer: rows of which text is lost, or becomes special tokens, are refused as it says.
            None: nothing is looked for (texts that are only scored).

    Returns:
        For each row its `…_ids`, and the ids at the prompt's end that are lost because the prompt is not a prefix of
        the whole in tokens (mostly none); or what is against the row.
    """
    checked = renderer is not None
    renderer = renderer or Renderer(tokenizer)
    kept: list[Row] = []
    marked: list[bool] = []
    found: list[tuple[dict[str, Ids], Ids] | BadRow | None] = [None] * len(rows)
    columns = ("prompt", *branches)
    for i, row in enumerate(rows):
        try:
            controlled = checked and renderer.controlled(row, columns)
        except BadRow as bad:
            found[i] = bad
            continue
        marked.append(controlled and renderer.rules.control_tokens == "text")
        kept.append(renderer.as_text(row, columns) if marked[-1] else row)
    encoded = iter(_encoded(kept, branches, renderer, marked, checked))
    return [next(encoded) if one is None else one for one in found]


def _encoded(
    rows: list[Row], branches: Sequence[str], renderer: Renderer, marked: list[bool], checked: bool
) -> list[tuple[dict[str, Ids], Ids] | BadRow]:
    from jinja2 import TemplateError

    if not rows:
        return []
    try:
        prompts = _whole(rows, None, renderer, marked, checked and not branches)
        wholes = {branch: _whole(rows, branch, renderer, marked, checked) for branch in branches}
    except (TemplateError, TypeError, ValueError) as error:
        if len(rows) > 1:  # find the row
            half = len(rows) // 2
            parts = (slice(half), slice(half, None))
            return [one for p in parts for one in _encoded(rows[p], branches, renderer, marked[p], checked)]
        return [BadRow(UNKNOWN_FORM, f"the chat template refuses it: {' '.join(str(error).split())[:120]}")]
    found: list[tuple[dict[str, Ids], Ids] | BadRow] = []
    for prompt, *answers in zip(prompts, *wholes.values(), strict=True):
        bad = next((one for one in (prompt, *answers) if isinstance(one, BadRow)), None)
        if bad is not None:
            found.append(bad)
            continue
        assert not isinstance(prompt, BadRow)
        ids = {branch: one for branch, one in zip(branches, answers, strict=True) if not isinstance(one, BadRow)}
        cut = min((_shared(prompt, ids[branch]) for branch in branches), default=len(prompt))
        responses = {f"{branch}_ids": ids[branch][cut:] for branch in branches}
        found.append(({"prompt_ids": prompt[:cut], **responses}, prompt[cut:]))
    return found


def _shared(ids: Ids, other: Ids) -> int:
    """Number of leading ids that both have."""
    if other[: len(ids)] == ids:
        return len(ids)
    return next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))


def check(row: Row, ids: dict[str, Ids], marks: Markers, max_length: int | None, *, given: bool) -> None:
    """Refuse a row whose tokens would teach something else than its text says.

    Args:
        row: canonical.
        ids: its `…_ids`.
        marks: of the tokenizer.
        max_length: of prompt and one response; None: no limit.
        given: the row brought its ids (a sample that ran out of tokens has no EOS: only BOS is checked then).

    Raises:
        BadRow: bos_eos, prompt_too_long, same_responses or same_after_truncation.
    """
    prompt = ids["prompt_ids"]
    if max_length is not None and len(prompt) >= max_length:
        raise BadRow(PROMPT_TOO_LONG, f"the prompt has {len(prompt)} tokens; raise data.max_length ({max_length})")
    room = None if max_length is None else max_length - len(prompt)
    chosen, rejected = ids["chosen_ids"], ids["rejected_ids"]
    if chosen == rejected:
        raise BadRow(SAME_RESPONSES, "chosen and rejected are the same tokens")
    if chosen[:room] == rejected[:room]:
        raise BadRow(SAME_AFTER_TRUNCATION, f"the first {room} tokens, all that fit max_length, are the same")
    check_bos(row, prompt, marks, given)
    for branch in ("chosen", "rejected", "calibration"):
        if f"{branch}_ids" in ids:
            check_response(branch, row[branch], ids[f"{branch}_ids"], marks, given)


def check_bos(row: Row, prompt: Ids, marks: Markers, given: bool) -> None:
    """Refuse a prompt with a BOS too many or too few (arguments as in `check`)."""
    bos = marks.bos
    if bos is None:
        return
    if prompt[:2] == [bos, bos]:
        raise BadRow(BOS_EOS, "the prompt begins with BOS twice")
    if isinstance(row["prompt"], str):
        wanted = 0 if given else int(marks.adds_bos)
        if marks.adds_bos and not wanted <= prompt.count(bos) <= 1:
            raise BadRow(BOS_EOS, f"BOS stands {prompt.count(bos)} times in the prompt")
    elif marks.adds_bos and bos not in marks.ends:
        # Llama 2's template begins every user turn with BOS: as many as there are user turns are its own.
        turns = max(1, sum(m["role"] == "user" for m in row["prompt"])) if marks.template_bos else 0
        if prompt.count(bos) > turns or any(a == b == bos for a, b in zip(prompt, prompt[1:], strict=False)):
            raise BadRow(BOS_EOS, f"BOS stands {prompt.count(bos)} times in the prompt")


def check_response(branch: str, value: Any, ids: Ids, marks: Markers, given: bool) -> None:
    """Refuse a response that does not end with EOS, or holds it or BOS once too often (arguments as in `check`).

    Raises:
        BadRow: bos_eos.
        UserError: no response can end: the chat template has no token for it.
    """
    replies = 1 if isinstance(value, str) else len(value)
    if marks.bos is not None and marks.bos not in marks.ends and replies == 1 and marks.bos in ids:
        raise BadRow(BOS_EOS, f"BOS stands inside {branch}")
    if given:
        return
    if marks.endless:
        raise UserError(marks.endless)
    if ids[-1:] == [] or ids[-1] not in marks.ends:
        raise BadRow(BOS_EOS, f"{branch} does not end with EOS")
    count = sum(ids.count(end) for end in marks.ends)
    if count > replies:
        raise BadRow(BOS_EOS, f"EOS stands {count} times in {branch}")
