"""Samples of a win rate on disk: interrupted and gone on from, read by a second judge, drawn anew for other models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from alignment.errors import UserError
from alignment.models.backends import TransformersBackend
from evaluation.plans import SAMPLES, pool_folder
from evaluation.win_rate import run_program
from tests import tiny_lm
from tests.e2e.conftest import finished as ended
from tests.e2e.conftest import launch
from tests.evaluation.test_win_rate import make_run


@pytest.fixture
def given(tiny, tmp_path) -> dict:
    """The tiny model against itself on six prompts, in shards of two prompts."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(tiny_lm.openings()[:6]))
    settings = {"samples": 2, "batch_size": 1, "max_new_tokens": 5, "reward": "length", "bootstrap": 200}
    return {"model": str(tiny), "baseline": str(tiny), "prompts": prompts, **settings}


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_an_interrupted_win_rate_goes_on_and_ends_the_same(given, tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_program({**given, "output": whole})
    draw, calls = TransformersBackend.draw, []

    def draw_until_killed(self, *arguments):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return draw(self, *arguments)

    monkeypatch.setattr(TransformersBackend, "draw", draw_until_killed)
    with pytest.raises(KeyboardInterrupt):
        run_program({**given, "output": cut})
    begun = {name for name in files(cut) if "shards" in name}
    assert len(begun) == 2 and not (cut / "win_rate.json").exists()  # of 2 models' 3 shards each; nothing half-written
    monkeypatch.setattr(TransformersBackend, "draw", draw)
    run_program({**given, "output": cut})
    assert files(cut) == files(whole)
    result = json.loads((whole / "win_rate.json").read_text())
    # The same seed without a folder: the same samples.
    capsys.readouterr()
    run_program({**given, "json": True})
    assert json.loads(capsys.readouterr().out) == result


def test_a_second_judge_reads_the_samples(given, tmp_path, monkeypatch):
    run_program({**given, "samples_dir": tmp_path / "kept"})
    monkeypatch.setattr(TransformersBackend, "draw", lambda *_: pytest.fail("drawn again"))
    run_program({**given, "reward": "vader", "samples_dir": tmp_path / "kept", "output": tmp_path / "out"})
    assert json.loads((tmp_path / "out" / "win_rate.json").read_text())["judge"]["name"] == "vader"
    assert not (tmp_path / "out" / SAMPLES).exists()
    assert len(list((tmp_path / "kept").iterdir())) == 2  # one pool a side


def test_other_settings_and_other_weights_are_other_pools(tiny, tmp_path):
    from dataclasses import replace

    from evaluation.files import Prompt
    from evaluation.plans import ModelSource, Plan

    model = tmp_path / "final"
    model.mkdir()
    (model / "weights").write_text("1")
    source = ModelSource("m", {"name_or_path": str(model), "adapter": None})
    plan = Plan(source, source, [Prompt("p", "f:1")], None)
    first = pool_folder(tmp_path, source, plan)
    assert first == pool_folder(tmp_path, source, replace(plan, resamples=7)) and first.name.startswith("final-")
    changed = [replace(plan, seed=2), replace(plan, samples_per_prompt=3), replace(plan, chat=True)]
    others = [pool_folder(tmp_path, source, p) for p in changed]
    os.utime(model / "weights", ns=(1, 1))
    others.append(pool_folder(tmp_path, source, plan))
    assert len({first, *others}) == 5


def test_a_run_keeps_its_samples(tiny, tmp_path):
    run_dir = make_run(tmp_path / "run", tiny, tiny_lm.openings()[:3])
    (run_dir / "final").symlink_to(tiny)
    run_program({"RUN_DIR": run_dir})
    assert len(list((run_dir / SAMPLES).iterdir())) == 2
    assert (run_dir / "win_rate.json").is_file() and (run_dir / "report.html").is_file()


def test_what_cannot_be_sampled_is_one_line(given, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="^vLLM is not installed"):
        run_program({**given, "vllm": True})
    with pytest.raises(UserError, match="--samples-dir does not apply with --a, --b"):
        run_program({"a": tmp_path, "b": tmp_path, "reward": "length", "samples_dir": tmp_path})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("alignment.processes.connect", lambda: None)
    with pytest.raises(UserError, match="--samples-dir missing: several processes"):
        run_program(given)


@pytest.mark.slow
def test_two_processes_draw_the_same_samples(given, root, tmp_path):
    """Each draws its shards, one judges and prints."""
    run_program({**given, "output": tmp_path / "one"})
    words = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    command = [str(root / "evaluation" / "win_rate.py"), *words, f"--output={tmp_path / 'two'}"]
    printed = ended(launch(root, ["--config_file", "recipes/accelerate/cpu2.yaml"], command))
    assert printed.count("Win rate  ") == 1
    assert files(tmp_path / "two") == files(tmp_path / "one")
