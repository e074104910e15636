"""Takes jobs from the queue in order, gives them to workers and keeps their files. Makes all changes of their state."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .clips import ENCODING, Event
from .files import LATENTS, MOTION, PICTURE, JobFiles
from .jobs import COMPLETED, FAILED, QUEUED, RUNNING, Job, Store
from .metrics import Metrics
from .requests import Limits

LOG = logging.getLogger("reducio_fast.server")
SWEEP_SECONDS = 60.0


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
    keeps_files: bool = False  # the files of the clip are being written; the work can no longer be stopped
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
        """Recover the jobs that the last process left, then begin."""
        for job in self.store.recover():
            LOG.warning("%s: was in work when the server ended; now %s", job.id, job.status)
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
            while self.home is not None and not self.stopping.is_set() and len(self._work) < self.home.slots:
                job = self.store.claim()
                if job is None:
                    break
                work = self._work[job.id] = _Work(job)
                work.task = asyncio.create_task(self._make(work))
            self._count()

    def _count(self) -> None:
        counts = self.store.counts()
        self.metrics.depth.set(counts.get(QUEUED, 0))
        self.metrics.running.set(counts.get(RUNNING, 0))

    async def _make(self, work: _Work) -> None:
        job, status = work.job, ""
        try:
            event = await self._follow_events(work)
            work.keeps_files = True
            size = await asyncio.to_thread(self.files.write, job.id, event["files"])
            self.store.finish(job.id, event["result"], size)
            await asyncio.to_thread(self.files.remove, job.id, PICTURE, MOTION)
            self._measure(job, event["result"])
            status = COMPLETED
        except asyncio.CancelledError:
            if work.ended_because == "timeout":
                line = f"the clip took more than {self.limits.job_seconds:g} s"
                self.store.fail(job.id, "timeout", line)
                status = FAILED
            elif work.ended_because != "deleted":
                self.store.put_back(job.id, counts=False)
        except _Failed as error:
            size = 0
            if error.latents is not None:
                with contextlib.suppress(OSError):  # on a full disk the job keeps its first error
                    size = await asyncio.to_thread(self.files.write, job.id, {LATENTS: error.latents})
            self.store.fail(job.id, error.code, error.message, size)
            status = FAILED
        except WorkerLost as error:
            status = self.store.put_back(job.id) or ""
            LOG.warning("%s: its worker was lost (%s); now %s", job.id, error, status)
        except Exception as error:
            LOG.error("%s failed", job.id, exc_info=error)
            reason = f"internal error ({type(error).__name__}); the log has the rest"
            if isinstance(error, OSError):
                reason = "the clip could not be kept on disk"
            self.store.fail(job.id, "internal_error", reason)
            status = FAILED
        finally:
            if work.timer is not None:
                work.timer.cancel()
            self._work.pop(job.id, None)
            if status in (COMPLETED, FAILED):
                self.metrics.jobs.labels(status).inc()
                self._log(job.id, status)
            self._notify(job.id)
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
        self.store.begin(work.job.id)
        self.metrics.wait.observe(time.time() - work.job.created_at)
        loop = asyncio.get_running_loop()
        work.timer = loop.call_later(self.limits.job_seconds, self._end, work, "timeout")
        self._count()

    def _end(self, work: _Work, why: str) -> None:
        if work.task is not None and not work.keeps_files and not work.ended_because:
            work.ended_because = why
            work.task.cancel()

    def _measure(self, job: Job, result: dict[str, Any]) -> None:
        for stage, seconds in result["timings"].items():
            self.metrics.stage.labels(stage).observe(seconds)
        self.metrics.peak.set(result.get("peak_bytes", 0))

    def _log(self, id: str, status: str) -> None:
        """Log one line of JSON per job, without its prompt."""
        if (job := self.store.get(id)) is not None:
            line = {"job": id, "owner": job.owner, "status": status, "attempts": job.attempts, "error": job.error_code}
            line |= {"wait_s": round((job.started_at or job.created_at) - job.created_at, 3)}
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
        self.store.delete(id)  # first: a crash in between leaves files without a job, which the next start sweeps
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
            for job in self.store.expired(self.limits.keep_seconds, self.limits.keep_bytes):
                LOG.info("%s: removed, its time is over", job.id)
                await self.delete(job.id)
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
