"""Reads which of two responses a judge's answer prefers, from its text and from its log-probs.

The forms are those that public judge prompts ask for: a letter alone (`TEMPLATE` of `judge`), `[[A]]`, `[[C]]`
(FastChat, RewardBench), `[[A>>B]]` (Arena-Hard), `m` and `M` or a ranking (AlpacaEval), `[RESULT] A` (Prometheus),
`Output (a)` (LLMBar, OffsetBias), `1`, `2`, `Tie` (PandaLM), `8 7` (JudgeLM, FastChat), `Preferred: "A"` (DPO), JSON,
`\\boxed{A}`, `<answer>`, and plain sentences. An answer that says two things has no verdict: Arena-Hard's rule, not
FastChat's, which reads `[[A]] … [[B]]` as A. Nothing is guessed; `judge` counts what has no verdict.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

FIRST, TIE, SECOND = 1.0, 0.5, 0.0

# What models think aloud, as servers give it: (opens, closes).
_THOUGHTS = (
    (
        r"<(?:seed:)?(?:think|thinking|thought|reasoning|reflection|analysis|scratchpad)>",
        r"</(?:seed:)?(?:think|thinking|thought|reasoning|reflection|analysis|scratchpad)>",
    ),
    (r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    (r"◁think▷", r"◁/think▷"),  # Kimi
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Command A
    (r"<\|channel\|>(?:analysis|commentary)\b", r"<\|channel\|>final(?:<\|message\|>)?"),  # gpt-oss
    (r"<\|channel>thought\b", r"<channel\|>"),  # Gemma
    (r"\A\s*analysis(?=[A-Z])", r"assistantfinal"),  # gpt-oss where the server drops its special tokens
)
_ENDS = re.compile(r"(?:\s|<\|[^|<>]*\|>|</s>)*\Z")  # end tokens, where a server gives them as text
_NOUN = (
    r"(?i:response|answer|assistant|output|model|option|candidate|completion|summary|chatbot|reply|text|system|"
    r"translation|solution)"
)
_START, _STOP = r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])"
_LETTER = rf"(?:\([ABab]\)|\[[AB]\](?!\])|[AB]{_STOP}\)?)"
_LABEL = (
    rf"{_START}(?:(?i:the\s+)?{_NOUN}[\s_\-]*[\[(#]*\s*(?:[ABab12]|(?i:one|two)){_STOP}\s*[\])]*"
    rf"|{_LETTER}|(?i:the\s+(?:first|second)(?:\s+(?:one|{_NOUN}))?){_STOP})"
)
_OWNED = rf"(?:['’]s(?:\s+{_NOUN})?)?"
_TIE = r"(?i:(?:a\s+)?(?:tie|draw)|tied|equal)"
_HOW = (
    r"(?i:(?:clear|clearly|slightly|significantly|much|far|marginally|definitely|overall|generally|a\s+bit|a\s+little|"
    r"somewhat|considerably|substantially|noticeably|strongly|the|a|an)\s+)*"
)
_BETTER = rf"{_HOW}(?i:(?:better|superior|preferable|preferred|stronger|best)(?:\s+(?:one|choice|{_NOUN}))?|winner)"
_LEAD = (
    r"(?i:(?:overall|therefore|thus|so|hence|but|however|actually|ultimately|finally|in\s+(?:conclusion|summary|my\s+(?:opinion|view))|to\s+conclude|"
    r"conclusion|i\s+(?:think|believe|find)(?:\s+that)?|based\s+on\s+(?:this|the\s+above|my\s+analysis|the\s+analysis))"
    r"\s*[,:]?\s*)*"
)
_OTHER = rf"(?:\s+(?i:than|to|over)\s+(?:(?P<other>{_LABEL}){_OWNED}|(?i:the\s+other(?:\s+(?:one|{_NOUN}))?)))?"
_REASON = r"(?:\s+(?i:overall))?(?:\s*[,;:–—-]?\s*(?i:because|since|due\s+to|as\s+(?:it|they))\b.*)?\s*[.!]*\s*"
_KEY = (
    r"(?i:(?:(?:the|my|final|overall)\s+)*(?:verdict|answer|decision|judge?ment|choice|preference|winner|result|"
    rf"conclusion|selection|pick|vote|response|(?:better|best|preferred|superior|more\s+helpful)(?:\s+(?:one|{_NOUN}))?))"
)
_IS = r"\s*(?:(?::|=|->|→|(?i:is|would\s+be|goes\s+to))\s*)+"
_OPENING = rf"{_LEAD}(?:{_KEY}\s*:\s*)?"
# A whole sentence is one of these, or says nothing that is read. A group's name says who is better.
_SLOT = re.compile(rf"{_LEAD}{_KEY}{_IS}(?:(?P<label>{_LABEL})|(?P<tie>{_TIE})){_REASON}", re.DOTALL)
_SENTENCES = tuple(
    re.compile(form, re.DOTALL)
    for form in (
        rf"{_OPENING}(?P<win>{_LABEL}){_OWNED}\s+(?i:is)\s+{_BETTER}{_OTHER}{_REASON}",
        rf"{_OPENING}(?P<win>{_LABEL})\s+(?i:gives|provides)\s+{_HOW}(?i:better)\s+{_NOUN}{_OTHER}{_REASON}",
        rf"{_OPENING}(?P<win>{_LABEL})\s+(?i:wins){_REASON}",
        rf"{_OPENING}(?i:(?:I|we)(?:['’]d|\s+would)?\s+(?:prefer|choose|pick|select|favou?r|go\s+with))\s+"
        rf"(?P<win>{_LABEL}){_OWNED}{_OTHER}{_REASON}",
        rf"(?P<win>{_LABEL})\s*(?:>>?|≻)\s*(?P<other>{_LABEL})\s*[.!]*\s*",
        rf"{_OPENING}(?P<lose>{_LABEL}){_OWNED}\s+(?i:is)\s+{_HOW}(?i:worse|inferior){_OTHER}{_REASON}",
        rf"{_OPENING}(?P<tie>(?i:it(?:['’]s|\s+is)|this\s+is)\s+{_TIE}){_REASON}",
        rf"{_OPENING}(?P<tie>(?i:both|they|the\s+two)(?:\s+{_NOUN}s?)?|{_LABEL}\s+(?i:and)\s+{_LABEL})\s+(?i:are)\s+"
        rf"(?i:(?:about|roughly)\s+)?(?i:tied|equal|equivalent|equally\s+\w+|of\s+(?:equal|the\s+same)\s+quality)"
        rf"(?:\s+(?i:in\s+quality))?{_REASON}",
        rf"{_OPENING}(?P<tie>(?i:neither))(?:\s+{_NOUN})?(?:\s+{_LABEL}\s+(?i:nor)\s+{_LABEL})?\s+(?i:is)\s+{_BETTER}"
        rf"(?:\s+(?i:than\s+the\s+other))?{_REASON}",
    )
)
_LINE = re.compile(rf"\s*(?:(?P<label>{_LABEL})|(?P<tie>{_TIE}))\s*[.!]*\s*")
_SCORE = r"(\d+(?:\.\d+)?)(?:\s*/\s*\d+)?"
_TWO_SCORES = re.compile(rf"\s*{_SCORE}\s*[,\s]\s*{_SCORE}\s*")  # the first line, in the order of the responses
_ONE_SCORE = re.compile(
    rf"\s*(?P<label>{_LABEL})\s*(?i:score|rating)?\s*[:=]\s*{_SCORE}(?=\s*(?:[,;.\n]|\Z|(?i:out\s+of|points?|and)\b))"
)
_NO_SCORE = re.compile(r"\b(?:rank|error|mistake|fault|penalt|word|token|length)", re.IGNORECASE)
_BRACKETS = re.compile(r"\[\[\s*([^\[\]\n]{1,24}?)\s*\]\]")
_MARKED = (
    _BRACKETS,
    re.compile(r"<(?:answer|verdict|winner|choice|preference|decision)>\s*(.*?)\s*</", re.DOTALL | re.IGNORECASE),
    re.compile(r"\\boxed\{\s*(?:\\text(?:bf)?\{)?([^{}\n]*?)\s*\}"),
    re.compile(r"\[RESULT\]\s*:?\s*([^\n]*)"),
)
_COMPARED = re.compile(r"([AB])\s*(>>?|=|<<?)\s*([AB])")
_CHOSEN = {"winner", "better", "best", "preferred", "choice", "better_response", "preferred_response"}
_JUDGED = _CHOSEN | {"verdict", "final_verdict", "preference", "answer", "decision", "judgment", "judgement", "result"}
_RANKED = ("ranking", "ordered_models", "rankings")
_SIDES = {"a": FIRST, "1": FIRST, "one": FIRST, "first": FIRST, "b": SECOND, "2": SECOND, "two": SECOND}
_OPPOSITE = {"A": "B", "a": "b", "1": "2", "m": "M"} | {"B": "A", "b": "a", "2": "1", "M": "m"}


class Verdict(NamedTuple):
    """What an answer says.

    Attributes:
        first: 1.0: the response shown first is better; 0.0: the second; 0.5: a tie.
        place: where in the text the one letter or digit stands that says so; None where more than one decides.
    """

    first: float
    place: int | None = None


def read_verdict(text: str, *, cut: bool = False) -> Verdict | None:
    """What the answer clearly says, or None.

    Explicit marks (`[[A]]`, `<answer>`, `\\boxed{}`, `[RESULT]`, JSON) go before lines and sentences, and these before
    headings such as "Response A". All of the same kind must agree.

    Args:
        text: the answer, with the model's thoughts if they are in it. A thought that does not end has no verdict.
        cut: the answer was cut at the token limit: what may go on behind its last word is not read.
    """
    plain = without_thoughts(text)
    if plain is None:
        return None
    for claims in (_marked(plain), _said(plain, cut), _headed(plain, cut)):
        found = sorted(claims, key=lambda claim: math.inf if claim.place is None else claim.place)
        if found:
            return found[0] if len({claim.first for claim in found}) == 1 else None
    return None


def without_thoughts(text: str) -> str | None:
    """The answer with its thoughts blanked out, every character in its place; None where a thought does not end.

    Of a thought whose opening was in the prompt (`…</think>`) only the end is there: all before it is thought.
    """
    for opens, closes in _THOUGHTS:
        text = re.sub(rf"{opens}.*?{closes}", _blank, text, flags=re.DOTALL)
        text = re.sub(rf"\A.*{closes}", _blank, text, flags=re.DOTALL)
        if re.search(opens, text):
            return None
    return _ENDS.sub(_blank, text)


def first_from_logprobs(tokens: Sequence[Mapping[str, Any]], text: str, place: int) -> float | None:
    """P(first), normalised over the two labels, at the token that carries the verdict (AlpacaEval's `logprob_parser`).

    p = exp(lp[A] - logsumexp(lp[A], lp[B])), where a label that is not among the alternatives has -inf. Unlike there,
    white space and marks around a label do not count (" A", "A" and "(A" add up).

    Args:
        tokens: `choices[0].logprobs.content` of a chat completion, log-probs in nats.
        text: the answer, which the tokens spell, perhaps after thoughts that the server gives elsewhere.
        place: of the verdict's letter or digit in `text`.

    Returns:
        In [0, 1]; None where the tokens do not spell the text, or the label shares its token with other words.
    """
    label = text[place]
    sides = (label, _OPPOSITE[label])
    token = _token_at(tokens, text, place)
    if token is None or _bare(token.get("token")) != label:
        return None
    given = {str(t.get("token")): t.get("logprob") for t in (*(token.get("top_logprobs") or ()), token)}
    known = {name: float(lp) for name, lp in given.items() if isinstance(lp, int | float) and lp > -math.inf}
    weights = [[lp for name, lp in known.items() if _bare(name) == side] for side in sides]
    if not any(weights):
        return None
    top = max(max(side, default=-math.inf) for side in weights)  # so that nothing underflows
    said, other = (sum(math.exp(lp - top) for lp in side) for side in weights)
    return (said if label in "Aa1m" else other) / (said + other)


def _token_at(tokens: Sequence[Mapping[str, Any]], text: str, place: int) -> Mapping[str, Any] | None:
    """The token that holds the character at `place`; None where the tokens do not end with the text."""
    spelt = "".join(str(token.get("token", "")) for token in tokens)
    body, answer = _ENDS.sub("", spelt), _ENDS.sub("", text).lstrip()
    if not answer or not body.endswith(answer):
        return None
    at = len(body) - len(answer) + place - (len(text) - len(text.lstrip()))
    for token in tokens:
        at -= len(str(token.get("token", "")))
        if at < 0:
            return token
    return None


def _bare(token: Any) -> str:
    return re.sub(r"[\W_]", "", str(token))


def _blank(found: re.Match[str]) -> str:
    return "\n" * len(found[0])


def _side(label: str) -> float:
    """Who a label means: `Response A`, `(b)`, `model_1`, `the second one`."""
    ordinal = re.search(r"(?i)\b(first|second)\b", label)
    if ordinal:
        return FIRST if ordinal[1].lower() == "first" else SECOND
    return _SIDES[_label_at(label)[0].lower()]


def _label_at(label: str) -> re.Match[str]:
    """The letter, digit or word in a label that says which."""
    found = re.search(r"(?:(?<![A-Za-z0-9])|(?<=_))(?:[ABab12]|(?i:one|two))(?![A-Za-z0-9])[\s\])]*\Z", label)
    found = found or re.search(r"[ABab12][\s\])]*\Z", label)
    assert found is not None  # _LABEL ends with one
    return re.compile(r"[A-Za-z]+|\d").search(label, found.start()) or found


def _slot(match: re.Match[str], offset: int = 0) -> Verdict:
    """The verdict of a match with the groups `label` and `tie`."""
    if match["label"] is None:
        return Verdict(TIE)
    exact = re.search(r"(?i)first|second", match["label"]) is None
    at = _label_at(match["label"]) if exact else None
    place = offset + match.start("label") + at.start() if at is not None and len(at[0]) == 1 else None
    return Verdict(_side(match["label"]), place)


def _named(value: Any, *, numbers: bool, letters: bool = True) -> Verdict | None:
    """What stands where a verdict belongs: a label, a comparison or a tie; its place is within the value."""
    text = str(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    compared = _COMPARED.fullmatch(text.strip())
    if compared:
        first, sign, second = compared.groups()
        if first == second:
            return None
        better = TIE if sign == "=" else FIRST if ">" in sign else SECOND
        return Verdict(better if first == "A" else 1.0 - better)
    line = _LINE.fullmatch(text)
    if line:
        return _slot(line)
    alone = re.fullmatch(r"\s*([abmM12])\s*", text) if letters else None
    if alone is None or (alone[1] in "12" and not numbers):
        return None
    return Verdict(FIRST if alone[1] in "am1" else SECOND, alone.start(1))


def _marked(text: str) -> list[Verdict]:
    """Verdicts in explicit marks."""
    claims = [claim for claim, _ in _in_json(text)]
    for form in _MARKED:
        for match in form.finditer(text):
            inside = match[1].translate(_EMPHASIS)
            if form is _BRACKETS and inside in ("C", "Tie", "tie"):  # FastChat's tie
                claims.append(Verdict(TIE))
                continue
            claim = _named(inside, numbers=False)
            if claim is not None:
                claims.append(claim._replace(place=None if claim.place is None else match.start(1) + claim.place))
    return claims


_EMPHASIS = str.maketrans(dict.fromkeys('*`"“”', " "))


def _said(text: str, cut: bool) -> list[Verdict]:
    """Verdicts that a line or a sentence is, as a whole."""
    text = text.translate(_EMPHASIS)
    claims: list[Verdict] = []
    if _in_json(text):
        return claims
    begin = re.match(r"\s*([^\n]*)", text)
    assert begin is not None
    alone = re.fullmatch(r"\s*([12mM])[.\s]*", begin[1])
    if alone and (alone[1] in "12" or not text[begin.end() :].strip()):
        claims.append(Verdict(FIRST if alone[1] in "1m" else SECOND, begin.start(1) + alone.start(1)))
    claims += _scored(text, begin[1])
    for line in re.finditer(r"[^\n]+", text):
        whole = re.fullmatch(rf"\s*(?:(?P<label>{_LETTER})|(?P<tie>{_TIE}))\s*[.!]*\s*", line[0])
        if whole:
            claims.append(_slot(whole, line.start()))
            continue
        for sentence in re.finditer(r"[^.!?]+(?:[.!?](?!\s|\Z)[^.!?]*)*[.!?]*", line[0]):
            unended = cut and line.start() + sentence.end() == len(text.rstrip()) and sentence[0][-1] not in ".!?"
            claims += _of_sentence(sentence[0].strip(" \t#>-"), text, line.start() + sentence.start(), unended)
    return [*claims, *_begun(text, cut)]


def _of_sentence(sentence: str, text: str, start: int, unended: bool) -> list[Verdict]:
    slot = _SLOT.fullmatch(sentence)
    if slot:
        return [_slot(slot, text.index(sentence, start))]
    for form in _SENTENCES if not unended else ():
        match = form.fullmatch(sentence)
        if match is None:
            continue
        groups = match.groupdict()
        if groups.get("tie"):
            return [Verdict(TIE)]
        first = _side(groups["win"]) if groups.get("win") else 1.0 - _side(groups["lose"])
        named = groups.get("win") or groups["lose"]
        return [] if groups.get("other") and _side(groups["other"]) == _side(named) else [Verdict(first)]
    return []


def _begun(text: str, cut: bool) -> list[Verdict]:
    """`B: it is shorter.`: a letter that the answer begins with, where the rest does not name the other one."""
    match = re.match(r"[\W_]*([AB])[.:)\]]+\s+[^\W\d]", text)
    if match is None or cut:
        return []
    other = _OPPOSITE[match[1]]
    if re.search(rf"{_START}(?:{other}|\({other.lower()}\)){_STOP}|(?i:{_NOUN}\s+{other}\b)", text):
        return []
    return [] if re.search(r"(?i)\b(?:neither|not|both)\b", text) else [Verdict(_side(match[1]), match.start(1))]


def _headed(text: str, cut: bool) -> list[Verdict]:
    """Lines such as "Response A".

    Of a cut answer only one that nothing follows: it may be the first of two headings.
    ."""
    lines = [line for line in re.finditer(r"[^\n]+", text.translate(_EMPHASIS)) if line[0].strip()]
    if cut and len(lines) > 1:
        return []
    return [_slot(match, line.start()) for line in lines if (match := _LINE.fullmatch(line[0]))]


def _scored(text: str, first_line: str) -> list[Verdict]:
    """Two scores, the higher the better: `8 7` on the first line, or `A: 7, B: 9`. Ranks and errors are no scores."""
    two = _TWO_SCORES.fullmatch(first_line)
    if two:
        return [_higher(float(two[1]), float(two[2]))]
    found = {(_side(m["label"]), float(m[2])) for m in _ONE_SCORE.finditer(text)}
    if len(found) != 2 or len({side for side, _ in found}) != 2 or _NO_SCORE.search(text):
        return []
    scores = dict(found)
    return [_higher(scores[FIRST], scores[SECOND])]


def _higher(first: float, second: float) -> Verdict:
    return Verdict(TIE if first == second else float(first > second))


def _in_json(text: str) -> list[tuple[Verdict, Any]]:
    """Verdicts of the JSON values in a text, with the value; also with Python's quotes, as AlpacaEval's."""
    return [(claim, value) for value in _json_values(text) if (claim := _of_json(value)) is not None]


def _json_values(text: str) -> Iterator[Any]:
    at, decoder = 0, json.JSONDecoder(strict=False)
    while (found := re.compile(r"[{\[](?=\s*[{\"'])").search(text, at)) is not None:
        try:
            value, at = decoder.raw_decode(text, found.start())
            yield value
        except json.JSONDecodeError:
            at = found.end()
            last = text.rfind("}" if found[0] == "{" else "]")
            try:
                yield ast.literal_eval(text[found.start() : last + 1])
                return
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue


def _of_json(value: Any) -> Verdict | None:
    """`{"winner": "A"}`, `[{"model": "model_1", "rank": 1}, …]`, `{"ranking": ["A", "B"]}`, or two scores."""
    if isinstance(value, list):
        return _of_ranking(value)
    keys = {str(key).lower().replace(" ", "_"): item for key, item in value.items()} if isinstance(value, dict) else {}
    found = [_named(item, numbers=key in _CHOSEN) for key, item in keys.items() if key in _JUDGED]
    found += [_of_ranking(item) for key, item in keys.items() if key in _RANKED and isinstance(item, list)]
    claims = {claim.first for claim in found if claim is not None}
    if found:
        return Verdict(claims.pop()) if len(claims) == 1 and None not in found else None
    scores = keys.get("scores", keys)
    named = {_side(k): v for k, v in scores.items() if _LINE.fullmatch(k.upper())} if isinstance(scores, dict) else {}
    if set(named) != {FIRST, SECOND} or not all(isinstance(v, int | float) for v in named.values()):
        return None
    return _higher(named[FIRST], named[SECOND])


def _of_ranking(items: list[Any]) -> Verdict | None:
    if all(isinstance(item, str) for item in items):
        sides = [_named(item, numbers=True) for item in items]
    elif all(isinstance(item, dict) for item in items) and {item.get("rank") for item in items} == {1, 2}:
        sides = [_named(item.get("model"), numbers=False) for item in sorted(items, key=lambda item: item["rank"])]
    else:
        return None
    if len(sides) != 2 or {None if side is None else side.first for side in sides} != {FIRST, SECOND}:
        return None
    assert sides[0] is not None
    return Verdict(sides[0].first)
