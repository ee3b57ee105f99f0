"""The over-optimisation experiment in small, on the tiny model: every stage, going on, refusals, the summary."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignment.errors import UserError
from evaluation.best_of_n import best_of_n_curve
from evaluation.experiments import read_experiment
from evaluation.overoptimization import METHODS, Experiment, run, summarise
from tests import tiny_lm

SHIPPED = Path("recipes/overoptimization/smollm2.yaml")


@pytest.fixture(scope="module")
def experiment(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    openings = tiny_lm.openings()
    (folder / "pairs.txt").write_text("\n".join(openings[:24]))
    (folder / "pool.txt").write_text("\n".join(openings[24:28]))
    content = {
        "policy": {"name_or_path": str(tiny)},
        "gold": {"name": "regex", "pattern": tiny_lm.KIND_PATTERN},
        "pairs": {"file": str(folder / "pairs.txt")},
        "samples_per_prompt": 4,
        "pool": {"file": str(folder / "pool.txt")},
        "n": 16,
        "reward_model": "recipes/overoptimization/reward_model.yaml",
        "overrides": [f"model.name_or_path={tiny}", "reward_model.members=2", "training.use_cpu=true"],
        "noise": [0.0, 0.5],
        "seeds": 2,
        "max_new_tokens": 12,
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    return folder / "small.yaml"


@pytest.fixture(scope="module")
def done(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole command, as a user starts it."""
    folder = tmp_path_factory.mktemp("out")
    command = [sys.executable, "evaluation/overoptimization.py", str(experiment), "--output", str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "| 0.5 | uwo |" in finished.stdout and "report: " in finished.stdout
    return folder


def test_it_ends_with_a_figure_and_a_table(done):
    result = json.loads((done / "overoptimization.json").read_text())
    assert [(r["noise"], r["seed"]) for r in result["runs"]] == [(0, 0), (0, 1), (0.5, 0), (0.5, 1)]
    assert {(row["noise"], row["method"]) for row in result["summary"]} == {(n, m) for n in (0, 0.5) for m in METHODS}
    text = (done / "overoptimization.md").read_text()
    assert text.count("| noise | method |") == 2 and text.count("| 0.5 | uwo |") == 2
    for key, curves in (("summary", "curves"), ("summary_not_normalised", "curves_not_normalised")):
        last = {
            (each["noise"], method): [
                r[curves][method][-1]["gold"] for r in result["runs"] if r["noise"] == each["noise"]
            ]
            for each in result["runs"]
            for method in METHODS
        }
        for row in result[key]:
            mean = np.mean(last[row["noise"], row["method"]])
            assert row["last_gold"]["mean"] == pytest.approx(mean) and f"{mean:.3f} [" in text
    page = (done / "overoptimization.html").read_text()
    assert "share one pool and one set of pairs" in page and "best n is chosen on that same curve" in page
    assert page.count("data:image/svg+xml") == 1 and "http" not in page.replace("http-equiv", "")
    for each in result["runs"]:
        for method in METHODS:
            first = each["curves"][method][0]
            assert first["n"] == 1 and first["kl"] == 0
            # At n = 1 nothing is chosen: gold is the pool's mean whoever would choose.
            assert first["gold"] == pytest.approx(each["curves"]["single"][0]["gold"])


def test_pairs_are_labelled_by_gold(done):
    counts = json.loads((done / "pairs.json").read_text())
    rows = [json.loads(line) for line in (done / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == counts["pairs"] and counts["pairs"] + counts["ties"] == 48
    for row in rows:
        found = [len(re.findall(tiny_lm.KIND_PATTERN, row[side])) for side in ("chosen", "rejected")]
        assert found[0] > found[1] and found == [row["reward_chosen"], row["reward_rejected"]]


def test_members_on_cached_features_score_as_the_exported_model(done):
    """One ensemble's curve again, from what plain transformers scores for the pool's texts."""
    trained = done / "reward-models" / "noise-0-seed-1" / "final"
    model, tokenizer = (cls.from_pretrained(trained) for cls in (AutoModelForSequenceClassification, AutoTokenizer))
    facts = json.loads((trained / "reward_model.json").read_text())
    rows = [json.loads(line) for f in sorted((done / "pool/shards").glob("*.jsonl")) for line in f.open()]
    proxy, gold = [], []
    for row in rows:
        texts = [row["prompt"] + text + tokenizer.eos_token for text in row["responses"]]
        with torch.no_grad():
            scores = [model(tokenizer(t, return_tensors="pt").input_ids).logits[0].tolist() for t in texts]
        proxy.append(((np.array(scores) - facts["mean"]) / facts["std"]).mean(1))
        gold.append([len(re.findall(tiny_lm.KIND_PATTERN, text)) for text in row["responses"]])
    found = json.loads((done / "overoptimization.json").read_text())["runs"][1]["curves"]["mean"]
    expected = best_of_n_curve(proxy, gold, [row["n"] for row in found])
    assert [row["gold"] for row in found] == pytest.approx([row["gold"] for row in expected], abs=1e-4)
    assert [row["proxy"] for row in found] == pytest.approx([row["proxy"] for row in expected], abs=1e-4)
    assert found[-1]["n"] == 8 and found[-1]["proxy"] > found[0]["proxy"] + 0.3


def test_it_goes_on_and_refuses_another_experiment(experiment, done):
    """A further seed: pairs, pool and what is trained are left as they are; another n is another experiment."""
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.suffix in (".jsonl", ".safetensors")}
    settings = read_experiment(experiment, Experiment)
    result = run(settings.model_copy(update={"seeds": 3}), done)
    assert len(result["runs"]) == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(UserError, match="n was 16 and is 8"):
        run(settings.model_copy(update={"n": 8}), done)
    # A folder of before digests were kept is gone on with, and has them from then on.
    file = done / "experiment.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in kept.items() if key != "sha256"}))
    run(settings.model_copy(update={"seeds": 3}), done)
    assert json.loads(file.read_text()) == kept and set(kept["sha256"]) == {"pairs", "pool", "reward_model"}
    for name in ("pairs", "pool"):  # other prompts under the same name
        prompts = Path(getattr(settings, name).file)
        before_text = prompts.read_text()
        prompts.write_text(before_text + "\nthe dog was here")
        with pytest.raises(UserError, match=f"the content of {name} is not what the experiment began with"):
            run(settings.model_copy(update={"seeds": 3}), done)
        prompts.write_text(before_text)


def test_prompts_of_pairs_are_refused_in_the_pool(experiment, tmp_path):
    settings = read_experiment(experiment, Experiment)
    with pytest.raises(UserError, match="24 prompts are in"):
        run(settings.model_copy(update={"pool": settings.pairs}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_summary_by_hand():
    """Two seeds whose curves rise and fall: 1, 3, 2 and 1, 5, 2."""

    def curves(*gold: float):
        return {m: [{"n": n, "gold": g} for n, g in zip((1, 2, 4), gold, strict=True)] for m in METHODS}

    rows = summarise(
        [{"noise": 0.25, "seed": s, "curves": c} for s, c in enumerate((curves(1, 3, 2), curves(1, 5, 2)))]
    )
    assert [row["method"] for row in rows] == list(METHODS)
    row = rows[0]
    assert (row["best_n"], row["largest_n"], row["gold_at_1"]) == (2, 4, 1.0)
    assert row["best_gold"]["mean"] == 4 and row["last_gold"] == {"mean": 2.0, "low": 2.0, "high": 2.0}
    # t interval with one degree of freedom: 12.706 * sqrt(2) / sqrt(2), of differences -1 and -3.
    assert row["lost"]["mean"] == -2
    assert row["lost"]["high"] - row["lost"]["mean"] == pytest.approx(12.7062047, rel=1e-6)


def test_the_shipped_experiment_is_one():
    settings = read_experiment(SHIPPED, Experiment)
    assert settings.n >= 512 and settings.seeds >= 3 and settings.noise == [0.0, 0.25]
    assert Path(settings.pairs.file).is_file() and Path(settings.pool.file).is_file()
    assert Path(settings.reward_model).is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nn": 3}, "nn: Extra inputs are not permitted"),
        ({"n": 1}, "n: Input should be greater than or equal to 2"),
        ({"noise": "much"}, "noise: Input should be a valid list"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path, change, message):
    (tmp_path / "e.yaml").write_text(yaml.safe_dump({**yaml.safe_load(SHIPPED.read_text()), **change}))
    with pytest.raises(UserError, match=f"e.yaml: {message}"):
        read_experiment(tmp_path / "e.yaml", Experiment)
