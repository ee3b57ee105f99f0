"""Chat completions of an OpenAI-compatible endpoint: asked at most once each and kept on disk.

Knows nothing of preferences: requests in, the endpoint's answers out, whole. `judge` reads verdicts from them, and
`alignment.web` sends and retries. Every answer is written the moment it is there, so whatever stops a run, the next
one goes on from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.files import json_digest, read_json_object, write_text
from alignment.web import Connection, Dialect, Failed, JsonServer, parsed, refused_key

FORMAT = 1  # of the cache; part of the key
TOP_LOGPROBS = 5  # alternatives per token that are asked for, as AlpacaEval does (alpaca_eval_clf, cd543a149)
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


@dataclass
class ChatClient:
    """One endpoint, with its cache.

    Attributes:
        server: whose `/chat/completions` is asked.
        cache: folder of the answers, one file each.
    """

    server: JsonServer
    cache: Path

    def __post_init__(self) -> None:
        own = "its own setting is used, and answers may differ from run to run"
        changes = {"max_tokens": ("max_completion_tokens", ""), "temperature": (None, own), "seed": (None, own)}
        without = {"logprobs": (None, ""), "top_logprobs": (None, "")}
        self._plain = Dialect(self.server.where, changes)
        self._weighed = Dialect(self.server.where, {**changes, **without})

    def file(self, request: Mapping[str, Any]) -> Path:
        """Where the answer to a request is kept: a name from everything that decides it."""
        keyed = {"format": FORMAT, "base_url": self.server.base_url, "request": request}
        return self.cache / f"{json_digest(keyed)}.json"

    def ask(self, requests: Sequence[Mapping[str, Any]]) -> list[Reply]:
        """One reply per request, in order; equal requests are sent once.

        Args:
            requests: bodies of chat completions. `logprobs` is true, false or "auto": asked for, and done without
                where the endpoint refuses a request because of it. So are temperature and seed, with a warning;
                `max_tokens` goes by the name that the endpoint takes.

        Raises:
            UserError: the endpoint cannot be used: dead, refuses the key, the model or the request, says nothing
                that is a chat completion; or a file of the cache cannot.
        """
        files = [self.file(request) for request in requests]
        replies = {file: Reply(_stored(file), cached=True) for file in dict.fromkeys(files) if file.is_file()}
        missing = {f: request for f, request in zip(files, requests, strict=True) if f not in replies}

        def one(connection: Connection, file: Path) -> Any:
            request = missing[file]
            answer = connection.without_key(self._try(connection, request))
            write_text(file, json.dumps({"format": FORMAT, "request": request, "answer": answer}) + "\n")
            return answer

        if missing:
            asked = self.server.ask(missing, one, "  judge")
            replies |= {file: Reply(answer, cached=False) for file, answer in asked}
        return [replies[file] for file in files]

    def _try(self, connection: Connection, request: Mapping[str, Any]) -> Any:
        """One try; `Failed` if another may go better, UserError if none will."""
        dialect, body = self._plain, {**request, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if not request["logprobs"]:
            del body["logprobs"], body["top_logprobs"]
        elif request["logprobs"] == "auto":
            dialect = self._weighed
        response = dialect.post(connection, "/chat/completions", body)
        said = connection.one_line(response.text)
        if response.status_code in (400, 413, 422) and _UNANSWERABLE.search(response.text):
            return {"error": {"status": response.status_code, "message": said}}
        remedy = "the server refuses this request: check model, max_tokens, temperature and extra"
        if request["logprobs"] is True and refused_key(response, ("logprobs", "top_logprobs")):
            remedy = "set logprobs: auto or false"
        connection.refuse(response, request["model"], remedy)
        answer = parsed(response)
        if not is_completion(answer):
            raise Failed(f"no chat completion but {said!r}")
        return answer


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
