"""Runs jobs in order until a deadline.

Nothing can interrupt a compiler from outside. So with a deadline the work is done in a thread of its own: when the time
is up the caller gets an answer at once, and the thread ends at its next check. Until then it may still be compiling, so
the caller of `run` must not share with it what it is working on.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

POLL = 0.02  # seconds between two looks at the clock
Check = Callable[[], None]


class DeadlinePassed(Exception):
    """Raised inside a job by its check, once the time is up."""


@dataclass(frozen=True, slots=True)
class Job:
    """`run` gets a check to call wherever it can stop: it raises `DeadlinePassed` when the time is up."""

    name: str
    run: Callable[[Check], object]


@dataclass(slots=True)
class Outcome:
    """`seconds` of each job that was finished, in order; `left` names the others."""

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
    """Run the jobs in order; `deadline` is in seconds from now, None waits for all. An error of a job is raised here.

    `on_done(name)` follows each finished job, for a progress bar.
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
                check()  # a job that was finished too late counts as left: the caller has gone on
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
        threading.Thread(target=context.run, args=(work,), name="reducio-fast warm-up", daemon=True).start()
        try:
            while not ended.wait(POLL) and clock() - start < deadline:
                pass
        finally:
            stopped.set()  # also where Ctrl-C ends the wait
    if failure:
        raise failure[0]
    done = dict(outcome.seconds)  # a copy: the thread may still be at its last line
    return Outcome(done, tuple(job.name for job in jobs if job.name not in done))
