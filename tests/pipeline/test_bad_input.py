"""What goes wrong while a run is under way: one line, exit code 2, and nothing that was done is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.data.preferences import read_rows
from alignment.errors import UserError
from alignment.pipeline.driver import run
from alignment.recipes import load_iterate_recipe
from tests.pipeline.conftest import QUICKSTART, content
from tests.rewards.http_server import Answer, endpoint, says, shown

JUDGE = "oracle={{name: llm_judge, base_url: '{url}', model: m, template: '{template}', retries: 0, cache: '{cache}'}}"


def prefers_the_longer(body, number):
    first, second = shown(body)
    return says("A" if len(first) > len(second) else "B")


@pytest.fixture
def judged_by(small, tmp_path):
    """`judged_by(url, name)`: a recipe whose judge is a language model behind an address."""
    (tmp_path / "template.txt").write_text("{prompt}|{first}|{second}")

    def recipe(url: str, name: str):
        oracle = JUDGE.format(url=url, template=tmp_path / "template.txt", cache=tmp_path / f"cache-{name}")
        given = small(tmp_path / name, "iterate.iterations=1", "iterate.samples=4", oracle)
        return load_iterate_recipe(QUICKSTART, given)

    return recipe


def late(override: str, message: str):
    """A case for `make test-all`: the stages that it needs take ten seconds to start."""
    return pytest.param([override], message, marks=pytest.mark.slow)


def test_a_judge_that_fails_midway_loses_nothing(judged_by, capfd):
    """It answers 60 questions and then refuses; the run goes on when it answers again, asking for none of the 60."""
    with endpoint(prefers_the_longer) as well:
        undisturbed = run(judged_by(well.url, "well"))
        questions = len(well.requests)
    capfd.readouterr()
    broken = [True]

    def until_it_breaks(body, number):
        refused = broken[0] and number >= 60
        return (
            Answer({"error": {"message": "out of credit"}}, status=402)
            if refused
            else prefers_the_longer(body, number)
        )

    with endpoint(until_it_breaks) as judge:
        recipe = judged_by(judge.url, "run")
        with pytest.raises(UserError, match="HTTP 402 .*out of credit") as stopped:
            run(recipe)
        assert "\n" not in str(stopped.value) and "Traceback" not in capfd.readouterr().err
        folder = Path(recipe.training.output_dir)
        done = json.loads((folder / "manifest.json").read_text())["stages"]
        assert list(done) == ["prompts", "iteration-1/samples"]
        broken[0] = False
        asked_before = len(judge.requests)
        answered = 60
        assert run(recipe) == folder
        assert 0 < len(judge.requests) - asked_before == questions - answered
    kept = [json.loads((f / "iteration-1" / "judged" / "judge.json").read_text()) for f in (undisturbed, folder)]
    counts = [one["invalid_answers"] for one in kept]  # with answers from the cache; what broke off counts once
    assert counts[0] == counts[1] and counts[0]["answers"] >= 60 and counts[0]["invalid"] == 0
    mine, theirs = content(folder), content(undisturbed)
    assert read_rows(folder / "iteration-1" / "pairs" / "pairs.jsonl")
    for name in ("iteration-1/pairs/pairs.jsonl", "iteration-1/logps/logps.jsonl", "iteration-1/train/metrics.jsonl"):
        assert mine[name] == theirs[name], name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["iterate.samples=1"], "iterate.samples: one sample makes no pair: at least 2"),
        (["data.prompts={prompts}.gone"], "no such file"),
        (["training.output_dir=/proc/x/y"], "/proc/x/y: cannot be made"),
        (["generation.max_new_tokens=1", "iterate.unfinished=drop"], "no pair is left of"),
        late("iterate.prompts_per_iteration=30", "41 prompts for 2 iterations of 30 are 19 too few"),
        late("oracle={{name: general, path: /nowhere}}", "/nowhere"),
        late("oracle={{name: tabular, table: {{responses: [x], matrix: [[0.5]]}}}}", "no pair is left of"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_mistake_is_one_line_and_exit_code_2(small, prompts, tmp_path, root, overrides, message):
    given = small(tmp_path / "run", *(override.format(prompts=prompts) for override in overrides))
    words = [sys.executable, "scripts/iterate.py", str(QUICKSTART), *given]
    ended = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=300)
    complaints = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert ended.returncode == 2, ended.stderr
    assert len(complaints) == 1 and message in complaints[0]
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.global_batch_size=7"], "7 pairs cannot be split evenly over 2 processes"),
        (["generation.max_new_tokens=1", "iterate.unfinished=drop"], "no pair is left of"),
        (["lora={{target_modules: [nope]}}"], "cannot set up training: Target modules"),
    ],
    ids=["before anything", "in one process", "in both processes"],
)
def test_a_mistake_in_a_launch_is_one_line_too(small, tmp_path, root, overrides, message):
    given = small(tmp_path / "run", *(override.format() for override in overrides))
    config = ["--accelerate-config", "recipes/accelerate/cpu2.yaml"]
    words = [sys.executable, "scripts/iterate.py", str(QUICKSTART), *given, *config]
    ended = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=300)
    complaints = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert ended.returncode == 2, ended.stderr
    assert len(complaints) == 1 and message in complaints[0]
    assert "Traceback" not in ended.stderr
