"""Runs jobs in order until a deadline.

A compiler cannot be interrupted from outside. With a deadline the jobs therefore run in a separate thread: at the
deadline `run` returns at once, and the thread ends at its next check. Until then it may still be compiling, so the
caller must not use the objects that the jobs modify.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

POLL = 0.02  # seconds between two checks of the clock
THREAD = "reducio-fast warm-up"  # name of the thread
Check = Callable[[], None]


class DeadlinePassed(Exception):
    """Raised inside a job by its check after the deadline."""


@dataclass(frozen=True, slots=True)
class Job:
    """A named job. `run` receives a check to call wherever it can stop; the check raises `DeadlinePassed`."""

    name: str
    run: Callable[[Check], object]


@dataclass(slots=True)
class Outcome:
    """`seconds` of each finished job, in order; `left` names the unfinished jobs."""

    seconds: dict[str, float] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not self.left


def run(
    jobs: Sequence[Job],
    deadline: float | None = None,
    *,
    on_done: Callable[[str], object] = lambda name: None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Run the jobs in order until `deadline`, in seconds from now; None waits for all. Raises the error of a job.

    `on_done(name)` is called after each finished job, for a progress bar.
    """
    start, outcome, stopped, ended = clock(), Outcome(), threading.Event(), threading.Event()
    failure: list[BaseException] = []

    def check() -> None:
        if stopped.is_set() or (deadline is not None and clock() - start >= deadline):
            raise DeadlinePassed

    def work() -> None:
        try:
            for job in jobs:
                check()
                began = clock()
                job.run(check)
                check()  # a job that ends after the deadline counts as unfinished, because `run` has returned
                outcome.seconds[job.name] = clock() - began
                on_done(job.name)
        except DeadlinePassed:
            pass
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    if deadline is None:
        work()
    else:
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(work,), name=THREAD, daemon=True).start()
        try:
            while not ended.wait(POLL) and clock() - start < deadline:
                pass
        finally:
            stopped.set()  # also if Ctrl-C ends the wait
    if failure:
        raise failure[0]
    done = dict(outcome.seconds)  # a copy, because the thread may still run its last lines
    return Outcome(done, tuple(job.name for job in jobs if job.name not in done))
