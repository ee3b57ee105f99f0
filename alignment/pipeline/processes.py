"""Each stage in a process of its own: memory is released when it ends, and a crash costs one stage.

Without an accelerate configuration it is a fork of a server that has done the slow imports once and computes nothing
itself; with one it is `accelerate launch`. What a stage has to say to the user it writes to a file: it is said once,
whatever the number of its processes.
"""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from alignment.errors import UserError
from alignment.files import read_text, write_text

PATIENCE = 60.0  # seconds that processes of a killed driver are given to end
PRELOADED = ["alignment.pipeline.stage", "alignment.runs.program", "alignment.runs.preferences"]


def die_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Where the kernel can: this process is stopped when the one that started it is killed.

    Args:
        number: the signal that it gets.
        parent: the one that started it; if it is gone already, there is nothing to wait for.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def complaint(words: Sequence[str]) -> Path:
    """The file in which a stage's processes leave what the user has to mend: NAME.error where it is at work."""
    name, run, iteration = words[:3]
    return Path(run) / (f"iteration-{iteration}" if iteration != "0" else "") / "unfinished" / f"{name}.error"


def complaining(words: Sequence[str], action: Callable[[], None]) -> None:
    """Carry out a stage; its UserError goes to the file."""
    try:
        action()
    except UserError as error:
        write_text(complaint(words), str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        write_text(
            complaint(words), f"stage {words[0]}: {error.filename or complaint(words).parent}: {error.strerror}"
        )


def run_stage(words: Sequence[str], accelerate_config: Path | None) -> None:
    """Run `alignment.pipeline.stage` with these words, and wait for it.

    Raises:
        UserError: what the stage said, or that something stopped it which it did not say.
        SystemExit: it was interrupted.
    """
    complaint(words).unlink(missing_ok=True)
    try:
        code = _forked(words) if accelerate_config is None else _launched(words, accelerate_config)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if complaint(words).is_file():
        said = read_text(complaint(words))
        complaint(words).unlink()
        raise UserError(said)
    if code == 130:
        raise SystemExit(code)
    if code:
        how = f"was stopped by signal {-code}" if code < 0 else f"ended with code {code}"
        raise UserError(f"stage {words[0]} {how}; what is complete is kept, and the same command goes on from there")


def _forked(words: Sequence[str]) -> int | None:
    from alignment.pipeline import stage

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=stage.run, args=(list(words),))
    process.start()
    process.join()
    return process.exitcode


def _launched(words: Sequence[str], accelerate_config: Path) -> int:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(accelerate_config)]
    driver = os.getpid()
    # On SIGTERM the launcher stops its workers; killed, it could not.
    process = subprocess.Popen(
        [*launch, "-m", "alignment.pipeline.stage", *words],
        preexec_fn=lambda: die_with_parent(signal.SIGTERM, driver),
    )
    return process.wait()
