"""A language model as a judge, behind any OpenAI-compatible HTTP endpoint. docs/judging.md shows it at work.

    oracle:
      name: llm_judge
      base_url: http://127.0.0.1:8000/v1
      model: Qwen/Qwen2.5-7B-Instruct

Here is what is asked; how an answer is read is in `verdicts`, keeping answers in `judge_client`, sending and retrying
in `alignment.web`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from alignment.errors import UserError
from alignment.files import read_text
from alignment.rewards.base import Prompt, prompt_text
from alignment.rewards.judge_client import ChatClient, Reply
from alignment.rewards.oracles import symmetric
from alignment.rewards.verdicts import TIE, Verdict, first_from_logprobs, read_verdict
from alignment.web import JsonServer, is_endpoint, is_variable

MOST_INVALID = 0.5  # a larger share of answers without a verdict is an error
ENOUGH = 20  # answers from which on it is one at once: with 1 in 4 invalid, 1 run in 250 would stop (binomial)
PLACES = ("prompt", "first", "second")
TEMPLATE = """\
Below are an instruction and two responses to it. Decide which response is better.

A response is better if it does what the instruction asks, is true, clear and harmless. Neither the order in which \
the responses are shown nor their length is a reason.

# Instruction

{prompt}

# Response A

{first}

# Response B

{second}

# Verdict

Answer with one letter and nothing else: A if response A is better, B if response B is better.
"""
OURS = ("model", "messages", "temperature", "max_tokens", "logprobs", "top_logprobs", "seed", "stream", "n")
_PLACE = re.compile(r"\{(prompt|first|second)\}")


@dataclass
class Tally:
    """What became of the questions of one judge, over all its calls. A pair is two questions, one per order."""

    pairs: int = 0
    called: int = 0  # questions that the endpoint answered
    cached: int = 0  # questions that the disk answered
    from_logprobs: int = 0  # answers read from log-probs, not from text
    invalid: int = 0  # answers without a verdict, counted as ties
    valid_pairs: int = 0  # pairs with two valid answers: what the next two are about
    consistent: int = 0  # of these, pairs in which both orders prefer the same text, or none
    first: float = 0.0  # sum over both orders of these of P(the text shown first)
    example: str = ""  # the first invalid answer

    @property
    def consistency(self) -> float:
        """Share of pairs in which the order did not change the verdict, in [0, 1]; NaN without a valid pair."""
        return self.consistent / self.valid_pairs if self.valid_pairs else math.nan

    @property
    def first_preference(self) -> float:
        """Mean P(the text shown first); 1/2 of a judge without position bias, NaN without a valid pair."""
        return self.first / (2 * self.valid_pairs) if self.valid_pairs else math.nan

    @property
    def answers(self) -> int:
        """Questions that were answered, by the endpoint or the disk."""
        return self.called + self.cached

    @property
    def invalid_share(self) -> float:
        """Share of the answers without a verdict, in [0, 1]; 0 before the first answer."""
        return self.invalid / self.answers if self.answers else 0.0

    def refuse(self) -> None:
        """Raise where most answers had no verdict: what is left says little of the responses.

        Raises:
            UserError: names the share, an example and what helps.
        """
        if self.invalid_share > MOST_INVALID:
            raise UserError(
                f"oracle llm_judge: {self.invalid} of {self.answers} answers have no verdict, such as {self.example}; "
                "raise max_tokens if the model thinks first, or give a template that asks for A or B"
            )

    def line(self) -> str:
        """All of it in one line."""
        example = f", the first: {self.example}" if self.invalid else ""
        return (
            f"{self.pairs} pairs in both orders: {self.called} answers asked for, {self.cached} from the cache, "
            f"{self.from_logprobs} read from log-probs, {self.invalid} invalid (counted as ties{example}); "
            f"orders agree on {self.consistency:.1%}, the first place is preferred with {self.first_preference:.1%}"
        )


@dataclass(frozen=True)
class LLMJudge:
    """A chat model that is shown two responses, in both orders, and names the better one.

    P(a > b) is the mean of what the two orders say, so a preference for the first or second place cancels exactly. One
    order says 1, 0, or, with log-probs, P(first) between them (AlpacaEval's `logprob_parser`). An answer without a
    verdict says 1/2; it is counted, and reported on standard error with the rest of `tally`.

    Attributes:
        model: the endpoint's name of the model.
        base_url: http:// or https://, up to before `/chat/completions`.
        template: text file with `{prompt}`, `{first}` and `{second}` that asks for A or B, or another form that
            `verdicts` reads. Default: `TEMPLATE`.
        temperature: of sampling the answer; above 0 one sample is drawn per order.
        max_tokens: of the answer. A model that thinks first needs room for it.
        logprobs: true: P(first) from the log-probs of A and B at the token that carries the verdict; false: from the
            text; auto: from log-probs where the endpoint gives them and the verdict has a token, else from the text.
        seed: sent along where it is given.
        extra: further keys of the request's body, such as `{chat_template_kwargs: {enable_thinking: false}}`.
        timeout: seconds without a byte until a try counts as failed.
        retries: further tries, after 0.5, 1, 2 … seconds or what the endpoint asks for (Retry-After).
        concurrency: requests at a time.
        cache: folder of the answers. Default: `llm_judge` in the project's cache.
        api_key_env: NAME of the environment variable that holds the key; the key itself is never written.

    Raises:
        UserError: a key of the wrong type or range; at the first question, a template, endpoint or answer that
            cannot be used; when most of `ENOUGH` answers or more had no verdict.
    """

    model: str
    base_url: str
    template: str | None = field(default=None, metadata={"file": True})
    temperature: float = 0.0
    max_tokens: int = 16
    logprobs: bool | Literal["auto"] = "auto"
    seed: int | None = None
    extra: Mapping[str, Any] | None = None
    timeout: float = field(default=60.0, compare=False)
    retries: int = field(default=5, compare=False)
    concurrency: int = field(default=8, compare=False)
    cache: str | None = field(default=None, compare=False)
    api_key_env: str | None = field(default=None, compare=False)
    name: ClassVar[str] = "llm_judge"

    def __post_init__(self) -> None:
        for key, wanted, good in _checks(self):
            if not good:
                given = (
                    "" if key in ("base_url", "api_key_env") else f", not {getattr(self, key)!r}"
                )  # may be a secret
                raise UserError(f"oracle llm_judge: {key} must be {wanted}{given}")
        for key in self.extra or {}:
            if key in OURS:
                raise UserError(f"oracle llm_judge: extra must not hold {key!r}; the judge sets that itself")

    @cached_property
    def tally(self) -> Tally:
        """What became of the questions so far."""
        return Tally()

    @cached_property
    def _question(self) -> str:
        if self.template is None:
            return TEMPLATE
        text = read_text(Path(self.template))
        for place in PLACES:
            if f"{{{place}}}" not in text:
                raise UserError(f"{self.template}: a judge's template needs {{{place}}}; put it where that text goes")
        return text

    @cached_property
    def _client(self) -> ChatClient:
        from alignment.models.gguf import cache_root

        manners = {key: getattr(self, key) for key in ("api_key_env", "timeout", "retries", "concurrency")}
        return ChatClient(
            JsonServer(self.base_url.rstrip("/"), where=f"oracle {self.name}", **manners),
            cache=Path(self.cache).expanduser() if self.cache else cache_root() / self.name,
        )

    def probability(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """See `PreferenceOracle.probability`; two different texts are two questions, none asked twice."""
        return symmetric(self._ask)(prompts, first, second)

    def _ask(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """P(the text shown first) of each question; the second half repeats the first in the opposite order."""
        asked = [self._request(prompt_text(p), a, b) for p, a, b in zip(prompts, first, second, strict=True)]
        replies = self._client.ask(asked)
        said = [self._verdict(reply) for reply in replies]
        half = len(said) // 2
        self.tally.pairs += half
        for p, q in zip(said[:half], said[half:], strict=True):
            if p is not None and q is not None:
                self.tally.valid_pairs += 1
                self.tally.first += p + q
                self.tally.consistent += (p > 0.5) == (q < 0.5) and (p < 0.5) == (q > 0.5)
        print(f"{self.name} {self.model}: {self.tally.line()}", file=sys.stderr, flush=True)
        if self.tally.answers >= ENOUGH:  # a training run stops here, whoever reports a result asks for fewer, too
            self.tally.refuse()
        return [0.5 if p is None else p for p in said]

    def _request(self, prompt: str, first: str, second: str) -> dict[str, Any]:
        texts = {"prompt": prompt, "first": first, "second": second}
        content = _PLACE.sub(lambda found: texts[found[1]], self._question)  # once: texts may hold {second}
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "logprobs": self.logprobs,
            **(self.extra or {}),
        }
        return request if self.seed is None else {**request, "seed": self.seed}

    def _verdict(self, reply: Reply) -> float | None:
        """P(the text shown first), or None of an answer without a verdict; counted."""
        self.tally.cached += reply.cached
        self.tally.called += not reply.cached
        choice: Mapping[str, Any] = reply.answer["choices"][0] if "choices" in reply.answer else {}
        tokens = (choice.get("logprobs") or {}).get("content")
        if self.logprobs is True and choice and not tokens:
            raise UserError(
                f"oracle llm_judge: base_url {self.base_url}: no log-probs came from model {self.model!r}; "
                "set logprobs: auto or false"
            )
        text = str((choice.get("message") or {}).get("content") or "")
        verdict = read_verdict(text, cut=choice.get("finish_reason") == "length")
        found = self._weighed(tokens, text, verdict)
        self.tally.from_logprobs += found is not None
        if found is None and verdict is not None and (self.logprobs is not True or verdict.first == TIE):
            found = verdict.first
        if found is None:
            if not self.tally.invalid:
                self.tally.example = repr((text if choice else str(reply.answer["error"]))[:80])
            self.tally.invalid += 1
        return found

    def _weighed(self, tokens: Any, text: str, verdict: Verdict | None) -> float | None:
        """P(the text shown first) from log-probs, where the verdict has a token of its own and they do not contradict.

        A greedy answer is the likeliest: log-probs that prefer the other letter are then not of this choice. Above
        temperature 0 the text is one draw from P, and P is what counts.
        """
        if not tokens or not self.logprobs or verdict is None or verdict.place is None:
            return None
        found = first_from_logprobs(tokens, text, verdict.place)
        against = found is not None and (found - TIE) * (verdict.first - TIE) < 0
        return None if against and self.temperature == 0 else found

    def describe(self) -> str:
        deciding = {f.name: getattr(self, f.name) for f in fields(self) if f.compare and f.name not in ("template",)}
        digest = hashlib.sha256(self._question.encode()).hexdigest()[:12]
        settings = json.dumps({**deciding, "base_url": self.base_url.rstrip("/")}, sort_keys=True)
        return f"language model as judge, both orders, template with SHA-256 {digest}, {settings}"


def _checks(judge: LLMJudge) -> list[tuple[str, str, bool]]:
    """(key, what it must be, whether it is that)."""

    def number(value: Any, kind: Any, least: float) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool) and bool(least <= value < math.inf)

    floats = (int, float)
    return [
        ("model", "the endpoint's name of the model", _is_text(judge.model)),
        ("base_url", "http://HOST… or https://HOST… without user, ? or #", is_endpoint(judge.base_url)),
        (
            "template",
            "a text file",
            judge.template is None or _is_text(judge.template),
        ),
        ("temperature", "a number, 0 or above", number(judge.temperature, floats, 0)),
        ("max_tokens", "an integer above 0", number(judge.max_tokens, int, 1)),
        ("logprobs", "true, false or auto", isinstance(judge.logprobs, bool) or judge.logprobs == "auto"),
        ("seed", "an integer", judge.seed is None or number(judge.seed, int, -math.inf)),
        ("extra", "a mapping that JSON can hold", judge.extra is None or _is_json_object(judge.extra)),
        ("timeout", "a number of seconds above 0", number(judge.timeout, floats, 0) and judge.timeout > 0),
        ("retries", "an integer, 0 or above", number(judge.retries, int, 0)),
        ("concurrency", "an integer above 0", number(judge.concurrency, int, 1)),
        ("cache", "a folder", judge.cache is None or _is_text(judge.cache)),
        (
            "api_key_env",
            "the NAME, in capitals, of an environment variable, never the key",
            is_variable(judge.api_key_env),
        ),
    ]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_json_object(value: Any) -> bool:
    try:
        return isinstance(value, Mapping) and isinstance(json.dumps(dict(value), allow_nan=False), str)
    except (TypeError, ValueError):
        return False
