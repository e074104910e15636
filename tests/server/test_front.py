"""The front with workers that fail on purpose: the dispatcher decides the outcome of a job. Real HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
import sqlite3
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
from reducio_fast.server import dispatcher as dispatching  # noqa: E402
from reducio_fast.server import serve as serving  # noqa: E402
from reducio_fast.server.dispatcher import Dispatcher, WorkerLost  # noqa: E402
from reducio_fast.server.files import PICTURE, JobFiles  # noqa: E402
from reducio_fast.server.jobs import Job, Store, new_id  # noqa: E402
from reducio_fast.server.metrics import Metrics  # noqa: E402
from reducio_fast.server.requests import Limits  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
RESULT = {"timings": {"dit.step": 0.1}, "fps": 16, "frames": 16, "encoder": "none", "seconds_of_clip": 0.1}


class Workers:
    """`script[prompt]`: outcomes of the attempts at that prompt, each "made", "lost", "error", "defect" or "hangs"."""

    slots = 2

    def __init__(self) -> None:
        self.script: dict[str, list[str]] = {}
        self.ended: list[str] = []

    async def make(self, request: dict[str, Any], given: Mapping[str, bytes]) -> AsyncIterator[dict[str, Any]]:
        prompt = request["call"]["prompt"]
        outcomes = self.script.get(prompt, [])
        outcome = outcomes.pop(0) if outcomes else "made"
        try:
            yield {"stage": "dit.step", "step": 1, "percent": 50}
            yield {"stage": "dit.step", "step": 2, "percent": 40}  # a progress bar must not go back
            if outcome == "hangs":
                await asyncio.Event().wait()
            if outcome == "lost":
                raise WorkerLost("killed")
            if outcome == "defect":
                raise KeyError("a secret")
            if outcome == "error":
                yield {"error": {"code": "out_of_memory", "message": "vae.decode: out of memory"}, "latents": b"kept"}
            else:
                yield {"files": {".mp4": prompt.encode(), ".content.png": b"png"}, "result": RESULT}
        finally:
            self.ended.append(prompt)


Front = Callable[..., tuple[str, Workers, Callable[[], None]]]


@pytest.fixture
def front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    """Starts a server on one folder; returns its address, its workers, and a function that ends it."""
    ends: list[Callable[[], None]] = []

    def start(loaded: bool = True, **kwargs: Any) -> tuple[str, Workers, Callable[[], None]]:
        workers, started = Workers(), []

        class Started(serving._Started):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                started.append(self)

            def _home(self, service: Any) -> Any:
                while not loaded and not service.dispatcher.stopping.is_set():
                    time.sleep(0.01)
                return workers

        monkeypatch.setattr(serving, "_Started", Started)
        settings = serving.Settings(port=0, data=str(tmp_path / "data"), grace=0, **kwargs)
        url, run = serving.serve(settings)
        thread = threading.Thread(target=run)
        thread.start()

        def end() -> None:
            while not started or started[0].server is None:
                time.sleep(0.01)
            started[0].server.handle_exit(15, None)
            thread.join(30)
            assert not thread.is_alive()

        ends.append(end)
        return url, workers, end

    yield start
    for end in ends[-1:]:
        end()


def client_of(url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def test_what_becomes_of_a_job(front: Front, tmp_path: Path) -> None:
    url, workers, _ = front(limits=Limits(job_seconds=0.5))
    client = client_of(url)
    outcomes = {
        "lost once": (["lost"], "completed", None, 2),
        "lost twice": (["lost", "lost"], "failed", "worker_lost", 2),
        "no memory": (["error"], "failed", "out_of_memory", 1),
        "a defect": (["defect"], "failed", "internal_error", 1),
        "too long": (["hangs"], "failed", "timeout", 1),
        "made": ([], "completed", None, 1),
    }
    workers.script = {prompt: list(each[0]) for prompt, each in outcomes.items()}
    ids = {prompt: client.videos.create(prompt=prompt).id for prompt in outcomes}
    for prompt, (_, status, code, attempts) in outcomes.items():
        video = client.videos.poll(ids[prompt])
        assert (video.status, video.error and video.error.code, video.attempts) == (status, code, attempts), prompt
        assert "secret" not in video.model_dump_json()
    assert client.videos.download_content(ids["lost once"]).content == b"lost once"
    with urllib.request.urlopen(f"{url}/v1/videos/{ids['no memory']}/content?variant=latents") as answer:
        assert answer.read() == b"kept"  # what was sampled is not lost
    client.videos.delete(ids["no memory"])
    assert not [path for path in (tmp_path / "data" / "files").iterdir() if "latents" in path.name]


def test_a_deleted_job_ends_and_leaves_nothing(front: Front, tmp_path: Path) -> None:
    url, workers, _ = front()
    client = client_of(url)
    workers.script = {"a": ["hangs"], "b": ["hangs"], "c": ["hangs"]}
    ids = [client.videos.create(prompt=prompt).id for prompt in "abc"]
    while [client.videos.retrieve(id).status for id in ids] != ["in_progress", "in_progress", "queued"]:
        time.sleep(0.01)
    assert client.videos.retrieve(ids[0]).progress == 50 and client.videos.retrieve(ids[2]).queue_position == 0
    client.videos.delete(ids[2])
    client.videos.delete(ids[0])
    assert workers.ended == ["a"]
    assert client.videos.create_and_poll(prompt="d").status == "completed"
    client.videos.delete(ids[1])
    assert [video.prompt for video in client.videos.list()] == ["d"]
    assert len(list((tmp_path / "data" / "files").iterdir())) == 2  # clip and content of d


def test_the_end_puts_jobs_back_and_a_start_takes_them_up(front: Front) -> None:
    url, workers, end = front()
    client = client_of(url)
    workers.script = {"a": ["hangs"]}
    id = client.videos.create(prompt="a").id
    picture = io.BytesIO()
    Image.new("RGB", (128, 128), "red").save(picture, "PNG")
    while client.videos.retrieve(id).status != "in_progress":
        time.sleep(0.01)
    helper = {"headers": {"X-Stainless-Poll-Helper": "true"}}
    waits = threading.Thread(target=client.get, args=(f"/videos/{id}",), kwargs={"cast_to": object, "options": helper})
    waits.start()
    time.sleep(0.2)
    begun = time.monotonic()
    end()
    waits.join()
    assert time.monotonic() - begun < 5  # every waiting request was answered
    url, _, _ = front()
    video = client_of(url).videos.poll(id)
    assert (video.status, video.attempts) == ("completed", 1)
    reference = ("x.png", picture.getvalue(), "image/png")
    other = client_of(url).videos.create_and_poll(prompt="x", input_reference=reference)
    assert other.status == "completed"


def test_keys_see_their_own_jobs(front: Front, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("".join(f"{name}:{hashlib.sha256(name.encode()).hexdigest()}\n" for name in "ab"))
    url, _, _ = front(loaded=False, api_keys=str(path), host="0.0.0.0", limits=Limits(queue=3, queue_per_key=2))
    url = url.replace("0.0.0.0", "127.0.0.1")
    a, b = client_of(url, "a"), client_of(url, "b")
    ids = [a.videos.create(prompt="x").id for _ in range(2)]  # accepted while the model loads
    assert a.videos.retrieve(ids[0]).status == "queued"
    with pytest.raises(openai.RateLimitError, match="2 jobs are open for this key"):
        a.videos.create(prompt="x")
    for call in (b.videos.retrieve, b.videos.delete, b.videos.download_content):
        with pytest.raises(openai.NotFoundError):
            call(ids[0])
    with pytest.raises(openai.NotFoundError):
        b.videos.list(after=ids[0])
    assert list(b.videos.list()) == [] and len(list(a.videos.list())) == 2
    b.videos.create(prompt="x")
    with pytest.raises(openai.RateLimitError, match="3 jobs are open"):
        b.videos.create(prompt="x")
    with pytest.raises(openai.AuthenticationError):
        client_of(url, "c").videos.list()


def test_clips_go_when_their_time_is_over(front: Front, tmp_path: Path) -> None:
    url, _, _ = front(limits=Limits(keep_seconds=0.8))
    client = client_of(url)
    id = client.videos.create_and_poll(prompt="x").id
    deadline = time.monotonic() + 20
    while list(client.videos.list()) and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(openai.NotFoundError):
        client.videos.download_content(id)
    assert list((tmp_path / "data" / "files").iterdir()) == []


def test_a_model_that_is_not_there_ends_the_server(tmp_path: Path) -> None:
    from reducio_fast import ReducioError

    url, run = serving.serve(serving.Settings(port=0, data=str(tmp_path / "data"), model=str(tmp_path / "none")))
    with pytest.raises(ReducioError, match="none"):
        run()
    assert url.startswith("http://127.0.0.1:")


def test_a_server_that_cannot_encode_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reducio_fast import ReducioError

    broken = tmp_path / "ffmpeg"
    broken.write_text("#!/bin/sh\ncat >/dev/null; echo 'Unknown encoder libx264' >&2; exit 8\n")
    broken.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(broken))
    with pytest.raises(ReducioError, match=r"^cannot write clip\.mp4: Unknown encoder libx264$"):
        serving.serve(serving.Settings(port=0, data=str(tmp_path / "data")))
    assert not (tmp_path / "data").exists()


def test_a_size_that_the_model_cannot_make_ends_the_server(tmp_path: Path) -> None:
    from reducio_fast import ReducioError

    limits = Limits(sizes=((128, 128), (100, 100)))
    _, run = serving.serve(serving.Settings(port=0, data=str(tmp_path / "data"), limits=limits))
    with pytest.raises(ReducioError, match="sizes: 100x100 cannot be served; height: .*32"):
        run()


class Disk:
    """A connection whose writes fail while the disk is `full`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection, self.full = connection, False

    def execute(self, sql: str, *values: Any) -> Any:
        if self.full and sql.startswith(("UPDATE", "DELETE", "INSERT", "COMMIT")):
            raise sqlite3.OperationalError("database or disk is full")
        return self.connection.execute(sql, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)


class Bench:
    """A dispatcher without HTTP, inside a running event loop."""

    def __init__(self, folder: Path, home: Any = None, **limits: Any) -> None:
        self.store, self.files = Store(folder / "jobs.sqlite3"), JobFiles(folder)
        self.disk = self.store._connection = Disk(self.store._connection)  # type: ignore[assignment]
        self.dispatcher, self.home = Dispatcher(self.store, self.files, Limits(**limits), Metrics()), home or Workers()
        self.dispatcher.start()
        self.dispatcher.open(self.home)

    def add(self, prompt: str) -> str:
        id = new_id()
        self.files.write(id, {PICTURE: b"picture"})
        self.store.insert(id, "", {"call": {"prompt": prompt}, "files": {PICTURE: "hash"}})
        return id

    async def ended(self, id: str) -> Job:
        async def wait() -> Job:
            while (job := self.store.get(id)) is None or not job.ended or self.dispatcher._work:
                await asyncio.sleep(0.01)
            return job

        return await asyncio.wait_for(wait(), 5)


@pytest.mark.parametrize("full_from", ["before", "begin", "clip", "error"])
def test_a_full_disk_stops_no_server(full_from: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatching, "RETRY_SECONDS", 0.02)

    class Home(Workers):
        async def make(self, request: dict[str, Any], given: Mapping[str, bytes]) -> AsyncIterator[dict[str, Any]]:
            bench.disk.full |= full_from == "begin"
            async for event in super().make(request, given):
                bench.disk.full |= full_from in ("clip", "error") and ("files" in event or "error" in event)
                yield event

    async def run() -> None:
        nonlocal bench
        bench = Bench(tmp_path, Home())
        id = bench.add("x")
        bench.home.script = {"x": ["error"]} if full_from == "error" else {}
        bench.disk.full = full_from == "before"
        bench.dispatcher.wake()
        await asyncio.sleep(0.15)
        job = bench.store.get(id)
        assert job is not None and bench.disk.full and not job.ended
        bench.disk.full = False
        job = await bench.ended(id)
        assert (job.status, job.error_code) == (
            ("failed", "out_of_memory") if full_from == "error" else ("completed", None)
        )
        await bench.dispatcher.drain(0)

    bench: Any = None
    asyncio.run(run())


def test_clips_go_after_the_disk_was_full(tmp_path: Path) -> None:
    async def run() -> None:
        bench = Bench(tmp_path, keep_seconds=0.4)
        id = bench.add("x")
        bench.dispatcher.wake()
        await bench.ended(id)
        bench.disk.full = True
        while list(bench.files.folder.iterdir()):  # they go first, which makes room
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert bench.store.get(id) is not None
        bench.disk.full = False
        while bench.store.get(id) is not None:
            await asyncio.sleep(0.01)
        await bench.dispatcher.drain(0)

    asyncio.run(asyncio.wait_for(run(), 5))


def test_the_server_ends_on_a_full_disk(tmp_path: Path) -> None:
    async def run() -> str:
        bench = Bench(tmp_path)
        bench.home.script = {"x": ["hangs"]}
        id = bench.add("x")
        bench.dispatcher.wake()
        while bench.dispatcher.progress(id)["percent"] < 50:
            await asyncio.sleep(0.01)
        bench.disk.full = True
        await bench.dispatcher.drain(0)
        return id

    id = asyncio.run(asyncio.wait_for(run(), 5))
    (job,) = Store(tmp_path / "jobs.sqlite3").recover()
    assert (job.id, job.status) == (id, "queued")


def test_a_job_that_ends_before_its_first_step_leaves_its_place(tmp_path: Path) -> None:
    async def run() -> None:
        bench = Bench(tmp_path)
        await asyncio.sleep(0)  # the dispatcher waits for jobs now
        for _ in range(Workers.slots):
            id = bench.add("x")
            bench.dispatcher.wake()
            await asyncio.create_task(bench.dispatcher.delete(id))
            assert bench.store.get(id) is None
        assert bench.home.ended == []  # none was begun
        id = bench.add("y")
        bench.dispatcher.wake()
        assert (await bench.ended(id)).status == "completed"
        id = bench.add("z")
        bench.dispatcher.wake()
        await asyncio.create_task(bench.dispatcher.drain(0))
        job = bench.store.get(id)
        assert job is not None and job.status == "queued" and bench.store.claim() is not None

    asyncio.run(run())


def test_what_a_failed_job_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its latents, although the time of the clip ends while they are written, but no upload."""
    write = JobFiles.write
    monkeypatch.setattr(JobFiles, "write", lambda *given: time.sleep(0.3) or write(*given))  # type: ignore[func-returns-value]

    async def run() -> None:
        bench = Bench(tmp_path, job_seconds=0.2)
        bench.home.script = {"x": ["error"], "y": ["hangs"]}
        ids = [bench.add(prompt) for prompt in "xy"]
        bench.dispatcher.wake()
        assert [(await bench.ended(id)).error_code for id in ids] == ["out_of_memory", "timeout"]
        assert [path.name for path in bench.files.folder.iterdir()] == [f"{ids[0]}.latents.safetensors"]
        await bench.dispatcher.drain(0)

    asyncio.run(run())


def test_the_page_shows_the_newest_clips(front: Front) -> None:
    """Of more than it shows, a reload had the oldest ones, and did not follow those in work."""
    url, _, _ = front()
    ids = [client_of(url).videos.create(prompt=f"{number}").id for number in range(22)]
    with urllib.request.urlopen(url) as page:
        listing = re.search(r'call\("(/v1/videos\?[^"]+)"\)', page.read().decode())
    assert listing is not None
    with urllib.request.urlopen(url + listing[1]) as answer:
        assert [video["id"] for video in json.load(answer)["data"]] == ids[:1:-1]
