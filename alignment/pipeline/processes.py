"""Each stage in a process of its own: memory is released when it ends, and a crash costs one stage.

Without an accelerate configuration it is a fork of a server that has done the slow imports once and computes nothing
itself; with one it is `accelerate launch`.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from alignment.errors import UserError

PRELOADED = ["alignment.pipeline.stage", "alignment.launched", "alignment.trainers.run"]


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Where the kernel can: this process is stopped when the one that started it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def run_stage(words: Sequence[str], accelerate_config: Path | None) -> None:
    """Run `alignment.pipeline.stage` with these words, and wait for it.

    Raises:
        UserError: the stage was stopped by something that it did not say itself.
        SystemExit: it has said itself what is wrong (code 2), or was interrupted (130).
    """
    try:
        code = _forked(words) if accelerate_config is None else _launched(words, accelerate_config)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if code in (2, 130):
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
    # On SIGTERM the launcher stops its workers; killed, it could not.
    process = subprocess.Popen(
        [*launch, "-m", "alignment.pipeline.stage", *words], preexec_fn=lambda: die_with_parent(signal.SIGTERM)
    )
    return process.wait()
