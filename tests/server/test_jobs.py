"""The job database with a crash at any statement, keys, the folder, and batches. Only the slow test loads a model."""

from __future__ import annotations

import datetime
import errno
import functools
import hashlib
import json
import shlex
import sqlite3
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reducio_fast import ReducioError
from reducio_fast.cli.main import main, parser
from reducio_fast.pipelines.call.output import ReducioOutput
from reducio_fast.server import batch, clips
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
    assert store.expired(60, 1000) == [] and {job.id for job in store.expired(-1, 1000)} == set(ids)
    assert [job.id for job in store.expired(60, 250)] == ids[:1]


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


def test_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\na:{hashlib.sha256(b'one').hexdigest()}\nb:{hashlib.sha256(b'two').hexdigest()}\n")
    keys = Keys(path)
    assert keys.owner("Bearer one") == "a" and keys.owner("bearer two") == "b" and Keys().owner(None) == ""
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


def test_prompts_of_every_format(tmp_path: Path) -> None:
    rows = [{"prompt": "a red circle", "seed": 3}, {"prompt": 'a "blue", star'}]
    (tmp_path / "p.txt").write_text("\ufeffa red circle\n\n  a blue star\n", encoding="utf-8")  # a BOM, of Windows
    lines = [*(json.dumps(row) for row in rows), '"a\u2028line"', '{"prompt": null, "image": "i.png", "seed": null}']
    (tmp_path / "p.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    (tmp_path / "p.csv").write_text('prompt,seed\na red circle,3\n"a ""blue"", star",\n')
    pq.write_table(pa.table({"prompt": [r["prompt"] for r in rows], "seed": [3, None]}), tmp_path / "p.parquet")
    assert batch.read_prompts(tmp_path / "p.txt") == [{"prompt": "a red circle"}, {"prompt": "a blue star"}]
    assert batch.read_prompts(tmp_path / "p.jsonl") == [*rows, {"prompt": "a\u2028line"}, {"image": "i.png"}]
    assert batch.read_prompts(tmp_path / "p.csv") == [rows[0] | {"seed": "3"}, rows[1]]
    assert batch.read_prompts(tmp_path / "p.parquet") == rows
    for name, text, line in (
        ("p.doc", "x", "no type that is known"),
        ("none.txt", None, "no such file"),
        ("empty.txt", "\n", "holds none"),
        ("bad.jsonl", "{", "cannot be read"),
        ("bad.parquet", "x", "cannot be read"),
        ("bad.csv", "text\nx\n", "row 0 of .* has neither prompt nor image"),
        ("number.jsonl", "1\n", "row 0 of .* has neither prompt nor image"),
        ("null.jsonl", '{"prompt": null}\n', "row 0 of .* has neither prompt nor image"),
        ("deep.jsonl", "[" * 100_000, "cannot be read"),
        ("nan.jsonl", '{"prompt": "x", "fps": NaN}\n', "row 0 of .*: fps is nan, which JSON does not have"),
        ("comma.csv", "prompt\na star\na circle, moving right\n", "row 1 of .* has more cells than the header; quote"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ReducioError, match=line):
            batch.read_prompts(tmp_path / name)
    path = tmp_path / "picture.parquet"
    pq.write_table(pa.table({"prompt": pa.array([None], pa.string()), "image": ["i.png"]}), path)
    assert batch.read_prompts(path) == [{"image": "i.png"}]
    for value in (datetime.date(2024, 5, 1), Decimal("1.5"), b"x"):
        pq.write_table(pa.table({"prompt": ["a"], "more": [value]}), path)
        with pytest.raises(ReducioError, match="row 0 of .*: more is .*, which JSON does not have"):
            batch.read_prompts(path)


def test_a_batch_of_several_seeds_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several seeds of a prompt make one file, which a second run keeps; another model or dtype is refused."""

    class StandIn:
        encoding = "fast"

        def __init__(self, **_: Any) -> None:
            self.pipe = self

        def __call__(self, seed: int, num_videos_per_prompt: int = 1, **_: Any) -> ReducioOutput:
            many = num_videos_per_prompt > 1
            frames = np.zeros((num_videos_per_prompt, 2, 32, 32, 3), np.uint8)
            seeds = [seed + i for i in range(num_videos_per_prompt)]
            return ReducioOutput(frames if many else frames[0], None, seeds, 8, {}, is_list=many)

    monkeypatch.setattr(clips, "Clips", StandIn)
    rows = [{"prompt": "a", "num_videos_per_prompt": 2}, {"prompt": "b"}]

    def run(**worker: Any) -> batch.Done:
        return batch.make_clips(rows, batch.Settings(out=str(tmp_path / "out"), worker=worker, call={}))

    manifest = tmp_path / "out" / "manifest.jsonl"
    assert run(model="m").made == 2
    made = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [(row["file"], row["frames"], row["size"]) for row in made] == [
        ("00000.mp4", 2, "64x32"),
        ("00001.mp4", 2, "32x32"),
    ]
    assert sorted(path.name for path in manifest.parent.glob("*.mp4")) == ["00000.mp4", "00001.mp4"]
    with manifest.open("ab") as file:
        file.write(b'7\n{"number": [1]}\n{"file": "x"}\n\xff\n')
    done = run(model="m")
    assert (done.made, done.kept) == (0, 2)
    assert [json.loads(line) for line in manifest.read_text().splitlines()] == made
    for worker in ({"model": "other"}, {"model": "m", "dtype": "float16"}, {"model": "m", "quantise": "fp8"}, {}):
        with pytest.raises(ReducioError, match="holds clips of other prompts or settings, or of another model"):
            run(**worker)


def test_a_batch_that_cannot_encode_makes_no_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    class StandIn:
        encoding = "quality"

        def __init__(self, **_: Any) -> None:
            self.pipe = self

        def __call__(self, **call: Any) -> ReducioOutput:
            made.append(call)
            return ReducioOutput(np.zeros((2, 32, 32, 3), np.uint8), None, [0], call.get("fps", 7), {})

    monkeypatch.setattr(clips, "Clips", StandIn)
    monkeypatch.setenv("REDUCIO_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "fps": 1000000000000}\n{"prompt": "b"}\n')
    command = ["batch", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out"), "--no-progress"]
    assert main(command) == 2 and [call["prompt"] for call in made] == ["b"]
    line = "1 of 2 prompts made no clip, the first is number 0: cannot write "
    assert line in capsys.readouterr().err and not (tmp_path / "cache" / "frames").exists()
    made.clear()
    broken = tmp_path / "ffmpeg"
    broken.write_text("#!/bin/sh\ncat >/dev/null; echo 'Unknown encoder libx264' >&2; exit 8\n")
    broken.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(broken))
    assert main([*command[:3], str(tmp_path / "other"), "--no-progress"]) == 2 and not made
    err = capsys.readouterr().err
    assert err == "reducio-fast batch: error: cannot write clip.mp4: Unknown encoder libx264\n"
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_batch_goes_on_where_it_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"a red circle number {n}" for n in range(8)]
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in [*prompts[:3], "", *prompts[4:]])
    )
    command = ["batch", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out"), "--num-inference-steps", "1"]
    command += ["--height", "64", "--width", "64", "--no-progress", "--encoding", "fast", "--json"]
    made = 0

    def stop() -> None:
        nonlocal made
        made += 1
        if made == 4:
            raise KeyboardInterrupt  # as Ctrl-C between two clips

    rows = batch.read_prompts(tmp_path / "p.jsonl")
    worker = {"model": None, "dtype": None, "device": None, "backend": "auto", "compile": None, "encoding": "fast"}
    call = {"height": 64, "width": 64, "num_inference_steps": 1}
    monkeypatch.setattr(clips, "Clips", functools.cache(clips.Clips))  # both runs share it, so it is loaded once
    with pytest.raises(KeyboardInterrupt):
        batch.make_clips(rows, batch.Settings(out=str(tmp_path / "out"), worker=worker, call=call), stop)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.mp4")}
    assert 3 <= len(before) < 7
    (tmp_path / "out" / ".00006.12345678.mp4").touch()
    assert main(command) == 2
    captured = capsys.readouterr()
    counts = {"made": 7 - len(before), "kept": len(before), "failed": 1}
    assert json.loads(captured.out) == {"path": str(tmp_path / "out")} | counts
    assert "1 of 8 prompts made no clip, the first is number 3: prompt: is empty" in captured.err
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.mp4")}
    assert len(after) == 7 and before.items() <= after.items()
    manifest = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [row["number"] for row in manifest] == list(range(8))
    assert manifest[3]["error"].startswith("prompt: is empty")
    assert [row.get("seed") for row in manifest] == [0, 1, 2, None, 4, 5, 6, 7]
    assert all(row["encoder"] == "libx264" for row in manifest if "timings" in row)
    assert not list((tmp_path / "out").glob(".*"))
    (tmp_path / "p.jsonl").write_text('{"prompt": "another"}\n')
    assert main(command) == 2
    assert "holds clips of other prompts or settings, or of another model (number 0 differs)" in capsys.readouterr().err


def test_a_worker_on_ray_returns_what_ends_the_run(bundle: Path, tmp_path: Path) -> None:
    """Ray would raise it with its own traceback."""
    row = {"task": json.dumps({"number": 0, "path": str(tmp_path / "0.mp4"), "call": {"prompt": "a"}})}
    missing = batch._Actor({"model": str(tmp_path / "nothing")})
    assert str(tmp_path / "nothing") in json.loads(missing(row)["result"])["refused"]
    full = batch._Actor({"model": str(bundle)})

    def no_space(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    full.clips.pipe = no_space
    assert "No space left" in json.loads(full(row)["result"])["refused"]
