"""Which tokens end a response: the one place that training, sampling, scoring and saved models ask.

    turn_of(tokenizer)                          what the chat template writes behind a reply
    end_of(tokenizer, chat=True)                the token that training puts at a response's end
    ends_of(tokenizer, model.generation_config) every token that sampling stops at, each with its origin

A chat response ends with the token that closes the reply wherever it stands in a conversation: ChatML's <|im_end|>,
Phi-3's <|end|>. What the template writes behind it (a line end; Phi-3's EOS, which closes the conversation) belongs to
no response: sampling stops at the first end, so nothing behind one is ever drawn. Text ends with the tokenizer's EOS.

A template may write nothing behind a reply (GLM: the next turn's <|user|> ends it). Then `model.end_of_turn` names the
token; the tokenizer keeps it (`tokenizer_config.json`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from alignment.errors import UserError, nearest
from alignment.models.chat import chat_ids, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "end_of_turn"  # of the recipe's `model` section, and of tokenizer_config.json


@dataclass(frozen=True)
class Turn:
    """What a chat template writes behind a reply.

    Attributes:
        end: the token that ends a reply; None where the template writes none and none is named.
        behind: ids that the template may write behind it, which belong to no response.
        written: whether the template writes `end`; where not, it is put behind the last message.
        opener: the token behind a reply that begins the user's next turn, where the template ends replies with none.
        probe: ids of a question and its answer.
    """

    end: int | None
    behind: frozenset[int]
    written: bool
    opener: int | None
    probe: tuple[int, ...]

    def closed(self, ids: list[int]) -> list[int]:
        """Ids of a conversation up to the end of its last reply; the end is put there where the template lacks one."""
        if self.end is None:
            return ids
        if not self.written:
            return [*ids, self.end]
        last = len(ids)
        while last and ids[last - 1] != self.end and ids[last - 1] in self.behind:
            last -= 1
        return ids[:last] if last and ids[last - 1] == self.end else ids


_TURNS: WeakKeyDictionary[Any, tuple[Any, Any, Turn]] = WeakKeyDictionary()


def turn_of(tokenizer: PreTrainedTokenizerBase) -> Turn:
    """Looked up by rendering one made-up conversation; kept as long as the tokenizer's template stays the same.

    Raises:
        jinja2.TemplateError, TypeError, ValueError: the template fails on a plain question and answer.
    """
    named = tokenizer.init_kwargs.get(KEY)
    template: Any = tokenizer.chat_template
    kept = _TURNS.get(tokenizer)
    if kept is not None and kept[:2] == (template, named):
        return kept[2]
    turn = _looked_up(tokenizer, named)
    _TURNS[tokenizer] = (template, named, turn)
    return turn


def _looked_up(tokenizer: Any, named: str | None) -> Turn:
    from jinja2 import TemplateError

    ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    final = _ids(tokenizer, [ask, answer])
    try:
        inner = _ids(tokenizer, [ask, answer, ask])
    except (TemplateError, TypeError, ValueError):  # it knows one question only
        inner = []
    markers = _markers(tokenizer)

    def blank(token: int) -> bool:
        return token not in markers and not str(tokenizer.decode([token])).strip()

    start = len(final)
    while start and (final[start - 1] in markers or blank(final[start - 1])):
        start -= 1
    tail = final[start:]
    if any(token in markers for token in tail):
        length = _shared_tail(tail, inner, final[start - 1] if start else None)
        places = [i for i, token in enumerate(tail[:length]) if token in markers]
        place = places[-1] if places else next(i for i, token in enumerate(tail) if token in markers)
        return Turn(tail[place], frozenset(tail[place + 1 :]) - {tail[place]}, True, None, tuple(final))
    opener = _opener(inner, final[start - 1] if start else None, markers, blank)
    end = None if named is None else int(tokenizer.convert_tokens_to_ids(named))
    return Turn(end, frozenset(), False, opener, tuple(final))


def _ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    return chat_ids(tokenizer, [messages], generation=False)[0]


def _markers(tokenizer: Any) -> set[int]:
    """Added tokens that are no white space: only these can end a turn."""
    added = tokenizer.added_tokens_decoder.items()
    return set(tokenizer.all_special_ids) | {i for i, token in added if token.special or str(token.content).strip()}


def _shared_tail(tail: Sequence[int], inner: Sequence[int], reply: int | None) -> int:
    """How much of what stands behind a last reply also stands behind one that the user answers.

    `reply` is the reply's last token; every place of it in `inner` is tried, as templates write text of their own.
    """
    longest = 0
    for place in (i for i, token in enumerate(inner) if token == reply):
        behind = inner[place + 1 :]
        longest = max(
            longest, next((n for n, (a, b) in enumerate(zip(tail, behind, strict=False)) if a != b), len(tail))
        )
    return longest


def _opener(inner: Sequence[int], reply: int | None, markers: set[int], blank: Any) -> int | None:
    """The first marker behind a reply that the user answers, with nothing but white space between."""
    for place in reversed([i for i, token in enumerate(inner) if token == reply]):
        behind = next((token for token in inner[place + 1 :] if not blank(token)), None)
        if behind in markers:
            return behind
    return None


def end_of(tokenizer: PreTrainedTokenizerBase, chat: bool) -> int | None:
    """The token that a response ends with in training: of chat the turn's, of text EOS; None where there is none."""
    end = turn_of(tokenizer).end if chat else tokenizer.eos_token_id
    return None if end is None else int(end)


def why_endless(tokenizer: PreTrainedTokenizerBase) -> str:
    """The cause and the remedy where a chat template ends replies with no token."""
    said = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "REPLY"}]
    behind = render(tokenizer, [said], generation=False)[0].rpartition("REPLY")[2].strip()
    if behind:
        return (
            f"model: the chat template ends a reply with {behind!r}, which is no token of this tokenizer; use the "
            "tokenizer that the template was written for"
        )
    opener = turn_of(tokenizer).opener
    token = None if opener is None else tokenizer.convert_ids_to_tokens(opener)
    return (
        "model: the chat template writes no token that ends a reply"
        + ("" if token is None else f", the next turn's {token!r} does")
        + f"; set model.{KEY}={'TOKEN' if token is None else repr(token)}, to be trained and to stop samples"
    )


@dataclass(frozen=True)
class Ends:
    """The tokens that sampling stops at.

    Attributes:
        origins: id → where it comes from; the one that training writes first.
    """

    origins: dict[int, tuple[str, ...]]

    @property
    def ids(self) -> list[int]:
        """The ids."""
        return list(self.origins)

    @property
    def configured(self) -> int | list[int] | None:
        """As `eos_token_id` of a generation config has them."""
        return self.ids if len(self.ids) > 1 else next(iter(self.ids), None)

    def lines(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Each end as `151645 '<|im_end|>' (chat template, tokenizer)`."""
        return [
            f"{token} {tokenizer.convert_ids_to_tokens(token)!r} ({', '.join(origin)})"
            for token, origin in self.origins.items()
        ]


def ends_of(tokenizer: PreTrainedTokenizerBase, generation_config: Any = None) -> Ends:
    """Every token that ends a response, whatever the prompt's form: a sample is cut at the first of them.

    Args:
        tokenizer: its chat template and EOS.
        generation_config: the model's, which may name more (Llama 3's <|eom_id|>); None: not known.
    """
    from jinja2 import TemplateError

    found: dict[int, list[str]] = {}

    def add(ids: Iterable[Any], origin: str) -> None:
        for token in ids:
            if token is not None:
                found.setdefault(int(token), []).append(origin)

    if tokenizer.chat_template:
        try:
            turn = turn_of(tokenizer)
            add([turn.end], "chat template" if turn.written else KEY)
        except (TemplateError, TypeError, ValueError):  # said where chat rows are rendered; text needs none
            pass
    add([tokenizer.eos_token_id], "tokenizer")
    add(configured_ids(generation_config), "generation config")
    return Ends({token: tuple(origins) for token, origins in found.items()})


def configured_ids(generation_config: Any) -> list[int]:
    """`eos_token_id` of a generation config, a number or a list, as a list; empty for None."""
    ids = None if generation_config is None else generation_config.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def settle_ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> Ends:
    """Write all ends into the model's generation config: it is saved with the weights, and what samples from them
    elsewhere (transformers, vLLM) stops there, too."""
    config = model.generation_config
    ends = ends_of(tokenizer, config)
    if config is not None and set(configured_ids(config)) != set(ends.ids):
        config.eos_token_id = ends.configured
    return ends


def write_ends(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Beside an adapter, which is saved without its base's generation config, a file with the ends alone."""
    from transformers import GenerationConfig

    if model.can_generate() and not (folder / "generation_config.json").is_file():
        GenerationConfig(eos_token_id=ends_of(tokenizer, model.generation_config).configured).save_pretrained(folder)


def read_generation_config(path: str, **options: Any) -> Any:
    """The generation config beside a model's weights, without the weights; None where there is none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path, **options)
    except (OSError, ValueError):
        return None


def name_end(tokenizer: PreTrainedTokenizerBase, named: str | None, path: str, **options: Any) -> None:
    """Keep with the tokenizer which token ends a turn, where its chat template writes none.

    That is the recipe's, or the token that begins the user's next turn if the model's generation config stops there
    (as GLM-4's does).

    Args:
        named: `model.end_of_turn`; None: not given.
        path: of the model, whose generation config is read where it is needed.
        options: of `read_generation_config`.

    Raises:
        UserError: `named` is not one token of the tokenizer, or the template ends turns by itself.
    """
    from jinja2 import TemplateError

    try:
        turn = turn_of(tokenizer) if tokenizer.chat_template else None
    except (TemplateError, TypeError, ValueError):  # said where chat rows are rendered; text needs none
        turn = None
    if named is not None:
        _refuse_end(tokenizer, named, turn)
        tokenizer.init_kwargs[KEY] = named
    elif turn is not None and turn.end is None and turn.opener is not None:
        stops = configured_ids(read_generation_config(path, **options))
        if turn.opener in stops:
            tokenizer.init_kwargs[KEY] = tokenizer.convert_ids_to_tokens(turn.opener)


def _refuse_end(tokenizer: Any, named: str, turn: Turn | None) -> None:
    where = f"model.{KEY}: {named!r}"
    if turn is None:
        raise UserError(f"{where}: the tokenizer has no chat template; text ends with its EOS: leave the key out")
    ids = tokenizer(named, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        hint = nearest(named, [str(token.content) for token in tokenizer.added_tokens_decoder.values()])
        raise UserError(f"{where}: is {len(ids)} tokens of this tokenizer, and one is needed{hint}")
    if turn.written and turn.end != ids[0]:
        token = tokenizer.convert_ids_to_tokens(turn.end)
        raise UserError(f"{where}: the chat template ends a reply with {token!r} itself; leave the key out")
