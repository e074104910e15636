"""The stages of an SVD clip on tensors without contents: what `memory.forecast` measures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...memory.dry_run import META, DryRun, without_weights
from ...memory.forecast import Stage
from ...reference.svd.config import time_id_widths
from ...reference.svd.sampler import ImageCondition
from ..execution.components import Components
from ..execution.executor import Executor
from ..execution.sampling import Sampler
from .conditioner import CLIP_SIZE
from .decoder import ClipDecoder, ClipDecoding

STEPS = 2  # a step's memory does not depend on its number; in the second one the first one's results are alive too


class DryStages:
    """The parts of a pipeline, rebuilt with weights on the meta device. Use it inside the context of `dry`."""

    def __init__(self, components: Components, executor: Executor, decoder: ClipDecoder, dry: DryRun) -> None:
        self.dry, self.on_cpu = dry, executor.device.type == "cpu"
        self.runs_plainly = {name: executor.backend_of(name) == "reference" for name in ("unet", "vae")}
        self.components = components.without_weights(without_weights)
        self.executor = executor.without_weights(self.components, dry)
        self.dtype = components.dtype
        self.sampler = Sampler(self.components, self.executor)
        self.decoder = ClipDecoder(self.components, self.executor)
        self.decoder.frames, self.decoder.chunk = decoder.frames, decoder.chunk
        dry.given(*self.components.networks(), *(self.executor.network(name) for name in ("unet", "vae")))

    def stages(self, height: int, width: int, way: ClipDecoding) -> list[Stage]:
        return [
            self._stage("image.encode", lambda: self._encode(height, width)),
            self._stage("dit.step", lambda: self._sample(height, width, way.frames)),
            self.decoding(height, width, way),
        ]

    def decoding(self, height: int, width: int, way: ClipDecoding) -> Stage:
        return self._stage("vae.decode", lambda: self._decode(height, width, way))

    def _stage(self, name: str, run: Callable[[], int | None]) -> Stage:
        return Stage(name, self.executor.networks_of(name), run)

    def _latent(self, height: int, width: int, *leading: int) -> Tensor:
        factor = self.decoder.config.spatial_factor
        shape = (*leading, self.decoder.config.latent_channels, height // factor, width // factor)
        return torch.empty(shape, device=META)

    def _encode(self, height: int, width: int) -> int | None:
        self.dry.unfolding = self.on_cpu
        vae, encoder = self.components["vae"], self.components["image_encoder"]
        upcast = self.dtype == torch.float16 and vae.config.force_upcast
        image = torch.empty((1, 3, height, width), dtype=torch.float32 if upcast else self.dtype, device=META)
        small = torch.empty((1, 3, *CLIP_SIZE), dtype=self.dtype, device=META)

        def encode() -> Tensor:
            encoder(small)
            return (vae.float() if upcast else vae).encode(image)

        peak = self.dry.peak_of(encode)[1]
        if upcast:
            vae.half()
        return peak

    def _sample(self, height: int, width: int, frames: int) -> int | None:
        self.dry.unfolding = self.on_cpu and self.runs_plainly["unet"]
        unet = self.components["unet"].config
        width_of_embeds = unet.per_level("cross_attention_dim")[0]
        cond = ImageCondition(
            torch.empty((1, 1, width_of_embeds), dtype=self.dtype, device=META),
            self._latent(height, width, 1).to(self.dtype),
            torch.empty((1, len(time_id_widths(unet))), dtype=self.dtype, device=META),
        )
        noise, generator = self._latent(height, width, 1, frames), torch.Generator()
        scale = 3.0  # with guidance: twice the batch of a call without it
        return self.dry.peak_of(self.sampler, noise, cond, None, scale, STEPS, generator, None)[1]

    def _decode(self, height: int, width: int, way: ClipDecoding) -> int | None:
        self.dry.unfolding = self.on_cpu and self.runs_plainly["vae"]
        return self.dry.peak_of(self.decoder.decode, self._latent(height, width, 1, way.frames), way)[1]
