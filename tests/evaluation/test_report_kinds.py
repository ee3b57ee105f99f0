"""report.html of runs without pairs or win rate: what it says fits them, and the commands that it gives run."""

from __future__ import annotations

import hashlib
import html
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignment.files import write_json, write_json_lines
from evaluation import reward_accuracy, win_rate
from evaluation.report import write_report


def run_of(folder: Path, section: str, tiny: Path) -> Path:
    run = folder / "my run"
    shutil.copytree(tiny, run / "final")
    write_json(run / "manifest.json", {"recipe": {section: {}, "model": {"name_or_path": str(tiny)}}})
    write_json_lines(run / "metrics.jsonl", [{"step": i, "loss": 1 / i, "eval_loss": 2 / i} for i in (1, 2, 3)])
    return run


def commands(page: str) -> list[list[str]]:
    """Of the first box on the page, one a line, as a shell reads them."""
    box = re.search(r"<pre>(.*?)</pre>", page, re.S)
    assert box is not None
    return [shlex.split(html.unescape(line)) for line in box.group(1).splitlines()]


def test_fine_tuning_has_no_pairs_and_its_command_runs(tiny, tmp_path):
    page = write_report(run_of(tmp_path, "sft", tiny)).read_text()
    text = re.sub(r"<style.*?</style>", "", page, flags=re.S)
    assert "Supervised fine-tuning" in text and "objective unknown" not in text and "nats per token" in text
    assert not re.search(r"chosen|rejected|per pair|win rate draws", text)
    (tmp_path / "prompts.txt").write_text("my dog is\nmy cat is\n")
    train, compare = commands(page)
    assert train[:2] == ["alignment", "train"] and train[-1] == f"model.name_or_path={tmp_path / 'my run' / 'final'}"
    assert compare[:3] == ["python", "-m", "evaluation.win_rate"]
    words = [str(tmp_path / "prompts.txt") if word == "PROMPTS" else word for word in compare[3:]]
    done = CliRunner().invoke(win_rate.app, [*words, "--samples", "1", "--max-new-tokens", "2"])
    assert done.exit_code == 0, done.output
    assert "not checked" in done.output  # nobody knows what this one was trained on
    (tmp_path / "my run" / "training_prompts.txt").write_text(hashlib.sha256(b"my dog").hexdigest()[:16] + "\n")
    done = CliRunner().invoke(win_rate.app, [*words, "--samples", "1", "--max-new-tokens", "2"])
    assert done.exit_code == 0 and "none of these prompts is among the 1 that" in done.output
    (tmp_path / "my run" / "training_prompts.txt").write_text(hashlib.sha256(b"my cat is").hexdigest()[:16] + "\n")
    done = CliRunner().invoke(win_rate.app, [*words, "--samples", "1", "--max-new-tokens", "2"])
    assert done.exit_code != 0 and "prompt 'my cat is' was trained on; 1 of 2" in str(done.exception)


@pytest.mark.parametrize("measured", [False, True])
def test_a_reward_model_shows_its_held_out_accuracy(tiny, tmp_path, measured):
    run = run_of(tmp_path, "reward_model", tiny)
    if measured:
        write_json(run / "held_out.json", {"summary": ["accuracy 0.75 [0.61, 0.86]"]})
    page = write_report(run).read_text()
    assert ("accuracy 0.75 [0.61, 0.86]" in page) == measured and ("No pairs were held out" in page) != measured
    assert "Not evaluated yet" not in page and "Outputs, before and after" not in page
    assert commands(page) == [
        ["python", "-m", "evaluation.reward_accuracy", "PAIRS", "--reward", "model", "--reward-key"]
        + [f"path={run / 'final'}"]
    ]
    assert {"--reward", "--reward-key"} <= set(re.findall(r"--[a-z-]+", reward_accuracy.__doc__ or ""))
