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
    quotas = [quota for quota in (_quota_v2(root), _quota_v1(root)) if quota is not None]
    return max(1, min(allowed, *(math.ceil(quota) for quota in quotas)) if quotas else allowed)


def _quota_v2(root: Path) -> float | None:
    """The smallest quota, in cores, from this process's group up to the root of the hierarchy."""
    group = _group(root, "")
    quotas = []
    folder = root / "sys/fs/cgroup"
    for part in [*_upwards(group), ""] if group is not None else [""]:
        limit, _, period = _read(folder / part / "cpu.max").partition(" ")
        if limit.isdigit() and period.strip().isdigit():
            quotas.append(int(limit) / int(period))
    return min(quotas) if quotas else None


def _quota_v1(root: Path) -> float | None:
    group = _group(root, "cpu")
    quotas = []
    folder = root / "sys/fs/cgroup/cpu"
    for part in [*_upwards(group), ""] if group is not None else [""]:
        limit, period = (_read(folder / part / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if limit.isdigit() and period.isdigit() and int(period):
            quotas.append(int(limit) / int(period))
    return min(quotas) if quotas else None


def _group(root: Path, controller: str) -> str | None:
    """The path of this process's control group under `controller` ("": the unified hierarchy)."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = (line.split(":", 2) + ["", ""])[:3]
        if controller in names.split(","):
            return path.strip("/")
    return None


def _upwards(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    return ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


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
