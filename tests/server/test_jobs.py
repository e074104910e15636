"""The job database with a crash at any statement, keys and the folder."""

from __future__ import annotations

import hashlib
import os
import shlex
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reducio_fast import ReducioError
from reducio_fast.cli.main import main, parser
from reducio_fast.server import jobs
from reducio_fast.server.errors import ApiError, bad_request, without_paths
from reducio_fast.server.files import CLIP, PICTURE, JobFiles
from reducio_fast.server.jobs import COMPLETED, FAILED, KeyReused, QueueFull, Store, new_id
from reducio_fast.server.keys import Keys


class Crash(Exception):
    pass


class Crashing:
    """A connection that fails at its n-th statement and after it, like a process that is killed there."""

    def __init__(self, connection: sqlite3.Connection, statements: int) -> None:
        self.connection, self.left = connection, statements

    def execute(self, *arguments: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Crash
        return self.connection.execute(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)


OPERATIONS = st.tuples(st.sampled_from(["insert", "claim", "begin", "finish", "fail", "lost", "delete"]),
                       st.integers(0, 5), st.integers(0, 6))  # fmt: skip


@given(st.lists(OPERATIONS, max_size=25))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_crash_loses_or_doubles_a_job(tmp_path: Path, operations: list[tuple[str, int, int]]) -> None:
    """Each operation is (name, which job, statement at which the process dies; 6: it does not). A job that was reported
    to its client is kept, in one state; it is handed out at most twice; a job reported as completed stays completed."""
    path = tmp_path / f"{new_id()}.sqlite3"
    store = Store(path)
    reported: dict[str, str] = {}  # id -> the last state that a client received
    claimed: list[str] = []
    handed_out: dict[str, int] = {}
    for operation, which, crash_at in operations:
        connection = store._connection
        if crash_at < 6:
            store._connection = Crashing(connection, crash_at)  # type: ignore[assignment]
        job = claimed[which % len(claimed)] if claimed else None
        try:
            if operation == "insert":
                id = store.insert(new_id(), "owner", {"call": {"prompt": str(which)}})[0].id
                reported[id] = "queued"
            elif operation == "claim" and (got := store.claim()) is not None:
                assert got.id not in claimed, "handed out twice at once"
                claimed.append(got.id)
                handed_out[got.id] = handed_out.get(got.id, 0) + 1
            elif job is not None and operation == "begin":
                store.begin(job)
            elif job is not None and operation == "finish":
                store.finish(job, {}, 1)
                reported[job] = COMPLETED
                claimed.remove(job)
            elif job is not None and operation == "fail":
                store.fail(job, "code", "line")
                reported[job] = FAILED
                claimed.remove(job)
            elif job is not None and operation == "lost":
                status = store.put_back(job)
                claimed.remove(job)
                reported[job] = FAILED if status == FAILED else "queued"
            elif reported and operation == "delete":
                id = sorted(reported)[which % len(reported)]
                store.delete(id)
                del reported[id]
                claimed = [each for each in claimed if each != id]
        except Crash:
            connection.close()  # what was not committed is gone
            store, claimed = Store(path), []
            store.recover()
            if operation == "delete":  # the client received no answer; either result is right
                reported = {id: state for id, state in reported.items() if store.get(id)}
    store._connection.close()
    store = Store(path)
    store.recover()
    for id, state in reported.items():
        found = store.get(id)
        assert found is not None, "lost"
        if state in (COMPLETED, FAILED):
            assert found.status == state
        assert found.status in ("queued", COMPLETED, FAILED) and handed_out.get(id, 0) <= 2
    order = []
    while (got := store.claim()) is not None:
        order.append(got.number)
    assert order == sorted(set(order))
    store.close()


def test_the_queue_is_bounded_and_keys_make_one_job(tmp_path: Path) -> None:
    store = Store(tmp_path / "jobs.sqlite3")
    a = [store.insert(new_id(), "a", {"n": n}, limit=4, limit_of_owner=2)[0] for n in range(2)]
    with pytest.raises(QueueFull) as full:
        store.insert(new_id(), "a", {}, limit=4, limit_of_owner=2)
    assert full.value.of_owner
    b = [store.insert(new_id(), "b", {"n": 1}, key=f"k{n}", limit=4, limit_of_owner=2)[0] for n in range(2)]
    again, new = store.insert(new_id(), "b", {"n": 1}, key="k0", limit=4, limit_of_owner=2)
    assert (again.id, new) == (b[0].id, False)
    # A client that is traced sends another `traceparent` with each attempt.
    again, new = store.insert(new_id(), "b", {"n": 1, "traceparent": "00-b"}, key="k0")
    assert (again.id, new) == (b[0].id, False)
    with pytest.raises(KeyReused):
        store.insert(new_id(), "b", {"n": 2}, key="k0")
    with pytest.raises(QueueFull) as full:
        store.insert(new_id(), "c", {}, limit=4, limit_of_owner=2)
    assert not full.value.of_owner
    assert store.get(a[0].id, "b") is None and store.get(a[0].id, "a") is not None
    page, more = store.page("a", None, 1, descending=True)
    assert ([job.id for job in page], more) == ([a[1].id], True)
    assert store.page("a", a[1].id, 5, descending=True) == ([a[0]], False)
    assert store.page("a", b[0].id, 5, descending=True) == ([], False)


def test_old_clips_go_by_age_and_by_size(tmp_path: Path) -> None:
    store = Store(tmp_path / "jobs.sqlite3")
    ids = []
    for _ in range(3):
        ids.append(store.insert(new_id(), "", {})[0].id)
        store.claim()
        store.finish(ids[-1], {}, 100)
    assert store.expired(60, 1000) == [] and set(store.expired(-1, 1000)) == set(ids)
    assert store.expired(60, 250) == ids[:1]


def test_the_work_for_a_request_does_not_grow_with_the_number_of_old_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in steps of SQLite's machine. What is expired is looked up without reading the requests."""
    store, work = Store(tmp_path / "jobs.sqlite3"), []
    sql = "INSERT INTO jobs (id, owner, status, created_at, started_at, completed_at, request, result, bytes) VALUES "

    def steps(function: Callable[[], Any]) -> int:
        counted = 0

        def count() -> None:
            nonlocal counted
            counted += 1

        store._connection.set_progress_handler(count, 1)
        function()
        store._connection.set_progress_handler(None, 1)
        return counted

    for begin, end in ((0, 100), (100, 1000)):
        rows = [(f"{i}", "me", "completed", i, i, i + 1, "{}", "{}", 1) for i in range(begin, end)]
        store._connection.executemany(f"{sql} (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        pages = [steps(lambda after=after: store.page("me", after, 20, True)) for after in (None, "50")]
        work.append((*pages, steps(store.seconds_of_a_clip)))
    assert all(more < 2 * few for few, more in zip(*work, strict=True)), work
    monkeypatch.setattr(jobs.json, "loads", None)
    assert len(store.expired(0, 10)) == 1000


def test_files_of_a_job_are_removed_without_a_look_at_those_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = JobFiles(tmp_path / "data")
    files.write("video_a", {CLIP: b"clip", PICTURE: b"picture"})
    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, None)
    files.remove("video_a", PICTURE)
    assert files.read("video_a", PICTURE) is None and files.read("video_a", CLIP) == b"clip"
    files.remove("video_a")
    assert files.read("video_a", CLIP) is None
    files.close()


def test_a_folder_has_one_server_and_is_swept(tmp_path: Path) -> None:
    files = JobFiles(tmp_path / "data")
    with pytest.raises(ReducioError, match="is in use by another server"):
        JobFiles(tmp_path / "data")
    for id in ("video_a", "video_b", "video_c"):
        files.write(id, {CLIP: b"clip", PICTURE: b"picture"})
    (files.folder / ".video_a.12345678.mp4").touch()
    files.sweep({"video_a": "completed", "video_b": "queued"})
    assert sorted(p.name for p in files.folder.iterdir()) == [
        "video_a.mp4", "video_b.picture",
    ]  # fmt: skip
    files.remove("video_a")
    assert [p.name for p in files.folder.iterdir()] == ["video_b.picture"]
    files.close()
    JobFiles(tmp_path / "data").close()


def test_jobs_for_another_model_are_not_made(tmp_path: Path) -> None:
    store, ids = Store(tmp_path / "jobs"), dict[str, str]()
    for name, served in (("older", None), ("same", "A"), ("other", "B"), ("begun", "B")):
        request = {"model": "m", "call": {}} | ({} if served is None else {"served": served})
        ids[name] = store.insert(new_id(), "", request)[0].id
    assert store.claim() is not None  # the older one
    assert store.fail_others("A") == [ids["other"], ids["begun"]]
    failed = store.get(ids["other"])
    assert failed is not None and (failed.status, failed.error_code) == (FAILED, "model_changed")
    assert failed.error_message == "was accepted for m; the server now has another model or other settings"
    assert store.counts() == {"queued": 2, FAILED: 2}
    key = {"model": "m", "call": {}}
    first = store.insert(new_id(), "", key | {"served": "A"}, key="k")[0]
    assert store.insert(new_id(), "", key | {"served": "B"}, key="k") == (first, False)
    store.close()


KEYS = ("one", "two", "schl\u00fcssel")


def test_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    hashes = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in zip("abc", KEYS, strict=True)}
    path.write_text("# ours\n" + "".join(f"{name}:{digest}\n" for name, digest in hashes.items()))
    keys = Keys(path)
    assert keys.owner("Bearer one") == "a" and keys.owner("bearer two") == "b" and Keys().owner(None) == ""
    assert keys.owner(f"Bearer {KEYS[2]}".encode().decode("latin-1")) == "c"  # as the server decodes a header
    for wrong in (None, "", "Bearer", "Bearer three", "Basic one", f"Bearer {hashlib.sha256(b'one').hexdigest()}"):
        with pytest.raises(ApiError) as error:
            keys.owner(wrong)
        assert error.value.status == 401
    for text, line in (("a", "line 1 is not NAME:SHA256"), ("", "holds no key"), (path.read_text() * 2, "second time")):
        path.write_text(text)
        with pytest.raises(ReducioError, match=line):
            Keys(path)
    pytest.importorskip("fastapi")
    assert main(["serve", "--host", "0.0.0.0", "--data", str(tmp_path / "d")]) == 2
    assert "0.0.0.0 is open to others; name the keys with --api-keys" in capsys.readouterr().err
    assert main(["serve", "--api-keys", str(tmp_path / "none"), "--data", str(tmp_path / "d")]) == 2
    assert main(["serve", "--sizes", "12", "--data", str(tmp_path / "d")]) == 2
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "option, value, line",
    [
        ("--keep-hours", "inf", "--keep-hours: must be finite and above 0, is inf"),
        ("--keep-hours", "1e306", "--keep-hours: must be finite and above 0, is 1e+306"),
        ("--job-seconds", "inf", "--job-seconds: must be finite and above 0, is inf"),
        ("--grace", "inf", "--grace: must be finite and at least 0, is inf"),
        ("--grace", "nan", "--grace: must be finite and at least 0, is nan"),
        ("--gpus-per-replica", "nan", "--gpus-per-replica: must be finite and at least 0, is nan"),
        ("--sizes", "0x0,128x128", "--sizes: must be WIDTHxHEIGHT with commas between, is '0x0,128x128'"),
        ("--sizes", "9" * 5000 + "x1", "--sizes: must be WIDTHxHEIGHT with commas between, is "),
    ],
)
def test_numbers_that_serve_cannot_use(option: str, value: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Without keys the address is refused, so that no server starts where the number is not.
    assert main(["serve", "--host", "0.0.0.0", option, value]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and line in err


@pytest.mark.parametrize("option", ["--min-replicas", "--max-replicas", "--gpus-per-replica"])
def test_replicas_without_ray(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a red circle")
    batch_command = ["batch", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")]
    for command in (["serve", "--host", "0.0.0.0"], batch_command):
        assert main([*command, option, "1"]) == 2
        assert f"{option}: is of clips on Ray, which needs --ray" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_of_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastapi")
    (tmp_path / "jobs.sqlite3").write_bytes(b"no database" * 1000)
    assert main(["serve", "--port", "0", "--data", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "jobs.sqlite3 cannot be used as the file of jobs (file is not a database)" in err
    JobFiles(tmp_path).close()  # the folder is free again


def test_a_message_holds_no_path_of_the_server() -> None:
    line = "vae.decode: out of memory at 64x64; latents are in /home/user/.cache/reducio-fast/latents/a.safetensors"
    assert without_paths(line) == "vae.decode: out of memory at 64x64; latents are in a.safetensors"
    assert without_paths("and/or 1/2 http://a.b/c/d") == "and/or 1/2 http://a.b/c/d"
    error = bad_request("height: 100 is not a multiple of 32")
    assert (error.status, error.body["error"]["param"]) == (400, "height")


def test_the_command_of_the_kubernetes_page_parses(root: Path) -> None:
    """Its fields were checked against KubeRay's resource definition, which is too large to keep here."""
    documents = {each["kind"]: each for each in yaml.safe_load_all((root / "docs" / "kuberay.yaml").read_text())}
    spec = documents["RayJob"]["spec"]
    program, *arguments = shlex.split(spec["entrypoint"])
    parsed = parser().parse_args(arguments)
    assert (program, parsed.command, parsed.ray) == ("reducio-fast", "serve", "auto") and parsed.api_keys
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]
    mounted = {mount["mountPath"] for mount in head["spec"]["containers"][0]["volumeMounts"]}
    assert {parsed.data, str(Path(parsed.api_keys).parent)} == mounted
    assert documents["Service"]["spec"]["selector"].items() <= head["metadata"]["labels"].items()
    assert documents["Service"]["spec"]["ports"][0]["targetPort"] == parsed.port
    assert parsed.max_replicas == spec["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"]
