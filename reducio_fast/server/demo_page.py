"""`reducio-fast demo`: a page in the browser that makes clips, the fast path beside the reference.

`make_clips` does all the work of a click, independently of the page; `page` builds the page, and is the only place that
imports gradio.
"""

from __future__ import annotations

import itertools
import math
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import strict_files
from ..media.contact_sheet import film_strip
from ..media.image_files import cover_crop
from ..media.similarity import psnr
from ..media.video_files import check_format
from ..pipelines import registry
from ..pipelines.call import validation
from ..pipelines.call.output import ReducioOutput
from ..pipelines.generate import generate
from ..pipelines.reducio.autoencoder import VideoAutoencoder
from ..pipelines.reducio.motion import read_motion
from ..system import devices
from ..system.errors import ReducioError

EXAMPLE = "a red circle moving right on a black background"

Progress = Callable[[float, str], None]  # share done, what is being done


class Cancelled(Exception):
    """Raised between two steps of a clip after its user has asked to stop."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One finished clip. `label` names the path that made it."""

    label: str
    path: Path
    out: ReducioOutput

    @property
    def rows(self) -> list[list[str]]:
        """Seconds per stage as a table, the sum last."""
        stages = [[name, f"{seconds:.2f}"] for name, seconds in self.out.timings.items()]
        return [*stages, ["sum", f"{sum(self.out.timings.values()):.2f}"]]


def make_clips(
    prompt: str,
    image: Any = None,
    *,
    both: bool = True,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    folder: Path,
    progress: Progress = lambda share, what: None,
    preview: Callable[[Any], None] | None = None,
    stop: threading.Event | None = None,
    interpolate: int = 1,
    **kwargs: Any,
) -> Iterator[Clip]:
    """Yield the clip of the fast path and, with `both`, that of the reference for the same seed, as they become ready.
    Several seeds (`num_videos_per_prompt`) give one clip that shows them side by side.

    They are written to `folder` as .mp4, with `interpolate` (1, 2 or 4) times their rate. `kwargs` are those of
    `generate` (model, dtype, device, height, ...). Setting `stop` raises Cancelled at the end of the running step; the
    models stay loaded. `preview(picture)` gets a film strip, uint8 [H, 4 W, 3], of the fast path's unfinished clip
    every `steps // 5` steps. `steps` and `guidance_scale` default to those of the model. Raises ReducioError.
    """
    defaults = registry.find(kwargs.get("model")).call_defaults
    steps = defaults["num_inference_steps"] if steps is None else steps
    guidance_scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
    frames, clips = kwargs.get("num_frames") or 16, kwargs.get("num_videos_per_prompt", 1)
    total = steps * clips * max(1, frames // 8 - 1)
    fast, _ = validation.resolve_backend("auto")
    paths = {fast: "auto"} | ({"reference": "reference"} if both else {})
    for number, (label, backend) in enumerate(paths.items()):
        done = itertools.count(1)  # steps of all clips of the call: seeds, and parts of a long clip

        def report(step: int, number: int = number, label: str = label) -> None:
            what = f"{label}: step {step} of {total}" if step else f"{label}: starting"
            progress((number + step / total) / len(paths), what)

        def step_end(
            pipe: Any, step: int, timestep: Any, tensors: dict[str, Any], report: Any = report, done: Any = done
        ) -> None:
            if stop is not None and stop.is_set():
                raise Cancelled
            report(next(done))
            if preview is not None and (frames := tensors.get("frames")) is not None:
                preview(film_strip(frames))

        previews: dict[str, Any] = {"preview_every": max(1, steps // 5)} if preview is not None and number == 0 else {}

        report(0)
        out = generate(
            prompt, image, backend=backend, seed=seed, num_inference_steps=steps, guidance_scale=guidance_scale,
            callback_on_step_end=step_end, progress=False, **previews, **kwargs,
        )  # fmt: skip
        if out.is_list:
            out = out.as_grid()
        if interpolate > 1:
            out = out.interpolated(interpolate)
        path = folder / f"{number}-{label}.mp4"
        out.save(path)
        yield Clip(label, path, out)


def events_of(prompt: str, image: Any, previews: bool, **kwargs: Any) -> Iterator[tuple[str, Any]]:
    """Run `make_clips` in a thread and yield its events in their order: ("progress", (share, what)), ("preview",
    picture) and ("clip", clip). A page can show the first two only between two events of its own."""
    events: queue.Queue[tuple[str, Any]] = queue.Queue()
    kwargs["progress"] = lambda share, what: events.put(("progress", (share, what)))
    kwargs["preview"] = (lambda picture: events.put(("preview", picture))) if previews else None

    def work() -> None:
        try:
            for clip in make_clips(prompt, image, **kwargs):
                events.put(("clip", clip))
            events.put(("end", None))
        except BaseException as error:  # raised again in the calling thread
            events.put(("error", error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while (event := events.get())[0] != "end":
        if event[0] == "error":
            raise event[1]
        yield event
    thread.join()


def motion_of(clip: str, kwargs: dict[str, Any]) -> Any:
    """Motion latents of a clip on disk, encoded by the autoencoder of the page's model."""
    source = strict_files.embedded_model() if kwargs.get("model") is None else kwargs["model"]
    autoencoder = VideoAutoencoder.load(source, kwargs.get("dtype"), kwargs.get("device"))
    settings, config = autoencoder.settings, autoencoder.config
    frames = read_motion(clip, config.num_frames)
    return autoencoder.encode(cover_crop(frames, settings["sample_height"], settings["sample_width"]))[0]


def serve(
    model: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> tuple[str, Callable[[], None]]:
    """Start the page; returns its address and a function that waits until it is stopped.

    Raises ReducioError if gradio is not installed, if clips cannot be encoded, if there is no such model, or if the
    port cannot be bound.
    """
    check_format("clip.mp4")
    if model is not None:
        registry.find(model)
    devices.resolve_device(device)
    app = page({"model": model, "dtype": dtype, "device": device})
    try:
        _, url, _ = app.launch(
            server_name=host, server_port=port, quiet=True, prevent_thread_lock=True, share=False, ssr_mode=False
        )
    except OSError as error:  # gradio's own line names the port and the variables that set it
        raise ReducioError(f"port: {error}") from error
    return url, app.block_thread


def call_options(
    defaults: Mapping[str, Any], frames: int, videos: int, loop: bool, strength: float, keep: bool, negative: str
) -> dict[str, Any]:
    """The controls' values as arguments of the model's call: those that it takes and that the page shows.

    `defaults` are the call's (`registry.Model`). SVD's clips keep their own number of frames.
    """
    options: dict[str, Any] = {}
    if "loop" in defaults:
        options |= {"num_videos_per_prompt": videos, "loop": loop}
    if "motion_strength" in defaults:
        options |= {"num_frames": frames, "motion_strength": strength, "keep_content": keep}
    if "loop" in defaults or negative:
        options |= {"negative_prompt": negative or None}
    return options


def page(kwargs: dict[str, Any]) -> Any:
    """The page, a `gradio.Blocks` that is not yet served. `kwargs` go to `generate` with each click."""
    defaults = registry.find(kwargs.get("model")).call_defaults
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it at import; no usage data is sent
    try:
        import gradio as gr
    except ImportError as error:
        raise ReducioError("demo: gradio is not installed; pip install 'reducio-fast[demo]'") from error

    # Our own models have these arguments, a peer's call has others. SVD's clips have their own length and read no text.
    steered, is_reducio = "loop" in defaults, "motion_strength" in defaults
    stops: dict[str | None, threading.Event] = {}  # by browser session, so that Cancel stops only the session's clip
    scratch = tempfile.TemporaryDirectory(prefix="reducio-demo-")  # deleted with the page, and with the process
    folders: dict[str | None, Path] = {}  # by browser session: its last clips, which its next click replaces

    def run(
        prompt: str,
        image: Any,
        seed: float | None,
        steps: float | None,
        guidance: float | None,
        both: bool,
        negative: str,
        strength: float,
        frames: float,
        videos: float,
        loop: bool,
        keep: bool,
        rate: float,
        motion: str | None,
        request: Any,
        bar: Any = gr.Progress(),  # noqa: B008 - how gradio hands a progress bar over
    ) -> Iterator[tuple[Any, ...]]:
        session = request.session_hash
        stop = stops[session] = threading.Event()
        shutil.rmtree(folders.pop(session, Path(scratch.name) / "none"), ignore_errors=True)
        folder = folders[session] = Path(tempfile.mkdtemp(dir=scratch.name))
        clips: list[Clip] = []
        options = call_options(defaults, int(frames), int(videos), loop, strength, keep, negative)
        try:
            if is_reducio and motion is not None:
                options["motion_latents"] = motion_of(motion, kwargs)
            arguments: dict[str, Any] = {
                "both": both,
                "seed": int(seed or 0),
                "steps": None if steps is None else int(steps),
            }
            arguments |= {"guidance_scale": guidance, "folder": folder, "stop": stop, "interpolate": int(rate)}
            arguments |= options | kwargs
            for kind, payload in events_of(prompt, image, previews=steered, **arguments):
                if kind == "progress":
                    bar(payload[0], desc=payload[1])
                elif kind == "preview":
                    yield (*show(clips, "The clip as it stands."), payload)
                else:
                    clips.append(payload)
                    yield (*show(clips, "Waiting for the reference." if both and len(clips) == 1 else ""), None)
        except Cancelled:
            return
        except ReducioError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def show(clips: list[Clip], status: str) -> tuple[Any, ...]:
        fast, reference = (clips + [None, None])[:2]
        if len(clips) == 2:
            a, b = (sum(clip.out.timings.values()) for clip in clips)
            decibels = psnr(clips[0].out.frames, clips[1].out.frames)
            frames = f"frames {decibels:.1f} dB alike" if math.isfinite(decibels) else "frames equal byte for byte"
            status = f"Same seed: {clips[0].label} {a:.2f} s, reference {b:.2f} s; {frames}."
        elif len(clips) == 1 and not status:
            status = f"{clips[0].label}: {sum(clips[0].out.timings.values()):.2f} s."
        cells = [part for clip in (fast, reference) for part in ((clip.path, clip.rows) if clip else (None, None))]
        return (status, *cells)

    def cancel(request: Any) -> str:
        if (stop := stops.get(request.session_hash)) is not None:
            stop.set()  # ends the work at the end of its step; `cancels` below ends the wait for it
        return "Cancelled."

    # gradio finds the argument for the session by its type, which it cannot look up by name inside this function.
    for function in (run, cancel):
        function.__annotations__["request"] = gr.Request

    def leave(request: Any) -> None:
        stops.pop(request.session_hash, None)
        shutil.rmtree(folders.pop(request.session_hash, Path(scratch.name) / "none"), ignore_errors=True)

    leave.__annotations__["request"] = gr.Request
    # gradio copies shown files into its own cache; delete_cache: seconds between two checks, and age of deleted files.
    with gr.Blocks(title="reducio-fast", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        app.unload(leave)
        gr.Markdown("# reducio-fast\nText, and an image if you have one, becomes a clip.")
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(EXAMPLE, label="Prompt", lines=2, elem_id="prompt")
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
                    steps = gr.Slider(1, 50, defaults["num_inference_steps"], step=1, label="Steps", elem_id="steps")
                    guidance = gr.Slider(1, 10, defaults["guidance_scale"], step=0.5, label="Guidance")
                both = gr.Checkbox(True, label="Reference beside it (loads the model twice)", elem_id="both")
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                    end = gr.Button("Cancel", elem_id="cancel")
            with gr.Column():
                image = gr.Image(label="Content frame (optional)", type="numpy", height=240)
                motion = gr.Video(label="Take the motion of this clip (optional)", height=160, visible=is_reducio)
        with gr.Accordion("Longer, steered", open=False, visible=steered):
            negative = gr.Textbox("", label="Negative prompt: what to lead away from", elem_id="negative")
            strength = gr.Slider(0, 2, 1, step=0.25, label="Motion: 0 still, 1 as generated", visible=is_reducio)
            frames = gr.Slider(16, 64, 16, step=8, label="Frames", visible=is_reducio)
            videos = gr.Slider(1, 9, 1, step=1, label="Seeds, side by side")
            loop = gr.Checkbox(False, label="Loop: there and back")
            keep = gr.Checkbox(False, label="Keep the content frame where nothing moves", visible=is_reducio)
            rate = gr.Radio([1, 2, 4], value=1, label="Frame rate: frames in between by interpolation")
        status = gr.Textbox(label="Status", interactive=False, elem_id="status")
        strip = gr.Image(label="Preview: four frames of the clip as it stands", interactive=False, visible=steered)
        outputs: list[Any] = [status]
        with gr.Row():
            for title, name in (("Fast path", "fast"), ("Reference", "reference")):
                with gr.Column():
                    outputs.append(gr.Video(label=title, autoplay=True, loop=True, elem_id=name))
                    outputs.append(gr.Dataframe(headers=["stage", "seconds"], label="Seconds", interactive=False))
        outputs.append(strip)
        inputs = [prompt, image, seed, steps, guidance, both, negative, strength, frames, videos, loop]
        inputs += [keep, rate, motion]
        work = start.click(run, inputs, outputs, concurrency_limit=1, show_progress_on=status)
        end.click(cancel, None, status, cancels=[work], queue=False)
    return app
