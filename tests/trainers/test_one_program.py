"""One program at a time works in a run's folder, whatever it trains."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignment.errors import UserError
from alignment.locks import sole_user
from evaluation import win_rate
from tests.runs.building_runs import recipe, train

HOLD = """
import sys, time
from pathlib import Path
from alignment.locks import sole_user
with sole_user(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def another_program(run: Path):
    """A process that works in the folder, killed at the end."""
    program = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert program.stdout is not None and program.stdout.readline() == "held\n"
        yield program
    finally:
        program.kill()
        program.wait()


def content(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("kind", ["dpo", "sft", "reward_model", "members"])
def test_a_second_program_is_refused_and_touches_nothing(tiny, tmp_path, kind):
    """Fresh or resumed; after the first was killed the second works, and no lock is left."""
    members = ("reward_model.members=2",) if kind == "members" else ()
    made = recipe("reward_model" if members else kind, tiny, tmp_path, "training.max_steps=1", *members)
    run = train(made)
    before = content(run)
    with another_program(run) as program:
        for resume in (False, True):
            with pytest.raises(UserError, match=rf"run: another program \(process {program.pid}\) works in this run"):
                train(made, resume)
        if kind == "dpo":
            done = CliRunner().invoke(win_rate.app, [str(run), "--prompts", "p.txt", "--reward", "length"])
            assert done.exit_code != 0 and "another program" in str(done.exception)
        assert content(run) == before and not run.with_name("run.1").exists()
    assert train(made) == run and run.with_name("run.1").is_dir()
    assert not list(tmp_path.rglob("*.lock"))


def test_the_lock_follows_a_folder_that_is_moved_aside(tmp_path):
    """What a run is renamed to is no longer what is locked, and the new folder of the name is."""
    run = tmp_path / "run"
    run.mkdir()
    with another_program(run):
        run.rename(tmp_path / "run.1")
        run.mkdir()
        with pytest.raises(UserError, match="another program"), sole_user(run):
            pass
        with sole_user(tmp_path / "run.1"):
            pass
