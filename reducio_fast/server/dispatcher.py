"""Takes jobs from the queue in order, gives them to workers and keeps their files. Makes all changes of their state."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from .clips import ENCODING, Event
from .files import LATENTS, MOTION, PICTURE, JobFiles
from .jobs import QUEUED, RUNNING, Job, Store
from .metrics import Metrics
from .requests import Limits

LOG = logging.getLogger("reducio_fast.server")
SWEEP_SECONDS = 60.0
RETRY_SECONDS = 1.0  # after an error of the database, such as a full disk


class WorkerLost(Exception):
    """The process that made a clip has gone."""


class Home(Protocol):
    """A place where workers run: `serve.LocalHome` or `on_ray.RayHome`. `slots`: jobs that are handed out at once."""

    slots: int

    def make(self, request: dict[str, Any], given: Mapping[str, bytes]) -> AsyncIterator[Event]:
        """As `clips.Clips.make`. Raises WorkerLost."""
        ...


class _Failed(Exception):
    def __init__(self, code: str, message: str, latents: bytes | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.latents = code, message, latents


@dataclass(slots=True, eq=False)
class _Work:
    """A job that is handed out."""

    job: Job
    task: asyncio.Task[None] | None = None
    begun: bool = False
    ending: bool = False  # its files and its end are being written; the work can no longer be stopped
    ended_because: str = ""  # "deleted", "timeout" or "drained", if the dispatcher ends it
    event: Event = field(default_factory=lambda: {"stage": "", "step": 0, "percent": 0})
    timer: asyncio.TimerHandle | None = None


class Dispatcher:
    """Runs in the event loop of the server. `progress(id)` and `watch(id)` report on a job, `delete(id)` ends it."""

    def __init__(self, store: Store, files: JobFiles, limits: Limits, metrics: Metrics) -> None:
        self.store, self.files, self.limits, self.metrics = store, files, limits, metrics
        self.home: Home | None = None  # None until clips can be made
        self.stopping = asyncio.Event()
        self._work: dict[str, _Work] = {}
        self._wake = asyncio.Event()
        self._watchers: dict[str, set[asyncio.Queue[Event | None]]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Remove the files that the last process left, then begin. The store has recovered its jobs before."""
        self.files.sweep(self.store.ids())
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._sweep())]

    def open(self, home: Home) -> None:
        """From now on clips are made by `home`."""
        self.home = home
        self.metrics.ready.set(1)
        self.wake()

    def wake(self) -> None:
        """A job was added."""
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                self._hand_out()
                self._count()
            except Exception as error:  # not raised: no later job would be made
                LOG.error("jobs cannot be handed out, tried again in %g s", RETRY_SECONDS, exc_info=error)
                await asyncio.sleep(RETRY_SECONDS)
                self.wake()

    def _hand_out(self) -> None:
        while self.home is not None and not self.stopping.is_set() and len(self._work) < self.home.slots:
            job = self.store.claim()
            if job is None:
                break
            work = self._work[job.id] = _Work(job)
            work.task = asyncio.create_task(self._make(work))
            work.task.add_done_callback(partial(self._leave, work))

    def _count(self) -> None:
        counts = self.store.counts()
        self.metrics.depth.set(counts.get(QUEUED, 0))
        self.metrics.running.set(counts.get(RUNNING, 0))

    async def _make(self, work: _Work) -> None:
        job, size = work.job, 0
        write: Callable[[], object]  # writes the end of the job
        try:
            event = await self._follow_events(work)
            size = await asyncio.to_thread(self.files.write, job.id, event["files"])
            write = partial(self.store.finish, job.id, event["result"], size)
        except asyncio.CancelledError:
            if work.ended_because == "deleted":
                raise
            write = partial(self.store.put_back, job.id, counts=False)
            if work.ended_because == "timeout":
                line = f"the clip took more than {self.limits.job_seconds:g} s"
                write = partial(self.store.fail, job.id, "timeout", line)
        except _Failed as error:
            if error.latents is not None:
                with contextlib.suppress(OSError):  # on a full disk the job keeps its first error
                    size = await asyncio.to_thread(self.files.write, job.id, {LATENTS: error.latents})
            write = partial(self.store.fail, job.id, error.code, error.message, size)
        except WorkerLost as error:
            LOG.warning("%s: its worker was lost (%s)", job.id, error)
            write = partial(self.store.put_back, job.id)
        except Exception as error:
            LOG.error("%s failed", job.id, exc_info=error)
            reason = f"internal error ({type(error).__name__}); the log has the rest"
            if isinstance(error, OSError):
                reason = "the clip could not be kept on disk"
            write = partial(self.store.fail, job.id, "internal_error", reason)
        self._hold(work)
        await self._write(job.id, write)
        if (ended := self.store.get(job.id)) is not None and ended.ended:
            self._measure(ended)
            await asyncio.to_thread(self.files.remove, job.id, PICTURE, MOTION)

    async def _write(self, id: str, write: Callable[[], object]) -> None:
        """Change a job in the database, again and again while it cannot be written, as on a full disk. Raises
        sqlite3.Error if the server ends before that; its next start puts the job back."""
        while True:
            try:
                write()
                return
            except sqlite3.Error as error:
                if self.stopping.is_set():
                    raise
                LOG.error("%s: cannot be written, tried again in %g s (%s)", id, RETRY_SECONDS, error)
            await asyncio.sleep(RETRY_SECONDS)

    def _leave(self, work: _Work, task: asyncio.Task[None]) -> None:
        """The task of a job has ended. A task that is cancelled before its first step runs nothing of `_make`."""
        self._hold(work)
        self._work.pop(work.job.id, None)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            LOG.error("%s: its work ended with an error", work.job.id, exc_info=error)
        if work.ended_because != "deleted" and (task.cancelled() or error is not None):
            try:
                self.store.put_back(work.job.id, counts=error is not None)
            except sqlite3.Error as another:
                LOG.error("%s: cannot be put back before the next start (%s)", work.job.id, another)
        self._notify(work.job.id)
        self.wake()

    async def _follow_events(self, work: _Work) -> Event:
        """Follow the events of a job; returns the last one, which has its files."""
        job = work.job
        assert self.home is not None
        given = {}
        for suffix in job.request.get("files", {}):
            if (data := await asyncio.to_thread(self.files.read, job.id, suffix)) is None:
                raise _Failed("internal_error", "a file that came with this job is gone")
            given[suffix] = data
        async with contextlib.aclosing(self.home.make(job.request, given)) as events:  # type: ignore[type-var]
            async for event in events:
                if not work.begun:
                    self._begin(work)
                if "error" in event or "files" in event:
                    self._hold(work)
                if "error" in event:
                    raise _Failed(event["error"]["code"], event["error"]["message"], event.get("latents"))
                if "files" in event:
                    return event
                if "preview" in event:  # only for clients that watch now; it is not stored
                    self._notify(job.id, event)
                    continue
                # Kept monotone, so that a client's progress bar does not go back.
                work.event = event | {"percent": max(event["percent"], work.event["percent"])}
                if event["percent"] >= ENCODING and work.timer is not None:
                    work.timer.cancel()
                self._notify(job.id, work.event)
        raise WorkerLost("its events ended without a clip")

    def _begin(self, work: _Work) -> None:
        work.begun = True
        self.metrics.wait.observe(time.time() - work.job.created_at)
        loop = asyncio.get_running_loop()
        work.timer = loop.call_later(self.limits.job_seconds, self._end, work, "timeout")
        try:
            self.store.begin(work.job.id)
            self._count()
        except sqlite3.Error as error:  # the clip is made all the same; its state remains "queued" until its end
            LOG.error("%s: its begin cannot be written (%s)", work.job.id, error)

    def _end(self, work: _Work, why: str) -> None:
        if work.task is not None and not work.ending and not work.ended_because:
            work.ended_because = why
            work.task.cancel()

    def _hold(self, work: _Work) -> None:
        """From now on the work is not stopped."""
        work.ending = True
        if work.timer is not None:
            work.timer.cancel()

    def _measure(self, job: Job) -> None:
        """Count a job that has ended, and log it as one line of JSON, without its prompt."""
        self.metrics.jobs.labels(job.status).inc()
        if job.result is not None:
            for stage, seconds in job.result["timings"].items():
                self.metrics.stage.labels(stage).observe(seconds)
            self.metrics.peak.set(job.result.get("peak_bytes", 0))
        line = {"job": job.id, "owner": job.owner, "status": job.status, "attempts": job.attempts}
        line |= {"error": job.error_code, "wait_s": round((job.started_at or job.created_at) - job.created_at, 3)}
        line |= {"seconds_of_clip": (job.result or {}).get("seconds_of_clip")}
        if "traceparent" in job.request:
            line["traceparent"] = job.request["traceparent"]
        LOG.info("%s", json.dumps(line))

    # ---- for the routes ----

    def progress(self, id: str) -> Event:
        """How far a job in work is."""
        work = self._work.get(id)
        return {"stage": "", "step": 0, "percent": 0} if work is None else work.event

    async def delete(self, id: str) -> None:
        """End a job at its next step, wait for that, and remove it with its files."""
        if (work := self._work.get(id)) is not None:
            self._end(work, "deleted")
            assert work.task is not None
            await asyncio.wait([work.task])
        # The row first: a crash in between leaves files without a job, which the next start sweeps.
        if work is None:
            self.store.delete(id)
        else:  # a row of a job in work must not stay without any work
            await self._write(id, partial(self.store.delete, id))
        await asyncio.to_thread(self.files.remove, id)
        self._notify(id)
        self._count()

    @contextlib.contextmanager
    def watch(self, id: str) -> Iterator[asyncio.Queue[Event | None]]:
        """A queue that gets each event of the job, and None for any other change."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._watchers.setdefault(id, set()).add(queue)
        try:
            yield queue
        finally:
            self._watchers[id].discard(queue)
            if not self._watchers[id]:
                del self._watchers[id]

    def _notify(self, id: str, event: Event | None = None) -> None:
        for queue in self._watchers.get(id, ()):
            queue.put_nowait(event)

    # ---- the end ----

    async def _sweep(self) -> None:
        while True:
            try:
                for id in self.store.expired(self.limits.keep_seconds, self.limits.keep_bytes):
                    # Its files first: on a full disk this makes room for the change of the database.
                    await asyncio.to_thread(self.files.remove, id)
                    await self.delete(id)
                    LOG.info("%s: removed, its time is over", id)
            except Exception as error:  # not raised: no later clip would be removed
                LOG.error("clips cannot be removed, tried again later", exc_info=error)
            await asyncio.sleep(min(SWEEP_SECONDS, max(0.2, self.limits.keep_seconds / 4)))

    def stop(self) -> None:
        """Begin no further job, and release the clients that wait for one."""
        self.stopping.set()
        for id in list(self._watchers):
            self._notify(id)

    async def drain(self, grace: float) -> None:
        """Give jobs in work `grace` seconds, then end them at their next step and put them back into the queue."""
        self.stop()
        at_work = [work.task for work in self._work.values() if work.task is not None and work.begun]
        if at_work:
            await asyncio.wait(at_work, timeout=grace)
        for work in list(self._work.values()):
            self._end(work, "drained")
        if left := [work.task for work in self._work.values() if work.task is not None]:
            await asyncio.wait(left)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
