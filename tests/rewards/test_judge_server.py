"""The judge and its HTTP server: keys that the server refuses, failures, waiting, secrets, and going on."""

from __future__ import annotations

import email.utils
import re
import time
from pathlib import Path

import pytest

from tests.rewards.http_server import Answer, endpoint, says, shown
from tests.rewards.judging import SECRET, better, failure, refused_port

ROOT = Path(__file__).resolve().parents[2]


def test_an_endpoint_that_refuses_log_probs_is_asked_without_them(make):
    def refusing(body, number):
        if "logprobs" in body:
            return Answer({"error": {"message": "This model does not support 'logprobs'."}}, status=400)
        return better(body, number)

    with endpoint(refusing) as server:
        assert make(server.url, concurrency=1).probability(["p"], ["good"], ["poor"]) == [1.0]
        assert ["logprobs" in body for body in server.requests] == [True, False, False]
        message = failure(make(server.url, logprobs=True))
    assert "HTTP 400" in message and message.endswith("set logprobs: auto or false")


def refuses(key, otherwise=None):
    """Refuses requests with a key as OpenAI does; of the temperature, any but 1."""

    def answer(body, number):
        if key in body and not (key == "temperature" and body[key] == 1):
            said = f"Unsupported parameter: '{key}' is not supported with this model."
            said += " Use 'max_completion_tokens' instead." if key == "max_tokens" else ""
            return Answer({"error": {"message": said, "type": "invalid_request_error", "param": key}}, status=400)
        return (otherwise or better)(body, number)

    return answer


def test_max_tokens_goes_by_its_newer_name(make, capsys):
    with endpoint(refuses("max_tokens")) as server:
        judge = make(server.url, concurrency=1, max_tokens=99)
        assert judge.probability(["p", "q"], ["good"] * 2, ["poor"] * 2) == [1.0, 1.0]
        asked = [(body.get("max_tokens"), body.get("max_completion_tokens")) for body in server.requests]
        assert asked == [(99, None)] + [(None, 99)] * 4  # refused once, and remembered
        own = make(server.url, concurrency=1, extra={"max_completion_tokens": 512}, cache=None)
        assert own.probability(["r"], ["good"], ["poor"]) == [1.0]
        assert server.requests[-1]["max_completion_tokens"] == 512
    assert "warning" not in capsys.readouterr().err  # it means the same


def test_two_refusals_in_a_row_and_a_warning_for_what_changes_answers(make, capsys):
    with endpoint(refuses("max_tokens", refuses("temperature", refuses("seed")))) as server:
        judge = make(server.url, concurrency=1, seed=7)
        assert judge.probability(["p", "q"], ["good"] * 2, ["poor"] * 2) == [1.0, 1.0]
        assert len(server.requests) == 3 + 4
        assert not {"max_tokens", "temperature", "seed"} & set(server.requests[-1])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert [re.search(r"refuses '(\w+)'", line)[1] for line in lines] == ["seed", "temperature"]  # once each
    assert all("answers may differ from run to run" in line for line in lines)


def test_a_refusal_of_a_value_or_of_another_key_is_no_reason_to_leave_a_key_out(make):
    for said in ("max_tokens must be at least 1024", "temperature must be between 1 and 2", "unknown key 'top_p'"):
        with endpoint(lambda body, number, said=said: Answer({"error": {"message": said}}, status=400)) as server:
            assert said in failure(make(server.url, concurrency=1, logprobs=False))
            assert len(server.requests) == 1


def test_retries_wait_as_long_as_they_are_asked_to(make):
    """A 500 is retried after at least 0.25 s (half of the first wait), a 429 after what Retry-After says."""

    def moody(body, number):
        if number == 0:
            return Answer("oops", status=500)
        if number == 1:
            return Answer({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "1.5"})
        if number == 2:
            date = email.utils.formatdate(time.time() + 3, usegmt=True)  # whole seconds: 2 to 3 from now
            return Answer("busy", status=503, headers={"Retry-After": date})
        return better(body, number)

    with endpoint(moody) as server:
        assert make(server.url, retries=3, concurrency=1).probability(["p"], ["good"], ["poor"]) == [1.0]
        gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert len(gaps) == 4
    assert 0.25 <= gaps[0] < 1.4 and 1.5 <= gaps[1] < 2.9 and 1.9 <= gaps[2] < 5 and gaps[3] < 1


def test_retries_end(make):
    with endpoint(lambda body, number: Answer("over\nloaded", status=503)) as server:
        message = failure(make(server.url, retries=1, concurrency=1))
        assert len(server.requests) == 2
    assert message.startswith(
        f"oracle llm_judge: base_url {server.url}: no answer after 2 tries: HTTP 503 over loaded;"
    )
    quota = Answer({"error": {"message": "quota"}}, status=429, headers={"Retry-After": "86400"})
    with endpoint(lambda body, number: quota) as server:
        assert "after 1 try: HTTP 429" in (message := failure(make(server.url, retries=5, concurrency=1)))
        assert "asks to wait 86400 s" in message


def test_time_outs_are_retried_then_named(make):
    def slow(body, number):
        answer = better(body, number)
        answer.delay = 1.0 if number == 0 or shown(body)[0] == "fair" else 0.0
        return answer

    with endpoint(slow) as server:
        assert make(server.url, timeout=0.3, retries=1, concurrency=1).probability(["p"], ["good"], ["poor"]) == [1.0]
        assert len(server.requests) == 3
        message = failure(make(server.url, timeout=0.3, concurrency=1), ["p"], ["fair"], ["poor"])
    assert f"base_url {server.url}: no answer after 1 try: timed out (0.3 s)" in message


def test_a_dead_endpoint_is_one_line(make):
    url = f"http://127.0.0.1:{refused_port()}/v1"
    message = failure(make(url, retries=1))
    assert message.startswith(f"oracle llm_judge: base_url {url}: no answer after 2 tries: ConnectError")
    assert "is the server up" in message and "a re-run goes on from them" in message


@pytest.mark.parametrize("body", ["<html>hello</html>", {"error": {"message": "upstream"}}, {"choices": []}, [1], "7"])
def test_what_is_no_chat_completion_is_retried_and_named(make, body):
    with endpoint(lambda asked, number: better(asked, number) if number else Answer(body)) as server:
        assert make(server.url, retries=1, concurrency=1).probability(["p"], ["good"], ["poor"]) == [1.0]
    with endpoint(lambda asked, number: Answer(body)) as server:
        assert "no answer after 1 try: no chat completion but " in failure(make(server.url))


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "name the key's variable in api_key_env"),
        (403, "name the key's variable in api_key_env"),
        (404, "/v1/models lists what model 'm' is"),
        (400, "the server refuses this request: check model, max_tokens, temperature and extra"),
        (301, "/v1/models lists what model 'm' is"),
    ],
)
def test_refusals_are_not_retried(make, status, remedy):
    refusal = Answer({"error": {"message": "no\nway"}}, status=status, headers={"Location": "http://127.0.0.1:9/"})
    with endpoint(lambda body, number: refusal) as server:
        message = failure(make(server.url, retries=3, concurrency=1))
        assert len(server.requests) == 1
    assert message.startswith(f"oracle llm_judge: base_url {server.url}: HTTP {status} ") and message.endswith(remedy)
    with endpoint(better) as server:
        assert "HTTP 404" in failure(make(server.url + "/v2"))


def test_the_key_is_sent_and_never_written(make, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", f"{SECRET}\n")

    def echoing(body, number):
        answer = better(body, number)
        answer.body["you_said"] = [{"key": f"Bearer {SECRET}"}]
        return answer

    with endpoint(echoing) as server:
        judge = make(server.url, api_key_env="JUDGE_KEY")
        assert judge.probability(["p"], ["good"], ["poor"]) == [1.0]
        assert [headers["authorization"] for headers in server.headers] == [f"Bearer {SECRET}"] * 2
    with endpoint(lambda body, number: Answer(f"bad key {SECRET}", status=401)) as refusing:
        message = failure(make(refusing.url, api_key_env="JUDGE_KEY"))
    assert message.endswith("HTTP 401 bad key ***; check the key in JUDGE_KEY (api_key_env)")
    with endpoint(lambda body, number: Answer(f"bad key {SECRET}", status=500)) as broken:
        assert SECRET not in failure(make(broken.url, api_key_env="JUDGE_KEY"))
    written = [file.read_text() + file.name for file in (tmp_path / "cache").iterdir()]
    assert len(written) == 2 and all("Bearer ***" in text for text in written)
    captured = capsys.readouterr()
    assert not any(SECRET in text for text in (*written, captured.out, captured.err, judge.describe(), repr(judge)))


def test_a_missing_key_is_named_when_it_is_needed(make, monkeypatch):
    with endpoint(better) as server:
        judge = make(server.url, api_key_env="JUDGE_KEY")
        for value, said in (
            (None, "is not set or empty"),
            (" ", "is not set or empty"),
            (f"{SECRET} x", "white space"),
        ):
            monkeypatch.setenv("JUDGE_KEY", value or "")
            if value is None:
                monkeypatch.delenv("JUDGE_KEY")
            message = failure(judge)
            assert said in message and SECRET not in message
            assert f"base_url {server.url}: the environment variable JUDGE_KEY (api_key_env) " in message
        assert server.requests == []
        monkeypatch.setenv("JUDGE_KEY", SECRET)
        judge.probability(["p"], ["good"], ["poor"])
        monkeypatch.delenv("JUDGE_KEY")
        assert judge.probability(["p"], ["good"], ["poor"]) == [1.0]  # from the cache: no key needed


def test_a_failure_midway_keeps_what_was_answered(make, tmp_path):
    texts = [str(i) for i in range(10)]
    down = True

    def failing(body, number):
        return Answer("gone", status=404) if down and number >= 7 else says("A" if "0" in shown(body)[0] else "B")

    asked = (["p"] * 9, texts[:1] * 9, texts[1:])
    with endpoint(failing) as server:
        failure(make(server.url, concurrency=1), *asked)
        assert len(server.requests) == 8  # none after the refusal
        assert len(list((tmp_path / "cache").iterdir())) == 7
        down = False
        judge = make(server.url, concurrency=1)
        assert judge.probability(*asked) == [1.0] * 9
        assert len(server.requests) == 8 + 18 - 7
        assert (judge.tally.cached, judge.tally.called) == (7, 11)


def test_one_failure_stops_the_others_that_wait_for_a_retry(make):
    """One question is refused after 0.3 s; the others were told to wait for a minute, and do not."""

    def answering(body, number):
        if shown(body) == ("good", "poor"):
            return Answer("no", status=401, delay=0.3)
        return Answer("later", status=429, headers={"Retry-After": "60"})

    with endpoint(answering) as server:
        start = time.monotonic()
        assert "HTTP 401" in failure(make(server.url, retries=3), ["p"] * 2, ["good", "good"], ["poor", "fair"])
        assert time.monotonic() - start < 10


def test_requests_go_out_together_up_to_the_limit(make):
    def pausing(body, number):
        answer = says("A")
        answer.delay = 0.1
        return answer

    with endpoint(pausing) as server:
        make(server.url, concurrency=4).probability(["p"] * 8, ["x"] * 8, [str(i) for i in range(8)])
        assert len(server.requests) == 16 and 2 <= server.together <= 4
