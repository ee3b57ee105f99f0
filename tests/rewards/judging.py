"""What tests of the judge share: a server's opinions, tokens with log-probs, and errors in one line."""

from __future__ import annotations

import socket

import pytest

from alignment.errors import UserError
from tests.rewards.http_server import says, shown

SECRET = "sk-0123456789-very-secret"
QUALITY = {"poor": 0.1, "fair": 0.3, "good": 0.45}  # what the server prefers by: P(a > b) = 1/2 + q(a) - q(b)


def token(text, **logprobs):
    """One entry of `logprobs.content`; `A_` stands for the token " A"."""
    top = {f" {name[0]}" if name.endswith("_") else name: lp for name, lp in logprobs.items()}
    alternatives = [{"token": name, "logprob": lp} for name, lp in top.items()]
    return {"token": text, "logprob": top.get(text, -1.0), "top_logprobs": alternatives}


def better(body, number):
    """Says in text which response is better."""
    first, second = shown(body)
    return says("A" if QUALITY[first] > QUALITY[second] else "B")


def failure(judge, *asked):
    with pytest.raises(UserError) as caught:
        judge.probability(*(asked or (["p"], ["good"], ["poor"])))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]
