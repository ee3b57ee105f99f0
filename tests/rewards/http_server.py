"""A small real HTTP endpoint for tests of judge and sampler: threads, 127.0.0.1, whatever the test's function answers.

No stub of our own code: bytes go through a socket. Not a language model either: what it "thinks" is `answer`.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What is sent back: a JSON value, or text as it is."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0  # seconds before it


def says(text: str | None, tokens: list[dict[str, Any]] | None = None) -> Answer:
    """A chat completion with this text, and these log-probs of its tokens."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if tokens is not None:
        choice["logprobs"] = {"content": tokens}
    return Answer({"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice]})


@dataclass
class Endpoint:
    """What a test sees: the address, and every request in the order of arrival."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)  # bodies
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)  # names in lower case
    times: list[float] = field(default_factory=list)  # of arrival, seconds
    together: int = 0  # most requests under way at a time


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The two responses in a question that was asked with the template `{prompt}|{first}|{second}`."""
    _, first, second = body["messages"][0]["content"].split("|")
    return first, second


@contextlib.contextmanager
def endpoint(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[Endpoint]:
    """POST /v1/completions and /v1/chat/completions give `answer(body, number of the request from 0)`, others 404."""
    lock, under_way = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet: two would wait 40 ms for an acknowledgement

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen.requests)
                seen.requests.append(body)
                seen.paths.append(self.path)
                seen.headers.append({name.lower(): value for name, value in self.headers.items()})
                seen.times.append(time.monotonic())
                under_way[0] += 1
                seen.together = max(seen.together, under_way[0])
            known = re.fullmatch("/v1/(chat/)?completions", self.path)
            reply = answer(body, number) if known else Answer({"error": {"message": "Not Found"}}, status=404)
            time.sleep(reply.delay)
            with lock:
                under_way[0] -= 1
            data = (reply.body if isinstance(reply.body, str) else json.dumps(reply.body)).encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client lost patience
                self.send_response(reply.status)
                for name, value in {**reply.headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
