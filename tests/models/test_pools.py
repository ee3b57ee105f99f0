"""Pools on disk: what is drawn, in one process and two, going on where it stopped, refusals."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from alignment.errors import UserError
from alignment.models import load_tokenizer
from alignment.models.pools import alone, open_pool, sample_pool
from alignment.models.sampling import Generation

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
    with pytest.raises(UserError, match="temperature: must be above 0"):
        draw(tiny, tmp_path / "new", generation=Generation(temperature=0.0))
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
