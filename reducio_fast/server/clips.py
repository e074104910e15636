"""The worker: a loaded model that makes clips and yields events. It runs in the server's process or a Ray replica."""

from __future__ import annotations

import asyncio
import ctypes
import io
import logging
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..system.errors import ReducioError, is_out_of_memory
from .errors import without_paths
from .files import CLIP, CONTENT, MOTION, PICTURE, SPRITESHEET, THUMBNAIL

LOG = logging.getLogger("reducio_fast")

Event = dict[str, Any]
# Percent of a clip that is done when a stage begins and when it ends. The first stage has no steps where the caller
# gave the picture, and the encoders are quick.
SPANS = {"content.generate": (2, 40), "text.encode": (40, 41), "image.encode": (41, 42), "dit.step": (42, 88)}
DECODING, ENCODING = 88, 97
THUMBNAIL_SIDE, SPRITE_SIDE = 320, 160


class Stopped(Exception):
    """Raised between two steps of a clip that is no longer wanted."""


class Clips:
    """Makes one clip at a time, and writes the file of the previous one meanwhile.

    model, dtype, device, backend, compile, quantise: as in `generate`. encoding: an option of `media.ffmpeg`. warm:
    make a clip of two steps at once, so that the first caller does not wait for compilers. threads: the number of
    torch's threads on a CPU, which changes the bytes; None keeps torch's default. The constructor loads the model,
    which may take minutes.
    """

    def __init__(
        self,
        model: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        backend: str = "auto",
        compile: bool | None = None,
        quantise: str | None = None,
        encoding: str = "quality",
        warm: bool = True,
        threads: int | None = None,
    ) -> None:
        import torch

        from ..pipelines import registry
        from ..system import devices

        if threads is not None:
            torch.set_num_threads(threads)
        entry, where = registry.find(model), devices.resolve_device(device)
        loader_chooses = dtype is None and bool(entry.load_arguments)
        given = {"compile": compile, "quantise": quantise}
        kwargs = {name: value for name, value in given.items() if value is not None}
        entry.check_call(backend, kwargs)
        resolved = None if loader_chooses else devices.resolve_dtype(dtype, None, where)
        self.pipe = entry.load(resolved, where, backend, **kwargs)
        if (parts := getattr(self.pipe, "parts", None)) is not None and parts.source is not None:
            parts.source = without_paths(parts.source)  # clients may fetch latents, which name their model
        self.defaults, self.encoding, self.where = entry.call_defaults, encoding, where
        self._rescue = tempfile.TemporaryDirectory(prefix="reducio-serve-")
        self.pipe.rescue_folder = Path(self._rescue.name)
        # The clip is made in a thread, so that the event loop can answer requests and cancel clips meanwhile.
        self._maker = ThreadPoolExecutor(1, "clip")
        self._writers = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2), "encode")
        self._turn: asyncio.Lock | None = None
        if warm and hasattr(self.pipe, "warmup"):
            self.pipe.warmup(progress=False)

    async def make(self, request: dict[str, Any], given: Mapping[str, bytes]) -> AsyncIterator[Event]:
        """Make the clip of `request["call"]` and yield its events. given: the caller's files by suffix.

        Events: {"stage", "step", "percent"} while the clip is made, the first one when it begins, with a "preview"
        (WebP) in the steps that show one; then one of {"files": bytes by suffix, "result": {...}} or {"error": {"code",
        "message"}}, with "latents", a file for `reducio-fast decode`, if the decode ran out of memory. Closing the
        generator, or cancelling its task, ends the clip at its next step or tile; when that returns the clip has
        stopped.
        """
        loop, events, stop = asyncio.get_running_loop(), asyncio.Queue[Event | None](), threading.Event()
        self._turn = self._turn or asyncio.Lock()

        def emit(event: Event | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        latents: list[bytes] = []
        async with self._turn:
            work = loop.run_in_executor(self._maker, self._clip, request, given, stop, emit, latents)
            work.add_done_callback(lambda done: events.put_nowait(None))
            try:
                while (event := await events.get()) is not None:
                    yield event
            finally:
                stop.set()
                await _settled(work)
        if (failure := work.exception()) is not None:
            yield {"error": self._client_error(failure)} | ({"latents": latents[-1]} if latents else {})
            return
        output, peak, seconds = work.result()
        yield {"stage": "video.write", "step": 0, "percent": ENCODING}
        try:
            files, result = await loop.run_in_executor(self._writers, self._encode, output, request.get("interpolate"))
        except Exception as error:
            yield {"error": self._client_error(error)}
            return
        yield {"files": files, "result": result | {"peak_bytes": peak, "seconds_of_clip": round(seconds, 4)}}

    def _clip(
        self,
        request: dict[str, Any],
        given: Mapping[str, bytes],
        stop: threading.Event,
        emit: Callable[[Event], None],
        latents: list[bytes],
    ) -> tuple[Any, int, float]:
        """The clip, its peak memory in bytes and its seconds. latents: receives those that could not be decoded."""
        from .requests import motion_file, open_picture

        start = time.perf_counter()
        call = request["call"] | {"seed": request["seed"]}
        percent = _Progress(self.pipe, call, self.defaults)

        def listen(stage: str, step: int) -> None:
            if stop.is_set():
                raise Stopped
            emit({"stage": stage, "step": step, "percent": percent(stage, step)})

        emit({"stage": "", "step": 0, "percent": 0})
        extra: dict[str, Any] = {"image": open_picture(given[PICTURE])} if PICTURE in given else {}
        has_listener = hasattr(self.pipe, "listener")

        def show(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if (frames := tensors.get("frames")) is not None:
                event = {"stage": "dit.step", "step": step + 1, "percent": percent("dit.step", step + 1)}
                emit(event | {"preview": _strip(frames)})
            return {}

        if has_listener:
            self.pipe.listener = listen
            if "preview_every" in call:
                extra["callback_on_step_end"] = show
        else:  # a peer, which reports only its denoising steps

            def after_step(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
                listen("dit.step", step + 1)
                return {}

            extra["callback_on_step_end"] = after_step
        try:
            if MOTION in given:
                with motion_file(given[MOTION]) as path:
                    extra["motion_latents"] = self.pipe.encode_motion(path, call["height"], call["width"])
            output = self.pipe(**call, **extra, progress=False)
        finally:
            if has_listener:
                self.pipe.listener = None
            for file in Path(self._rescue.name).iterdir():  # of a decode that ran out of memory
                latents.append(file.read_bytes())
                file.unlink(missing_ok=True)
            give_back_memory()
        return output, self._peak_bytes(), time.perf_counter() - start

    def _encode(self, output: Any, factor: int | None) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The files of a clip by suffix, and the result for the client. factor: multiplies the frame rate, 2 or 4."""
        import numpy as np
        from PIL import Image

        from ..media import ffmpeg, video_files

        output = output if factor is None else output.interpolated(factor)
        if output.is_list:  # several seeds: one clip that shows them side by side
            output = output.as_grid()
        frames = np.asarray(output.frames)
        with tempfile.TemporaryDirectory(prefix="reducio-serve-") as scratch:
            clip, start = Path(scratch) / f"clip{CLIP}", time.perf_counter()
            # Not `output.save`, which keeps the frames of a failed write: a client could fill the disk with them.
            video_files.write_video(frames, clip, output.fps, self.encoding)
            timings = output.timings | {"video.write": time.perf_counter() - start}
            files = {CLIP: clip.read_bytes()}
        pictures = [Image.fromarray(np.asarray(frame)) for frame in frames]
        small = pictures[len(pictures) // 2].copy()
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        files[THUMBNAIL] = _saved(small, "WEBP", quality=85)
        files[SPRITESHEET] = _saved(_sheet(pictures), "JPEG", quality=85)
        if output.content is not None:
            files[CONTENT] = _saved(Image.fromarray(np.asarray(output.content)), "PNG", compress_level=1)
        count, height, width = frames.shape[:3]
        result = {
            "seed": output.seed,
            "fps": output.fps,
            "frames": int(count),
            "size": f"{width}x{height}",
            "timings": {name: round(seconds, 4) for name, seconds in timings.items()},
            "encoder": ffmpeg.encoder(self.encoding).name,
        }
        return files, result

    def _client_error(self, error: BaseException) -> dict[str, str]:
        """The client's error for an exception; the log has the rest."""
        if isinstance(error, Stopped):
            return {"code": "stopped", "message": "the clip was stopped"}
        cause = error.__cause__ if isinstance(error, ReducioError) else error
        if cause is not None and is_out_of_memory(cause):
            line = str(error).partition(";")[0] if isinstance(error, ReducioError) else "out of memory"
            return {"code": "out_of_memory", "message": without_paths(line)}
        if isinstance(error, ReducioError):
            return {"code": "invalid_value", "message": without_paths(" ".join(str(error).split()))}
        LOG.error("a clip failed", exc_info=error)
        return {"code": "internal_error", "message": f"internal error ({type(error).__name__}); the log has the rest"}

    def _peak_bytes(self) -> int:
        import torch

        if self.where.type == "cuda":
            return int(torch.cuda.max_memory_reserved(self.where))  # with graphs' pools, whose replays allocate nothing
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def describe(self) -> dict[str, Any]:
        """The device, the threads that a clip has and, for our own families, why each network runs as it does."""
        import torch

        from ..system import cores

        threads = torch.get_num_threads()
        report = dict(getattr(self.pipe, "report", {}))
        return {"device": str(self.where), "threads": cores.too_many(threads) or threads, "report": report}


class _Progress:
    """Percent of a clip that is done, from the stages and steps of its call."""

    def __init__(self, pipe: Any, call: dict[str, Any], defaults: Mapping[str, Any]) -> None:
        self.pipe, self.parts, self.reached = pipe, 0, 0
        self.steps = call.get("num_inference_steps") or defaults.get("num_inference_steps") or 1  # of a peer
        self.videos = call.get("num_videos_per_prompt", 1)

    def __call__(self, stage: str, step: int) -> int:
        request = getattr(getattr(self.pipe, "call", None), "request", None)
        chain = getattr(request, "chain", None)
        clips = self.videos * (1 if chain is None else chain.clips)  # a long clip is sampled and decoded in parts
        self.parts += stage == "dit.step" and step == 0
        begin, end = SPANS.get(stage, (DECODING, DECODING))
        share = 0.0
        if stage == "content.generate":
            from ..pipelines.execution.drawing import drawing_steps

            share = step / drawing_steps(self.pipe.text_to_image, getattr(request, "content_kwargs", {}))
        elif stage == "dit.step":
            done = min(1.0, step / (getattr(request, "num_inference_steps", None) or self.steps))
            share = (max(0, self.parts - 1) + done) / clips
        elif stage not in SPANS and self.parts < clips:
            (begin, end), share = SPANS["dit.step"], self.parts / clips
        self.reached = max(self.reached, int(begin + min(1.0, share) * (end - begin)))
        return self.reached


async def _settled(work: asyncio.Future[Any]) -> None:
    """Wait until a thread's work has ended, however often the waiting task is cancelled meanwhile."""
    cancelled = False
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError:
            cancelled = True
    if not work.cancelled():
        work.exception()  # retrieved, because asyncio logs exceptions that nothing retrieves
    if cancelled:
        raise asyncio.CancelledError


def _strip(frames: Any) -> bytes:
    """Four frames of a preview side by side, as WebP."""
    from PIL import Image

    from ..media.contact_sheet import film_strip

    strip = Image.fromarray(film_strip(frames))
    strip.thumbnail((4 * SPRITE_SIDE, 4 * SPRITE_SIDE))
    return _saved(strip, "WEBP", quality=80)


def _saved(image: Any, format: str, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def _sheet(pictures: list[Any]) -> Any:
    """All frames side by side, four in a row, from left to right and down."""
    from PIL import Image

    width, height = pictures[0].size
    share = min(1.0, SPRITE_SIDE / max(width, height))
    cell = max(1, round(width * share)), max(1, round(height * share))
    sheet = Image.new("RGB", (4 * cell[0], -(-len(pictures) // 4) * cell[1]))
    for i, picture in enumerate(pictures):
        sheet.paste(picture.resize(cell), (i % 4 * cell[0], i // 4 * cell[1]))
    return sheet


def give_back_memory() -> None:
    """Return free memory to the system. glibc keeps what clips of mixed sizes fragment: 0.77 GB after fifty sizes of
    the default model on a CPU, all of which this returns."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # another C library, such as musl
            return
