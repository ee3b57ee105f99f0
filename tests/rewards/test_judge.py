"""The judge against a real HTTP server: what it asks, what it makes of the answers, and what it does when they fail.

What the server "thinks" is chosen so that the right probability is known beforehand.
"""

from __future__ import annotations

import email.utils
import json
import math
import re
import socket
import time
from pathlib import Path

import mpmath
import pytest
import yaml

from alignment.errors import UserError
from alignment.recipes import load_recipe
from alignment.rewards import get_oracle
from alignment.rewards.judge import first_from_logprobs, first_from_text
from tests.rewards.http_server import Answer, endpoint, says, shown

ROOT = Path(__file__).resolve().parents[2]
SECRET = "sk-0123456789-very-secret"
QUALITY = {"poor": 0.1, "fair": 0.3, "good": 0.45}  # what the server prefers by: P(a > b) = 1/2 + q(a) - q(b)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def make(tmp_path):
    """A judge of a server, with a cache of the test's own and a template that the server can take apart."""
    template = tmp_path / "template.txt"
    template.write_text("{prompt}|{first}|{second}")

    def made(url, **keys):
        defaults = {"model": "m", "template": str(template), "cache": str(tmp_path / "cache"), "retries": 0}
        return get_oracle("llm_judge", base_url=url, **{**defaults, **keys})

    return made


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


def test_position_bias_cancels_exactly(make):
    """P(shown first) = P(a > b) + 0.05: the mean over both orders is P(a > b) without the 0.05."""

    def biased(body, number):
        a, b = shown(body)
        p = 0.5 + QUALITY[a] - QUALITY[b] + 0.05
        return says("A" if p > 0.5 else "B", [token("A" if p > 0.5 else "B", A=math.log(p), B=math.log(1 - p))])

    first, second = ["good", "poor", "poor", "good"], ["poor", "good", "fair", "good"]
    with endpoint(biased) as server:
        judge = make(server.url)
        found = judge.probability(["p"] * 4, first, second)
        assert len(server.requests) == 4  # two pairs of different texts in two orders; equal texts are not asked
        turned = judge.probability(["p"] * 4, second, first)
        assert len(server.requests) == 4
    assert found == pytest.approx([0.85, 0.15, 0.3, 0.5], abs=1e-12)
    assert [p + q for p, q in zip(found, turned, strict=True)] == [1.0] * 4
    assert judge.tally.first_preference == pytest.approx(0.55, abs=1e-12)
    assert judge.tally.consistency == 1.0 and judge.tally.from_logprobs == 8


def test_a_judge_of_places_alone_says_one_half(make, capsys):
    with endpoint(lambda body, number: says("A")) as server:
        judge = make(server.url)
        assert judge.probability(["p", "p"], ["good", "fair"], ["poor", "good"]) == [0.5, 0.5]
    assert (judge.tally.consistency, judge.tally.first_preference) == (0.0, 1.0)
    assert "orders agree on 0.0%, the first place is preferred with 100.0%" in capsys.readouterr().err


def test_text_verdicts_of_both_orders_are_averaged(make):
    with endpoint(better) as server:
        judge = make(server.url, logprobs=False)
        assert judge.probability(["p", "p"], ["good", "poor"], ["poor", "fair"]) == [1.0, 0.0]
        assert all("logprobs" not in body and "top_logprobs" not in body for body in server.requests)
    assert (judge.tally.consistency, judge.tally.first_preference) == (1.0, 0.5)
    assert judge.tally.pairs == 2 and judge.tally.called == 4 and judge.tally.from_logprobs == 0


def test_logprobs_are_normalised_over_the_two_labels():
    """By mpmath with 30 digits: exp(a) / (exp(a) + exp(b)), spellings with white space added up."""
    e = mpmath.exp
    with mpmath.workdps(30):
        both = e(mpmath.mpf(-1.3)) / (e(mpmath.mpf(-1.3)) + e(mpmath.mpf(-0.7)))
        spelt = (e(mpmath.mpf(-2)) + e(mpmath.mpf(-3))) / (e(mpmath.mpf(-2)) + e(mpmath.mpf(-3)) + e(mpmath.mpf(-1)))
        tiny = e(mpmath.mpf(-900)) / (e(mpmath.mpf(-900)) + e(mpmath.mpf(-901)))  # both underflow in a float
    assert first_from_logprobs([token("B", B=-0.7, A=-1.3, The=-4.0)], "B") == pytest.approx(float(both), abs=1e-15)
    assert first_from_logprobs([token("B", B=-1, A=-2, A_=-3)], "B") == pytest.approx(float(spelt), abs=1e-15)
    assert first_from_logprobs([token("x", A=-900, B=-901, x=0)], "x") == pytest.approx(float(tiny), abs=1e-15)
    assert first_from_logprobs([token("A", A=-0.1, C=-3)], "A") == 1.0  # B is missing: minus infinity
    assert first_from_logprobs([token("B", B=-0.1, A=None)], "B") == 0.0
    assert first_from_logprobs([{"token": "B", "logprob": -0.1}], "B") == 0.0  # no alternatives given
    assert first_from_logprobs([token("Both", Both=-0.1, C=-3)], "Both") is None
    blank = token("\n\n", A=-0.1, B=-9)
    assert first_from_logprobs([blank, token("B", B=-0.7, A=-1.3)], "\n\nB") == pytest.approx(float(both), abs=1e-15)
    assert first_from_logprobs([blank], "\n\n") is None
    assert first_from_logprobs([token("Okay", Okay=-0.1, A=-3)], "B") is None  # tokens of thoughts, kept apart


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        *[(text, 1.0) for text in ("A", " A.\n", "**A**", "(A)", "Response A", "The better response is: **A**")],
        *[("<think>B? No, [[B]] is wrong.</think>\n\nA", 1.0), ("Long story. [[A]]", 1.0), ("answer: A", 1.0)],
        *[("B", 0.0), ("B: it is shorter.", 0.0), ("Response A is bad. So: [[B]]", 0.0), ("B\n\nIt is clear.", 0.0)],
        *[(text, None) for text in ("", "C", "Both are good.", "A or B", "[[A]] or [[B]]", "AB", "a", "Absolutely")],
        *[(text, None) for text in ("A good question.", "A: bad. B: good.", "<think>A", "I like A", "A, surely")],
    ],
)
def test_verdicts_in_text(text, verdict):
    assert first_from_text(text) == verdict


def test_auto_reads_text_where_log_probs_are_not_given_or_say_nothing(make):
    """`The answer is A` begins with `The`: its first token has no label among the alternatives."""

    def mixed(body, number):
        first, _ = shown(body)
        label = "A" if first == "good" else "B"
        if body["messages"][0]["content"].startswith("given"):
            return says(f"The answer is {label}", [token("The", The=-0.1, Response=-3)])
        return says(label)

    with endpoint(mixed) as server:
        judge = make(server.url)
        assert judge.probability(["given", "not"], ["good"] * 2, ["poor"] * 2) == [1.0, 1.0]
        assert all(body["logprobs"] is True and body["top_logprobs"] == 5 for body in server.requests)
        assert judge.tally.from_logprobs == 0 and judge.tally.invalid == 0
        strict = make(server.url, logprobs=True)
        assert strict.probability(["given"], ["good"], ["poor"]) == [0.5] and strict.tally.invalid == 2
        assert "no log-probs came from model 'm'; set logprobs: auto or false" in failure(
            strict, ["not"], ["good"], ["poor"]
        )


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


def test_answers_without_a_verdict_are_ties_and_reported(make, capsys):
    """good/poor: both orders invalid, 1/2. good/fair: one order says good, the other nothing: (1 + 1/2) / 2."""

    def partly(body, number):
        first, second = shown(body)
        if "poor" in (first, second):
            return says("I cannot\ndecide.") if first == "poor" else says(None)
        return says("A") if first == "good" else says("Hm.")

    with endpoint(partly) as server:
        judge = make(server.url)
        assert judge.probability(["p", "p"], ["good", "good"], ["poor", "fair"]) == [0.5, 0.75]
        assert (judge.tally.invalid, judge.tally.called, judge.tally.cached) == (3, 4, 0)
        assert "3 invalid (counted as ties, the first: " in capsys.readouterr().err
        assert math.isnan(judge.tally.consistency)  # no pair with two valid answers
        again = make(server.url)
        assert again.probability(["p", "p"], ["good", "good"], ["poor", "fair"]) == [0.5, 0.75]
        assert (again.tally.invalid, again.tally.called, again.tally.cached) == (3, 0, 4)


def test_what_is_too_long_or_filtered_is_invalid_not_the_end(make):
    def limited(body, number):
        if "long" in shown(body):
            said = "This model's maximum context length is 4096 tokens. However, you requested 9000."
            return Answer({"error": {"message": said}}, status=400)
        return better(body, number)

    with endpoint(limited) as server:
        for called in (4, 0):
            judge = make(server.url)
            assert judge.probability(["p", "p"], ["good", "good"], ["poor", "long"]) == [1.0, 0.5]
            assert (judge.tally.invalid, judge.tally.called) == (2, called)
        assert len(server.requests) == 4


def test_a_second_run_asks_nothing_and_says_the_same(make):
    def noisy(body, number):
        p = 0.5 ** (number + 1)  # no two pairs have the same difference
        return says("A", [token("A", A=math.log(p), B=math.log1p(-p))])

    prompts, first, second = ["p", "q", "p"], ["good", "good", "fair"], ["poor", "fair", "poor"]
    with endpoint(noisy) as server:
        found = make(server.url).probability(prompts, first, second)
        assert len(server.requests) == 6 and len(set(found)) == 3
    dead = make(server.url)  # the server is gone
    assert dead.probability(prompts, first, second) == found
    turned = dead.probability(prompts, second, first)
    assert [p + q for p, q in zip(found, turned, strict=True)] == [1.0] * 3
    assert dead.tally.called == 0 and dead.tally.cached == 12


def test_the_answer_is_kept_whole(make, tmp_path):
    with endpoint(better) as server:
        make(server.url).probability(["p"], ["good"], ["poor"])
    kept = [json.loads(file.read_text()) for file in (tmp_path / "cache").iterdir()]
    assert len(kept) == 2
    for entry in kept:
        content = entry["request"]["messages"][0]["content"]
        wanted = {"p|good|poor": "A", "p|poor|good": "B"}[content]
        assert entry["answer"] == says(wanted).body
    (file, _) = (tmp_path / "cache").iterdir()
    file.write_text('{"answer": 3}')
    assert failure(make(server.url)) == f"{file}: holds no answer of a judge; delete it and it is asked for again"


def test_whatever_matters_is_part_of_the_key(make, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Q: {prompt}|{first}|{second}")
    matters = [
        *[{"model": "n"}, {"temperature": 0.5}, {"max_tokens": 3}, {"logprobs": False}, {"logprobs": "auto"}],
        *[{"seed": 1}, {"seed": 2}, {"template": str(other)}, {"extra": {"top_p": 0.5}}, {"extra": {"top_p": 0.6}}],
    ]
    quiet = [{"timeout": 9}, {"retries": 3}, {"concurrency": 1}, {"api_key_env": "JUDGE_KEY"}]
    given = says("A", [token("A", A=-0.5, B=-1)])
    with endpoint(lambda body, number: given) as server, endpoint(lambda body, number: given) as elsewhere:
        plain = make(server.url, logprobs=True)
        descriptions = {plain.describe()}
        plain.probability(["p"], ["good"], ["poor"])
        for count, keys in enumerate(matters, start=2):
            judge = make(server.url, **{"logprobs": True, **keys})
            judge.probability(["p"], ["good"], ["poor"])
            assert len(server.requests) == 2 * count, keys
            descriptions.add(judge.describe())
            assert judge != plain
        assert len(descriptions) == 1 + len(matters)
        before = len(server.requests)
        for keys in quiet:
            judge = make(server.url + "/", **{"logprobs": True, **keys})
            judge.probability(["p"], ["good"], ["poor"])
            assert judge.describe() in descriptions
        assert len(server.requests) == before
        make(elsewhere.url, logprobs=True).probability(["p"], ["good"], ["poor"])
        assert len(elsewhere.requests) == 2
    sent = [(body.get("seed"), body.get("top_p"), body["temperature"], body["max_tokens"]) for body in server.requests]
    wanted = {(None, None, 0.0, 16), (None, None, 0.5, 16), (None, None, 0.0, 3), (1, None, 0.0, 16)}
    assert wanted | {(2, None, 0.0, 16), (None, 0.5, 0.0, 16), (None, 0.6, 0.0, 16)} == set(sent)


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


def test_texts_arrive_as_they_are(make, tmp_path):
    """Braces, line ends, no ASCII, half a surrogate pair; and a chat as its messages."""
    odd = '{second} {prompt} \n\t “ü” 😀 \ud83d \\ " {0}'
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with endpoint(lambda body, number: says("B")) as server:
        make(server.url, concurrency=1).probability([chat], [odd], ["other"])
        make(server.url, template=None, concurrency=1).probability(["{first}"], [odd], ["other"])
    asked = [body["messages"] for body in server.requests]
    assert [len(messages) for messages in asked] == [1] * 4
    contents = [messages[0]["content"] for messages in asked]
    assert sorted(contents[:2]) == sorted([f"system: s\nuser: u|{odd}|other", f"system: s\nuser: u|other|{odd}"])
    for content in contents[2:]:
        assert all(content.count(text) == 1 for text in (odd, "other", "{first}"))
    assert contents[2].index(odd) > contents[2].index("other") or contents[3].index(odd) > contents[3].index("other")


def test_a_template_without_a_place_is_named(make, tmp_path):
    file = tmp_path / "broken.txt"
    file.write_text("{prompt} {first}")
    judge = make("http://127.0.0.1:9/v1", template=str(file))  # reads nothing yet
    assert failure(judge) == f"{file}: a judge's template needs {{second}}; put it where that text goes"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": ""}, "model must be the endpoint's name of the model, not ''"),
        ({"temperature": -1}, "temperature must be a number, 0 or above, not -1"),
        ({"max_tokens": 1.5}, "max_tokens must be an integer above 0, not 1.5"),
        ({"logprobs": "yes"}, "logprobs must be true, false or auto, not 'yes'"),
        ({"seed": True}, "seed must be an integer, not True"),
        ({"timeout": 0}, "timeout must be a number of seconds above 0, not 0"),
        ({"retries": -1}, "retries must be an integer, 0 or above, not -1"),
        ({"concurrency": 0}, "concurrency must be an integer above 0, not 0"),
        ({"extra": {"x": {1}}}, "extra must be a mapping that JSON can hold, not {'x': {1}}"),
        ({"extra": {"model": "m"}}, "extra must not hold 'model'; the judge sets that itself"),
        ({"cache": ""}, "cache must be a folder, not ''"),
        *[
            ({"base_url": url}, "base_url must be http://HOST… or https://HOST… without user, ? or #")
            for url in ("", "localhost:8000/v1", "ftp://x", "http://", f"http://u:{SECRET}@x", "http://x:y", 3)
        ],
        *[
            (
                {"api_key_env": key},
                "api_key_env must be the NAME, in capitals, of an environment variable, never the key",
            )
            for key in (SECRET, "sk_lower", "", 3)
        ],
    ],
)
def test_mistakes_are_named_without_secrets(keys, message):
    with pytest.raises(UserError) as caught:
        get_oracle("llm_judge", **{"model": "m", "base_url": "http://127.0.0.1:9/v1", **keys})
    assert str(caught.value) == f"oracle llm_judge: {message}"


def test_the_page_s_recipe_is_one_and_its_program_runs(tmp_path, monkeypatch):
    """Of docs/judging.md: recipes load, and the program runs against a server that finds the longer text better."""
    page = (ROOT / "docs" / "judging.md").read_text()
    monkeypatch.chdir(tmp_path)
    base = {
        "objective": {"name": "dpo"},
        "model": {"name_or_path": "some/model"},
        "data": {"train": "pairs.jsonl"},
        "training": {"global_batch_size": 4, "learning_rate": 1e-6},
    }
    recipes = re.findall(r"^```yaml\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert recipes
    for text in recipes:
        Path("r.yaml").write_text(yaml.safe_dump({**base, **yaml.safe_load(text)}))
        assert load_recipe("r.yaml").oracle.name == "llm_judge"

    def longer(body, number):
        texts = re.search(r"# Response A\n\n(.*)\n\n# Response B\n\n(.*)\n\n# Verdict", body["messages"][0]["content"])
        return says("A" if len(texts[1]) > len(texts[2]) else "B")

    (program,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    with endpoint(longer) as server:
        assert program.count("http://127.0.0.1:8000/v1") == 1
        exec(program.replace("http://127.0.0.1:8000/v1", server.url), {})
        assert len(server.requests) == 2
