"""Chat completions of an OpenAI-compatible endpoint: asked at most once each and kept on disk.

Knows nothing of preferences: requests in, the endpoint's answers out, whole. `judge` reads verdicts from them, and
`alignment.http` sends and retries. Every answer is written the moment it is there, so whatever stops a run, the next
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
from alignment.http import Connection, Failed, JsonServer, parsed

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
        self._refuses_logprobs = False

    def file(self, request: Mapping[str, Any]) -> Path:
        """Where the answer to a request is kept: a name from everything that decides it."""
        keyed = {"format": FORMAT, "base_url": self.server.base_url, "request": request}
        return self.cache / f"{json_digest(keyed)}.json"

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
        response = self._send(connection, request, logprobs=not self._refuses_logprobs)
        refused = response.status_code in range(400, 500) and "logprob" in response.text.lower()
        if refused and request["logprobs"] == "auto" and not self._refuses_logprobs:
            response = self._send(connection, request, logprobs=False)
            self._refuses_logprobs = response.status_code == 200
        said = connection.one_line(response.text)
        if response.status_code in (400, 413, 422) and _UNANSWERABLE.search(response.text):
            return {"error": {"status": response.status_code, "message": said}}
        remedy = "the server refuses this request: check model, max_tokens, temperature and extra"
        if refused and request["logprobs"] is True:
            remedy = "set logprobs: auto or false"
        connection.refuse(response, request["model"], remedy)
        answer = parsed(response)
        if not is_completion(answer):
            raise Failed(f"no chat completion but {said!r}")
        return answer

    def _send(self, connection: Connection, request: Mapping[str, Any], *, logprobs: bool) -> Any:
        body = {**request, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if not request["logprobs"] or (request["logprobs"] == "auto" and not logprobs):
            del body["logprobs"], body["top_logprobs"]
        return connection.post("/chat/completions", body)


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
