"""Jobs in one SQLite file: the request, its owner and its outcome.

Every method is one transaction, so a process that is killed between any two statements leaves each job in one state. A
job is `queued` until a worker begins it; `claimed` says whether it has been given to a worker.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_ATTEMPTS = 2  # a job whose worker was lost is made once more, then fails
QUEUED, RUNNING, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"

_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order in which jobs are made
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    key TEXT,  -- the caller's Idempotency-Key
    status TEXT NOT NULL,
    claimed INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    created_at REAL NOT NULL,
    started_at REAL,
    completed_at REAL,
    bytes INTEGER NOT NULL DEFAULT 0,
    request TEXT NOT NULL,
    result TEXT,
    error_code TEXT,
    error_message TEXT,
    UNIQUE (owner, key)
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, claimed, number);
CREATE INDEX IF NOT EXISTS jobs_by_owner ON jobs (owner, number);
CREATE INDEX IF NOT EXISTS jobs_by_end ON jobs (status, completed_at, bytes, id);
"""
_COLUMNS = (
    "number, id, owner, status, attempts, created_at, started_at, completed_at, bytes, request, result, error_code, "
    "error_message"
)


@dataclass(frozen=True, slots=True)
class Job:
    """One row. `request` is `requests.Asked.row()`, `result` the worker's result of a finished clip. Times are seconds
    since 1970, `bytes` is the size of the files that the job has."""

    number: int
    id: str
    owner: str
    status: str
    attempts: int
    created_at: float
    started_at: float | None
    completed_at: float | None
    bytes: int
    request: dict[str, Any]
    result: dict[str, Any] | None
    error_code: str | None
    error_message: str | None

    @property
    def ended(self) -> bool:
        return self.status in (COMPLETED, FAILED)


class QueueFull(Exception):
    """The queue has no room for another job. `of_owner`: whether the owner's own limit is reached."""

    def __init__(self, of_owner: bool, limit: int) -> None:
        super().__init__(f"{limit} jobs are open" + (" for this key" if of_owner else ""))
        self.of_owner, self.limit = of_owner, limit


class KeyReused(Exception):
    """The Idempotency-Key belongs to another request."""


def new_id() -> str:
    return f"video_{secrets.token_hex(16)}"


class Store:
    """The table. Safe to share between threads of one process; a second process must not open it (`server.files`)."""

    def __init__(self, path: str | Path) -> None:
        self._lock = threading.RLock()
        # Each commit is on disk before the answer is sent, so an accepted job survives a power cut too.
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.executescript(_TABLE)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _rows(self, sql: str, *values: Any) -> list[Job]:
        with self._lock:
            return [_job(row) for row in self._connection.execute(sql, values)]

    def insert(
        self,
        id: str,
        owner: str,
        request: dict[str, Any],
        key: str | None = None,
        limit: int | None = None,
        limit_of_owner: int | None = None,
        size: int = 0,
    ) -> tuple[Job, bool]:
        """Add a job at the end of the queue; returns it and True, or the job that this owner's `key` made before and
        False.

        `size`: bytes of the files that it has already. Raises QueueFull if as many jobs are open as the limits allow,
        and KeyReused if the key came with another request before.
        """
        text = json.dumps(request, sort_keys=True)
        with self._transaction() as connection:
            if key is not None and (known := self._rows(f"{_SELECT} WHERE owner = ? AND key = ?", owner, key)):
                if _comparable(known[0].request) != _comparable(request):
                    raise KeyReused
                return known[0], False
            counted = "SELECT count(*) FROM jobs WHERE status IN ('queued', 'in_progress')"
            for most, of_owner in ((limit, False), (limit_of_owner, True)):
                extra, values = (" AND owner = ?", (owner,)) if of_owner else ("", ())
                if most is not None and connection.execute(counted + extra, values).fetchone()[0] >= most:
                    raise QueueFull(of_owner, most)
            connection.execute(
                "INSERT INTO jobs (id, owner, key, status, created_at, request, bytes) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (id, owner, key, QUEUED, time.time(), text, size),
            )
            return self._rows(f"{_SELECT} WHERE id = ?", id)[0], True

    def get(self, id: str, owner: str | None = None) -> Job | None:
        """The job, None if there is none or it belongs to another owner. `owner` None finds the jobs of all owners."""
        rows = self._rows(f"{_SELECT} WHERE id = ? AND (? IS NULL OR owner = ?)", id, owner, owner)
        return rows[0] if rows else None

    def page(self, owner: str, after: str | None, limit: int, descending: bool) -> tuple[list[Job], bool]:
        """At most `limit` jobs of an owner that follow the job `after`, in order of their creation, and whether there
        are more."""
        order, compare = ("DESC", "<") if descending else ("ASC", ">")
        behind = "" if after is None else f"AND number {compare} (SELECT number FROM jobs WHERE id = ? AND owner = ?)"
        values = (owner,) if after is None else (owner, after, owner)
        rows = self._rows(f"{_SELECT} WHERE owner = ? {behind} ORDER BY number {order} LIMIT ?", *values, limit + 1)
        return rows[:limit], len(rows) > limit

    def claim(self) -> Job | None:
        """Take the next job of the queue; no other caller gets it from now on."""
        with self._transaction():
            rows = self._rows(
                "UPDATE jobs SET claimed = 1, attempts = attempts + 1 WHERE number = (SELECT number FROM jobs WHERE "
                f"status = 'queued' AND claimed = 0 ORDER BY number LIMIT 1) RETURNING {_COLUMNS}"
            )
        return rows[0] if rows else None

    def begin(self, id: str) -> None:
        """A worker has begun this claimed job."""
        self._change("status = 'in_progress', started_at = ?", "status = 'queued' AND claimed = 1", id, time.time())

    def finish(self, id: str, result: dict[str, Any], size: int) -> None:
        """A claimed job is completed; its files, of `size` bytes, are in their place."""
        self._change(
            "status = 'completed', claimed = 0, completed_at = ?, result = ?, bytes = ?",
            "claimed = 1",
            id,
            time.time(),
            json.dumps(result),
            size,
        )

    def fail(self, id: str, code: str, message: str, size: int = 0) -> None:
        """A claimed job ended without a clip; `size`: bytes of what is kept of it."""
        self._change(
            "status = 'failed', claimed = 0, completed_at = ?, error_code = ?, error_message = ?, bytes = ?",
            "claimed = 1",
            id,
            time.time(),
            code,
            message,
            size,
        )

    def put_back(self, id: str, counts: bool = True) -> str | None:
        """Queue a claimed job again in its old place, because its worker did not end it, or fail it after MAX_ATTEMPTS
        that count. `counts` False: this server ended the attempt. Returns the status, None if it was not claimed."""
        with self._transaction():
            rows = self._rows(f"{_SELECT} WHERE id = ? AND claimed = 1", id)
            if not rows:
                return None
            if counts and rows[0].attempts >= MAX_ATTEMPTS:
                self.fail(id, "worker_lost", f"the worker was lost {MAX_ATTEMPTS} times while it made this clip")
                return FAILED
            self._change(
                "status = 'queued', claimed = 0, started_at = NULL, attempts = attempts - ?",
                "TRUE",
                id,
                int(not counts),
            )
            return QUEUED

    def recover(self) -> list[Job]:
        """Put back every job that an earlier process had in work. Returns these jobs as they are now."""
        claimed = [job.id for job in self._rows(f"{_SELECT} WHERE claimed = 1 ORDER BY number")]
        for id in claimed:
            self.put_back(id)
        return [job for id in claimed if (job := self.get(id)) is not None]

    def fail_others(self, served: str) -> list[str]:
        """Fail the queued jobs that were checked for another model or other settings than `served`; their ids."""
        queued = self._rows(f"{_SELECT} WHERE status = 'queued' AND claimed = 0")
        others = [job for job in queued if job.request.get("served", served) != served]
        for job in others:
            line = f"was accepted for {job.request['model']}; the server now has another model or other settings"
            self._change(
                "status = 'failed', completed_at = ?, error_code = 'model_changed', error_message = ?",
                "claimed = 0",
                job.id,
                time.time(),
                line,
            )
        return [job.id for job in others]

    def delete(self, id: str) -> bool:
        with self._transaction() as connection:
            return connection.execute("DELETE FROM jobs WHERE id = ?", (id,)).rowcount == 1

    def expired(self, seconds: float, most_bytes: int) -> list[str]:
        """Ids of ended jobs that are older than `seconds`, and of the oldest of those whose files together take more
        than `most_bytes`."""
        # Every column is in the index: 20,000 whole rows, with their JSON, took 0.4 s, in which no request is answered.
        sql = (
            "SELECT id, completed_at, bytes FROM jobs WHERE status IN ('completed', 'failed') "
            "ORDER BY completed_at DESC"
        )
        held, out, now = 0, [], time.time()
        with self._lock:
            for id, completed_at, size in self._connection.execute(sql):
                held += size
                if held > most_bytes or now - (completed_at or now) > seconds:
                    out.append(id)
        return out

    def queued_before(self, job: Job) -> int:
        """The number of queued jobs that are made before this one."""
        sql = "SELECT count(*) FROM jobs WHERE status = 'queued' AND number < ?"
        with self._lock:
            return int(self._connection.execute(sql, (job.number,)).fetchone()[0])

    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(self._connection.execute("SELECT status, count(*) FROM jobs GROUP BY status"))

    def ids(self) -> dict[str, str]:
        """The status of every job by its id."""
        with self._lock:
            return dict(self._connection.execute("SELECT id, status FROM jobs"))

    def seconds_of_a_clip(self) -> float | None:
        """Mean time from begin to end of the last twenty clips."""
        sql = (
            "SELECT avg(completed_at - started_at) FROM (SELECT completed_at, started_at FROM jobs WHERE "
            "status = 'completed' ORDER BY completed_at DESC LIMIT 20)"
        )
        with self._lock:
            return self._connection.execute(sql).fetchone()[0]

    def _change(self, assignments: str, condition: str, id: str, *values: Any) -> None:
        with self._lock:
            self._connection.execute(f"UPDATE jobs SET {assignments} WHERE id = ? AND {condition}", (*values, id))


_SELECT = f"SELECT {_COLUMNS} FROM jobs"


def _job(row: tuple[Any, ...]) -> Job:
    fields = list(row)
    fields[9] = json.loads(row[9])
    fields[10] = None if row[10] is None else json.loads(row[10])
    return Job(*fields)


def _comparable(request: dict[str, Any]) -> dict[str, Any]:
    """The request without what differs between attempts at it: the trace, the state of the model's files, and the seed
    if the server drew it."""
    differs = ("traceparent", "served", "seed") if request.get("seed_drawn") else ("traceparent", "served")
    return {name: value for name, value in request.items() if name not in differs}
