"""The processes of a launch: how long they wait for each other, what each does of a batch, and its CPU threads.

For everything that `accelerate launch` starts; importing it imports nothing heavy.
"""

from __future__ import annotations

import datetime
import math
import os
import sys
from typing import TYPE_CHECKING

from alignment.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState

WAIT_HOURS = 24


def connect(threads: int | None = None) -> PartialState:
    """The processes of this launch, connected for work without training: one where there is no launch.

    Args:
        threads: of the CPU in each process; see `set_threads`.
    """
    import torch
    from accelerate import PartialState

    from alignment.models.loading import settle_accelerator

    settle_accelerator()
    # Processes with little to do wait for the others.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(hours=WAIT_HOURS))
    set_threads(threads, state)
    return state


def plan_batches(global_batch: int, per_device: int, world: int) -> tuple[int, int]:
    """(pairs per device and pass, accumulation steps) with which `world` processes make up the declared batch.

    The per-device batch is the largest divisor of each process's share that is at most `per_device`: the losses are
    per pair, so it changes memory and speed but no result.

    Raises:
        UserError: the declared batch cannot be split evenly.
    """
    if global_batch % world:
        raise UserError(
            f"training.global_batch_size: {global_batch} pairs cannot be split evenly over {world} processes; "
            f"declare {math.ceil(global_batch / world) * world}, or launch fewer"
        )
    share = global_batch // world
    fitting = max(d for d in range(1, min(per_device, share) + 1) if share % d == 0)
    return fitting, share // fitting


def set_threads(wanted: int | None, state: PartialState) -> None:
    """CPU threads of this process. `accelerate launch` exports OMP_NUM_THREADS=1 unless told otherwise: that cannot be
    told from a wish, and is undone (training.cpu_threads=1 is the wish); any other exported number is kept."""
    import torch

    if state.device.type != "cpu":
        return
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if wanted is None and (by_accelerate or "OMP_NUM_THREADS" not in os.environ):
        local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        wanted = max(1, cores // local)
    if wanted is not None:
        torch.set_num_threads(wanted)
