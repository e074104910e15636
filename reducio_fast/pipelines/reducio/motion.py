"""Operations on the motion latent: move another picture with a clip's motion, scale the motion, keep still pixels.

The latent holds motion and almost no appearance: decoded with another content frame, it moves that picture. All of
these need only the video autoencoder, so they work with the published weights and without a prompt.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...media.image_files import read_image
from ...media.pixels import to_unit
from ...media.video_files import read_video
from ...system.errors import ReducioError
from ..call import validation
from ..execution.components import Components
from ..execution.decoding import Decoding, TiledDecoder
from ..execution.executor import Executor
from . import refinement

# For `keep_content`, in grey levels of 255: where the clip and its still differ by less than NEAR, the content frame's
# own pixels are used; above FAR, the decoder's. REACH: side in pixels of the square around a pixel that counts too. On
# the embedded model of November 2026 (6 scenes, CPU, float32) frame 7 rose from 29 to 35 dB and the clip by 0.9; with 3
# and 9 by 0.3.
NEAR, FAR, REACH = 8.0, 24.0, 5
LONGEST = 2**31  # frames of a video


class Motion:
    """Encodes clips, and works on their latents, with the networks of a pipeline or of an autoencoder alone."""

    def __init__(self, components: Components, executor: Executor, decoder: TiledDecoder) -> None:
        self.components, self.executor, self.decoder = components, executor, decoder

    def encode(self, clip: np.ndarray, refine: int = 0, progress: bool = False) -> Tensor:
        """uint8 [T, H, W, 3], with the model's T -> motion latent, float32 [1, 16, T/f, H/32, W/32]: the posterior's
        mode, normalised as the denoiser's latents are; improved by `refine` steps of `refinement.refine`."""
        validation.check_count("refine", refine, refinement.MAX_STEPS, least=0)
        vae = self.executor.network("vae")
        dtype = next(vae.parameters()).dtype
        video = to_unit(clip, self.executor.device, dtype).transpose(0, 1)[None]
        tiled = self.decoder.default(*clip.shape[1:3]).tiled
        latent = vae.normalize_latent(vae.encode(video, tiled=tiled).mode()).float()
        if not refine:
            return latent
        reference = self.components[self.components.layout.decoder]
        return refinement.refine(reference, latent, clip, refine, tiled, progress)

    def still(self, frame: np.ndarray) -> Tensor:
        """The latent of a clip in which the content frame, uint8 [H, W, 3], stands still."""
        return self.encode(np.repeat(frame[None], self.decoder.config.num_frames, axis=0))

    def scaled(self, latent: Tensor, frame: np.ndarray, strength: float) -> Tensor:
        """The latent with its motion scaled, on the line from its content frame's still (0) through itself (1).

        The result is normalised again, as every latent of the decoder's training: above 1 the line bends and the motion
        saturates.
        """
        if strength == 1:
            return latent
        still = self.still(frame).to(latent)
        if strength == 0:
            return still
        return self.executor.network("vae").normalize_latent(still + strength * (latent - still))

    def decode(
        self,
        latent: Tensor,
        frame: np.ndarray,
        output_type: str,
        decoding: Decoding | None,
        strength: float,
        keep: bool,
    ) -> Tensor:
        """Frames as the decoder returns them, with the motion scaled by `strength`; if `keep`, with the content frame's
        own pixels where nothing moves."""
        video = self.decoder(self.scaled(latent, frame, strength), frame, output_type, decoding)
        if not keep:
            return video
        still = self.decoder(self.still(frame), frame, output_type, decoding)
        return kept_content(_unit(video), _unit(still), to_unit(frame, self.executor.device)).transpose(0, 1)


def _unit(video: Tensor) -> Tensor:
    """What the decoder returns -> float32 [T, 3, H, W] in [-1, 1]."""
    return to_unit(video, video.device) if video.dtype == torch.uint8 else video.transpose(0, 1)


def kept_content(clip: Tensor, still: Tensor, frame: Tensor) -> Tensor:
    """The clip, [T, 3, H, W] in [-1, 1], with the content frame's pixels, [3, H, W], where it agrees with the still."""
    difference = (clip - still).abs().mean(dim=1, keepdim=True) * 127.5
    # The maximum within reach keeps the rim of moving objects unmixed; the average then hides the edge of the mixture.
    near = F.max_pool2d(difference, REACH, stride=1, padding=REACH // 2)
    near = F.avg_pool2d(near, REACH, stride=1, padding=REACH // 2, count_include_pad=False)
    weight = ((FAR - near) / (FAR - NEAR)).clamp(0, 1)
    return torch.lerp(clip, frame[None], weight)


def read_motion(video: Any, num_frames: int, start: int = 0, step: int = 1) -> np.ndarray:
    """Frames `start`, `start + step` ... of a clip, `num_frames` in all: uint8 [T, h, w, 3].

    video: a path, or uint8 [T, h, w, 3], or a list of pictures. Raises ReducioError if there are too few,
    and for a `start` or `step` that is no such number.
    """
    validation.check_count("step", step, LONGEST)
    validation.check_count("start", start, LONGEST, least=0)
    needed = (num_frames - 1) * step + 1
    if isinstance(video, str | os.PathLike):
        frames = read_video(video, start, needed)[0]
        name = f"motion: {os.fspath(video)}"
    else:
        if isinstance(video, list | tuple):
            pictures = [read_image(each) for each in video]
            if len({picture.shape for picture in pictures}) > 1:
                raise ReducioError("motion: its pictures differ in size")
            video = np.stack(pictures) if pictures else np.empty((0, 1, 1, 3), np.uint8)
        is_array = isinstance(video, np.ndarray)
        if not is_array or video.ndim != 4 or video.shape[3] != 3 or 0 in video.shape[1:] or video.dtype != np.uint8:
            what = f"{video.dtype} {list(video.shape)}" if is_array else type(video).__name__
            raise ReducioError(f"motion: must be a path, a list of pictures or uint8 [T, H, W, 3]; it is {what}")
        frames, name = np.asarray(video)[start : start + needed], "motion: the clip"
    frames = frames[::step]
    if len(frames) < num_frames:
        where = f" from number {start} on" if start else ""
        apart = f", {step} apart" if step > 1 else ""
        raise ReducioError(f"{name} has {len(frames)} frames{where}{apart}; the model takes {num_frames}")
    return frames
