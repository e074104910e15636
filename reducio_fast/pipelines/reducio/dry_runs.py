"""The stages of a Reducio clip on tensors without contents: what `memory.forecast` measures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from ...memory.dry_run import META, DryRun, without_weights
from ...memory.forecast import Stage
from ...reference import Condition, initial_latent
from ...system.errors import ReducioError
from ..call.request import Embeds
from ..execution.components import Components
from ..execution.decoding import Decoding, TiledDecoder
from ..execution.drawing import draw_image
from ..execution.executor import Executor
from ..execution.first_stage import FirstStage
from ..execution.sampling import Sampler
from .conditioner import Conditioner

LOG = logging.getLogger("reducio_fast")
PROMPT = "a red circle"
# Two steps: from the second step on, a multistep scheduler keeps its last prediction.
STEPS, GUIDANCE_SCALE = 2, 4.5


class DryStages:
    """The parts of a pipeline, rebuilt with weights on the meta device. Use it inside the context of `dry`.

    Each stage passes its shapes to the next, so run them in order.
    """

    def __init__(self, components: Components, executor: Executor, tiling: bool | None, dry: DryRun) -> None:
        self.dry = dry
        self.on_cpu = executor.device.type == "cpu"
        self.decodes_plainly = executor.backend_of(components.layout.decoder) == "reference"
        self.components = components.without_weights(without_weights)
        self.executor = executor.without_weights(self.components, dry)
        self.dtype = components.dtype
        self.conditioner = Conditioner(self.components, self.executor)
        self.sampler = Sampler(self.components, self.executor)
        self.decoder = TiledDecoder(self.components, self.executor)
        self.decoder.tiling = tiling
        self.condition: dict[str, Any] = {}  # what the encoders returned
        self.first_stage = FirstStage(lambda: self.components["text_to_image"], self.executor)
        live = FirstStage(lambda: components["text_to_image"], executor)
        self.drawing_twins: Sequence[Any] = ()  # none if diffusers draws
        if components["text_to_image"] is not None and live.obstacle() is None:
            with suppress(ReducioError):
                self.drawing_twins = self.first_stage.twins()
        layout = self.components.layout
        denoiser, decoder = (self.executor.network(name) for name in (layout.denoiser, layout.decoder))
        dry.given(*self.components.networks(), denoiser, decoder, *self.drawing_twins)
        dry.remember(*denoiser.transformer_blocks)
        dry.remember(decoder.decoder, decoder.encoder_2d)

    def stages(self, height: int, width: int, decoding: Decoding) -> list[Stage]:
        generator = torch.Generator().manual_seed(0)
        frame = np.zeros((height, width, 3), np.uint8)
        shape = self.decoder.config.latent_shape(height, width)
        return [
            self._stage("content.generate", lambda: self._draw(height, width, generator), self.drawing_twins),
            self._stage("text.encode", self._encode_text),
            self._stage("image.encode", lambda: self._encode_image(frame)),
            self._stage("dit.step", lambda: self._sample(shape, generator)),
            self.decoding(height, width, decoding),
        ]

    def decoding(self, height: int, width: int, decoding: Decoding) -> Stage:
        return self._stage("vae.decode", lambda: self._decode(height, width, decoding))

    def _stage(self, name: str, run: Any, further: Sequence[nn.Module] = ()) -> Stage:
        return Stage(name, [*self.executor.networks_of(name), *further], run)

    def _draw(self, height: int, width: int, generator: torch.Generator) -> int | None:
        """Dry run of the text-to-image stage, which may be any diffusers pipeline."""
        self.dry.unfolding = self.on_cpu
        pipeline = self.components["text_to_image"]
        if pipeline is None:
            return 0
        kwargs = {"num_inference_steps": STEPS}
        if self.drawing_twins:
            arguments = self.first_stage.arguments(kwargs, height, width)
            self.dry.unfolding = False  # the twins call oneDNN at every size
            return self.dry.peak_of(self.first_stage.pixels, self.drawing_twins, PROMPT, "", generator, arguments)[1]
        try:
            # Pixels have no contents here, so the drawing ends after its decoder.
            pipeline.image_processor.postprocess = lambda *_, **__: np.zeros((1, height, width, 3), np.float32)
            return self.dry.peak_of(draw_image, pipeline, PROMPT, "", height, width, generator, False, kwargs)[1]
        except Exception as error:  # foreign code may read a tensor's contents in any way
            LOG.info("content.generate: no forecast for a %s (%s)", type(pipeline).__name__, error)
            return None

    def _encode_text(self) -> int:
        self.dry.unfolding = self.on_cpu
        if self.components["text_encoder"] is None:
            length, channels = self.components["transformer"].null_text.shape
            text = torch.empty(1, length, channels, dtype=self.dtype, device=META)
            mask, peak = torch.empty(1, length, dtype=torch.bool, device=META), 0
        else:
            (text, mask), peak = self.dry.peak_of(self.conditioner.encode_text, PROMPT)
        self.condition |= {"text": text, "text_mask": mask}
        return peak

    def _encode_image(self, frame: np.ndarray) -> int:
        self.dry.unfolding = self.on_cpu
        (semantic, content), peak = self.dry.peak_of(self.conditioner.encode_image, frame, Embeds())
        self.condition |= {"semantic": semantic, "content": content}
        return peak

    def _sample(self, shape: tuple[int, ...], generator: torch.Generator) -> int:
        self.dry.unfolding = self.on_cpu
        cond = Condition(**self.condition)
        uncond = cond.without_text(self.components["transformer"].null_text)
        noise = initial_latent((1, *shape), [generator])
        return self.dry.peak_of(self.sampler, noise, cond, uncond, GUIDANCE_SCALE, STEPS, generator, None)[1]

    def _decode(self, height: int, width: int, decoding: Decoding) -> int:
        # The twins call oneDNN at every size.
        self.dry.unfolding = self.on_cpu and self.decodes_plainly
        latent = torch.empty((1, *self.decoder.config.latent_shape(height, width)), device=META)
        return self.dry.peak_of(self.decoder.decode, latent, np.zeros((height, width, 3), np.uint8), decoding)[1]
