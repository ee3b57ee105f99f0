"""Rows of supervised fine-tuning: token ids, and which of them are learned.

| a source's rows have | learned is |
|---|---|
| `messages` | every assistant turn where the chat template marks them, else the last one |
| `prompt`, `completion` (texts or messages) | the completion |
| `conversations` (ShareGPT), with `system` or without | as of `messages` |
| `instruction`, `input`, `output` (Alpaca) | the output |
| `text` | all of it |
| any form of preferences (`forms`) | the chosen response (Preferred-FT of Rafailov et al. 2023, 2305.18290) |

Tokens are made as for preference training (`tokens`), so the model that comes out has seen prompts and ends as they
will be in the next step: EOS exactly once, prompts never learned. Rows that cannot be used are kept apart with number
and reason, as there.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignment.data.forms import (
    PEEKED,
    alpaca_prompt,
    chat_messages,
    check_columns,
    converter,
    form_of,
    tidy,
    under_our_names,
)
from alignment.data.messages import PLAIN, TextRules, refuse_unread, settled, with_context
from alignment.data.overlap import prompt_hash
from alignment.data.pipeline import Prepared, Rejected, described, title
from alignment.data.preferences import (
    BOS_EOS,
    CONTROL_TOKEN,
    DIFFERENT_PROMPTS,
    EMPTY,
    MISSING_FIELD,
    NOT_TEXT,
    PROMPT_TOO_LONG,
    READ_COLUMNS,
    UNKNOWN_FORM,
    BadRow,
    has_text,
    is_messages,
    plain_message,
    refuse_written_messages,
)
from alignment.data.reading import Place, Placed, raw_rows
from alignment.data.rendering import Renderer
from alignment.data.tables import mixed
from alignment.data.tokens import Markers, check_bos, check_response, encode, markers
from alignment.errors import UserError
from alignment.models.chat import marked_ids, render
from alignment.models.ends import Turn, turn_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from alignment.recipes.rows import SourceSection

Row = dict[str, Any]
IGNORED = -100  # the label of a token that is not learned, torch's own
ACCEPTED = (
    "messages; prompt and completion; conversations (ShareGPT); instruction, input and output (Alpaca); text; or "
    "preferences (prompt, chosen, rejected …); map other names with columns: {prompt: THEIRS, completion: THEIRS}"
)
_NAMED = {"sharegpt": "conversations", "alpaca": "instruction"}  # `format`, where rows are no preferences


@dataclass
class _Encoder:
    """Rows of one source to (input_ids, labels)."""

    renderer: Renderer
    max_length: int
    template: str | None  # one that marks assistant turns, or None: only the last turn is learned

    def __post_init__(self) -> None:
        self.tokenizer = self.renderer.tokenizer
        self.marks: dict[bool, Markers] = {}

    def __call__(self, row: Row) -> tuple[list[int], list[int]]:
        chat = "messages" in row or not isinstance(row["prompt"], str)
        if chat not in self.marks:
            self.marks[chat] = markers(self.tokenizer, chat)
        if "messages" in row and self.template is not None:
            ids, labels = self._all_turns(row)
        else:
            ids, labels = self._completion(_last_turn(row) if "messages" in row else row, self.marks[chat])
        ids = ids[: self.max_length]
        labels = [IGNORED, *labels[1 : self.max_length]]  # nothing predicts a row's first token
        if all(label == IGNORED for label in labels):
            raise BadRow(PROMPT_TOO_LONG, f"nothing to learn in the first {self.max_length} tokens (max_length)")
        return ids, labels

    def prompts(self, row: Row) -> list[str]:
        """Hashes of what the row's learned turns answer; none of plain text, which answers nothing."""
        if "messages" not in row:
            return [prompt_hash(row["prompt"])] if row["prompt"] else []
        turns = [i for i, message in enumerate(row["messages"]) if i and message["role"] == "assistant"]
        return [prompt_hash(row["messages"][:i]) for i in (turns[-1:] if self.template is None else turns)]

    def _completion(self, row: Row, marks: Markers) -> tuple[list[int], list[int]]:
        given = "completion_ids" in row
        ids: Any = row
        if not given:
            found = encode([row], self.tokenizer, ["completion"], self.renderer)[0]
            if isinstance(found, BadRow):
                raise found
            ids = found[0]
        check_bos(row, ids["prompt_ids"], marks, given)
        check_response("completion", row["completion"], ids["completion_ids"], marks, given)
        return ids["prompt_ids"] + ids["completion_ids"], [IGNORED] * len(ids["prompt_ids"]) + ids["completion_ids"]

    def _all_turns(self, row: Row) -> tuple[list[int], list[int]]:
        from jinja2 import TemplateError

        messages, tools = row["messages"], row.get("tools")
        if self.renderer.controlled(row, ["messages"]) and self.renderer.rules.control_tokens == "text":
            raise BadRow(CONTROL_TOKEN, "the assistant's turns cannot be told in text with marks; set sft.turns: last")
        try:
            text = render(self.tokenizer, [messages], generation=False, tools=[tools])[0]
            ids, marked = marked_ids(self.tokenizer, messages, str(self.template), tools)
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise BadRow(UNKNOWN_FORM, f"the chat template refuses it: {reason}") from None
        self.renderer.check(messages, tools, text, "messages")
        turn = turn_of(self.tokenizer)
        ids = turn.closed(list(ids))
        learned = _up_to_ends(ids, [*marked, 1], turn)  # an end that the template lacks is learned, too
        ends = sum(i in self.marks[True].ends for i, own in zip(ids, learned, strict=True) if own)
        turns = sum(m["role"] == "assistant" for m in messages)
        if ends != turns:
            raise BadRow(BOS_EOS, f"{turns} assistant turns, and EOS is learned {ends} times")
        return ids, [i if own else IGNORED for i, own in zip(ids, learned, strict=True)]


def _up_to_ends(ids: Sequence[int], marked: Sequence[int], turn: Turn) -> list[bool]:
    """Which of `ids` are learned: what the template marks, without what it writes behind the end of a turn."""
    learned: list[bool] = []
    ended = False
    for token, own in zip(ids, marked, strict=False):
        ended = ended and token in turn.behind
        learned.append(bool(own) and not ended)
        ended = ended or token == turn.end
    return learned


def _last_turn(row: Row) -> Row:
    return row | {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def marking_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A chat template that writes the tokenizer's own text and marks what an assistant says, ends included.

    The tokenizer's own if it has `{% generation %}` marks, else TRL's variant of it, for the families that TRL knows.
    None where neither gives the same tokens with every end of turn inside the marks.
    """
    from trl.chat_template_utils import (
        get_training_chat_template,
        has_generation_markers,
        is_chat_template_stop_token_trained,
    )

    own: Any = tokenizer.chat_template
    if not isinstance(own, str):
        return None
    template: str | None = own
    if not has_generation_markers(own):
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError:  # of a family that TRL does not know
            return None
    if template is None or not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        return None
    turns = [{"role": role, "content": word} for role, word in (("user", "a"), ("assistant", "b")) * 2]
    plain, marked = (render(tokenizer, [turns], generation=False, template=t) for t in (own, template))
    return template if plain == marked else None


def prepare_supervised(
    sources: Sequence[SourceSection],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    role: str,
    turns: str = "all",
    max_rejected_share: float = 0.1,
    seed: int = 0,
    rules: TextRules = PLAIN,
) -> Prepared:
    """Read, check, tokenise and mix sources; the data set has columns `input_ids` and `labels` (-100: not learned).

    Args:
        sources: with all of them weighted or none, as for preferences.
        tokenizer: of the model.
        max_length: tokens of a row; longer ones are cut at the end.
        role: "train" or "eval"; also says which split is meant where none is named.
        turns: of `messages`: "all" assistant turns, or the "last".
        max_rejected_share: kept for `write_rejected`.
        seed: of the draw of a weighted mixture.
        rules: what becomes of reasoning, and of special tokens in the rows' text.

    Raises:
        UserError: a source cannot be read, or its form not be told.
    """
    template = marking_template(tokenizer) if turns == "all" and tokenizer.chat_template else None
    encoder = _Encoder(Renderer(tokenizer, rules), max_length, template)
    tables: list[Dataset | None] = []
    asked: list[list[list[str]]] = []  # of each usable row of each source
    found: list[tuple[str, list[Place], list[Rejected]]] = []  # form, places of the usable rows, others
    for source in sources:
        kept: list[tuple[list[int], list[int]]] = []
        prompts: list[list[str]] = []
        rejected: list[Rejected] = []
        places: list[Place] = []
        form, rows = _converted(source, raw_rows(source, role), bool(tokenizer.chat_template), rules)
        for place, convert in rows:
            try:
                row = convert()
                kept.append(encoder(row))
                prompts.append(encoder.prompts(row))
                places.append(place)
            except BadRow as bad:
                rejected.append(Rejected(title(source), place.row, bad.reason, bad.detail, place.file))
        tables.append(_table(kept))
        asked.append(prompts)
        found.append((form, places, rejected))
    dataset, chosen = mixed(tables, list(sources), seed)
    entries = [
        described(role, title(source), form, len(usable) + len(bad), len(usable), len(rows), bad)
        for source, (form, usable, bad), rows in zip(sources, found, chosen, strict=True)
    ]
    every = [bad for _, _, rejected in found for bad in rejected]
    only_last = turns == "all" and template is None and {"messages", "conversations"} & {e["form"] for e in entries}
    notes = ["of conversations only the last turn is learned: the chat template does not mark assistant turns"]
    return Prepared(
        dataset=dataset,
        rejected=every,
        counts=dict(Counter(bad.reason for bad in every).most_common()),
        rows=sum(entry["read"] for entry in entries),
        role=role,
        max_rejected_share=max_rejected_share,
        notes=(*(notes if only_last else ()), *encoder.renderer.notes(role)),
        sources=tuple(entries),
        places=tuple(
            (title(source), usable[i])
            for source, (_, usable, _), rows in zip(sources, found, chosen, strict=True)
            for i in rows
        ),
        prompts=frozenset(
            prompt for usable, rows in zip(asked, chosen, strict=True) for i in rows for prompt in usable[i]
        ),
    )


def _table(rows: list[tuple[list[int], list[int]]]) -> Dataset | None:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [i for i, _ in rows], "labels": [n for _, n in rows]}) if rows else None


def _converted(
    source: SourceSection, placed: Iterator[Placed], has_template: bool, rules: TextRules
) -> tuple[str, Iterator[tuple[Place, Callable[[], Row]]]]:
    """The form of a source, and for each of its rows its place and what converts it (or raises `BadRow`)."""
    peeked = list(itertools.islice(placed, PEEKED))
    first, rows = [row for _, row in peeked], itertools.chain(peeked, placed)
    check_columns(source, first)
    form = _form(source, [tidy(under_our_names(row, source.columns)) for row in first])
    if form == "preferences":
        name, preferred = converter(source, first, has_template, rules, READ_COLUMNS)
        return name, ((place, lambda row=row: _chosen(preferred(row))) for place, row in rows)
    if form is None:
        columns = ", ".join(dict.fromkeys(key for row in first for key in row)) or "(none)"
        raise UserError(f"{source.name}: nothing to learn in columns {columns}; accepted: {ACCEPTED}")
    if source.format != "auto" and _NAMED.get(source.format) != form:
        raise UserError(f"{source.name}: format {source.format} is not that of these rows ({form}): leave it out")
    chat = bool(source.chat) if form != "instruction" or source.chat is not None else has_template
    convert = {
        "messages": _conversation,
        "conversations": _sharegpt,
        "completion": _completion,
        "instruction": _instruction,
        "text": _text,
    }[form]

    def converted(row: Row) -> Row:
        given = settled(under_our_names(row, source.columns), rules, source.ignore)
        row = with_context(convert(given, chat), given, rules)
        refuse_unread(form, given, row)
        return row

    return form, ((place, lambda row=row: converted(row)) for place, row in rows)


def _form(source: SourceSection, first: Sequence[Row]) -> str | None:
    """What the first rows, under our names, have to learn from."""
    filled = [{key: value for key, value in row.items() if value is not None} for row in first]
    keys = {key for row in filled for key in row}
    if {"prompt", "completion"} <= keys:
        return "completion"
    if source.format in ("preference", "hh") or form_of(filled) is not None:
        return "preferences"
    if "output" in keys and {"instruction", "prompt"} & keys:
        return "instruction"
    return next((form for form in ("messages", "conversations", "text") if form in keys), None)


def _chosen(row: Row) -> Row:
    ids = {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"]} if "chosen_ids" in row else {}
    tools = {"tools": row["tools"]} if "tools" in row else {}
    return {"prompt": row["prompt"], "completion": row["chosen"], **ids, **tools}


def _field(row: Row, column: str) -> Any:
    value = row.get(column)
    if value is None:
        raise BadRow(MISSING_FIELD, f"{column} is missing")
    if not isinstance(value, str) and not is_messages(value):
        raise BadRow(NOT_TEXT, f"{column}: expected text or a list of messages, got {type(value).__name__}")
    if isinstance(value, str):
        refuse_written_messages(column, value)
        return value
    return [plain_message(message) for message in value]


def _said(column: str, value: Any) -> Any:
    """Learned text or messages: not empty, and the assistant's."""
    if isinstance(value, list) and any(m["role"] in ("user", "system") for m in value):
        raise BadRow(DIFFERENT_PROMPTS, f"{column} has a message that is not an assistant's")
    if not has_text(value):
        raise BadRow(EMPTY, f"{column} is empty")
    return value


def _completion(row: Row, chat: bool) -> Row:
    prompt, completion = _field(row, "prompt"), _said("completion", _field(row, "completion"))
    if chat:
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        completion = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    if isinstance(prompt, str) != isinstance(completion, str):
        raise BadRow(UNKNOWN_FORM, "prompt and completion mix text and chat messages")
    return {"prompt": prompt, "completion": completion}


def _instruction(row: Row, chat: bool) -> Row:
    output = _said("output", _field(row, "output"))
    if not isinstance(output, str):
        raise BadRow(NOT_TEXT, "output: expected text, got a list of messages")
    prompt = alpaca_prompt(row, chat)
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": output}] if chat else output}


def _sharegpt(row: Row, chat: bool) -> Row:
    turns = row.get("conversations")
    if not isinstance(turns, list):
        _field(row, "conversations")
        raise BadRow(NOT_TEXT, f"conversations: expected a list of messages, got {type(turns).__name__}")
    return _conversation(row | {"messages": chat_messages("conversations", turns)}, chat)


def _text(row: Row, chat: bool) -> Row:
    text = _field(row, "text")
    if chat or not isinstance(text, str):
        raise BadRow(NOT_TEXT, "text: is no chat; give messages")
    return {"prompt": "", "completion": _said("text", text)}


def _conversation(row: Row, chat: bool) -> Row:
    messages = _field(row, "messages")
    if isinstance(messages, str):
        raise BadRow(NOT_TEXT, "messages: expected a list of messages, got str")
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow(MISSING_FIELD, "messages do not end with the assistant's")
    if len(messages) == 1 and not row.get("system"):
        raise BadRow(MISSING_FIELD, "messages hold no question to the answer")
    _said("messages", messages[-1:])
    return {"messages": messages}


def refuse_overlap(trained: Dataset, held_out: Dataset | None) -> None:
    """Rows that are both learned and judged on.

    Raises:
        UserError: naming the first row of data.eval that is also in data.train.
    """
    if held_out is None:
        return
    known = {tuple(ids) for ids in trained["input_ids"]}
    for number, ids in enumerate(held_out["input_ids"], start=1):
        if tuple(ids) in known:
            raise UserError(
                f"data.eval: usable row {number} is also in data.train: judge on rows that are not learned"
            )
