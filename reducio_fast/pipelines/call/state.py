"""The state of a call: one object for each call, shared by its callback, its progress bar and its caller."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...checkpoints.saved_latents import Latents, marks, rescue
from ...reference.sampler import StopSampling
from ...system.errors import ReducioError
from .output import ReducioOutput, stack, there_and_back
from .request import ClipRequest, Request

Stage = Callable[..., AbstractContextManager[None]]  # stage(timings, NAME) around the work of a stage


@dataclass(slots=True)
class CallState:
    """The running call, or the last one."""

    request: Request
    progress: tqdm = field(default_factory=lambda: tqdm(disable=True))
    interrupted: bool = False  # the current clip is the last one, and ends after its current step
    stage: str = ""  # the current one: "content.generate", "dit.step" ...
    step: int = 0  # steps done in the current stage, if it has steps
    listener: Callable[[str, int], None] | None = None  # called when either changes; an exception from it ends the call
    timestep: Tensor | None = None  # timestep that the callback is called for
    timings: dict[str, float] = field(default_factory=dict)  # seconds by stage
    # Latents and content frames of the clips so far. They are kept, being small, since decoding may run out of memory.
    undecoded: list[tuple[Tensor, np.ndarray]] = field(default_factory=list)

    @contextmanager
    def show_progress(self, config: dict[str, Any]) -> Iterator[None]:
        """A progress bar over the steps of all clips, where the request says so; `config` are arguments for tqdm."""
        silent = not self.request.progress or os.environ.get("RANK", "0") != "0"  # of torchrun's ranks, one prints
        chain = self.request.chain
        total = len(self.request.clips) * self.request.num_inference_steps * (1 if chain is None else chain.clips)
        with tqdm(total=total, **({"desc": "dit.step", "disable": silent} | config)) as self.progress:
            yield

    def make_clips(
        self, make_clip: Callable[[ClipRequest], tuple[np.ndarray | None, Any]], fps: float, progress: dict[str, Any]
    ) -> ReducioOutput:
        """The output of the call; `make_clip` returns the content frame and the frames of each clip. An interrupted
        call ends early, and raises ReducioError if it has no clip yet."""
        request, frames = self.request, list[Any]()
        contents: list[np.ndarray] = []  # empty where nothing needs a content frame
        with self.show_progress(progress):
            for clip in request.clips:
                try:
                    content, clip_frames = make_clip(clip)
                except StopSampling:  # in the first stage or the decode; the second stage ends with a latent
                    break
                contents += [] if content is None else [content]
                frames.append(there_and_back(clip_frames) if request.loop else clip_frames)
                if self.interrupted:
                    break
        if len(frames) > 1 and self.interrupted and len(frames[-1]) < len(frames[0]):
            frames.pop()  # a long clip that was interrupted between its parts does not fit into the list
            contents.pop()
        if not frames:
            raise self.stopped()
        return ReducioOutput(
            frames=stack(frames) if request.is_list else frames[0],
            content=None if not contents else np.stack(contents) if request.is_list else contents[0],
            seeds=[clip.generator.initial_seed() for clip in request.clips[: len(frames)]],
            fps=fps,
            timings=self.timings,
            output_type=request.output_type,
            is_list=request.is_list,
            interrupted=self.interrupted,
        )

    def stopped(self) -> ReducioError:
        """The error of a call that was interrupted before it had a clip."""
        what = "the clip was decoded" if self.stage == "vae.decode" else "the content frame was drawn"
        return ReducioError(f"interrupted while {what}: there is no clip")

    @contextmanager
    def at(self, run: Stage, timings: dict[str, float], stage: str) -> Iterator[None]:
        """Run the block within `run(timings, stage)`, with `stage` as the current stage."""
        self.tell(stage, 0)
        with run(timings, stage):
            yield

    def tell(self, stage: str, step: int) -> None:
        """Record that `step` steps of a stage are done, and call the listener."""
        self.stage, self.step = stage, step
        if self.listener is not None:
            self.listener(stage, step)

    def rescue_latents(self, folder: Path | None, pipeline: str, source: str | None, vae: Any) -> str:
        """Save what was sampled and not yet decoded, with the model `source` and its `vae`; returns the end of an error
        line that names the file."""
        request = self.request
        seeds = [clip.generator.initial_seed() for clip in request.clips[: len(self.undecoded)]]
        latents = torch.cat([latent for latent, _ in self.undecoded])
        content = np.stack([frame for _, frame in self.undecoded])
        decoding: dict[str, Any] = {"motion_strength": request.motion_strength, "keep_content": request.keep_content}
        decoding["loop"] = request.loop and request.chain is None  # of a long clip, only the current part is kept
        decoding["decode_chunk_size"] = getattr(request, "decode_chunk_size", None)
        clips = Latents(latents, content, request.fps, seeds, pipeline, source, marks(vae), decoding)
        return rescue(clips, folder)

    def content_step(self, step: int) -> None:
        """To be called after each step of the first stage: raises StopSampling if the call was asked to end."""
        self.tell(self.stage, step + 1)
        if self.interrupted:
            raise StopSampling

    def decoding_check(self) -> Callable[[], None]:
        """A check for `cancellation.cancellable`: it calls the listener, and raises StopSampling once the call is
        interrupted during its decode. A call that was interrupted earlier still decodes the latent it has reached."""
        before = self.interrupted

        def check() -> None:
            if self.listener is not None:
                self.listener(self.stage, self.step)
            if self.interrupted and not before:
                raise StopSampling

        return check

    def end(self) -> None:
        """Free what only a running call needs."""
        self.timestep = None
        self.undecoded = []
