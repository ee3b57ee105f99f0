"""Samples from a real HTTP server: what is asked, what is kept, and what happens when the server fails."""

from __future__ import annotations

import json
import runpy
import socket
import sys

import pytest

from alignment.errors import UserError
from alignment.models import load_tokenizer
from alignment.models.endpoint import EndpointBackend
from alignment.models.pools import open_pool, sample_pool
from alignment.models.sampling import Generation
from tests.rewards.http_server import Answer, endpoint

PROMPTS = ["my dog is", "the cat was", "our house seems", "your book is", "my river was"]
SETTINGS = Generation(8, 0.7, 0.9, batch_size=2)
KIND = (" kind .", " warm and good .", " cold")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def completing(body, number):
    """n texts that prompt and seed decide; a text without a full stop was cut."""
    choices = []
    for i in range(body["n"]):
        text = KIND[(body["seed"] + i) % 3]
        said = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        choices.append({"index": i, "finish_reason": "stop" if text.endswith(".") else "length", **said})
        if body.get("return_token_ids"):
            choices[-1]["token_ids"] = [7, 8, i]
    return Answer({"object": "text_completion", "choices": choices})


def draw(tiny, url, folder, n=3, prompts=PROMPTS, generation=SETTINGS, prompts_per_shard=2, **keys):
    tokenizer = load_tokenizer(tiny)
    backend = EndpointBackend(url, "m", tokenizer, **{"retries": 1, **keys})
    settings = {"generation": generation, "seed": 1, "prompts_per_shard": prompts_per_shard, "backend": backend}
    return sample_pool({"name_or_path": str(tiny)}, tokenizer, prompts, folder, n, **settings)


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_what_is_asked_and_what_is_kept(tiny, tmp_path):
    tokenizer = load_tokenizer(tiny)
    with endpoint(completing) as server:
        pool = draw(tiny, server.url, tmp_path / "pool")
    assert set(server.paths) == {"/v1/completions"}
    first = server.requests[0]
    settings = {"model": "m", "max_tokens": 8, "temperature": 0.7, "top_p": 0.9}
    assert settings.items() <= first.items() and not {"top_k", "return_token_ids"} & set(first)
    assert sorted((body["prompt"], body["n"]) for body in server.requests) == sorted(
        (prompt, n) for prompt in PROMPTS for n in (2, 1)
    )
    assert len({body["seed"] for body in server.requests}) == 10
    assert pool.manifest["backend"] == "endpoint" and pool.manifest["ids"] == "retokenised"
    assert pool.manifest["base_url"] == server.url and pool.manifest["temperature"] == 0.7
    rows = [row for shard in range(3) for row in pool.rows(shard)]
    assert [row["prompt"] for row in rows] == PROMPTS
    cut = 0
    for row in rows:
        assert row["prompt_ids"] == tokenizer(row["prompt"]).input_ids
        for ids, text, finished in zip(row["ids"], row["responses"], row["finished"], strict=True):
            assert text in KIND and finished == text.endswith(".")
            plain = tokenizer(text, add_special_tokens=False).input_ids
            assert ids == ([*plain, tokenizer.eos_token_id] if finished else plain)
            cut += not finished
    assert pool.unfinished() == cut > 0


def test_the_same_again_and_messages_with_the_servers_ids(tiny, tmp_path):
    said = [{"role": "user", "content": PROMPTS[0]}]
    with endpoint(completing) as server:
        one, two = (
            draw(
                tiny,
                server.url,
                tmp_path / name,
                prompts=[said, said],
                generation=Generation(8, top_k=5),
                server_ids=True,
            )
            for name in "ab"
        )
    assert contents(one.folder) == contents(two.folder)
    assert set(server.paths) == {"/v1/chat/completions"} and server.requests[0]["messages"] == said
    assert server.requests[0]["top_k"] == 5 and one.manifest["ids"] == "server"
    assert one.rows(0)[0]["ids"] == [[7, 8, 0], [7, 8, 1], [7, 8, 2]] and one.read(0)[0] == [said, said]
    assert server.requests[0]["seed"] != server.requests[1]["seed"]


def test_a_500_then_success(tiny, tmp_path):
    with endpoint(lambda body, number: completing(body, number) if number else Answer("oops", status=500)) as server:
        pool = draw(tiny, server.url, tmp_path / "pool", prompts=PROMPTS[:1])
        assert len(server.requests) == 3 and pool.n == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda choices: choices[:1], "1 samples instead of n=2: the server does not heed n; batch size 1"),
        (lambda choices: choices * 2, "4 samples instead of n=2"),
        (lambda choices: [{**choices[0], "text": None}] * 2, "after 1 try: no completion but"),
        (lambda choices: None, "after 1 try: no completion but"),
    ],
)
def test_exact_counts_or_an_error(tiny, tmp_path, change, message):
    def changed(body, number):
        return Answer({"choices": change(completing(body, number).body["choices"])})

    with endpoint(changed) as server, pytest.raises(UserError) as caught:
        draw(tiny, server.url, tmp_path / "pool", retries=0, concurrency=1)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("pool/shards/*"))


def without(*keys):
    """A server that refuses these keys of a request, as OpenAI words it."""

    def answer(body, number):
        refused = next((key for key in keys if key in body), None)
        if refused is not None:
            return Answer({"error": {"message": f"Unsupported parameter: '{refused}' is not supported."}}, status=400)
        return completing({"seed": 0, **body}, number)

    return answer


def test_keys_that_a_server_refuses_are_renamed_or_left_out_where_samples_stay_the_same(tiny, tmp_path, capsys):
    """At temperature 1 and top_p 1, leaving both out changes nothing; leaving out the seed is said once."""
    with endpoint(without("max_tokens", "temperature", "top_p", "seed")) as server:
        pool = draw(tiny, server.url, tmp_path / "pool", generation=Generation(8, 1.0), concurrency=1)
        assert len(server.requests) == 4 + len(PROMPTS)
    last = server.requests[-1]
    assert last["max_completion_tokens"] == 8 and not {"max_tokens", "temperature", "top_p", "seed"} & set(last)
    assert pool.prompts == len(PROMPTS)
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: sampling")]
    assert len(warned) == 1 and "refuses 'seed'" in warned[0]


@pytest.mark.parametrize(
    ("key", "generation", "remedy"),
    [
        ("temperature", Generation(8, 0.7), "without temperature: 0.7 samples would be others; set temperature: 1"),
        ("top_p", Generation(8, 1.0, 0.9), "without top_p: 0.9 samples would be others; set top_p: 1"),
        ("top_k", Generation(8, 1.0, top_k=5), "without top_k: 5 samples would be others; set top_k: 0"),
    ],
)
def test_a_key_that_decides_what_is_drawn_is_never_left_out(tiny, tmp_path, key, generation, remedy):
    with endpoint(without(key)) as server, pytest.raises(UserError) as caught:
        draw(tiny, server.url, tmp_path / "pool", generation=generation, concurrency=1)
    assert str(caught.value).endswith(remedy) and "\n" not in str(caught.value)
    assert len(server.requests) == 1 and not list(tmp_path.glob("pool/shards/*"))


MANY = [f"my dog number {i} is" for i in range(8)]
LONG_TEXT = " warm and good and kind and cold and warm ."


def saying(text_of):
    """n samples of `text_of(prompt, seed, number of the sample)`."""

    def answer(body, number):
        texts = [text_of(body["prompt"], body["seed"], i) for i in range(body["n"])]
        return Answer({"choices": [{"text": text, "finish_reason": "stop"} for text in texts]})

    return answer


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_server_that_ignores_temperature_is_noticed_after_the_first_shard(tiny, tmp_path, batch_size):
    """As `transformers serve` without do_sample: one request a sample, each answered greedily."""
    generation = Generation(16, 1.0, batch_size=batch_size)
    with (
        endpoint(saying(lambda prompt, seed, i: f" {prompt}{LONG_TEXT}")) as server,
        pytest.raises(UserError) as found,
    ):
        draw(tiny, server.url, tmp_path / "pool", n=2, prompts=MANY * 2, generation=generation, prompts_per_shard=8)
    message = str(found.value)
    assert "\n" not in message and f"base_url {server.url}: each of 8 prompts got one answer again" in message
    assert "do_sample: true in the model's generation_config.json" in message
    assert len(server.requests) == 8 * 2 // batch_size and not list(tmp_path.glob("pool/shards/*"))


@pytest.mark.parametrize(
    ("text_of", "prompts", "n", "generation"),
    [
        (lambda prompt, seed, i: LONG_TEXT, MANY[:7], 2, Generation(16, 1.0)),  # too few prompts to tell
        (lambda prompt, seed, i: LONG_TEXT, MANY, 1, Generation(16, 1.0)),  # one sample each
        (lambda prompt, seed, i: " kind .", MANY, 2, Generation(16, 1.0)),  # a few tokens repeat by themselves
        (lambda prompt, seed, i: LONG_TEXT, MANY, 2, Generation(16, 0.1)),  # nearly greedy on purpose
        (lambda prompt, seed, i: LONG_TEXT, MANY, 2, Generation(16, 1.0, 0.1)),
        (lambda prompt, seed, i: (" cold" if i and "7" in prompt else "") + LONG_TEXT, MANY, 2, Generation(16, 1.0)),
    ],
)
def test_samples_that_may_be_alike_raise_no_alarm(tiny, tmp_path, text_of, prompts, n, generation):
    with endpoint(saying(text_of)) as server:
        pool = draw(
            tiny, server.url, tmp_path / "pool", n=n, prompts=prompts, generation=generation, prompts_per_shard=8
        )
    assert pool.prompts == len(prompts)


def test_ids_that_the_server_does_not_give(tiny, tmp_path):
    def without(body, number):
        return completing({**body, "return_token_ids": False}, number)

    with endpoint(without) as server, pytest.raises(UserError, match="gives no token_ids; without server_ids"):
        draw(tiny, server.url, tmp_path / "pool", server_ids=True)


def test_the_key_is_sent_and_not_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMPLER_KEY", "sk-0123456789-very-secret")
    with endpoint(completing) as server:
        pool = draw(tiny, server.url, tmp_path / "pool", api_key_env="SAMPLER_KEY")
    assert server.headers[0]["authorization"] == "Bearer sk-0123456789-very-secret"
    assert not any(b"sk-0123456789" in data for data in contents(pool.folder).values())


def program(root, monkeypatch, capsys, *words):
    """Exit code, standard output and standard error of scripts/sample.py, run in this process."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path("scripts/sample.py", run_name="__main__")
    return stopped.value.code or 0, *capsys.readouterr()


def test_the_program_goes_on_after_the_server_was_down(root, tiny, tmp_path, monkeypatch, capsys):
    """A server that dies after two shards: one line, code 2, two shards kept; up again: the rest is asked for."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    with socket.socket() as taken:  # a port where nothing answers
        taken.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"

    def words(url, folder):
        given = ["--model", tiny, "--prompts", tmp_path / "p.txt", "--samples", 2, "--prompts-per-shard", 1]
        return *given, "--output", tmp_path / folder, "--endpoint", url, "--endpoint-model", "m", "--retries", 0

    code, out, err = program(root, monkeypatch, capsys, *words(dead, "none"))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"error: sampling: base_url {dead}: no answer after 1 try: ConnectError")
    assert err.endswith("Whole shards so far are kept, a re-run goes on from them\n")
    down = True

    def dying(body, number):
        return Answer("gone", status=503) if down and number >= 2 else completing(body, number)

    with endpoint(dying) as server:
        code, out, err = program(root, monkeypatch, capsys, *words(server.url, "pool"))
        assert code == 2 and "HTTP 503 gone" in err and len(list(tmp_path.glob("pool/shards/*"))) == 2
        down = False
        code, out, err = program(root, monkeypatch, capsys, *words(server.url, "pool"))
        assert code == 0 and f"{tmp_path / 'pool'}: 5 prompts, 10 samples, " in out
        assert len(server.requests) == 3 + 3
        program(root, monkeypatch, capsys, *words(server.url, "straight"))
    assert contents(tmp_path / "pool") == contents(tmp_path / "straight")
    assert json.loads((tmp_path / "pool/manifest.json").read_text())["endpoint_model"] == "m"
    assert open_pool(tmp_path / "pool").prompts == 5
