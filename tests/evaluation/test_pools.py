"""Pools on disk: what is drawn, going on after `kill -9`, refusals, stored scores, and the program end to end."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from alignment.errors import UserError
from alignment.rewards import get_reward
from evaluation.best_of_n import app, default_ns, parse_ns
from evaluation.plans import Generation, ModelSource
from evaluation.pools import identity_of, open_pool, sample_pool, stored_scores
from tests.tiny_lm import KIND_PATTERN

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "evaluation/best_of_n.py"]
PROMPTS = ["my dog is", "the cat was", "our house seems", "your book is", "my river was"]


def draw(tiny, folder, n=7, prompts=PROMPTS, **keys):
    generation = Generation(max_new_tokens=8, batch_size=keys.pop("batch_size", 3))
    source = ModelSource(str(tiny), {"name_or_path": str(tiny), "dtype": "float32"})
    return sample_pool(source, prompts, folder, n, generation=generation, **{"prompts_per_shard": 2, **keys})


@pytest.fixture(scope="module")
def pool(tiny, tmp_path_factory):
    return draw(tiny, tmp_path_factory.mktemp("pools") / "pool")


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_exact_counts_and_what_a_row_holds(pool, tiny):
    """5 prompts in shards of 2 make 2 + 2 + 1; 7 samples in calls of at most 3 are 7, and decode to their texts."""
    from alignment.models import load_tokenizer

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


@pytest.mark.slow
def test_kill_and_run_again(tiny, tmp_path):
    """A real process, killed with SIGKILL once some shards stand; then again and to the end: the files are equal."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{d} {n} {v}" for d in ("my", "our") for n in ("dog", "cat") for v in ("is", "was")))

    def command(folder):
        keys = ["--prompts", prompts, "--n", 96, "--batch-size", 16, "--shard", 1, "--max-new-tokens", 8]
        return [*PROGRAM, "sample", str(tiny), "--pool", str(folder), *map(str, keys)]

    killed, straight = tmp_path / "killed", tmp_path / "straight"
    process = subprocess.Popen(command(killed), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(killed.glob("shards/0*.jsonl"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    stand = contents(killed)
    assert 2 <= len([name for name in stand if name.endswith(".jsonl") and "/0" in name]) < 8
    for folder in (killed, straight):
        done = subprocess.run(command(folder), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{folder}: 8 prompts, 96 samples each, in 8 shards\n"
    assert contents(killed) == contents(straight)
    assert all(contents(killed)[name] == data for name, data in stand.items() if not name.endswith(".tmp"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n": 8}, "n is 7 there and 8 now"),
        ({"seed": 3}, "seed is 1 there and 3 now"),
        ({"chat": True}, "chat is False there and True now"),
        ({"batch_size": 4}, "batch_size is 3 there and 4 now"),
        ({"prompts": PROMPTS[:4]}, "prompts is 5 there and 4 now"),
        ({"prompts": [*PROMPTS[:4], "our shop is"]}, "prompts_sha256 is"),
    ],
)
def test_other_settings_are_refused(pool, tiny, change, named):
    with pytest.raises(UserError, match=re.escape(named)):
        draw(tiny, pool.folder, **change)


def test_other_weights_under_the_same_name_are_refused(tiny, tmp_path):
    import shutil

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
    source = ModelSource(str(tiny), {"name_or_path": str(tiny)})
    with pytest.raises(UserError, match="temperature: must be above 0"):
        sample_pool(source, PROMPTS, tmp_path / "new", 4, generation=Generation(temperature=0.0))


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
    from evaluation.pools import _alone

    with _alone(pool.folder), pytest.raises(UserError, match="another process is writing there"):
        draw(tiny, pool.folder)


def test_scores_are_kept_per_shard_and_nan_survives(tiny, tmp_path):
    """Member 0 scores by length, member 1 cannot score texts with an 'n'; each different text is asked once."""
    made, asked = draw(tiny, tmp_path / "pool"), []

    def score(prompts, responses):
        asked.append(list(zip(prompts, responses, strict=True)))
        return np.array([[len(r) for r in responses], [math.nan if "n" in r else 1 / 3 for r in responses]])

    first = stored_scores(made, {"reward": "mine"}, score, "scoring")
    assert first.shape == (2, 5, 7) and len(asked) == 3
    texts = [text for number in range(3) for group in made.read(number)[1] for text in group]
    assert first[0].ravel().tolist() == [len(text) for text in texts]
    np.testing.assert_array_equal(first[1].ravel(), [math.nan if "n" in text else 1 / 3 for text in texts])
    assert all(len(calls) == len(set(calls)) for calls in asked)
    again = stored_scores(made, {"reward": "mine"}, score, "scoring")
    np.testing.assert_array_equal(again, first)
    assert len(asked) == 3  # nothing was asked again
    (folder,) = (made.folder / "scores").iterdir()
    (folder / "00001.jsonl").unlink()
    np.testing.assert_array_equal(stored_scores(made, {"reward": "mine"}, score, "scoring"), first)
    assert len(asked) == 4 and asked[3] == asked[1]
    stored_scores(made, {"reward": "another"}, score, "scoring")
    assert len(asked) == 7
    (folder / "00002.jsonl").write_text('{"scores": [[1.0]]}\n')
    with pytest.raises(UserError, match="00002.jsonl: 1 rows of 7 scores per member are needed"):
        stored_scores(made, {"reward": "mine"}, score, "scoring")


@pytest.fixture(scope="module")
def ensemble(tiny, tmp_path_factory):
    """Three fresh heads on the tiny model's trunk, of very different offsets; constants measured on nothing real."""
    import torch

    from alignment.models import load_tokenizer
    from alignment.models.reward_model import Facts, load_reward_model, settle_padding

    folder = tmp_path_factory.mktemp("ensemble")
    torch.manual_seed(0)
    model, tokenizer = load_reward_model(tiny, fresh_head=True, outputs=3), load_tokenizer(tiny)
    settle_padding(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Facts(outputs=3, chat=False, max_length=64, mean=[0.0, 0.1, 0.2], std=[1.0, 2.0, 0.5]).write(folder)
    return folder


def test_program_end_to_end(pool, ensemble, tmp_path):
    """Gold, a rule, recomputed from the texts; at n = 1 every curve's gold is the pool's mean, whatever the proxy."""
    out = tmp_path / "out"
    keys = ["--gold", "regex", "--gold-key", f"pattern={KIND_PATTERN}", "--proxy", ensemble, "--ns", "1,2,7"]
    command = [*PROGRAM, "curves", "--pool", pool.folder, *keys, "--bootstrap", 200, "--output", out, "--json"]
    done = subprocess.run(list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((out / "best_of_n.json").read_text())
    counts = np.array(
        [[len(re.findall(KIND_PATTERN, t)) for t in group] for number in range(3) for group in pool.read(number)[1]]
    )
    assert counts.std() > 0
    for name in ("single", "mean", "wco", "uwo"):
        rows = result["curves"][name]
        assert [row["n"] for row in rows] == [1, 2, 7]
        assert rows[0]["gold"] == pytest.approx(counts.mean())
        assert rows[0]["gold_low"] <= rows[0]["gold"] <= rows[0]["gold_high"]
        assert rows[0]["proxy"] < rows[1]["proxy"] < rows[2]["proxy"]
    assert result["proxy"]["members"] == 3 and result["proxy"]["mean"] == [0.0, 0.1, 0.2]
    assert result["unscored"] == {"gold": 0, "members": [0, 0, 0]}
    text, page = (out / "best_of_n.md").read_text(), (out / "best_of_n.html").read_text()
    assert f"| 1 | 0.000 | {counts.mean():.4g} [" in text and "number of matches" in text
    assert page.count("<svg") == 1 and "http-equiv" not in page and "<img" not in page
    again = CliRunner().invoke(app, ["curves", "--pool", str(pool.folder), *map(str, keys), "--bootstrap", "200"])
    assert again.exit_code == 0 and again.stdout.strip().startswith(text.strip())


def test_program_member_scores_are_the_models(pool, ensemble):
    """Stored member scores against one forward pass by hand, text by text."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from alignment.rewards.scored import EnsembleReward

    reward = EnsembleReward(path=str(ensemble))
    scores = stored_scores(pool, identity_of(reward), reward.member_scores, "proxy")
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(ensemble),
        AutoTokenizer.from_pretrained(ensemble),
    )
    prompts, responses = pool.read(1)
    for row, (prompt, texts) in enumerate(zip(prompts, responses, strict=True)):
        for column, text in enumerate(texts):
            ids = tokenizer(prompt).input_ids + tokenizer(text).input_ids + [tokenizer.eos_token_id]
            with torch.no_grad():
                want = model(input_ids=torch.tensor([ids])).logits[0]
            np.testing.assert_allclose(scores[:, 2 + row, column], want, atol=1e-5)


def test_identity_follows_keys_and_contents(ensemble, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    from alignment.rewards.scored import _loaded

    assert identity_of(get_reward("regex", pattern="a")) != identity_of(get_reward("regex", pattern="b"))
    assert identity_of(get_reward("length")) == identity_of(get_reward("length"))
    folder = tmp_path / "rm"
    shutil.copytree(ensemble, folder)
    one = identity_of(get_reward("ensemble", path=str(folder)))
    assert identity_of(get_reward("ensemble", path=str(folder), batch_size=3)) == one
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _loaded.cache_clear()  # as a new process would
    assert identity_of(get_reward("ensemble", path=str(folder))) != one


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--gold", "nonsense"], "unknown reward 'nonsense'"),
        (["--gold", "length", "--ns", "1,8"], "n = 8 is more than the pool's 7 samples"),
        (["--gold", "length", "--ns", "1,x"], "--ns '1,x': write whole numbers"),
        (["--gold", "length", "--normalise", "batch"], "--normalise 'batch': member or none"),
    ],
)
def test_mistakes_are_one_line(pool, ensemble, arguments, text):
    asked = ["curves", "--pool", str(pool.folder), "--proxy", str(ensemble), *arguments]
    error = CliRunner().invoke(app, asked).exception
    assert isinstance(error, UserError) and text in str(error) and "\n" not in str(error)


def test_default_ns():
    assert default_ns(512) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert default_ns(7) == [1, 2] and default_ns(1) == [1] and default_ns(2) == [1]
    assert parse_ns("1,2,64") == [1, 2, 64]
