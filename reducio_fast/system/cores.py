"""The processor time that this process may have, and threads that leave it to others while they wait.

torch starts as many threads as the machine has cores. In a container with a quota they are stopped again and again, and
where other work runs, OpenMP's threads spin for those that do not get a core: a warm clip of the default model once
took 31 s instead of 0.4 on two crowded cores, and 2 to 3 s with threads that sleep.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# By any of these a user says how OpenMP's threads are to wait; and how many there are to be.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Turns of libgomp's waiting loop before a thread sleeps, about 10 us: long enough for the next of a chain of small
# products, short enough to leave a shared core. Its own default is 300,000 turns, and 0 under OMP_WAIT_POLICY=passive.
SPIN = "10000"


def usable(root: Path = Path("/")) -> int:
    """Cores that this process may use: of its affinity, as far as the quota of its control group reaches. At least 1.

    `root`: where /proc and /sys are.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for quota in (_quota_v2(root), _quota_v1(root)) if quota is not None]
    return max(1, min(allowed, *(math.ceil(quota) for quota in quotas)) if quotas else allowed)


def _quota_v2(root: Path) -> float | None:
    """The smallest quota, in cores, from this process's group up to the root of the hierarchy."""
    group = _group(root, "")
    found = []
    folder = root / "sys/fs/cgroup"
    for part in [*_upwards(group), ""] if group is not None else [""]:
        limit, _, period = _read(folder / part / "cpu.max").partition(" ")
        if limit.isdigit() and period.strip().isdigit():
            found.append(int(limit) / int(period))
    return min(found) if found else None


def _quota_v1(root: Path) -> float | None:
    group = _group(root, "cpu")
    found = []
    folder = root / "sys/fs/cgroup/cpu"
    for part in [*_upwards(group), ""] if group is not None else [""]:
        limit, period = (_read(folder / part / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if limit.isdigit() and period.isdigit() and int(period):
            found.append(int(limit) / int(period))
    return min(found) if found else None


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
    """Around the first import of torch: its OpenMP threads soon sleep while they wait, unless the user has chosen how.
    The runtime reads its environment when it is loaded, so nothing stays set for child processes."""
    if "torch" in sys.modules or any(os.environ.get(name) for name in WAITING):
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = SPIN
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


def too_many(threads: int) -> int | None:
    """To how many of its `threads` torch should keep; None: to all, as the user has chosen them or cores suffice."""
    if any(os.environ.get(name) for name in COUNTS):
        return None
    limit = usable()
    return limit if threads > limit else None
