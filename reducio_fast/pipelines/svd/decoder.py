"""vae.decode: latents to frames, all of a clip together."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checkpoints import hub, networks, strict_files
from ...checkpoints.strict_files import SVD_TINY, embedded_model
from ...media.pixels import to_bytes, to_unit
from ...reference.svd.config import FrameVAEConfig, TemporalVAEConfig
from ...reference.svd.vae import FrameVAE, TemporalVAE
from ...system import devices, torch_state
from ...system.errors import ReducioError
from ...system.paths import is_folder
from ..call import validation
from ..execution.components import Components
from ..execution.executor import Executor

# Bytes alive per byte of a full-size tensor of the finest level, measured by forecasts: all frames at once need the
# convolution's input and output, the norm's and the residual.
FULL_SIZE_TENSORS = 6
HUB_ID = "stabilityai/stable-video-diffusion-img2vid-xt"


@dataclass(frozen=True, slots=True)
class ClipDecoding:
    """How a clip of `frames` frames is decoded: all together, or in independent chunks.

    `chunk` is diffusers' `decode_chunk_size`. It changes the clip, so it is never chosen to save memory.
    """

    frames: int
    chunk: int | None = None
    tiled: bool = False
    tile_batch: int = 1

    def __str__(self) -> str:
        return "whole" if self.chunk is None else f"{self.chunk} frames at once"


class ClipDecoder:
    """Decodes with the model's autoencoder. `frames` and `chunk` are those of the current call."""

    def __init__(self, components: Components, executor: Executor) -> None:
        self.components, self.executor = components, executor
        self.frames, self.chunk = components["unet"].config.num_frames, None

    @property
    def tiling(self) -> bool | None:
        """See `VideoPipeline.vae_tiling`."""
        return None

    @tiling.setter
    def tiling(self, value: bool | None) -> None:
        if value is not None:
            raise ReducioError(
                f"vae_tiling: {value!r} given, only Reducio decodes in tiles; to save memory pass decode_chunk_size"
            )

    @property
    def config(self) -> TemporalVAEConfig | FrameVAEConfig:
        return self.components["vae"].config

    @property
    def settings(self) -> Hashable:
        """What a forecast depends on besides the clip's size."""
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
        """A number of bytes above any forecast, at the cost of a multiplication: the U-Net has all frames at once, and
        so does a decoder without chunks."""
        finest = self.config.block_out_channels[0] * self.components.dtype.itemsize
        return 2 * FULL_SIZE_TENSORS * self.frames * height * width * 2 * finest + 2**30

    def __call__(
        self, latent: Tensor, frame: np.ndarray | None, output_type: str = "pt", decoding: ClipDecoding | None = None
    ) -> Tensor:
        """[1, T, 4, H/8, W/8] -> float32 [3, T, H, W] in [-1, 1] for "pt"; uint8 [T, H, W, 3] for other types."""
        video = self.finish(self.decode(latent, decoding or self.default(0, 0)), frame)
        if not torch.isfinite(video).all():
            raise ReducioError("vae.decode: the clip has values that are not finite (NaN or infinite)")
        if output_type == "pt":
            return video.clamp(-1, 1).transpose(0, 1)
        return to_bytes(video)

    def finish(self, video: Tensor, frame: np.ndarray | None) -> Tensor:
        """The decoded clip as the caller gets it."""
        return video

    def decode(self, latent: Tensor, decoding: ClipDecoding) -> Tensor:
        """float32 [T, 3, H, W], not clamped."""
        vae = self.executor.network("vae")
        scaled = latent.to(self.executor.device, vae.dtype) / self.config.scaling_factor
        return vae.decode(scaled, decoding.chunk)[0].float()


class OrbitDecoder(ClipDecoder):
    """For SV3D: the last frame, with the camera back at its start, is the picture itself, as in Stability's script."""

    def finish(self, video: Tensor, frame: np.ndarray | None) -> Tensor:
        if frame is None:
            return video
        return torch.cat([video[:-1], to_unit(frame, video.device, video.dtype)[None]])


@torch_state.inference()
def decode_latents(
    model: str | os.PathLike[str],
    latents: Tensor,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    chunk: int | None = None,
    check: Callable[[Any], None] = lambda vae: None,
) -> np.ndarray:
    """[N, T, 4, H/8, W/8] -> uint8 [N, T, H, W, 3]. Loads only the autoencoder of `model`: a folder or a hub id, with
    or without "svd:" in front, or svd-tiny. `chunk` is `decode_chunk_size`; `check` gets the autoencoder and may
    refuse it. Raises ReducioError for another model or other latents."""
    target_device = devices.resolve_device(device)
    name = str(model).removeprefix("svd:") if str(model) != "svd" else HUB_ID
    if name == SVD_TINY:
        folder = embedded_model(SVD_TINY)
    else:
        folder = hub.find_model(name, files=("vae/*",), ignored=("*/*.fp16.*", "*/*.fp16-*"))
    resolved_dtype = devices.resolve_dtype(dtype, None, target_device)
    if not is_folder(folder / "vae"):  # which is all that is read here
        strict_files.check_model_folder(folder)
    class_name = strict_files.read_json(folder / "vae" / strict_files.CONFIG).get("_class_name")
    is_frame_vae = class_name == networks.published_class(FrameVAE)[1]
    network_class: Any = FrameVAE if is_frame_vae else TemporalVAE
    config_class = FrameVAEConfig if is_frame_vae else TemporalVAEConfig
    vae = networks.load_model(network_class, config_class, folder / "vae", resolved_dtype, target_device)
    check(vae)
    shape = (None, vae.config.latent_channels, None, None)
    clips = validation.check_tensor(latents, shape, len(latents), True, "latents")
    network: Any = vae
    if validation.resolve_backend(backend)[0] != "reference":
        from ...fast.engine import Engine  # needs Triton; the reference does not

        engine = Engine()
        engine.free_dtype = dtype is None
        network = engine.twin(vae)
    factor = vae.config.scaling_factor
    videos = [network.decode((z / factor).to(target_device, network.dtype), chunk)[0].float() for z in clips]
    return np.stack([to_bytes(video).cpu().numpy() for video in videos])
