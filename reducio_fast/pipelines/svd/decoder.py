"""vae.decode: latents to frames, all of a clip together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...media.pixels import to_bytes
from ...reference.svd.config import TemporalVAEConfig
from ...system.errors import ReducioError
from ..execution.components import Components
from ..execution.executor import Executor

# Bytes alive for each byte of a full-size tensor of the finest level, measured by forecasts: all frames at once need
# the convolution's input and output, the norm's and the residual.
FULL_SIZE_TENSORS = 6


@dataclass(frozen=True, slots=True)
class ClipDecoding:
    """How a clip of `frames` is decoded: all together, or in chunks that do not see each other.

    A chunk is diffusers' `decode_chunk_size`: another clip, so never chosen to save memory.
    """

    frames: int
    chunk: int | None = None
    tiled: bool = False
    tile_batch: int = 1

    def __str__(self) -> str:
        return "whole" if self.chunk is None else f"{self.chunk} frames at once"


class ClipDecoder:
    """Decodes with the model's autoencoder. `frames` and `chunk` are those of the call at work."""

    tiling: bool | None = None

    def __init__(self, components: Components, executor: Executor) -> None:
        self.components, self.executor = components, executor
        self.frames, self.chunk = components["unet"].config.num_frames, None

    @property
    def config(self) -> TemporalVAEConfig:
        return self.components["vae"].config

    @property
    def settings(self) -> Hashable:
        """What a forecast depends on beside the clip's size."""
        return (self.frames, self.chunk)

    def default(self, height: int, width: int) -> ClipDecoding:
        return ClipDecoding(self.frames, self.chunk)

    def ways(self, decoding: ClipDecoding) -> Iterator[ClipDecoding]:
        yield decoding

    def wider(
        self, decoding: ClipDecoding, height: int, width: int, peak: Callable[[Any], int], room: int
    ) -> ClipDecoding:
        return decoding

    def generous(self, height: int, width: int) -> int:
        """Bytes above any forecast, for the price of a multiplication."""
        frames = self.frames if self.chunk is None else min(self.chunk, self.frames)
        finest = self.config.block_out_channels[0] * self.components.dtype.itemsize
        return 2 * FULL_SIZE_TENSORS * frames * height * width * 2 * finest + 2**30

    def __call__(
        self, latent: Tensor, frame: np.ndarray | None, output_type: str = "pt", decoding: ClipDecoding | None = None
    ) -> Tensor:
        """[1, T, 4, H/8, W/8] -> float32 [3, T, H, W] in [-1, 1]; where bytes are wanted, uint8 [T, H, W, 3]."""
        video = self.decode(latent, decoding or self.default(0, 0))
        if not torch.isfinite(video).all():
            raise ReducioError("vae.decode: the clip has values that are not finite (NaN or infinite)")
        if output_type == "pt":
            return video.clamp(-1, 1).transpose(0, 1)
        return to_bytes(video)

    def decode(self, latent: Tensor, decoding: ClipDecoding) -> Tensor:
        """float32 [T, 3, H, W], not clamped."""
        vae = self.executor.network("vae")
        scaled = latent.to(self.executor.device, vae.dtype) / self.config.scaling_factor
        return vae.decode(scaled, decoding.chunk)[0].float()
