"""Pools of processes that end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor


def spawned(workers: int | None = None) -> ProcessPoolExecutor:
    """A pool of `workers` spawned processes, by default one per core.

    If this process is killed, its workers end too. Those of `ProcessPoolExecutor` alone wait for work forever then. At
    Ctrl-C, which the terminal sends to all of them, a worker ends at once. As an exception it printed a traceback, and
    one that came between two lines of multiprocessing left a lock taken, for which the other workers waited forever.
    """
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_exit_after_parent, daemon=True).start()


def _exit_after_parent() -> None:
    """Exit, even in the middle of a task, as soon as the parent process has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker has a parent"
    parent.join()
    os._exit(1)
