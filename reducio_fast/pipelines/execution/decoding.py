"""vae.decode: from the motion latent and the content frame to frames, whole or in tiles."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...media.pixels import to_unit
from ...reference import VAEConfig
from ...system.errors import ReducioError, is_out_of_memory
from .components import Components
from .executor import Executor

LOG = logging.getLogger("reducio_fast")


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a clip is decoded: whole, or in tiles of `tile_size` pixels (plus overlap), `tile_batch` of them at once."""

    tiled: bool
    tile_size: int
    tile_batch: int = 1

    def __str__(self) -> str:
        return f"in tiles of {self.tile_size}, {self.tile_batch} at once" if self.tiled else "whole"


class TiledDecoder:
    """Decodes with the model's autoencoder. `tiling` None: by the size of the clip."""

    def __init__(self, components: Components, executor: Executor) -> None:
        self.components, self.executor = components, executor
        self.tiling: bool | None = None

    @property
    def config(self) -> VAEConfig:
        return self.components[self.components.layout.decoder].config

    @property
    def settings(self) -> Hashable:
        """What a forecast depends on besides the clip's size."""
        return self.tiling

    def default(self, height: int, width: int) -> Decoding:
        tiled = self.config.needs_tiling(height, width) if self.tiling is None else self.tiling
        return Decoding(tiled, self.config.tile_size)

    def ways(self, decoding: Decoding) -> Iterator[Decoding]:
        """`decoding`, then the ways that need less memory, in the order in which they are tried.

        Tiles change the clip a little (normalisation sees a tile), so a clip that is to be decoded whole stays whole.
        """
        ways = [decoding, dataclasses.replace(decoding, tile_batch=1)]
        if decoding.tiled or self.tiling is None:
            ways.append(Decoding(True, decoding.tile_size))
            if (half := half_tile(self.config)) is not None:
                ways.append(Decoding(True, half))
        yield from dict.fromkeys(ways)

    def wider(
        self, decoding: Decoding, height: int, width: int, peak: Callable[[Decoding], int], room: int
    ) -> Decoding:
        """`decoding` with as many tiles at once as fit into `room` bytes: each further tile needs the same."""
        runs_fast = self.executor.backend_of(self.components.layout.decoder) == "fast"
        if not decoding.tiled or self.executor.device.type == "cpu" or not runs_fast:
            return decoding
        peak_1, peak_2 = (peak(dataclasses.replace(decoding, tile_batch=n)) for n in (1, 2))
        tiles = -(-height // decoding.tile_size) * -(-width // decoding.tile_size)
        further = (room - peak_1) // (peak_2 - peak_1) if peak_2 > peak_1 else tiles
        return dataclasses.replace(decoding, tile_batch=max(1, min(tiles, 1 + further)))

    def generous(self, height: int, width: int) -> int:
        """An upper bound in bytes for any forecast, at the cost of a multiplication: 64 full-size tensors of the widest
        fine level of a tile; and for what grows with the frame when the decoder works in tiles, 8 clips as floats and 8
        tensors of that width for the encoders of the content frame and its features. (Default model at 4096x4096: the
        forecast is 20.5 GiB, 1310 bytes per pixel; this is 39 GiB, 2050 bytes per pixel.)
        """
        config = self.config
        reach = int(config.tile_size * (1 + config.tile_overlap))
        cells = height * width if self.tiling is False else min(height, reach) * min(width, reach)
        widest = config.base_channels * max(config.channel_multipliers[:2])
        in_tiles = 64 * cells * config.num_frames * widest * self.components.dtype.itemsize
        per_pixel = 8 * 4 * (3 * config.num_frames + widest)
        return in_tiles + height * width * per_pixel + 2**30

    def __call__(
        self, latent: Tensor, frame: np.ndarray, output_type: str = "pt", decoding: Decoding | None = None
    ) -> Tensor:
        """[1, 16, T/f, H/32, W/32] and the content frame -> float32 [3, T, H, W] in [-1, 1].

        For "np" and "pil" the fast path itself returns bytes, uint8 [T, H, W, 3]. If memory runs out, it tries again in
        ways that need less, and raises the error if none is left.
        """
        failure: BaseException | None = None
        ways = self.ways(decoding or self.default(*frame.shape[:2]))
        if self.executor.ranks is not None:
            ways = itertools.islice(ways, 1)  # one of several processes must not try again alone
        for way in ways:
            if failure is not None:
                LOG.warning("vae.decode: out of memory, trying again %s", way)
            try:
                return self.decode(latent, frame, way, output_type)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # the traceback's frames hold the tensors that did not fit
            if self.executor.device.type == "cuda":
                torch.cuda.empty_cache()
        assert failure is not None
        raise failure

    def decode(self, latent: Tensor, frame: np.ndarray, decoding: Decoding, output_type: str = "pt") -> Tensor:
        """Decode in this one way, without another try."""
        vae = with_tiles(self.executor.network(self.components.layout.decoder), decoding)
        dtype, device = next(vae.parameters()).dtype, self.executor.device
        features = vae.encode_content(to_unit(frame, device, dtype)[None], tiled=decoding.tiled)
        latent = latent.to(device, dtype)
        if output_type != "pt" and getattr(vae, "makes_bytes", False):
            try:
                return vae.decode(latent, features, tiled=decoding.tiled, as_uint8=True)[0]
            except ValueError as error:
                raise ReducioError(f"vae.decode: {error}") from error
        video = vae.decode(latent, features, tiled=decoding.tiled)[0].float()
        if not torch.isfinite(video).all():
            raise ReducioError("vae.decode: the clip has values that are not finite (NaN or infinite)")
        return video.clamp(-1, 1)


def half_tile(config: VAEConfig) -> int | None:
    """Half the tile size, 128 pixels in the release. None if it or its overlap is no whole number of latent cells."""
    half = config.tile_size // 2
    overlap = half * config.tile_overlap
    return half if half % config.spatial_factor == 0 and overlap % config.spatial_factor == 0 else None


def with_tiles(vae: Any, decoding: Decoding) -> Any:
    """The autoencoder, reference or twin, on the same weights, with this tile size and batch."""
    if (decoding.tile_size, decoding.tile_batch) == (vae.config.tile_size, getattr(vae, "tile_batch", 1)):
        return vae
    other = copy.copy(vae)  # shares its modules
    if hasattr(vae, "tile_batch"):
        other.reference = (with_tiles(vae.reference[0], dataclasses.replace(decoding, tile_batch=1)),)
        other.tile_batch = decoding.tile_batch
    other.config = dataclasses.replace(vae.config, tile_size=decoding.tile_size)
    return other
