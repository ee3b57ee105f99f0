"""Iterative methods, end to end on the tiny language model, in one process and in launches of several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from alignment.data.preferences import read_rows
from alignment.pipeline.driver import run
from alignment.recipes import load_iterate_recipe
from alignment.rewards import get_reward
from evaluation.plans import plan_of_run, run_plan
from tests import tiny_lm
from tests.e2e.conftest import free_port
from tests.pipeline.conftest import KIND_WORDS, QUICKSTART, losses

REWARD = ("oracle=null", f"reward={KIND_WORDS}", "iterate.pairing=best_worst", "reference=fixed")
BY_ORACLE = ("reference=previous", "iterate.pairing=best_worst")
METHODS = {
    "inpo": (),
    "inpo iid": ("iterate.pairing=iid", "iterate.labels=drawn"),
    "iterative dpo": (
        *REWARD,
        "objective={name: dpo, beta: 0.1}",
        "iterate.length_penalty=0.01",
        "iterate.unfinished=drop",
        "iterate.train_on=all",
    ),
    "sppo": (*BY_ORACLE, "objective={name: sppo, eta: 4}"),
    "gpo": (*BY_ORACLE, "objective={name: gpo, eta: 0.5}"),
    "online vpo": (
        *REWARD,
        "objective={name: vpo, mode: online, calibration: given, alpha: 0.001}",
        "iterate.train_on=all",
        "iterate.start=base",
    ),
    "inpo lora": ("lora.r=8", "training.learning_rate=5e-3"),
    "simpo": (*REWARD[:-1], "reference=null", "objective={name: simpo}", "training.num_train_epochs=3"),
}
QUICK = ("inpo", "iterative dpo")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Openings to train on, and others to judge by."""
    folder, openings = tmp_path_factory.mktemp("openings"), tiny_lm.openings()
    found = folder / "train.txt", folder / "held_out.txt"
    for file, part in zip(found, (openings[:112], openings[112:]), strict=True):
        file.write_text("".join(f"{opening}\n" for opening in part))
    return found


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in METHODS])
def test_the_last_iterate_beats_the_base(iterate, files, method):
    """On openings that nobody trained on, and by the mean count of kind words; two iterations of 56 prompts."""
    train, held_out = files
    evaluation = f"evaluation={{prompts: {held_out}, limit: null}}"
    folder = iterate("run", f"data.prompts={train}", evaluation, *METHODS[method])
    result = run_plan(plan_of_run(folder, judge=get_reward("regex", pattern=tiny_lm.KIND_PATTERN))).result
    assert result["prompts"] == 68
    assert result["interval"][0] > 0.5, result
    assert result["mean_score"]["difference_interval"][0] > 0, result
    assert result["training_prompts"] == 112  # none of which is asked
    first, second = (len(read_rows(folder / f"iteration-{t}" / "pairs" / "pairs.jsonl")) for t in (1, 2))
    trained = json.loads((folder / "iteration-2" / "train" / "manifest.json").read_text())["pairs"]
    everything = "iterate.train_on=all" in METHODS[method]
    assert trained == (first + second if everything else second)
    if method == "iterative dpo":
        lines = read_rows(folder / "metrics.jsonl")
        assert lines[1]["reward"] > lines[0]["reward"]  # the samples of pi_2 against those of pi_1
        pairs = [row for t in (1, 2) for row in read_rows(folder / f"iteration-{t}" / "pairs" / "pairs.jsonl")]
        assert all(row["reward_chosen"] > row["reward_rejected"] for row in pairs)
        judged = [r for row in read_rows(folder / "iteration-1" / "judged" / "00000.jsonl") for r in row["rewards"]]
        judged = [r for r in judged if r is not None]
        assert lines[0]["reward"] == pytest.approx(sum(judged) / len(judged))


LAUNCHES = {
    "two": ("cpu2.yaml", {}),
    "zero2": ("zero2.yaml", {"num_processes": 2, "mixed_precision": "no"}),
    "zero3": ("zero3.yaml", {"num_processes": 2, "mixed_precision": "no"}),
}


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory) -> Path:
    return run(load_iterate_recipe(QUICKSTART, small(tmp_path_factory.mktemp("alone") / "run")))


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_launch_of_two_processes_is_the_same_run(alone, small, root, tmp_path, monkeypatch, launch):
    """Samples and pairs to the byte, losses to rounding; what pi_2 says depends on weights that differ in rounding,
    and is compared where it is the same."""
    name, changes = LAUNCHES[launch]
    config = yaml.safe_load((root / "recipes" / "accelerate" / name).read_text()) | changes
    config |= {"main_process_port": int(free_port()), "use_cpu": True}
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(root)
    folder = run(load_iterate_recipe(QUICKSTART, small(tmp_path / "run")), tmp_path / "launch.yaml")
    for file in ("samples/shards/00000.jsonl", "judged/00000.jsonl", "pairs/pairs.jsonl"):
        one, two = ((place / "iteration-1" / file).read_bytes() for place in (alone, folder))
        assert one == two, file
    first, other = losses(alone, 1, "kl"), losses(folder, 1, "kl")
    assert [x for row in other for x in row] == pytest.approx([x for row in first for x in row], rel=1e-4, abs=1e-4)
    pairs = [read_rows(place / "iteration-2" / "pairs" / "pairs.jsonl") for place in (alone, folder)]
    assert len(pairs[1]) > 10
    if pairs[0] == pairs[1]:
        assert [x for row in losses(folder, 2) for x in row] == pytest.approx(
            [x for row in losses(alone, 2) for x in row], rel=1e-3, abs=1e-3
        )
    manifest = json.loads((folder / "iteration-2" / "train" / "manifest.json").read_text())
    assert manifest["hardware"]["processes"] == 2
    assert manifest["sharding"] == {"two": "none", "zero2": "zero2", "zero3": "zero3"}[launch]
    assert (folder / "final" / "model.safetensors").is_file()
