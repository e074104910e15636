"""The number of cores that this process may use, and threads that sleep while they wait."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reducio_fast.system import control_groups, cores, torch_state


def machine(root: Path, groups: str, **files: str) -> Path:
    """A root of /proc and /sys with these control groups; double underscores in names are slashes."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name.replace("_DOT_", ".")).write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {}, 64),
        ("0::/", {"cpu_DOT_max": "max 100000\n"}, 64),
        ("0::/", {"cpu_DOT_max": "150000 100000\n"}, 2),
        ("0::/a/b", {"a__b__cpu_DOT_max": "max 100000", "a__cpu_DOT_max": "300000 100000"}, 3),
        ("0::/a", {"a__cpu_DOT_max": "20000 100000"}, 1),
        ("4:cpu,cpuacct:/c", {"cpu__c__cpu_DOT_cfs_quota_us": "400000", "cpu__c__cpu_DOT_cfs_period_us": "100000"}, 4),
        ("4:cpu:/", {"cpu__cpu_DOT_cfs_quota_us": "-1", "cpu__cpu_DOT_cfs_period_us": "100000"}, 64),
        ("0::/", {"cpu_DOT_max": "9900000 100000"}, 64),
        ("nonsense", {"cpu_DOT_max": "nonsense"}, 64),
    ],
)  # fmt: skip
def test_cores_of_a_container(
    groups: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert cores.usable(machine(tmp_path, groups, **files)) == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert cores.usable(tmp_path) == 1


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {}, []),
        ("0::/", {"memory_DOT_max": "max\n", "memory_DOT_current": "5\n"}, []),
        ("0::/", {"memory_DOT_max": "100\n", "memory_DOT_current": "70\n"}, [30]),
        (
            "0::/a/b",
            {
                "a__b__memory_DOT_max": "100", "a__b__memory_DOT_current": "70",
                "a__b__memory_DOT_stat": "anon 3\ninactive_file 20\n",
                "a__memory_DOT_max": "200", "a__memory_DOT_current": "190",
            },
            [50, 10],
        ),
        (
            "9:memory:/c",
            {
                "memory__c__memory_DOT_limit_in_bytes": "100", "memory__c__memory_DOT_usage_in_bytes": "120",
                "memory__c__memory_DOT_stat": "inactive_file 1\ntotal_inactive_file 25\n",
            },
            [5],
        ),
        ("9:memory:/", {"memory__memory_DOT_limit_in_bytes": "100", "memory__memory_DOT_usage_in_bytes": "140"}, [0]),
    ],
)  # fmt: skip
def test_memory_of_a_container(groups: str, files: dict[str, str], expected: list[int], tmp_path: Path) -> None:
    """By both versions of the interface, of each group from the process's own upwards; file cache counts as free."""
    assert control_groups.free_bytes(machine(tmp_path, groups, **files)) == expected


def test_torch_keeps_to_them_during_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cores.COUNTS:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setattr(cores, "usable", lambda: 2)
        with torch_state.inference():
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 3
        monkeypatch.setattr(cores, "usable", lambda: 4)
        with torch_state.inference():
            assert torch.get_num_threads() == 3
        monkeypatch.setattr(cores, "usable", lambda: 1)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        with torch_state.inference():
            assert torch.get_num_threads() == 3, "the user has chosen them"
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_waiting_threads_sleep_soon() -> None:
    """libgomp prints the setting; the environment of child processes is unchanged, and a user's own setting is kept."""
    code = "import reducio_fast, os; reducio_fast.generate; print(os.environ.get('GOMP_SPINCOUNT'))"
    for chosen, spin, left in (({}, cores.SPIN, "None"), ({"GOMP_SPINCOUNT": "77"}, "77", "77")):
        clean = {name: value for name, value in os.environ.items() if name not in cores.WAITING}
        environment = clean | {"OMP_DISPLAY_ENV": "verbose"} | chosen
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True, cwd="/"
        )
        if "GOMP_SPINCOUNT" not in done.stderr:
            pytest.skip("torch brings another OpenMP runtime than GNU's")
        assert f"GOMP_SPINCOUNT = '{spin}'" in done.stderr and done.stdout.strip() == left
    assert math.isfinite(cores.usable())
