"""The judge against a real HTTP server: what it asks, what it makes of the answers, and what it does when they fail.

What the server "thinks" is chosen so that the right probability is known beforehand.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml

from alignment.errors import UserError
from alignment.recipes import load_recipe
from alignment.rewards import get_oracle
from tests.rewards.http_server import Answer, endpoint, says, shown
from tests.rewards.judging import QUALITY, SECRET, better, failure, token

ROOT = Path(__file__).resolve().parents[2]


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


def test_a_thought_decides_nothing_neither_by_its_words_nor_by_its_log_probs(make):
    """Every verdict prefers the good response; the thoughts speak for the other one, also in log-probs."""

    def thinking(body, number):
        good, bad = ("A", "B") if shown(body)[0] == "good" else ("B", "A")
        text = f"Okay, {bad} is better. [[{bad}]]\n</think>\n\n{good}"
        return says(text, [token("Okay", **{bad: -4.2, "Okay": -0.1})] if body.get("logprobs") else None)

    with endpoint(thinking) as server:
        for logprobs in ("auto", False):
            judge = make(server.url, logprobs=logprobs)
            assert judge.probability(["p"], ["good"], ["poor"]) == [1.0]
            assert (judge.tally.invalid, judge.tally.from_logprobs, judge.tally.first_preference) == (0, 0, 0.5)


def test_log_probs_never_contradict_a_greedy_verdict(make):
    """Greedy, the text is the likeliest; at temperature 1 it is one draw, and P = 0.3 counts in both orders."""

    def contrary(body, number):
        good = shown(body)[0] == "good"
        label, other = ("A", "B") if good else ("B", "A")
        return says(label, [token(label, **{label: math.log(0.3), other: math.log(0.7)})])

    with endpoint(contrary) as server:
        assert make(server.url).probability(["p"], ["good"], ["poor"]) == [1.0]
        warm = make(server.url, temperature=1.0).probability(["p"], ["good"], ["poor"])
        assert warm == pytest.approx([0.3], abs=1e-12)


def test_a_tie_is_a_verdict(make):
    with endpoint(lambda body, number: says("[[C]]", [token("[["), token("C", A=-0.1, B=-3), token("]]")])) as server:
        judge = make(server.url)
        assert judge.probability(["p"], ["good"], ["poor"]) == [0.5]
        assert (judge.tally.invalid, judge.tally.valid_pairs, judge.tally.consistency) == (0, 1, 1.0)


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


@pytest.mark.parametrize(("invalid", "stops"), [(10, False), (11, True)])
def test_a_judge_that_mostly_has_no_verdict_stops_the_run(make, invalid, stops):
    """20 answers, two for each of ten pairs; the first so many have none. Half is still a win rate, more is not."""
    answers = ["Let me think"] * invalid + ["A"] * (20 - invalid)
    with endpoint(lambda body, number: says(answers[number])) as server:
        judge = make(server.url, concurrency=1)
        asked = (["p"] * 10, ["x"] * 10, [f"y{i}" for i in range(10)])
        if stops:
            message = failure(judge, *asked)
            assert message.startswith(
                "oracle llm_judge: 11 of 20 answers have no verdict, such as 'Let me think'; raise"
            )
        else:
            assert len(judge.probability(*asked)) == 10
        assert judge.tally.invalid_share == invalid / 20
    few = make(server.url)  # answers 0 and 10, from the cache: too few to stop a training run, but no result
    few.probability(["p"], ["x"], ["y0"])
    assert few.tally.invalid == 1 + stops
    if stops:
        with pytest.raises(UserError, match="2 of 2 answers have no verdict"):
            few.tally.refuse()


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
        return says("A" if p == 0.5 else "B", [token("A" if p == 0.5 else "B", A=math.log(p), B=math.log1p(-p))])

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
