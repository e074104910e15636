"""The CPU cores that this process may use, and OpenMP threads that sleep while they wait.

torch starts as many threads as the machine has cores. In a container with a CPU quota they are stopped again and again.
Beside other work, OpenMP's threads spin while they wait for threads that have no core: a warm clip of the default model
once took 31 s instead of 0.4 s on two crowded cores, and 2 to 3 s with threads that sleep.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import control_groups

# Environment variables by which a user chooses how OpenMP's threads wait, and how many there are.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Turns of libgomp's wait loop before a thread sleeps, about 10 us: long enough to reach the next of several small
# products, short enough to free a shared core. libgomp's default is 300,000 turns, and 0 under OMP_WAIT_POLICY=passive.
SPIN = "10000"


def usable(root: Path = Path("/")) -> int:
    """Cores that this process may use: those of its affinity, limited by the quota of its control group. At least 1.

    `root`: where /proc and /sys are.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, control_groups.quotas(root))]))


@contextmanager
def sleeping_threads() -> Iterator[None]:
    """For the first import of torch: its OpenMP threads sleep after a short wait, unless the user has chosen how they
    wait. The OpenMP runtime reads its environment when it is loaded, so nothing stays set for child processes."""
    if "torch" in sys.modules or any(os.environ.get(name) for name in WAITING):
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = SPIN
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


def too_many(threads: int) -> int | None:
    """The number to which torch should reduce its `threads`; None if the user has set it or there are enough cores."""
    if any(os.environ.get(name) for name in COUNTS):
        return None
    limit = usable()
    return limit if threads > limit else None
