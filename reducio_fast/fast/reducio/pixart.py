"""The fast twin of `reference/reducio/pixart.py`: PixArt's image transformer on the blocks of the fast Reducio-DiT.

An image is a clip of one frame, and its condition is text alone; everything that `dit.py` says about steps holds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.reducio.pixart import PixArt
from ..plan import Plan
from .dit import FastDenoiser, FastTransformer, Modulation, Prepared


class FastPixArt(FastTransformer):
    """Built from a `PixArt`. Evaluation only."""

    graph_names = ("content.step", "content.forward")
    block_name = "content.block"

    def __init__(self, model: PixArt, plan: Plan) -> None:
        super().__init__(model, model.sizes, plan)
        self.proj_out = model.proj_out  # with the variance, which `predict` returns and a step does not need

    @torch.no_grad()
    def forward(
        self, latent: Tensor, timestep: Tensor, text: Tensor, mask: Tensor | None = None, size: Tensor | None = None
    ) -> Tensor:
        """As the reference's. All items share one timestep and one size.

        Raises ValueError as the reference does, and for timesteps or sizes that differ between the items.
        """
        for name, value in (("timestep", timestep), ("size", size)):
            if value is not None and value.ndim and bool((value != value[:1]).any()):
                raise ValueError(f"{name} differs between the items of the batch: {value.tolist()}")
        return self.predict(
            latent, timestep.flatten()[:1], self.prepare(text, mask), None if size is None else size[:1]
        )

    @torch.no_grad()
    def predict(self, latent: Tensor, timestep_1: Tensor, prepared: Prepared, size_12: Tensor | None = None) -> Tensor:
        """As `forward`, for a condition that `prepare` has read."""
        self.conditioner[0].check_inputs(latent)
        clip = latent[:, :, None]
        modulation = self.modulations(timestep_1, clip.shape[2:], size_12)
        if self.graphs is None:
            return self._predict(clip, modulation, prepared)
        return self.graphs("content.forward", self._predict, clip.contiguous(), modulation, prepared)

    def _predict(self, clip: Tensor, modulation: Modulation, prepared: Prepared) -> Tensor:
        _, y, grid = self.run_blocks(clip, modulation, prepared)
        out = F.linear(y, self.proj_out.weight, self.proj_out.bias)
        return self.conditioner[0].unpatchify(out, grid)[:, :, 0]

    @torch.no_grad()
    def prepare(self, text: Tensor, mask: Tensor | None = None) -> Prepared:
        """Cross-attention keys and values of every block: text [B, L, caption_channels], mask [B, L]."""
        return self.keys_values(self.conditioner[0].embed_condition(text, mask))

    @torch.no_grad()
    def denoiser(
        self,
        text: Tensor,
        mask: Tensor,
        negative: tuple[Tensor, Tensor] | None = None,
        guidance_scale: float = 1.0,
        size: Tensor | None = None,
    ) -> FastDenoiser:
        """For `fast.sampler.sample` on latents [1, C, 1, h, w]: text [1, L, C] and mask [1, L] of the prompt; negative:
        those of the negative prompt, needed if `guidance_scale` exceeds 1; size [1, 2] in pixels."""
        if guidance_scale > 1:
            if negative is None:
                raise ValueError(f"guidance_scale={guidance_scale} needs the negative prompt's text")
            text, mask = torch.cat([negative[0], text]), torch.cat([negative[1], mask])
        return self.lent(FastDenoiser(self, self.prepare(text, mask), guidance_scale, size))
