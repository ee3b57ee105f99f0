"""docs/sampling.md: its commands and its Python run, on the tiny model."""

from __future__ import annotations

import runpy
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from alignment.models.pools import open_pool
from alignment.models.sampling import Generation
from tests.pages import ROOT, blocks, read

PAGE = read("docs/sampling.md")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder like a checkout, with prompts."""
    for name in ("evaluation", "recipes", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "prompts.txt").write_text("my dog is\nthe cat was\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_the_commands_run(workplace, tiny, monkeypatch, capsys):
    """In this process, the launch of two as one process: tests/models/test_pools.py launches."""
    (script,) = blocks(PAGE, "bash")
    for line in script.splitlines():
        words = [str(tiny) if word == "MODEL" else word for word in shlex.split(line)]
        if "--config_file" in words:
            assert Path(words[words.index("--config_file") + 1]).is_file()
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        monkeypatch.setattr(sys, "argv", words[at:])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(words[at], run_name="__main__")
        assert not stopped.value.code
    printed = capsys.readouterr().out
    assert "pools/two: 2 prompts, 16 samples, " in printed and "Win rate  50.0 %" in printed


def test_the_python_runs(workplace, tiny, capsys):
    (code,) = blocks(PAGE, "python")
    exec(code.replace("MODEL", str(tiny)), {})
    assert capsys.readouterr().out.startswith("4 samples, ") and open_pool(Path("pools/python")).n == 4


def test_columns_and_settings_are_on_the_page(workplace, tiny):
    (code,) = blocks(PAGE, "python")
    scope: dict = {}
    exec(code.replace("MODEL", str(tiny)), scope)
    for name in (*scope["pool"].rows(0)[0], *asdict(Generation())):
        assert f"`{name}`" in PAGE, name
