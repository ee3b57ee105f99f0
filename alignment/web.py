"""JSON to an HTTP server and back: many requests at a time, retried with back-off, the key never repeated.

Knows nothing of what is asked: `models.endpoint` asks for samples, `rewards.judge_client` for verdicts. (The standard
library's `http` is another one: imports here are absolute.)
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from alignment.errors import UserError

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before the first retry; doubled each time, up to the second
LONGEST_RETRY_AFTER = 600.0  # seconds; an endpoint that asks for more has a quota, and waiting is no help
SECRET_LENGTH = 8  # a shorter key ("EMPTY", "x") is none, and would be found in innocent text

Job = TypeVar("Job")
Answer = TypeVar("Answer")


class Failed(Exception):
    """A try that may go better the next time; `wait` is what the server asked for, in seconds."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass
class JsonServer:
    """One server, and the manners with which it is asked.

    Attributes:
        base_url: without the last slash; paths are added to it.
        api_key_env: environment variable that holds the key; None sends none. It is read when something is asked.
        timeout: seconds without a byte before a try counts as failed.
        retries: further tries after the first, on connection errors, time-outs, 408, 429, 5xx and broken answers.
        concurrency: requests at a time.
        where: what errors begin with, before the address.
        kept: what a run that stops does not lose, for errors.
    """

    base_url: str
    api_key_env: str | None = None
    timeout: float = 60.0
    retries: int = 5
    concurrency: int = 8
    where: str = ""
    kept: str = "Answers"
    # Its own: the run's seeds stay where they are.
    _jitter: random.Random = field(default_factory=random.Random, init=False, repr=False)

    def __post_init__(self) -> None:
        self.where = f"{self.where}: base_url {self.base_url}".removeprefix(": ")

    def ask(
        self, jobs: Iterable[Job], answer: Callable[[Connection, Job], Answer], progress: str | None = None
    ) -> Iterator[tuple[Job, Answer]]:
        """(job, its answer) as answers arrive.

        Args:
            jobs: whatever `answer` takes.
            answer: asks the server about one job; raises `Failed` where another try may go better. Called in threads.
            progress: label of a progress bar; None shows none.

        Raises:
            UserError: the server cannot be used: no answer after all tries, or what `answer` raises. Requests under
                way end first, others are not sent any more.
        """
        import httpx2
        from tqdm import tqdm

        key, stop = self._key(), threading.Event()
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        limits = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        with ExitStack() as stack:
            http = stack.enter_context(httpx2.Client(headers=headers, timeout=self.timeout, limits=limits))
            pool = stack.enter_context(ThreadPoolExecutor(self.concurrency, thread_name_prefix="http"))
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)  # requests in flight end, and are kept
            stack.callback(stop.set)  # Ctrl-C, too: nobody waits for a retry any more
            connection = Connection(self, http, key)
            futures = {pool.submit(self._one, connection, job, answer, stop): job for job in jobs}
            arriving: Any = as_completed(futures)
            if progress is not None:
                arriving = tqdm(arriving, total=len(futures), desc=progress, delay=2)
            for done in arriving:
                answered, value = done.result()
                if answered:
                    yield futures[done], value

    def _key(self) -> str:
        if self.api_key_env is None:
            return ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise UserError(
                f"{self.where}: the environment variable {self.api_key_env} (api_key_env) is not set or empty; "
                "export the endpoint's key in it, or remove api_key_env for an endpoint without keys"
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise UserError(
                f"{self.where}: the environment variable {self.api_key_env} (api_key_env) holds white space or "
                "characters that no key has; export the key alone"
            )
        return key

    def _one(
        self, connection: Connection, job: Job, answer: Callable[[Connection, Job], Answer], stop: threading.Event
    ) -> tuple[bool, Any]:
        """(True, the answer) after as many tries as it takes; (False, None) where another job stopped all."""
        try:
            for attempt in range(self.retries + 1):
                if stop.is_set():
                    return False, None
                try:
                    return True, answer(connection, job)
                except Failed as failed:
                    self._give_up_or_wait(attempt, failed, stop)
        except UserError:
            stop.set()  # here, not where it is caught: this thread's next request would be on its way by then
            raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _give_up_or_wait(self, attempt: int, failed: Failed, stop: threading.Event) -> None:
        if attempt == self.retries or failed.wait > LONGEST_RETRY_AFTER:
            tries = f"{attempt + 1} {'try' if attempt == 0 else 'tries'}"
            later = f" and asks to wait {failed.wait:.0f} s" if failed.wait > LONGEST_RETRY_AFTER else ""
            raise UserError(
                f"{self.where}: no answer after {tries}: {failed}{later}; is the server up, and timeout "
                f"({self.timeout:g} s) long enough? {self.kept} so far are kept, a re-run goes on from them"
            ) from None
        stop.wait(max(self._back_off(attempt), failed.wait))

    def _back_off(self, attempt: int) -> float:
        """Seconds: 0.5, 1, 2 … up to a minute, each times a random factor in [1/2, 1] that spreads the threads."""
        return min(LONGEST_WAIT, FIRST_WAIT * 2.0**attempt) * (0.5 + self._jitter.random() / 2)


@dataclass(frozen=True)
class Connection:
    """What a job asks the server through: an open client and the key."""

    server: JsonServer
    http: Any = field(repr=False)
    key: str = field(repr=False)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The server's response, whatever its status.

        Raises:
            Failed: there is none.
        """
        import httpx2

        try:  # dumped here: plain ASCII, which holds any text
            return self.http.post(f"{self.server.base_url}{path}", content=json.dumps(body).encode())
        except httpx2.TimeoutException:
            raise Failed(f"timed out ({self.server.timeout:g} s)") from None
        except httpx2.RequestError as error:
            raise Failed(f"{type(error).__name__} {self.one_line(str(error))}") from None

    def refuse(self, response: Any, model: str, otherwise: str) -> None:
        """Raise unless the status is 200.

        Args:
            response: of `post`.
            model: the server's name of the model.
            otherwise: the remedy where nothing better is known.

        Raises:
            Failed: a status that may pass.
            UserError: one that will not.
        """
        status, said = response.status_code, self.one_line(response.text)
        if status in (408, 429) or status >= 500:
            raise Failed(f"HTTP {status} {said}", _retry_after(response.headers.get("retry-after")))
        if status in (401, 403):
            name = self.server.api_key_env
            otherwise = f"check the key in {name} (api_key_env)" if name else "name the key's variable in api_key_env"
        elif status == 404 or status in range(300, 400):
            url = self.server.base_url
            otherwise = f"base_url usually ends in /v1, and {url}/models lists what model {model!r} is"
        if status != 200:
            raise UserError(f"{self.server.where}: HTTP {status} {said}; {otherwise}")

    def without_key(self, value: Any) -> Any:
        """A JSON value in which nothing repeats the key."""
        if isinstance(value, str):
            return value.replace(self.key, "***") if len(self.key) >= SECRET_LENGTH else value
        if isinstance(value, dict):
            return {self.without_key(name): self.without_key(item) for name, item in value.items()}
        return [self.without_key(item) for item in value] if isinstance(value, list) else value

    def one_line(self, text: str) -> str:
        """What a server said, for an error's one line; without the key, which some of them repeat."""
        return " ".join(self.without_key(text).split())[:200]


LOGPROBS = frozenset({"logprobs", "top_logprobs"})  # two keys, one wish


class Dialect:
    """Which keys of a request one server wants under another name, or not at all; learned from its refusals.

    Servers of one protocol differ: OpenAI's newer models take `max_completion_tokens` in place of `max_tokens`, some
    no `logprobs`, `temperature` or `seed`. A request refused for such a key is sent again without it, and so are all
    further ones once that went well.
    """

    def __init__(self, where: str, changes: Mapping[str, tuple[str | None, str]]) -> None:
        """
        Args:
            where: what the line on standard error begins with.
            changes: key -> (its other name, or None to leave it out; what the user is told once, "" for nothing).
                Other keys stay as they are.
        """
        self.where, self.changes = where, changes
        self._learned: set[str] = set()
        self._lock = threading.Lock()

    def post(self, connection: Connection, path: str, body: Mapping[str, Any]) -> Any:
        """The server's response to the body as it wants it; its refusal where it wants something else.

        Raises:
            Failed: there is none.
        """
        changed = set(self._learned)
        while True:
            names = {key: self.changes[key][0] if key in changed else key for key in body}
            sent = {name: body[key] for key, name in names.items() if name is not None}
            response = connection.post(path, sent)
            key = refused_key(response, [key for key in self.changes if key in body and key not in changed])
            if key is None:
                break
            changed |= LOGPROBS if key in LOGPROBS else {key}
        if response.status_code == 200:
            self._say(changed & set(body))
        return response

    def _say(self, changed: set[str]) -> None:
        with self._lock:
            new, self._learned = changed - self._learned, self._learned | changed
        for key in sorted(new):
            if self.changes[key][1]:
                print(f"warning: {self.where}: the server refuses {key!r}: {self.changes[key][1]}", file=sys.stderr)


_REFUSES = re.compile(
    r"unsupported|not support|unrecogni[sz]ed|unknown|unexpected|not (?:permitted|allowed|available|implemented)|"
    r"invalid (?:parameter|argument)|extra_forbidden|deprecated",
    re.IGNORECASE,
)


def refused_key(response: Any, keys: Iterable[str]) -> str | None:
    """Which of a request's keys the server will not have, by the words of its refusal; None where it names none.

    OpenAI, Azure, vLLM, SGLang, llama.cpp, Groq and Mistral name the key in `error.param` or in the message.
    """
    status, text = response.status_code, response.text
    if status not in range(400, 500) or status in (401, 403, 408, 429):
        return None
    named = {key: re.search(rf"(?<![A-Za-z0-9_]){key}(?![A-Za-z0-9_])", text, re.IGNORECASE) for key in keys}
    refuses = _REFUSES.search(text) is not None
    places = {key: found.start() for key, found in named.items() if found and (refuses or key in LOGPROBS)}
    return min(places, key=lambda key: places[key]) if places else None


def is_endpoint(url: Any) -> bool:
    """Whether `url` is an http address without a user, a query or a fragment, any of which may hold a secret."""
    if not isinstance(url, str):
        return False
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for one that is no number
    except ValueError:
        return False
    plain = not (parts.username or parts.password or parts.query or parts.fragment or re.search(r"\s", url))
    return parts.scheme in ("http", "https") and bool(parts.hostname) and plain


def is_variable(name: Any) -> bool:
    """Whether `name` is None or an environment variable's name in capitals, which a key hardly ever is."""
    return name is None or (isinstance(name, str) and re.fullmatch(r"[A-Z_][A-Z0-9_]*", name) is not None)


def parsed(response: Any) -> Any:
    """The JSON value of a response; None where it is none."""
    try:
        return json.loads(response.text)
    except json.JSONDecodeError:
        return None


def _retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date; 0 for none, or one that is neither."""
    if header is None:
        return 0.0
    if re.fullmatch(r"\d+(\.\d+)?", header.strip()):
        return float(header)
    try:
        when = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
