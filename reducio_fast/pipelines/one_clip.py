"""One clip of a call: its content frame, its latent, its frames."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..media.pixels import to_unit
from ..reference.cancellation import cancellable
from ..reference.data_prediction import DataHook
from ..reference.reducio.preview import PreviewDecoder
from ..system.errors import ReducioError, is_out_of_memory
from .call.output import as_frames, from_frames, to_output
from .call.request import ClipRequest, Embeds, Hold
from .call.state import CallState
from .call.step_callback import StepCallback
from .execution.decoding import Decoding
from .parallel import together

LOG = logging.getLogger("reducio_fast")


class Sampled(NamedTuple):
    """A latent [1, ...] as the denoiser returned it, the content frame, and the conditions that further clips reuse."""

    latent: Tensor
    frame: np.ndarray | None
    follow: Embeds


def make_clip(pipe: Any, clip: ClipRequest, call: CallState, decoding: Decoding) -> tuple[Any, Any]:
    """The content frame, and the frames or the latent in the form asked for."""
    request = call.request
    latent, frame, _ = sample_clip(pipe, clip, call, decoding)
    if request.output_type == "latent":
        if request.motion_strength != 1 and frame is not None:
            with call.at(pipe.executor.stage, call.timings, "vae.decode"):
                latent = pipe.motion.scaled(latent, frame, request.motion_strength)
        return frame, latent[0]
    assert frame is not None  # only calls that ask for latents have none
    output_type = "pt" if request.output_type == "pt" else "np"
    return frame, from_frames(decode_clip(pipe, latent, frame, call, decoding, output_type), request.output_type)


def sample_clip(pipe: Any, clip: ClipRequest, call: CallState, decoding: Decoding) -> Sampled:
    """The latent of a clip: sampled, or the request's own where it has one."""
    request, stage = call.request, functools.partial(call.at, pipe.executor.stage)
    inputs = pipe._sampling_inputs(clip, call, stage)
    frame = inputs.frame
    if clip.motion is not None:
        return Sampled(clip.motion.to(pipe.executor.device), frame, clip.embeds)
    preview = Preview(pipe, call, frame, decoding) if request.previews else None
    hold = None if clip.hold is None else clip.hold.to(pipe.executor.device)
    callback = StepCallback(pipe, call, inputs.tensors, preview)
    scale = request.guidance_scale if request.guidance_per_frame is None else request.guidance_per_frame
    with stage(call.timings, "dit.step"):
        latent = pipe.sampler(
            inputs.noise if clip.latents is None else clip.latents,
            inputs.cond,
            inputs.uncond,
            scale,
            request.num_inference_steps,
            clip.generator,
            callback,
            request.sigmas,
            request.schedule,
            request.shortcuts,
            data_hook(hold, preview),
        )
    if preview is not None:
        call.timings["dit.step"] -= preview.take_seconds()
    latent = latent if callback.replaced is None else callback.replaced
    if hold is not None and not call.interrupted:
        latent = torch.where(hold.mask, hold.latent, latent)  # exact, while the last step rounds
    return Sampled(latent, frame, inputs.follow)


def data_hook(hold: Hold | None, preview: Preview | None) -> DataHook | None:
    """A hook that holds the carried part of the data prediction and hands the result to the preview."""
    if hold is None and preview is None:
        return None

    def hook(step: int, data: Tensor) -> Tensor | None:
        held = None if hold is None else torch.where(hold.mask, hold.latent.to(data), data)
        if preview is not None:
            preview.data = data if held is None else held
        return held

    return hook


def decode_clip(
    pipe: Any, latent: Tensor, frame: np.ndarray, call: CallState, decoding: Decoding, output_type: str
) -> Tensor:
    """Frames in the form of `as_frames`. If memory runs out, the latent is saved and the error says where."""
    request = call.request
    call.undecoded.append((latent, frame))
    try:
        stage = call.at(pipe.executor.stage, call.timings, "vae.decode")
        with stage, together(pipe.executor.ranks), cancellable(call.decoding_check()):
            return as_frames(pipe.finished(latent, frame, request, output_type, decoding), output_type)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        kept = call.rescue_latents(pipe.rescue_folder, pipe.layout.pipeline, pipe.parts.source, pipe.vae)
        raise ReducioError(f"vae.decode: out of memory at {request.height}x{request.width}; {kept}") from error


def preview_decoder(pipe: Any, motion_strength: float) -> PreviewDecoder | None:
    """The model's small preview decoder. None if it has none, or if the motion is to be scaled, which needs the full
    autoencoder."""
    decoder = pipe.parts["preview_decoder"] if "preview_decoder" in pipe.layout.names else None
    return decoder if motion_strength == 1 else None


class Preview:
    """Frames of the data prediction while a clip is denoised, uint8: [T, H/2, W/2, 3] by the model's preview decoder,
    [T, H, W, 3] by its full decoder where it has none.

    Early previews resemble a still: on the embedded model they differ from a still from 40% of the steps on.
    """

    def __init__(self, pipe: Any, call: CallState, frame: np.ndarray | None, decoding: Decoding) -> None:
        self.pipe, self.call, self.frame, self.decoding = pipe, call, frame, decoding
        self.data: Tensor | None = None
        self.seconds = 0.0

    def __call__(self, step: int) -> np.ndarray | None:
        """The frames after a step. None in steps that are left out, and without a preview decoder under offloading."""
        every = self.call.request.preview_every or 1
        if (step + 1) % every or self.data is None or self.frame is None:
            return None
        request = self.call.request
        small = preview_decoder(self.pipe, request.motion_strength)
        if small is None and self.pipe.offloading:
            LOG.warning("preview: none while weights are offloaded: the decoder's are not on the device")
            return None
        clock: Callable[[], float] = self.pipe.executor.clock
        start = clock()
        if small is None:
            frames = self.pipe.finished(self.data, self.frame, request, "np", self.decoding)
        else:
            weight = next(small.parameters())
            frames = small(self.data.to(weight), to_unit(self.frame, weight.device, weight.dtype)[None])[0].float()
        seconds = clock() - start
        self.seconds += seconds
        self.call.timings["preview"] = self.call.timings.get("preview", 0.0) + seconds
        return to_output(frames, "np")

    def take_seconds(self) -> float:
        """Seconds of this clip's previews, which the clock of the denoising stage counted too."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds
