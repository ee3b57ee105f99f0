"""Chat completions of an OpenAI-compatible endpoint: asked at most once each, kept on disk, retried with back-off.

Knows nothing of preferences: requests in, the endpoint's answers out, whole. `judge` reads verdicts from them.
Every answer is written the moment it is there, so whatever stops a run, the next one goes on from it.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import os
import random
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.files import read_json_object, write_text

FORMAT = 1  # of the cache; part of the key
TOP_LOGPROBS = 5  # alternatives per token that are asked for, as AlpacaEval does (alpaca_eval_clf, cd543a149)
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before the first retry; doubled each time, up to the second
LONGEST_RETRY_AFTER = 600.0  # seconds; an endpoint that asks for more has a quota, and waiting is no help
SECRET_LENGTH = 8  # a shorter key ("EMPTY", "x") is none, and would be found in innocent text
# What servers say of a request that no retry mends and no other request suffers from. A guess from OpenAI's, Azure's,
# vLLM's and llama.cpp's messages: one that is missed stops the run, which is the safe side.
_UNANSWERABLE = re.compile(r"context.{0,20}(length|size|window)|content.{0,20}(filter|policy)", re.IGNORECASE)


@dataclass(frozen=True)
class Reply:
    """What the endpoint said to one request.

    Attributes:
        answer: its JSON object; of a request it refused for its content or length, that refusal (`{"error": …}`).
        cached: it came from the disk.
    """

    answer: Mapping[str, Any]
    cached: bool


class _Failed(Exception):
    """A try that may go better the next time; `wait` is what the endpoint asked for, in seconds."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass
class ChatClient:
    """One endpoint, with its cache and its manners.

    Attributes:
        base_url: without the last slash; `/chat/completions` is added.
        cache: folder of the answers, one file each.
        api_key_env: environment variable that holds the key; None sends none. It is read when something is asked.
        timeout: seconds without a byte before a try counts as failed.
        retries: further tries after the first, on connection errors, time-outs, 408, 429, 5xx and broken answers.
        concurrency: requests at a time.
    """

    base_url: str
    cache: Path
    api_key_env: str | None
    timeout: float
    retries: int
    concurrency: int

    def __post_init__(self) -> None:
        self._where = f"oracle llm_judge: base_url {self.base_url}"
        self._jitter = random.Random()  # its own: the run's seeds stay where they are
        self._refuses_logprobs = False

    def file(self, request: Mapping[str, Any]) -> Path:
        """Where the answer to a request is kept: a name from everything that decides it."""
        keyed = {"format": FORMAT, "base_url": self.base_url, "request": request}
        return self.cache / f"{hashlib.sha256(json.dumps(keyed, sort_keys=True).encode()).hexdigest()}.json"

    def ask(self, requests: Sequence[Mapping[str, Any]]) -> list[Reply]:
        """One reply per request, in order; equal requests are sent once.

        Args:
            requests: bodies of chat completions. `logprobs` is true, false or "auto": asked for, and done without
                where the endpoint refuses a request because of it.

        Raises:
            UserError: the endpoint cannot be used: dead, refuses the key, the model or the request, says nothing
                that is a chat completion; or a file of the cache cannot.
        """
        files = [self.file(request) for request in requests]
        replies = {file: Reply(_stored(file), cached=True) for file in dict.fromkeys(files) if file.is_file()}
        missing = {f: request for f, request in zip(files, requests, strict=True) if f not in replies}
        if missing:
            replies |= self._fetch(missing)
        return [replies[file] for file in files]

    def _fetch(self, missing: Mapping[Path, Mapping[str, Any]]) -> dict[Path, Reply]:
        import httpx2
        from tqdm import tqdm

        key, stop, replies = self._key(), threading.Event(), {}
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        limits = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        with ExitStack() as stack:
            http = stack.enter_context(httpx2.Client(headers=headers, timeout=self.timeout, limits=limits))
            pool = stack.enter_context(ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge"))
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)  # requests in flight end, and are kept
            stack.callback(stop.set)  # Ctrl-C, too: nobody waits for a retry any more
            futures = {pool.submit(self._one, http, key, f, request, stop): f for f, request in missing.items()}
            for done in tqdm(as_completed(futures), total=len(futures), desc="  judge", delay=2):
                answer = done.result()
                if answer is not None:
                    replies[futures[done]] = Reply(answer, cached=False)
        return replies

    def _key(self) -> str:
        if self.api_key_env is None:
            return ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise UserError(
                f"{self._where}: the environment variable {self.api_key_env} (api_key_env) is not set or empty; "
                "export the endpoint's key in it, or remove api_key_env for an endpoint without keys"
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise UserError(
                f"{self._where}: the environment variable {self.api_key_env} (api_key_env) holds white space or "
                "characters that no key has; export the key alone"
            )
        return key

    def _one(self, http: Any, key: str, file: Path, request: Mapping[str, Any], stop: threading.Event) -> Any:
        """The answer to one request, after as many tries as it takes, and written; None if another one stopped all."""
        try:
            answer = self._until_answered(http, key, request, stop)
            if answer is None:
                return None
            answer = _without(answer, key)
            write_text(file, json.dumps({"format": FORMAT, "request": request, "answer": answer}) + "\n")
            return answer
        except UserError:
            stop.set()  # here, not where it is caught: this thread's next request would be on its way by then
            raise

    def _until_answered(self, http: Any, key: str, request: Mapping[str, Any], stop: threading.Event) -> Any:
        for attempt in range(self.retries + 1):
            if stop.is_set():
                return None
            try:
                return self._try(http, key, request)
            except _Failed as failed:
                tries = f"{attempt + 1} {'try' if attempt == 0 else 'tries'}"
                if attempt == self.retries or failed.wait > LONGEST_RETRY_AFTER:
                    later = f" and asks to wait {failed.wait:.0f} s" if failed.wait > LONGEST_RETRY_AFTER else ""
                    raise UserError(
                        f"{self._where}: no answer after {tries}: {failed}{later}; is the server up, and timeout "
                        f"({self.timeout:g} s) long enough? Answers so far are kept, a re-run goes on from them"
                    ) from None
                stop.wait(max(self._back_off(attempt), failed.wait))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _back_off(self, attempt: int) -> float:
        """Seconds: 0.5, 1, 2 … up to a minute, each times a random factor in [1/2, 1] that spreads the threads."""
        return min(LONGEST_WAIT, FIRST_WAIT * 2.0**attempt) * (0.5 + self._jitter.random() / 2)

    def _try(self, http: Any, key: str, request: Mapping[str, Any]) -> Any:
        """One try; `_Failed` if another may go better, UserError if none will."""
        response = self._send(http, key, request, logprobs=not self._refuses_logprobs)
        refused = response.status_code in range(400, 500) and "logprob" in response.text.lower()
        if refused and request["logprobs"] == "auto" and not self._refuses_logprobs:
            response = self._send(http, key, request, logprobs=False)
            self._refuses_logprobs = response.status_code == 200
        status = response.status_code
        said = _one_line(response.text, key)
        if status in (408, 429) or status >= 500:
            raise _Failed(f"HTTP {status} {said}", _retry_after(response.headers.get("retry-after")))
        if status in (400, 413, 422) and _UNANSWERABLE.search(response.text):
            return {"error": {"status": status, "message": said}}
        if status != 200:
            raise UserError(f"{self._where}: HTTP {status} {said}; {self._remedy(status, request, refused)}")
        try:
            answer = json.loads(response.text)
        except json.JSONDecodeError:
            answer = None
        if not is_completion(answer):
            raise _Failed(f"no chat completion but {said!r}")
        return answer

    def _send(self, http: Any, key: str, request: Mapping[str, Any], *, logprobs: bool) -> Any:
        import httpx2

        body = {**request, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if not request["logprobs"] or (request["logprobs"] == "auto" and not logprobs):
            del body["logprobs"], body["top_logprobs"]
        try:  # dumped here: plain ASCII, which holds any text
            return http.post(f"{self.base_url}/chat/completions", content=json.dumps(body).encode())
        except httpx2.TimeoutException:
            raise _Failed(f"timed out ({self.timeout:g} s)") from None
        except httpx2.RequestError as error:
            raise _Failed(f"{type(error).__name__} {_one_line(str(error), key)}") from None

    def _remedy(self, status: int, request: Mapping[str, Any], refused_logprobs: bool) -> str:
        if refused_logprobs and request["logprobs"] is True:
            return "set logprobs: auto or false"
        if status in (401, 403):
            name = self.api_key_env
            return f"check the key in {name} (api_key_env)" if name else "name the key's variable in api_key_env"
        if status == 404 or status in range(300, 400):
            return f"base_url usually ends in /v1, and {self.base_url}/models lists what model {request['model']!r} is"
        return "the server refuses this request: check model, max_tokens, temperature and extra"


def is_completion(answer: Any) -> bool:
    """Whether a server's answer has the one part that is read: a first choice with a message."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        return False
    return isinstance(choices[0].get("message"), dict)


def _stored(file: Path) -> Any:
    answer = read_json_object(file).get("answer")
    if not is_completion(answer) and not (isinstance(answer, dict) and "error" in answer):
        raise UserError(f"{file}: holds no answer of a judge; delete it and it is asked for again")
    return answer


def _without(value: Any, key: str) -> Any:
    """An answer in which nothing repeats the key."""
    if isinstance(value, str):
        return value.replace(key, "***") if len(key) >= SECRET_LENGTH else value
    if isinstance(value, dict):
        return {_without(name, key): _without(item, key) for name, item in value.items()}
    return [_without(item, key) for item in value] if isinstance(value, list) else value


def _one_line(text: str, key: str) -> str:
    """What a server said, for an error's one line; without the key, which some of them repeat."""
    return " ".join(_without(text, key).split())[:200]


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
