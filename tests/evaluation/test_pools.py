"""Scores beside a pool, and best-of-n's program end to end, `kill -9` included; samples: `models/test_pools.py`."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from alignment.errors import UserError
from alignment.models.sampling import Generation
from alignment.rewards import get_reward
from evaluation.best_of_n import app, default_ns, parse_ns
from evaluation.plans import ModelSource
from evaluation.pools import identity_of, sample_source, stored_scores
from tests.tiny_lm import KIND_PATTERN

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "evaluation/best_of_n.py"]
PROMPTS = ["my dog is", "the cat was", "our house seems", "your book is", "my river was"]


def draw(tiny, folder, n=7, prompts=PROMPTS, **keys):
    generation = Generation(max_new_tokens=8, batch_size=keys.pop("batch_size", 3))
    source = ModelSource(str(tiny), {"name_or_path": str(tiny), "dtype": "float32"})
    return sample_source(source, prompts, folder, n, generation=generation, **{"prompts_per_shard": 2, **keys})


@pytest.fixture(scope="module")
def pool(tiny, tmp_path_factory):
    return draw(tiny, tmp_path_factory.mktemp("pools") / "pool")


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


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


def test_chat_prompts_are_what_a_user_says(tiny, tmp_path):
    made = draw(tiny, tmp_path / "pool", n=2, prompts=PROMPTS[:1], chat=True)
    assert made.read(0)[0] == [[{"role": "user", "content": PROMPTS[0]}]]


def test_chat_without_a_template_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = None
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="no chat template; use --no-chat"):
        draw(tmp_path / "plain", tmp_path / "pool", chat=True)
    assert not (tmp_path / "pool").exists()


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
    assert page.count("data:image/svg+xml") == 1 and "http" not in page.replace("http-equiv", "")
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
