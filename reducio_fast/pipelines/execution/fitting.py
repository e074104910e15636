"""How a clip is made in the memory that is free: forecasts and choices of one pipeline, kept by size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...memory import fit as memory_fit
from ...memory.dry_run import DryRun, free_bytes
from ...memory.fit import Fit
from ...memory.forecast import Forecast, forecast, in_another_way
from ...system.errors import ReducioError, shown
from ..call import validation
from ..parallel import shared
from .components import Components
from .decoding import Decoding, TiledDecoder
from .executor import Executor

LOG = logging.getLogger("reducio_fast")
KEPT = 256  # forecasts, and choices by size: bounds the memory of a server that gets ever new sizes


class Fitter:
    """Chooses the way in which the decoder works, and whether weights are offloaded.

    dry_stages: makes the family's stages without contents, within an entered `DryRun`: an object with `components`,
    `stages(height, width, way)` and `decoding(height, width, way)`, the last stage alone. free_bytes: what the device
    can still allocate.
    """

    def __init__(
        self,
        parts: Components,
        executor: Executor,
        decoder: TiledDecoder,
        dry_stages: Callable[[DryRun], Any],
        free_bytes: Callable[[torch.device], int | None] = free_bytes,
    ) -> None:
        self.parts, self.executor, self.decoder, self.dry_stages = parts, executor, decoder, dry_stages
        self.free_bytes = free_bytes
        self.fits: dict[tuple[int, int], Fit] = {}  # how the last call of each size was made
        self._forecasts: dict[tuple[Any, ...], Forecast] = {}

    def forecast(self, height: int, width: int, way: Decoding | None = None) -> Forecast:
        validation.check_size(self.decoder.config, height, width)
        own = self.decoder.default(height, width)
        way = own if way is None else way
        if not isinstance(way, type(own)):
            raise ReducioError(f"decoding: must be how this model decodes, is {shown(way)}")
        self.executor.refresh()
        layout = self.parts.layout
        networks = tuple(
            (self.executor.backend_of(name), self.parts[name].config) for name in (layout.denoiser, layout.decoder)
        )
        same = (height, width, self.decoder.settings, self.executor.device, self.parts.dtype, networks)
        key = (*same, way)
        if key not in self._forecasts:
            earlier = next((f for known, f in self._forecasts.items() if known[:-1] == same), None)
            dry = DryRun()
            with torch.no_grad(), dry:
                dry_stages = self.dry_stages(dry)
                if earlier is None:
                    stages = dry_stages.stages(height, width, way)
                    self._forecasts[key] = forecast(stages, dry_stages.components.networks(), height, width, way)
                else:
                    self._forecasts[key] = in_another_way(earlier, dry_stages.decoding(height, width, way), way)
            while len(self._forecasts) > KEPT:
                self._forecasts.pop(next(iter(self._forecasts)))
        return self._forecasts[key]

    def fit(self, height: int, width: int) -> Fit:
        """How to make a clip of this size with the memory that is free now. Raises ReducioError where nothing fits."""
        device, default = self.executor.device, self.decoder.default(height, width)
        free, offloading = self.free_bytes(device), self.executor.offload is not None
        if free is None or (device.type == "cpu" and self.decoder.generous(height, width) < free):
            return Fit(default)
        room = memory_fit.room(free, self.executor.resident_bytes())

        def forecast_of(way: Decoding) -> Forecast:
            return self.forecast(height, width, way)

        earlier = self.fits.get((height, width))
        same = earlier is not None and (earlier.offload, earlier.decoding.tiled) == (offloading, default.tiled)
        if earlier is not None and same and forecast_of(earlier.decoding).peak(earlier.offload) <= room:
            return earlier  # another number of tiles at once would need another graph
        offloads = [True] if offloading else [False] if device.type == "cpu" else [False, True]
        fit = memory_fit.fit(self.decoder.ways(default), forecast_of, room, offloads)
        if fit is None:

            def forecasts(height: int, width: int) -> Iterator[Forecast]:
                for way in self.decoder.ways(self.decoder.default(height, width)):
                    yield self.forecast(height, width, way)

            factor = self.decoder.config.spatial_factor
            raise memory_fit.refuse(height, width, forecasts, factor, room, offloads[-1], str(device))
        way = self.decoder.wider(fit.decoding, height, width, lambda wider: forecast_of(wider).peak(fit.offload), room)
        if way != default and not way.tile_batch > 1:
            LOG.warning("vae.decode: %dx%d is decoded %s to fit into memory", height, width, way)
        return Fit(way, fit.offload)

    def settle(self, height: int, width: int) -> Decoding:
        """Choose how clips of this size are made from now on, start offloading if the choice includes it, and return
        how they are decoded. Raises ReducioError if they cannot be made."""
        fit = shared(self.executor.ranks, self.fit, height, width)  # tiles of all processes must be the same
        if fit.offload and self.executor.offload is None:
            LOG.warning("memory: weights are offloaded to the CPU between stages, all at once do not fit")
            self.executor.start_offload(None, self.parts.device)
            self.fits.clear()
        self.fits.pop((height, width), None)
        self.fits[height, width] = fit
        while len(self.fits) > KEPT:
            self.fits.pop(next(iter(self.fits)))
        return fit.decoding
