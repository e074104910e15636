"""Limits of this process's Linux control groups, which containers and systemd set: cores and memory.

Each limit is that of the process's group or of one above it, in both versions of the interface. `root` is where /proc
and /sys are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def quotas(root: Path = ROOT) -> list[float]:
    """Quotas of processor time, in cores."""
    found = []
    for folder in _folders(root, "", "sys/fs/cgroup"):
        limit, _, period = _read(folder / "cpu.max").partition(" ")
        found.append((limit, period.strip()))
    for folder in _folders(root, "cpu", "sys/fs/cgroup/cpu"):
        limit, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        found.append((limit, period))
    return [int(limit) / int(period) for limit, period in found if limit.isdigit() and period.isdigit() and int(period)]


def free_bytes(root: Path = ROOT) -> list[int]:
    """Bytes that are left of each limit of memory. The memory in use includes the file cache, which the kernel frees on
    demand."""
    files = (
        (_folders(root, "", "sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file "),
        (
            _folders(root, "memory", "sys/fs/cgroup/memory"),
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file ",
        ),
    )
    left = []
    for folders, limit_name, used_name, cache_name in files:
        for folder in folders:
            limit, used = _read(folder / limit_name).strip(), _read(folder / used_name).strip()
            if limit.isdigit() and used.isdigit():
                lines = _read(folder / "memory.stat").splitlines()
                cache = sum(int(line.split()[1]) for line in lines if line.startswith(cache_name))
                left.append(max(0, int(limit) - int(used) + cache))
    return left


def _folders(root: Path, controller: str, mount: str) -> Iterator[Path]:
    """The folders of this process's group under `controller` ("": the unified hierarchy) and of those above it."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = (line.split(":", 2) + ["", ""])[:3]
        if controller in names.split(","):
            parts = [part for part in path.split("/") if part]
            yield from (root / mount / "/".join(parts[:count]) for count in range(len(parts), 0, -1))
            break
    yield root / mount


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
