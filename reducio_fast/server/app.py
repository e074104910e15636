"""The HTTP interface: OpenAI's videos API over the jobs of a dispatcher; health checks and metrics for operators."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

from fastapi import Depends, FastAPI, Header, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from . import schema
from .clips import Event
from .dispatcher import Dispatcher
from .errors import ApiError, bad_request
from .files import CLIP, CONTENT, LATENTS, PICTURE, SPRITESHEET, THUMBNAIL, JobFiles
from .jobs import COMPLETED, FAILED, RUNNING, Job, KeyReused, QueueFull, Store, new_id
from .keys import Keys
from .request_body import read_body
from .requests import Asked, Checker, Limits

VARIANTS = {"video": (CLIP, "video/mp4"), "thumbnail": (THUMBNAIL, "image/webp"),
            "spritesheet": (SPRITESHEET, "image/jpeg"), "latents": (LATENTS, "application/octet-stream")}  # fmt: skip
# A polling client gets its answer when something has changed, and is told to poll again at once; otherwise it would see
# the end of its clip half a second late on average. Proxies cut connections that are silent for a minute.
HOLD_SECONDS, POLL_AGAIN_MS = 20.0, 20
MAX_DISCARDED = 5  # times the limit: bytes of an oversized body that are read and dropped, so that its sender gets 413


class Service:
    """The state that the routes share. `checker` is set once the model's configuration has been read."""

    def __init__(self, store: Store, files: JobFiles, dispatcher: Dispatcher, keys: Keys, limits: Limits) -> None:
        self.store, self.files, self.dispatcher, self.keys, self.limits = store, files, dispatcher, keys, limits
        self.checker: asyncio.Future[Checker] = asyncio.get_running_loop().create_future()
        self.described: Callable[[], dict[str, Any]] = dict
        # Two threads that decode pictures, so that at most two at a time take memory, however many are sent.
        self._checks = ThreadPoolExecutor(2, "check")

    async def accept(
        self, fields: dict[str, Any], files: dict[str, bytes], owner: str, key: str | None, more: dict[str, Any]
    ) -> Job:
        """Check a request and put it into the queue as a job. Raises ApiError."""
        checker = await asyncio.shield(self.checker)
        loop = asyncio.get_running_loop()
        asked: Asked = await loop.run_in_executor(self._checks, checker, fields, files, more)
        if self.files.free_bytes() < 2 * self.limits.body_bytes:
            raise ApiError(503, "no room on the server's disk", code="disk_full", headers={"Retry-After": "60"})
        return await asyncio.to_thread(self._insert, asked, owner, key)

    def _insert(self, asked: Asked, owner: str, key: str | None) -> Job:
        id, limits = new_id(), self.limits
        # Write the files first: a job whose files are missing cannot be made, but files without a job are swept.
        size = self.files.write(id, dict(asked.files))
        new = False
        try:
            per_owner = limits.queue_per_key if self.keys.required else None
            job, new = self.store.insert(id, owner, asked.row(), key, limits.queue, per_owner, size)
            return job
        except QueueFull as error:
            code = "too_many_jobs" if error.of_owner else "queue_full"
            raise ApiError(429, str(error), code=code, headers={"Retry-After": str(self._estimate())}) from error
        except KeyReused:
            raise ApiError(400, "Idempotency-Key: was used for another request", "Idempotency-Key",
                           "idempotency_key_reused") from None  # fmt: skip
        finally:
            if not new:
                self.files.remove(id)

    def _estimate(self) -> int:
        """Seconds until a place in the queue is free, estimated from the mean time of the last clips."""
        slots = 1 if self.dispatcher.home is None else max(1, self.dispatcher.home.slots // 2)
        return max(1, min(120, math.ceil((self.store.seconds_of_a_clip() or 5) / slots)))

    def find(self, id: str, owner: str) -> Job:
        """An owner's job. Raises ApiError 404 if there is none or it belongs to another owner."""
        job = self.store.get(id, owner)
        if job is None:
            raise ApiError(404, f"there is no video {id[:60]!r}", "video_id", "video_not_found")
        return job

    def video(self, job: Job, event: Event | None = None) -> dict[str, Any]:
        """A job as the client reads it, with its progress now or as of `event`: OpenAI's fields, then ours."""
        progress = event or self.dispatcher.progress(job.id)
        done = {COMPLETED: 100, RUNNING: progress["percent"]}.get(job.status, 0)
        ended = None if job.completed_at is None else int(job.completed_at)
        video: dict[str, Any] = {
            "id": job.id,
            "object": "video",
            "model": job.request["model"],
            "status": job.status,
            "progress": done,
            "created_at": int(job.created_at),
            "completed_at": ended if job.status == COMPLETED else None,
            "expires_at": None if ended is None else int(ended + self.limits.keep_seconds),
            "prompt": job.request["call"].get("prompt"),
            "size": job.request["size"],
            "seconds": job.request["seconds"],
            "seed": job.request["seed"],
            "remixed_from_video_id": job.request.get("remixed_from_video_id"),
            "error": None,
            "attempts": job.attempts,
        }
        if job.status == FAILED:
            video["error"] = {"code": job.error_code, "message": job.error_message}
        if job.status == RUNNING:
            video |= {"stage": progress["stage"], "step": progress["step"]}
        if not job.ended and job.status != RUNNING:
            video["queue_position"] = self.store.queued_before(job)
        if job.result is not None:
            video |= {name: job.result[name] for name in ("timings", "fps", "frames", "encoder", "seconds_of_clip")}
        return video


class BodyLimit:
    """ASGI middleware that counts the bytes of a body as they arrive and answers with 413 above `most`."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        seen = 0

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self.most:
                    while message.get("more_body") and seen < MAX_DISCARDED * self.most:
                        message = await receive()
                        seen += len(message.get("body", b""))
                    raise ApiError(413, f"the body has more than {self.most} bytes", code="body_too_large")
            return message

        await self.app(scope, counted if scope["type"] == "http" else receive, send)


def create_app(make_service: Callable[[], Any], limits: Limits) -> FastAPI:
    """`make_service` is an asynchronous context manager of the Service, entered when the server starts."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with make_service() as app.state.service:
            yield

    app = FastAPI(title="reducio-fast", lifespan=lifespan, description=schema.DESCRIPTION, responses=schema.ERRORS)
    app.add_middleware(BodyLimit, most=limits.body_bytes)
    _handle_errors(app)

    def service() -> Service:
        return app.state.service

    def owner_of(request: Request, authorization: str | None = Header(None)) -> str:
        return service().keys.owner(authorization)

    owned = Depends(owner_of)
    an_id = Path(max_length=80, pattern=r"^[\w-]+$")

    @app.post("/v1/videos", openapi_extra=schema.CREATE, response_model=schema.Video)
    async def create(request: Request, owner: str = owned, idempotency_key: str | None = Header(None)) -> Any:
        """Ask for a clip: it is made in its turn."""
        fields, files = await read_body(request)
        return await accept(request, fields, files, owner, idempotency_key, {})

    @app.post("/v1/videos/{video_id}/remix", openapi_extra=schema.REMIX, response_model=schema.Video)
    async def remix(
        request: Request, video_id: str = an_id, owner: str = owned, idempotency_key: str | None = Header(None)
    ) -> Any:
        """Another clip that looks like a finished one: its content frame, under a new prompt."""
        fields, files = await read_body(request)
        if PICTURE in files:
            raise bad_request("input_reference: a remix has the picture of its clip")
        job = service().find(video_id, owner)
        content = await asyncio.to_thread(service().files.read, job.id, CONTENT)
        if content is None:
            raise ApiError(404, "this video has no content frame yet", "video_id", "video_not_ready")
        fields = {"size": job.request["size"]} | fields
        files[PICTURE] = content
        return await accept(request, fields, files, owner, idempotency_key, {"remixed_from_video_id": job.id})

    async def accept(
        request: Request, fields: Any, files: dict[str, bytes], owner: str, key: str | None, more: dict[str, Any]
    ) -> Any:
        if key is not None and not 1 <= len(key) <= 200:
            raise bad_request("Idempotency-Key: must have 1 to 200 characters")
        if re.fullmatch(r"[0-9a-f-]{20,100}", trace := request.headers.get("traceparent", "")):
            more = more | {"traceparent": trace}
        job = await service().accept(fields, files, owner, key, more)
        service().dispatcher.wake()
        return service().video(job)

    @app.get("/v1/videos", response_model=schema.VideoList)
    async def list_videos(
        owner: str = owned,
        after: str | None = Query(None, max_length=80),
        limit: int = Query(20, ge=1, le=100),
        order: str = Query("desc", pattern="^(asc|desc)$"),
    ) -> Any:
        """Your clips, the newest first."""
        if after is not None:
            service().find(after, owner)
        jobs, has_more = service().store.page(owner, after, limit, order == "desc")
        data = [service().video(job) for job in jobs]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return {"object": "list", "data": data, "has_more": has_more, "first_id": first, "last_id": last}

    @app.get("/v1/videos/{video_id}", response_model=schema.Video)
    async def retrieve(request: Request, video_id: str = an_id, owner: str = owned) -> Any:
        """A clip's state. A client's polling helper is answered when the state changes."""
        job = service().find(video_id, owner)
        headers = {}
        if request.headers.get("x-stainless-poll-helper") == "true":
            headers["openai-poll-after-ms"] = str(POLL_AGAIN_MS)
            if "x-stainless-custom-poll-interval" not in request.headers:
                job = await _held(service(), job, owner)
        return JSONResponse(service().video(job), headers=headers)

    @app.get("/v1/videos/{video_id}/content", response_class=FileResponse, responses=schema.CONTENT)
    async def content(
        video_id: str = an_id,
        owner: str = owned,
        variant: str = Query("video", pattern="^(video|thumbnail|spritesheet|latents)$"),
    ) -> Any:
        """The clip as .mp4, or a picture of it; of a job that ran out of memory in its decode the latents, which
        `reducio-fast decode` finishes."""
        job = service().find(video_id, owner)
        suffix, media_type = VARIANTS[variant]
        path = service().files.path(job.id, suffix)
        ready = FAILED if variant == "latents" else COMPLETED
        if job.status != ready or not path.is_file():  # not 409, which clients retry by themselves
            raise ApiError(404, f"the video is {job.status}", "video_id", "video_not_ready")
        return FileResponse(path, media_type=media_type, filename=f"{job.id}{suffix}")

    @app.get("/v1/videos/{video_id}/events", response_class=StreamingResponse, responses=schema.EVENTS)
    async def events(video_id: str = an_id, owner: str = owned) -> Any:
        """Server-sent events: the clip's state after every step, the last one when it is completed or failed; with
        `preview_every` also "preview", whose `image` is a data: URL of four frames as they stand."""
        job = service().find(video_id, owner)
        stream = _events(service(), job, owner)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.delete("/v1/videos/{video_id}", response_model=schema.Deleted)
    async def delete(video_id: str = an_id, owner: str = owned) -> Any:
        """End a clip, or remove it. When this is answered no work goes on and no file is left."""
        job = service().find(video_id, owner)
        # Shielded: the deletion goes on if the caller does not wait for it.
        await asyncio.shield(asyncio.create_task(service().dispatcher.delete(job.id)))
        return {"id": job.id, "object": "video.deleted", "deleted": True}

    @app.get("/v1/models", response_model=schema.ModelList)
    async def models(owner: str = owned) -> Any:
        """The model that is served, with the sizes and the fields that it takes."""
        checker = await asyncio.shield(service().checker)
        entry = {"id": checker.name, "object": "model", "created": 0, "owned_by": "reducio-fast"}
        entry |= {"sizes": [f"{w}x{h}" for h, w in checker.sizes], "fields": list(checker.fields)}
        entry |= {"runs": service().described()}
        return {"object": "list", "data": [entry]}

    @app.get("/healthz", response_model=schema.Health)
    async def healthz() -> Any:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/readyz", response_model=schema.Health, responses=schema.NOT_READY)
    async def readyz() -> Any:
        """Whether clips are made: 503 while the model loads and while the server ends."""
        dispatcher = service().dispatcher
        status = "ending" if dispatcher.stopping.is_set() else "loading" if dispatcher.home is None else "ready"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics", response_class=Response, responses=schema.METRICS)
    async def metrics() -> Any:
        """For Prometheus."""
        text, media_type = service().dispatcher.metrics.text()
        return Response(text, media_type=media_type)

    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> str:
        return page

    return app


async def _held(service: Service, job: Job, owner: str) -> Job:
    """Wait until the job's status has changed, it has ended, or HOLD_SECONDS have passed; returns the job."""
    with service.dispatcher.watch(job.id) as changes:
        deadline = asyncio.get_running_loop().time() + HOLD_SECONDS
        now = service.find(job.id, owner)
        while now.status == job.status and not now.ended and not service.dispatcher.stopping.is_set():
            left = deadline - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(changes.get(), left)
            except asyncio.TimeoutError:
                break
            now = service.find(job.id, owner)
        return now


async def _events(service: Service, job: Job, owner: str) -> AsyncIterator[str]:
    with service.dispatcher.watch(job.id) as changes:
        last, event = "", None
        while True:
            now = service.store.get(job.id, owner)
            if now is None:
                yield 'event: deleted\ndata: {"object": "video.deleted"}\n\n'
                return
            if event is not None and "preview" in event:
                picture = "data:image/webp;base64," + base64.b64encode(event["preview"]).decode()
                yield f"event: preview\ndata: {json.dumps({'id': now.id, 'step': event['step'], 'image': picture})}\n\n"
            data = json.dumps(service.video(now, event))
            if data != last:
                last = data
                yield f"event: {now.status if now.ended else 'progress'}\ndata: {data}\n\n"
            if now.ended or service.dispatcher.stopping.is_set():
                return
            try:
                event = await asyncio.wait_for(changes.get(), HOLD_SECONDS)
            except asyncio.TimeoutError:
                yield ": still here\n\n"


def _handle_errors(app: FastAPI) -> None:
    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def ours(request: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return answer(ApiError(400, f"{name}: {first['msg']}", name, "invalid_value"))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> JSONResponse:
        return answer(ApiError(500, f"internal error ({type(error).__name__}); the log has the rest"))
