"""Rows as the text that is tokenised, and what is lost or added on the way.

Chat templates drop what they do not know (roles, tools, reasoning), and some drop thoughts before an answer. Two
checks, on the rendering itself: once per shape of conversation, with made-up words in every place that carries
meaning; and for every message of every row, whether its text stands in the rendering. And special tokens that a row's
own text spells out become the tokenizer's marks: an end of turn in a question lets the user write the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from alignment.data.messages import PLAIN, TextRules
from alignment.data.preferences import CONTROL_TOKEN, LOST_TEXT, UNKNOWN_FORM, BadRow
from alignment.errors import nearest
from alignment.models.chat import render, template_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Ids = list[int]
Message = dict[str, Any]

# Roles of transformers' chat templates; others count where the template names them.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
_SPACE = re.compile(r"\s+")
_TAGS = re.compile(r"</?think>")


class Renderer:
    """Rows of one tokenizer to texts and token ids.

    Attributes:
        rules: what becomes of special tokens in a row's text.
        controls: rows so far whose text has special tokens, and which were not refused for them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: TextRules = PLAIN):
        self.tokenizer, self.rules = tokenizer, rules
        self.controls = 0
        self._shapes: dict[Any, str | None] = {}

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Any special token; tokens that are blanks are text."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        tokens = sorted(filter(str.strip, added | {*self.tokenizer.all_special_tokens}), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    # --- special tokens in a row's own text -----------------------------------------------------------------------

    def controlled(self, row: Row, columns: Sequence[str]) -> bool:
        """Whether a row's text spells out special tokens; a text may begin with BOS, and its response end with EOS.

        Raises:
            BadRow: it does, and such rows are refused.
        """
        for column in columns:
            value = row[column]
            if isinstance(value, str):
                texts = [self._between(column, value)[1]]
            else:
                texts = [text for message in value for text in _texts(message)]
            found = next((match for text in texts if (match := self._control.search(text))), None)
            if found is None:
                continue
            if self.rules.control_tokens == "refuse":
                raise BadRow(
                    CONTROL_TOKEN,
                    f"{column}: its text has the special token {found[0]!r}: set data.control_tokens: text or keep",
                )
            self.controls += 1
            return True
        return False

    def notes(self, role: str) -> list[str]:
        """What is worth a line of the terminal."""
        if not self.controls:
            return []
        how = "read as text" if self.rules.control_tokens == "text" else "kept as tokens"
        return [f"{self.controls} {role} rows have special tokens in their text: {how} (data.control_tokens)"]

    def as_text(self, row: Row, columns: Sequence[str]) -> Row:
        """The row with marks around the special tokens in its text, for `marked_ids`."""
        return row | {column: self._marked(column, row[column]) for column in columns}

    def _marked(self, column: str, value: Any) -> Any:
        from transformers.utils.chat_template_utils import mark_control_tokens

        if not isinstance(value, str):
            return mark_control_tokens(value, self._control)
        before, text, after = self._between(column, value)
        return before + str(mark_control_tokens(text, self._control)) + after

    def _between(self, column: str, text: str) -> tuple[str, str, str]:
        """The BOS token that a prompt begins with, a text, and the EOS token that a response ends with."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        before = str(bos) if bos and column == "prompt" and text.startswith(str(bos)) else ""
        after = str(eos) if eos and column != "prompt" and text.endswith(str(eos)) else ""
        return before, text[len(before) : len(text) - len(after)], after

    def marked_ids(self, text: str, *, chat: bool) -> Ids:
        """Token ids of a text with marks: what stands between them is read as ordinary text.

        Args:
            text: of rows that went through `as_text`.
            chat: the template has written what stands around it; else the tokenizer writes what it puts around text.
        """
        from transformers.utils.chat_template_utils import encode_marked_chat

        ids = list(encode_marked_chat(self.tokenizer, text))
        if chat:
            return ids
        whole, bare = (list(self.tokenizer("a", add_special_tokens=s)["input_ids"]) for s in (True, False))
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return whole[:start] + ids + whole[start + len(bare) :]

    # --- what the template drops ----------------------------------------------------------------------------------

    def check(self, messages: Sequence[Message], tools: str | None, text: str, what: str) -> None:
        """Refuse a conversation that is not whole in its rendering.

        Args:
            messages: prompt and response.
            tools: of the conversation, as JSON text.
            text: the rendering.
            what: the messages' name in errors.

        Raises:
            BadRow: a role that nobody knows (unknown_form), or text, a call or a tool that is not there (lost_text).
        """
        self._check_roles(messages, what)
        shape = (*((m["role"], bool(m["content"].strip()), *_extras(m)) for m in messages), bool(tools))
        if shape not in self._shapes:
            self._shapes[shape] = self._lost_of_shape(messages, bool(tools))
        lost = self._shapes[shape]
        if lost is not None:
            raise BadRow(LOST_TEXT, f"{what}: the chat template drops {lost}")
        place = 0
        for message in messages:
            for piece in _texts(message):
                if place >= 0:
                    words = piece.strip()
                    at = text.find(words, place)
                    place = at + len(words) if at >= 0 else -1
        if place < 0:
            self._check_closely(messages, text, what)

    def _check_roles(self, messages: Sequence[Message], what: str) -> None:
        for message in messages:
            role = message["role"]
            if (
                role in ROLES
                or f"'{role}'" in template_text(self.tokenizer)
                or f'"{role}"' in template_text(self.tokenizer)
            ):
                continue
            hint = f"; did you mean {_OTHER_NAMES[role]!r}" if role in _OTHER_NAMES else nearest(role, ROLES)
            raise BadRow(UNKNOWN_FORM, f"{what}: unknown role {role!r:.40}{hint}")

    def _lost_of_shape(self, messages: Sequence[Message], tools: bool) -> str | None:
        """What a template drops of a conversation of this shape, whatever its words; None where it refuses it."""
        from jinja2 import TemplateError

        probe, wanted = _probe(messages)
        listed = json.dumps([_TOOL]) if tools else None
        if tools:
            wanted["tools"] = ["qztoolzq", "qzparameterzq"]
        try:
            text = render(self.tokenizer, [probe], generation=False, tools=[listed])[0]
        except (TemplateError, TypeError, ValueError):
            return None  # it may take the row's own words; what stands in it is looked for there
        return next((name for name, words in wanted.items() if any(word not in text for word in words)), None)

    def _check_closely(self, messages: Sequence[Message], text: str, what: str) -> None:
        """As in `check`, where a plain search failed: templates move system messages, write thoughts on lines of their
        own, or what a tool returned as JSON; spaces do not matter."""
        squeezed, place = _SPACE.sub("", text), 0
        pieces = [(number, *part) for number, m in enumerate(messages, start=1) for part in _parts(m)]
        for number, words, thought in pieces:
            spellings = (words, _SPACE.sub("", json.dumps(words, ensure_ascii=False)[1:-1]))
            ends = [at + len(w) for w in spellings if (at := squeezed.find(w, place)) >= 0]
            if ends:
                place = min(ends)
                continue
            if max(map(squeezed.count, spellings)) >= sum(words == other for _, other, _ in pieces):
                continue
            turn = f"message {number} ({messages[number - 1]['role']})"
            if thought:
                remedy = "data.reasoning: remove trains without any"
                raise BadRow(LOST_TEXT, f"{what}: the chat template drops the thoughts of {turn}: {remedy}")
            raise BadRow(LOST_TEXT, f"{what}: the text of {turn} is not in what the chat template writes")


_TOOL = {
    "type": "function",
    "function": {
        "name": "qztoolzq",
        "description": "qztellszq",
        "parameters": {
            "type": "object",
            "properties": {"qzparameterzq": {"type": "string", "description": "qzsayszq"}},
        },
    },
}


def _extras(message: Message) -> tuple[bool, int]:
    """Whether there is reasoning, and the number of calls."""
    if len(message) == 2:
        return False, 0
    return "reasoning_content" in message, len(json.loads(message["tool_calls"])) if "tool_calls" in message else 0


def _texts(message: Message) -> list[str]:
    """What a message says, in the order in which templates write it."""
    if len(message) == 2:
        return [message["content"]]
    return [message[key] for key in ("reasoning_content", "content") if message.get(key)]


def _parts(message: Message) -> list[tuple[str, bool]]:
    """What a message says, without spaces, and whether it is a thought; cut at the tags that templates write anew."""
    before, tag, after = message["content"].rpartition("</think>")
    texts = [(str(message.get("reasoning_content") or ""), True), (before if tag else "", True), (after, False)]
    parts = [(_SPACE.sub("", part), thought) for text, thought in texts for part in _TAGS.split(text)]
    return [(part, thought) for part, thought in parts if part]


def _probe(messages: Sequence[Message]) -> tuple[list[Message], dict[str, list[str]]]:
    """A conversation of the same shape with made-up words, and the words by what they stand for."""
    probe: list[Message] = []
    wanted: dict[str, list[str]] = {}
    for number, message in enumerate(messages, start=1):
        turn, made = f"message {number} ({message['role']})", {**message}
        thinks, calls = _extras(message)
        if message["content"].strip():
            made["content"] = f"qzword{number}zq"
            wanted[f"the text of {turn}"] = [made["content"]]
        if thinks:
            made["reasoning_content"] = f"qzthought{number}zq"
            wanted[f"the reasoning of {turn}; data.reasoning: remove trains without any"] = [made["reasoning_content"]]
        if calls:
            names = [f"qz{number}call{i}zq" for i in range(calls)]
            made["tool_calls"] = json.dumps(
                [
                    {"id": f"qz{number:03d}{i:04d}", "type": "function"}
                    | {"function": {"name": name, "arguments": {"qzkeyzq": f"{name}value"}}}
                    for i, name in enumerate(names)
                ]
            )
            wanted[f"the tool_calls of {turn}"] = [*names, *(f"{name}value" for name in names)]
        if "tool_call_id" in message:
            made["tool_call_id"] = "qz0010000"
        probe.append(made)
    return probe, wanted
