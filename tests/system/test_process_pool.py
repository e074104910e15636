"""Pools whose processes do not outlive the process that started them, and end at Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys, time
from reducio_fast.system import process_pool

def work(seconds):
    time.sleep(seconds)
    return os.getpid()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with process_pool.spawned(2) as pool:
            list(pool.map(work, [0.2] * 2))
            print(pool.submit(work, 0).result(), flush=True)
            pool.submit(work, WAIT).result()
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
@pytest.mark.parametrize("end", ["finished", "killed", "interrupted"])
def test_workers_end_with_the_process_that_started_them(end: str, tmp_path: Path) -> None:
    script, pipes = tmp_path / "script.py", {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    script.write_text(SCRIPT.replace("WAIT", "0" if end == "finished" else "100"))
    with subprocess.Popen([sys.executable, str(script)], start_new_session=True, **pipes) as parent:
        worker = Path("/proc") / parent.stdout.readline().strip()
        if end != "finished":
            assert runs(worker)
        if end == "killed":
            parent.kill()
        elif end == "interrupted":  # as a terminal does: the whole group
            time.sleep(0.1)
            os.killpg(parent.pid, signal.SIGINT)
        try:
            _, errors = parent.communicate(timeout=4)
        finally:
            parent.kill()
        assert parent.returncode == {"finished": 0, "killed": -9, "interrupted": 130}[end]
        assert errors == "" or end == "killed"  # Python's tracker of semaphores then says that some were left
    last = time.monotonic() + 4
    while runs(worker):
        assert time.monotonic() < last, f"process {worker.name} still waits for work"
        time.sleep(0.02)


def runs(process: Path) -> bool:
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
