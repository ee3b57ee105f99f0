"""`evaluation/replication.py`: arms and seeds end in one table; what is complete is not done again."""

import json
import math
import shutil

import pytest
import yaml

from alignment.errors import UserError
from evaluation import replication
from evaluation.experiments import cell, read_experiment
from evaluation.replication import Replication, reward_at, summarise

KIND = r"\b(kind|warm|good|nice|bright)\b"
SHARED = [
    "data.prompts={name: {task}/prompts.txt, limit: 8}",
    "evaluation=null",
    f"reward={{name: regex, pattern: '{KIND}'}}",
    "generation.max_new_tokens=8",
    "rollout.prompts_per_rollout=8",
    "training.global_batch_size=4",
    "training.learning_rate=1e-3",
    "training.use_cpu=true",
    "training.cpu_threads=1",
]


def asked(**more):
    shift = f"reward={{name: shifted, scale: 5.0, reward: {{name: regex, pattern: '{KIND}'}}}}"
    given = {
        "claim": "a shift changes nothing",
        "task": "grammar",
        "recipe": "recipes/quickstart/p3o.yaml",
        "overrides": SHARED,
        "arms": {"plain": {}, "shifted": {"overrides": [shift]}},
        "seeds": 2,
        "reward": {"name": "regex", "pattern": KIND},
        "oracle": {"name": "cyclic", "pattern": r"\w+"},
        "limit": 4,
    }
    return Replication.model_validate(given | more)


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("replication")
    shutil.copytree(tiny, folder / "grammar" / "model")
    return folder, replication.run(asked(), folder)


def test_p3o_does_not_see_a_shift_of_a_prompts_rewards(done):
    folder, result = done
    rows = {(row["arm"], row["seed"]): row for row in result["rows"]}
    assert len(rows) == 4
    for seed in (0, 1):
        plain, shifted = rows["plain", seed], rows["shifted", seed]
        assert plain["kl"] > 0.01  # it moved
        assert {k: v for k, v in plain.items() if k != "arm"} == pytest.approx(
            {k: v for k, v in shifted.items() if k != "arm"}, abs=1e-3
        )
    assert rows["plain", 0]["kl"] != rows["plain", 1]["kl"]
    logged = (folder / "shifted-0" / "metrics.jsonl").read_text()
    assert logged != (folder / "plain-0" / "metrics.jsonl").read_text()  # the rewards were shifted


def test_duels_are_two_sides_of_one_table(done):
    duels = done[1]["duels"]
    assert duels["arms"] == ["plain", "shifted"]
    wins = [[each["mean"] for each in row] for row in duels["wins"]]
    assert wins[0][1] + wins[1][0] == pytest.approx(1.0) and wins[0][0] == pytest.approx(0.5)
    assert all(0 <= each["mean"] <= 0.5 for each in duels["exploited"].values())
    text = replication.describe(done[1])
    assert "| plain |" in text and "exploited" in text


def test_a_second_run_trains_nothing_and_other_keys_are_refused(done, capsys):
    folder, result = done
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/final/*")}
    capsys.readouterr()
    again = replication.run(asked(), folder)
    assert json.dumps(again["rows"]) == json.dumps(result["rows"])
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/final/*")} == before
    with pytest.raises(UserError, match="began with another overrides"):
        replication.run(asked(overrides=[*SHARED, "objective.beta=0.2"]), folder)
    with pytest.raises(UserError, match="arm plain began with other keys"):
        replication.run(asked(arms={"plain": {"overrides": ["objective.beta=0.2"]}}), folder)


def test_the_figure_and_the_shipped_files(done, tmp_path, root, monkeypatch):
    replication.write_figure(done[1], tmp_path / "figure.svg")
    assert (
        "KL to the start" in (tmp_path / "figure.svg").read_text() or (tmp_path / "figure.svg").stat().st_size > 5000
    )
    monkeypatch.chdir(root)
    from alignment.recipes import load_any

    for file in sorted((root / "recipes" / "replications").glob("*.yaml")):
        shipped = read_experiment(file, Replication)
        for name, arm in shipped.arms.items():
            load_any(arm.recipe or shipped.recipe, replication._overrides(shipped, arm, tmp_path, name, 0))


def test_summaries():
    rows = [{"arm": "a", "seed": i, "x": v, "y": math.nan} for i, v in enumerate([1.0, 2.0, 3.0])]
    (found,) = summarise(rows)
    half = 4.302652729911275 * 1.0 / math.sqrt(3)  # t(0.975, 2), standard deviation 1
    assert found["x"] == pytest.approx({"mean": 2.0, "low": 2 - half, "high": 2 + half})
    assert found["y"] == {"mean": None, "low": None, "high": None} and cell(found["y"]) == "–"
    assert cell({"mean": 0.5, "low": 0.5, "high": 0.5}) == "0.500 (every seed)"
    curve = [{"kl": 0.0, "reward": 1.0}, {"kl": 4.0, "reward": 3.0}, {"kl": 6.0, "reward": 5.0}]
    assert reward_at(curve, 5.0) == 4.0 and math.isnan(reward_at(curve, 7.0))


def test_mistakes_in_the_file(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(asked().model_dump() | {"sedes": 2}))
    with pytest.raises(UserError, match="sedes"):
        read_experiment(file, Replication)
    file.write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        read_experiment(file, Replication)
