"""Degraded copies of responses for SPO: the same text with ever more of its key phrases removed.

    rake("the red apple, red, and a green apple pie")   # [(phrase, score, spans)], best first
    degraded(text, degrees=3, removal="rake", rng_seed=0)   # [(text, 0), (copy, 1), (copy, 2)], or [] if too short

Key phrases are RAKE's (Rose, Engel, Cramer, Cowley 2010, "Automatic keyword extraction from individual documents"),
from memory of that chapter, checked against hand-computed scores. How SPO (Li et al. 2024, arXiv:2409.17791) removes
them was not seen; everything marked CHOICE is ours. Not here: truncation (the collator), the head and the loss.

The stop words are the closed-class words of English (articles, pronouns, prepositions, conjunctions, auxiliaries,
common adverbs) and contractions, written down for this file: not Fox's list that the chapter used. Text of other
languages has no stop words then, so that its phrases are whole clauses.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from alignment.objectives.base import Objective

Span = tuple[int, int]
Removal = Literal["rake", "random", "length"]

STOP_WORDS = frozenset(
    """
    a about above across after again against ain't all almost along already also although always am among an and
    another any anyone anything are aren't around as at away back be became because become been before behind being
    below beside between beyond both but by came can can't cannot come could couldn't did didn't do does doesn't doing
    don't done down during each either else enough even ever every everyone everything few for from further gave get
    gets getting give given gives go goes going gone got had hadn't has hasn't have haven't having he he'd he'll he's
    hence her here here's hers herself him himself his how how's however i i'd i'll i'm i've if in indeed instead into
    is isn't it it'd it'll it's its itself just keep kept last least less let let's like likely made make makes many
    may maybe me might mine more most much must mustn't my myself neither never next no nobody none nor not nothing
    now of off often on once one only onto or other others otherwise our ours ourselves out over own per perhaps put
    quite rather really said same say says see seem seemed seems seen several shall shan't she she'd she'll she's
    should shouldn't since so some somehow someone something sometimes somewhat soon still such take taken than that
    that'd that'll that's the their theirs them themselves then thence there there's therefore these they they'd
    they'll they're they've thing things this those though through thus to together too toward towards under unless
    until up upon us use used uses using very via was wasn't we we'd we'll we're we've well went were weren't what
    what's whatever when whenever where where's wherever whether which while who who'd who'll who's whoever whole whom
    whose why will with within without won't would wouldn't yes yet you you'd you'll you're you've your yours
    yourself yourselves
    """.split()
)
STOP_WORDS_SHA256 = hashlib.sha256("\n".join(sorted(STOP_WORDS)).encode()).hexdigest()

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_CLOSING = frozenset(".,;:!?)]}”’…")


def rake(text: str) -> list[tuple[str, float, list[Span]]]:
    """Candidate phrases: runs of words between stop words, punctuation and line ends, best score first.

    A word scores degree / frequency, where its degree is the summed length of the phrases that it occurs in; a phrase
    scores the sum of its words. Ties go to the phrase that occurs first.

    Returns:
        (words in lower case, score, character spans of every occurrence).
    """
    occurrences: dict[tuple[str, ...], list[Span]] = {}
    words: list[str] = []
    start = end = 0
    for match in [*_WORD.finditer(text), None]:
        word = "" if match is None else match.group().lower().replace("’", "'")
        stops = match is None or word in STOP_WORDS
        if words and (stops or text[end : match.start() if match else None].strip(" \t")):
            occurrences.setdefault(tuple(words), []).append((start, end))
            words = []
        if match is not None and not stops:
            start = match.start() if not words else start
            end = match.end()
            words.append(word)
    frequency: Counter[str] = Counter()
    degree: Counter[str] = Counter()
    for phrase, spans in occurrences.items():
        for word in phrase:
            frequency[word] += len(spans)
            degree[word] += len(spans) * len(phrase)
    scored = [(" ".join(p), sum(degree[w] / frequency[w] for w in p), s) for p, s in occurrences.items()]
    return sorted(scored, key=lambda found: (-found[1], found[2][0]))


def degraded(text: str, degrees: int, removal: Removal = "rake", rng_seed: int | str = 0) -> list[tuple[str, int]]:
    """`text` and copies with ever more of its key content removed, each with its degree as label.

    CHOICE: key phrases are the best third as RAKE has it (a third as many as there are different content words), but
    at least `degrees` - 1; degree k removes the best k / (degrees - 1) of them, wherever one stands by itself.
    CHOICE: a text with fewer phrases gives nothing at all rather than some of the degrees. So every text that gives
    copies gives each degree once: classes are balanced, and what a text is about says nothing about the label.

    Every copy comes from the one before by deleting characters; the first is the text itself.

    Args:
        text: a response.
        degrees: N, the text itself included.
        removal: `rake`; or a control that removes as many words: `random` ones outside the key phrases, or, for
            `length`, the last ones. Final punctuation stays.
        rng_seed: of `random`.

    Returns:
        N pairs (text, label), labels 0 to N - 1; empty where the text has too few phrases (or, for `random`, too few
        words outside them).
    """
    copies, kept = [(text, 0)], [True] * len(text)
    steps = _steps(text, degrees, removal, rng_seed)
    for label, spans in enumerate(steps, start=1):
        for span in spans:
            _delete(text, kept, span)
        copies.append(("".join(c for c, stays in zip(text, kept, strict=True) if stays), label))
    return copies if steps else []


def _steps(text: str, degrees: int, removal: Removal, rng_seed: int | str) -> list[list[Span]]:
    """What each degree removes beyond the one before."""
    ranked = rake(text)
    different = {word for phrase, _, _ in ranked for word in phrase.split()}
    top = ranked[: max(math.ceil(len(different) / 3), degrees - 1)]
    if len(top) < degrees - 1:
        return []
    cuts = [k * len(top) // (degrees - 1) for k in range(degrees)]
    steps = [[span for _, _, spans in top[a:b] for span in spans] for a, b in zip(cuts, cuts[1:], strict=False)]
    if removal == "rake":
        return steps
    words = [match.span() for match in _WORD.finditer(text)]
    keys = [span for spans in steps for span in spans]
    counts = [sum(_inside(word, spans) for word in words) for spans in steps]
    totals = [sum(counts[: k + 1]) for k in range(len(counts))]
    if removal == "length":
        return [[(words[-n][0], words[-1][1])] for n in totals]
    others = [word for word in words if not _inside(word, keys)]
    if len(others) < totals[-1]:
        return []
    random.Random(rng_seed).shuffle(others)
    return [others[total - n : total] for n, total in zip(counts, totals, strict=True)]


def _inside(word: Span, spans: list[Span]) -> bool:
    return any(start <= word[0] and word[1] <= end for start, end in spans)


def _delete(text: str, kept: list[bool], span: Span) -> None:
    """Remove a span, and one space that would be left doubled, at either end, or in front of punctuation."""
    kept[span[0] : span[1]] = [False] * (span[1] - span[0])
    left = next((i for i in range(span[0] - 1, -1, -1) if kept[i]), None)
    right = next((i for i in range(span[1], len(text)) if kept[i]), None)
    if left is not None and text[left] == " " and (right is None or text[right].isspace() or text[right] in _CLOSING):
        kept[left] = False
    elif right is not None and text[right] == " " and (left is None or text[left] == "\n"):
        kept[right] = False


def with_degree_copies(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, objective: Objective, seed: int
) -> Dataset:
    """Rows with `degree_ids` and `degree_labels`, for each response of `objective.responses` N copies in order.

    The first copy of a response is its own ids. The others are encoded from the shortened text and carry on with the
    response's own end: its end token, and what a chat template puts behind it. So the last token is of one kind at
    every degree. Where there are no copies the labels are -1 and the ids stand in: a response that is too short
    (`degraded`), has several messages, or whose tokens are not what its text encodes to (a sample cut within a word,
    for one: its copies would differ from it by more than what was removed).

    Args:
        dataset: has `chosen_ids` and `rejected_ids`.
        tokenizer: the model's.
        objective: has `degrees`, `responses` and `removal`.
        seed: of the random removal.
    """
    settings: Any = objective
    columns = ["chosen_ids", "rejected_ids"] if settings.responses == "both" else [f"{settings.responses}_ids"]
    ends = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}

    def copies(row: dict[str, Any], index: int) -> dict[str, Any]:
        ids: list[list[int]] = []
        labels: list[int] = []
        for column in columns:
            own = row[column]
            found = _copies(tokenizer, own, ends, settings.degrees, settings.removal, f"{seed} {index} {column}")
            ids += found or [own[:2]] * settings.degrees
            labels += range(settings.degrees) if found else [-1] * settings.degrees
        return {"degree_ids": ids, "degree_labels": labels}

    return dataset.map(copies, with_indices=True, desc="  degraded copies")


def _copies(
    tokenizer: Any, ids: list[int], ends: set[int], degrees: int, removal: Removal, seed: str
) -> list[list[int]]:
    """Token ids of the response and its copies; empty where there are none."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    body, tail = ids[:stop], ids[stop:]
    if not body or any(token not in ends and tokenizer.decode([token]).strip() for token in tail):
        return []
    text = tokenizer.decode(body, clean_up_tokenization_spaces=False)
    # Some tokenizers put a space before a text's first word: behind a line end they see it as the model did.
    for prefix in ("", "\n"):
        start = len(_encode(tokenizer, prefix)) if prefix else 0
        if _encode(tokenizer, prefix + text)[start:] == body:
            found = degraded(text, degrees, removal, seed)[1:]
            copies = [_encode(tokenizer, prefix + copy)[start:] + tail for copy, _ in found]
            return [ids, *copies] if copies and all(copies) else []
    return []


def _encode(tokenizer: Any, text: str) -> list[int]:
    encoded: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return encoded
