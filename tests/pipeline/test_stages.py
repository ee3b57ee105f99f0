"""Judging and pairing as stages: what is judged stays, another judge is refused, noise turns everything of a pair."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from alignment.data.preferences import read_rows
from alignment.errors import UserError
from alignment.files import read_json_object, write_json, write_json_lines
from alignment.locks import alone
from alignment.pipeline.judging import judge_samples
from alignment.pipeline.pairing import write_pairs
from alignment.pipeline.prompts import judge_of
from alignment.recipes import load_iterate_recipe
from tests.pipeline.conftest import KIND_WORDS, QUICKSTART

REWARD = ("oracle=null", f"reward={KIND_WORDS}")


@pytest.fixture
def folder(tmp_path):
    """Two shards of two prompts with four samples each, as a pool has them."""
    texts = [" kind .", " kind and warm .", " cold .", " kind and warm and good ."]
    write_json(tmp_path / "samples" / "manifest.json", {"format": 2, "prompts": 4, "n": 4, "prompts_per_shard": 2})
    for shard in range(2):
        rows = [
            {
                "prompt": f"my {shard}{i}",
                "prompt_ids": [1, shard, i],
                "ids": [[len(text), j] for j, text in enumerate(texts)],
                "responses": texts,
                "finished": [True] * 4,
            }
            for i in range(2)
        ]
        write_json_lines(tmp_path / "samples" / "shards" / f"{shard:05d}.jsonl", rows)
    return tmp_path


@pytest.fixture
def judged(folder, small):
    def carried_out(*overrides):
        pairing = [] if any("pairing" in override for override in overrides) else ["iterate.pairing=best_worst"]
        given = ("iterate.samples=4", *pairing, *overrides)
        recipe = load_iterate_recipe(QUICKSTART, small(folder / "run", *given))
        judge_samples(recipe, folder / "samples", folder / "judged", judge_of(recipe).describe())
        return SimpleNamespace(recipe=recipe, shards=sorted((folder / "judged").glob("0*.jsonl")))

    return carried_out


def test_judged_shards_are_not_judged_again(judged, folder):
    first = judged()
    before = first.shards[0].stat().st_mtime_ns
    first.shards[1].unlink()
    (folder / "judged" / ".00001.jsonl.9.tmp").write_text("half")
    again = judged()
    assert again.shards[0].stat().st_mtime_ns == before and len(again.shards) == 2
    assert not list((folder / "judged").glob(".*"))


def test_another_judge_than_at_the_start_is_refused(judged, folder):
    recipe = judged().recipe
    with pytest.raises(UserError, match="the judge is .*kind.*, and the run began with 'somebody else'"):
        judge_samples(recipe, folder / "samples", folder / "judged", "somebody else")


def test_noise_turns_a_pair_with_all_that_belongs_to_it(judged, folder):
    plain, noisy = judged(*REWARD), judged(*REWARD, "iterate.label_noise=1.0")
    write_pairs(plain.recipe, folder, 1, folder / "plain")
    write_pairs(noisy.recipe, folder, 1, folder / "noisy")
    straight, turned = (read_rows(folder / name / "pairs.jsonl") for name in ("plain", "noisy"))
    assert read_json_object(folder / "noisy" / "counts.json")["flipped"] == len(turned) == 4
    assert read_json_object(folder / "plain" / "counts.json")["mean_reward"] == (1 + 2 + 0 + 3) / 4
    for one, other in zip(straight, turned, strict=True):
        assert (one["chosen"], one["rejected"]) == (" kind and warm and good .", " cold .")
        assert (one["reward_chosen"], one["reward_rejected"]) == (3.0, 0.0)
        mirrored = {
            key.replace("chosen", "#").replace("rejected", "chosen").replace("#", "rejected"): value
            for key, value in other.items()
        }
        assert mirrored == one


def test_a_length_penalty_decides_games(folder, judged):
    file = folder / "samples" / "shards" / "00000.jsonl"
    rows = read_rows(file)
    rows[0]["ids"][3] = list(range(40))  # three kind words, and 40 tokens: 3 - 0.1 * 40 < 0
    write_json_lines(file, rows)
    found = judged(*REWARD, "iterate.pairing=tournament", "iterate.length_penalty=0.1")
    first, second = (json.loads(line) for line in found.shards[0].read_text().splitlines())
    assert first["finalists"] == [1, 3] and second["finalists"] == [3, 2]


def test_independent_pairs_of_a_reward(judged, folder):
    """One and two kind words, then none and three: the higher one is chosen; where one was cut there is no pair."""
    file = folder / "samples" / "shards" / "00000.jsonl"
    rows = read_rows(file)
    rows[0]["finished"][1] = False
    write_json_lines(file, rows)
    found = judged(*REWARD, "iterate.pairing=iid", "iterate.unfinished=drop")
    write_pairs(found.recipe, folder, 1, folder / "pairs")
    pairs = [(row["prompt"], row["chosen"]) for row in read_rows(folder / "pairs" / "pairs.jsonl")]
    first, second = " kind and warm .", " kind and warm and good ."
    assert pairs[:3] == [("my 00", second), ("my 01", first), ("my 01", second)] and len(pairs) == 7
    assert read_json_object(folder / "pairs" / "counts.json")["short"] == 1


def test_a_lock_is_waited_for_and_then_refused(tmp_path):
    with alone(tmp_path), pytest.raises(UserError, match="another process is writing there"), alone(tmp_path, 0.3):
        pass
    with alone(tmp_path):  # and given back
        pass
