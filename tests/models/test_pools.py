"""Pools on disk and scripts/sample.py: what is drawn, in one process and two, `kill -9` and going on, refusals."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
import time

import psutil
import pytest

from alignment.errors import UserError
from alignment.models import load_tokenizer
from alignment.models.pools import alone, open_pool, sample_pool
from alignment.models.sampling import Generation
from tests.e2e.conftest import finished as ended
from tests.e2e.conftest import launch

PROMPTS = ["my dog is", "the cat was", "our house seems", "your book is", "my river was"]


def draw(tiny, folder, n=7, prompts=PROMPTS, **keys):
    generation = Generation(max_new_tokens=8, batch_size=keys.pop("batch_size", 3))
    settings = {"generation": generation, "seed": 1, "prompts_per_shard": 2, **keys}
    return sample_pool(
        {"name_or_path": str(tiny), "dtype": "float32"}, load_tokenizer(tiny), prompts, folder, n, **settings
    )


@pytest.fixture(scope="module")
def pool(tiny, tmp_path_factory):
    return draw(tiny, tmp_path_factory.mktemp("pools") / "pool")


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_exact_counts_and_what_a_row_holds(pool, tiny):
    """5 prompts in shards of 2 make 2 + 2 + 1; 7 samples in calls of at most 3 are 7, and decode to their texts."""
    assert [len(block) for block in pool.shards] == [2, 2, 1]
    assert sorted(p.name for p in (pool.folder / "shards").iterdir()) == [f"0000{i}.jsonl" for i in range(3)]
    tokenizer, seen = load_tokenizer(tiny), []
    for number in range(3):
        prompts, responses = pool.read(number)
        seen += prompts
        for line in pool.file(number).read_text().splitlines():
            row = json.loads(line)
            assert [len(row[key]) for key in ("ids", "responses", "finished")] == [7, 7, 7]
            for ids, text, finished in zip(row["ids"], row["responses"], row["finished"], strict=True):
                assert tokenizer.decode(ids, skip_special_tokens=True) == text
                assert finished == (ids[-1] == tokenizer.eos_token_id) and len(ids) <= 8
        assert all(len(texts) == 7 for texts in responses)
    assert seen == PROMPTS


def test_parts_are_drawn_independently(tiny, tmp_path):
    """One prompt in two shards, two calls each: were a seed used twice, the same 16 texts would stand twice."""
    made = draw(tiny, tmp_path / "p", n=32, prompts=PROMPTS[:1] * 2, batch_size=16, prompts_per_shard=1)
    texts = [made.read(number)[1][0] for number in range(2)]
    parts = [tuple(t[start : start + 16]) for t in texts for start in (0, 16)]
    assert len(set(parts)) == 4
    again = draw(tiny, tmp_path / "q", n=32, prompts=PROMPTS[:1] * 2, batch_size=16, prompts_per_shard=1, seed=2)
    assert again.read(0)[1] != made.read(0)[1]


def test_a_pool_that_is_there_is_left_alone(pool, tiny):
    before = {f: f.stat().st_mtime_ns for f in (pool.folder / "shards").iterdir()}
    draw(tiny, pool.folder)
    assert {f: f.stat().st_mtime_ns for f in (pool.folder / "shards").iterdir()} == before


def test_only_what_is_missing_is_drawn_again_and_equal(tiny, tmp_path):
    folder = tmp_path / "pool"
    whole = contents(draw(tiny, folder).folder)
    (folder / "shards" / "00001.jsonl").unlink()
    (folder / "shards" / ".00001.jsonl.4242.tmp").write_text('{"prompt": "my d')  # a killed writer's
    kept = (folder / "shards" / "00000.jsonl").stat().st_mtime_ns
    with pytest.raises(UserError, match="1 of 3 shards are missing; run the same"):
        open_pool(folder)
    draw(tiny, folder)
    assert contents(folder) == whole
    assert (folder / "shards" / "00000.jsonl").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n": 8}, "n is 7 there and 8 now"),
        ({"seed": 3}, "seed is 1 there and 3 now"),
        ({"prompts": [[{"role": "user", "content": p}] for p in PROMPTS]}, "prompts_sha256 is"),
        ({"generation": Generation(8, temperature=0.5, batch_size=3)}, "temperature is 1.0 there and 0.5 now"),
        ({"batch_size": 4}, "batch_size is 3 there and 4 now"),
        ({"prompts": PROMPTS[:4]}, "prompts is 5 there and 4 now"),
        ({"prompts": [*PROMPTS[:4], "our shop is"]}, "prompts_sha256 is"),
    ],
)
def test_other_settings_are_refused(pool, tiny, change, named):
    with pytest.raises(UserError, match=re.escape(named)):
        draw(tiny, pool.folder, **change)


def test_other_weights_under_the_same_name_are_refused(tiny, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny, tmp_path / "model")
    draw(tmp_path / "model", tmp_path / "pool", n=1, prompts=PROMPTS[:1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="model_sha256 is"):
        draw(tmp_path / "model", tmp_path / "pool", n=1, prompts=PROMPTS[:1])


def test_what_is_no_pool_is_refused(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a pool"):
        draw(tiny, tmp_path)
    with pytest.raises(UserError, match="no manifest.json there"):
        open_pool(tmp_path / "nowhere")
    with pytest.raises(UserError, match="temperature: must be a number, at least 0, not -1"):
        draw(tiny, tmp_path / "new", generation=Generation(temperature=-1.0))
    for same in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}):
        with pytest.raises(UserError, match=f"^{next(iter(same))}: [01]: greedy samples of a prompt are all the same"):
            draw(tiny, tmp_path / "new", generation=Generation(**same))
    with pytest.raises(UserError, match="no prompts to sample"):
        draw(tiny, tmp_path / "new", prompts=[])
    assert not (tmp_path / "new").exists()


def test_a_damaged_shard_is_named(tiny, tmp_path):
    made = draw(tiny, tmp_path / "pool", prompts=PROMPTS[:2])
    row = json.loads(made.file(0).read_text().splitlines()[0])
    made.file(0).write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"00000.jsonl: 1 prompts instead of 2; delete the file"):
        made.read(0)
    made.file(0).write_text(json.dumps({**row, "responses": row["responses"][:6]}) + "\n")
    with pytest.raises(UserError, match=r"00000.jsonl:1: 7 samples are needed"):
        made.read(0)


def test_two_processes_at_once(pool, tiny):
    """The lock is held by this process's first handle; a second one is told so."""
    with alone(pool.folder), pytest.raises(UserError, match="another process is writing there"):
        draw(tiny, pool.folder)


def test_more_prompts_leave_the_earlier_shards_as_they_are(pool, tiny, tmp_path):
    """Whole shards, that is: the last one of five prompts holds one, of six prompts two."""
    more = draw(tiny, tmp_path / "pool", prompts=[*PROMPTS, "our shop is"])
    assert [more.file(i).read_bytes() == pool.file(i).read_bytes() for i in range(3)] == [True, True, False]
    assert len(more.shards) == 3 and more.prompts == 6


def test_what_the_manifest_and_the_pool_say(tiny, tmp_path):
    """Settings of the draws are there; one token does not end a sentence, so all are unfinished."""
    generation = Generation(1, temperature=0.7, top_p=0.9, top_k=5, batch_size=4)
    made = draw(tiny, tmp_path / "pool", n=4, generation=generation, seed=9, name="mine")
    kept = {"model": "mine", "backend": "transformers", "device": "cpu", "n": 4, "prompts": 5, "seed": 9}
    kept |= {"max_new_tokens": 1, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "batch_size": 4}
    assert kept.items() <= json.loads((made.folder / "manifest.json").read_text()).items()
    assert made.unfinished() == 20 and all(len(ids) == 1 for row in made.rows(0) for ids in row["ids"])


def test_messages_are_kept_and_given_through_the_template(tiny, tmp_path):
    tokenizer, said = load_tokenizer(tiny), [{"role": "user", "content": PROMPTS[0]}]
    made = draw(tiny, tmp_path / "pool", n=2, prompts=[said, PROMPTS[1]])
    assert made.read(0)[0] == [said, PROMPTS[1]]
    expected = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert made.rows(0)[0]["prompt_ids"] == expected["input_ids"]
    assert made.rows(0)[1]["prompt_ids"] == tokenizer(PROMPTS[1]).input_ids


# The program.

SENTENCES = [f"{d} {n} {v}" for d in ("my", "our") for n in ("dog", "cat") for v in ("is", "was")]


@pytest.fixture
def words(tiny, tmp_path):
    """Command line of scripts/sample.py for 8 prompts, 96 samples each, in 8 shards; and where they go."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(SENTENCES))
    keys = {"model": tiny, "prompts": prompts, "samples": 96, "batch-size": 16, "max-new-tokens": 8}
    keys |= {"prompts-per-shard": 1, "cpu-threads": 1}
    given = [str(word) for key, value in keys.items() for word in (f"--{key}", value)]
    return lambda folder, *more: ["scripts/sample.py", *given, "--output", str(folder), *map(str, more)]


def program(root, words):
    return subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True, timeout=120)


def straight(tiny, folder):
    """The same in this process, by the library."""
    return draw(
        tiny, folder, n=96, prompts=SENTENCES, generation=Generation(8, batch_size=16), prompts_per_shard=1
    ).folder


@pytest.mark.slow
def test_two_processes_killed_and_run_again_make_the_files_of_one(root, tiny, words, tmp_path):
    """SIGKILL to all once a shard stands; the same command again; byte for byte what one process writes."""
    two, command = ["--config_file", "recipes/accelerate/cpu2.yaml"], words(tmp_path / "pool")
    process, deadline = launch(root, two, command), time.monotonic() + 120
    launcher, family = psutil.Process(process.pid), []
    while not list(tmp_path.glob("pool/shards/0*.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        family = [launcher, *launcher.children(recursive=True)]  # workers are in process groups of their own
        time.sleep(0.002)
    for member in family:
        member.kill()
    process.communicate()
    stood = {name: data for name, data in contents(tmp_path / "pool").items() if not name.endswith(".tmp")}
    assert 2 <= len(stood) < 9  # the manifest and some shards
    printed = ended(launch(root, two, command))
    expected = contents(straight(tiny, tmp_path / "straight"))
    assert contents(tmp_path / "pool") == expected and stood.items() <= expected.items()
    unfinished = open_pool(tmp_path / "pool").unfinished()
    assert f"{tmp_path / 'pool'}: 8 prompts, 768 samples, {unfinished} unfinished\n" in printed
    assert 0 < unfinished < 768


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["zero3", "fsdp"])
def test_launches_that_shard_in_training_do_not_shard_here(root, tiny, words, tmp_path, launcher):
    """ZeRO-3, and FSDP that lets one process alone read the weights: each process has the whole model."""
    name, environment = "cpu2", {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    if launcher == "zero3":
        name, environment = "zero3", {}
    options = ["--config_file", f"recipes/accelerate/{name}.yaml", "--num_processes", "2"]
    ended(launch(root, options, words(tmp_path / "pool"), **environment))
    assert contents(tmp_path / "pool") == contents(straight(tiny, tmp_path / "straight"))


def test_prompts_of_a_jsonl_and_a_limit(root, words, tmp_path):
    said = [{"role": "user", "content": "my dog is"}]
    rows = [{"prompt": "my dog is", "note": 1}, {"prompt": said}, {"prompt": "my dog is"}, {"prompt": "left out"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--prompts", tmp_path / "p.jsonl", "--limit", 3, "--samples", 2)
    done = program(root, words(tmp_path / "pool", *more))
    assert done.returncode == 0 and "3 prompts, 6 samples, " in done.stdout, done.stderr
    pool = open_pool(tmp_path / "pool")
    assert [pool.read(i)[0][0] for i in range(3)] == ["my dog is", said, "my dog is"]
    assert pool.rows(0)[0]["ids"] != pool.rows(2)[0]["ids"]  # equal prompts, other draws


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--temperature", "0"], "temperature: 0: greedy samples of a prompt are all the same; ask for one"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--model", "./nowhere"], "cannot load './nowhere'"),
        (["--endpoint-model", "m"], "--endpoint-model without --endpoint"),
        (["--endpoint", "http://me:secret@host/v1"], "endpoint: must be http://HOST"),
        (["--endpoint", "http://host/v1", "--api-key-env", "sk-1"], "api_key_env: must be the NAME"),
        (["--endpoint", "http://host/v1", "--vllm"], "--vllm and --endpoint: one of them draws"),
        pytest.param(
            ["--vllm"],
            "vLLM is not installed: `pip install vllm`",
            marks=pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed"),
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(root, words, tmp_path, monkeypatch, capsys, more, message):
    """In this process, as the program does it: a start of Python costs seconds."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", words(tmp_path / "pool", *more))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path("scripts/sample.py", run_name="__main__")
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "pool").exists()


def test_help_is_fast(root):
    start = time.monotonic()
    done = program(root, ["-X", "importtime", "scripts/sample.py", "--help"])
    assert done.returncode == 0 and "--prompts-per-shard" in done.stdout
    assert not re.search(r"\| +(torch|transformers|accelerate)$", done.stderr, flags=re.MULTILINE)
    assert time.monotonic() - start < 5
