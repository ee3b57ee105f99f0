"""Chains of thought for log-probability rewards: where a sample's chain ends, and the reference answer behind it.

    sample      z = "2+4=6 1+3=4 Answer:" + " 46"         drawn; kept as token ids
    scored row  z                         + " 46" + EOS   the reference answer, teacher-forced

The chain is everything up to and including the marker: stopping there is an act of the policy, and has a gradient. The
answer is tokenised as it stands after the marker; where the sampled token that ends the marker also begins the answer,
the chain is cut before that token and the rest of its text is tokenised with the answer. The end token belongs to the
answer (our choice; VeriFree, too, scores what closes it, the likelihood paper does not say).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignment.errors import UserError
from alignment.models.ends import end_of, why_endless


def check_marker(tokenizer: Any, marker: str, separator: str, answer: str) -> None:
    """UserError where a token would span marker and answer, so that the answer could not be scored in context."""
    tail = separator + answer
    alone = tokenizer(tail, add_special_tokens=False).input_ids
    whole = tokenizer(marker + tail, add_special_tokens=False).input_ids
    if whole[len(whole) - len(alone) :] != alone:
        raise UserError(
            f"rollout.answer: the tokenizer joins the end of the marker {marker!r} with what follows it, "
            f"{tail[:12]!r}; choose another separator"
        )


def cut_chain(ids: Sequence[int], marker: str, tokenizer: Any) -> tuple[list[int], str] | None:
    """(token ids of the chain, text between its end and the marker's end); None where the marker is not in the text.

    Args:
        ids: a sample's token ids.
        marker: what ends a chain; its first occurrence counts.
    """

    def text(n: int) -> str:
        return str(tokenizer.decode(ids[:n], skip_special_tokens=True))

    if marker not in text(len(ids)):
        return None
    low, high = 1, len(ids)  # the first prefix that has the whole marker
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if marker in text(middle) else (middle + 1, high)
    whole = text(low)
    end = whole.index(marker) + len(marker)
    if end == len(whole):
        return list(ids[:low]), ""
    return list(ids[: low - 1]), whole[len(text(low - 1)) : end]


def forced_answer(
    tokenizer: Any, between: str, separator: str, answer: str, chat: bool = False
) -> tuple[list[int], int]:
    """(token ids of `between + separator + answer`, with the end token; how many of them come before the answer).

    A token that spans the separator and the answer counts as the answer's.

    Args:
        between: text between the chain's end and the marker's.
        chat: whether the prompt is chat messages: the answer then ends as the chat template ends a reply.

    Raises:
        UserError: there is no such end.
    """
    encoded = tokenizer(between + separator + answer, add_special_tokens=False, return_offsets_mapping=True)
    start = len(between + separator)
    first = next((i for i, (_, stop) in enumerate(encoded.offset_mapping) if stop > start), len(encoded.input_ids))
    end = end_of(tokenizer, chat)
    if end is None:
        raise UserError(why_endless(tokenizer) if chat else "model: the tokenizer has no EOS token")
    return [*encoded.input_ids, end], first


def sampled_answer(text: str, marker: str) -> str | None:
    """What a sample says after the marker, without spaces around it; None where there is no marker."""
    _, found, answer = text.partition(marker)
    return answer.strip() if found else None
