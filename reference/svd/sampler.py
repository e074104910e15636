"""The U-Net's conditioning inputs for a clip, and the denoiser that `reference.sample` steps with.

The schedule is EDM's (arXiv 2206.00364) as diffusers' `EulerDiscreteScheduler` has it for Stable Video Diffusion:
sigmas from 700 to 0.002 by Karras' rule, a latent scaled by 1 / sqrt(sigma^2 + 1) on its way in, v as prediction, and a
quarter of the logarithm of sigma as time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..sampler import guided


@dataclasses.dataclass(frozen=True, slots=True)
class ImageCondition:
    """Inputs of B clips: `embeds` of the image encoder, [B, S, E] or, per frame, [B, T, S, E]; `latents` of the image,
    not scaled by the autoencoder's factor, [B, 4, h, w] or, per frame, [B, T, 4, h, w]; `added_time_ids` [B, n] or
    [B, T, n]."""

    embeds: Tensor
    latents: Tensor
    added_time_ids: Tensor

    def without_image(self) -> ImageCondition:
        """The unconditional half of guidance: zeros for the image; rate, motion and augmentation stay."""
        return ImageCondition(torch.zeros_like(self.embeds), torch.zeros_like(self.latents), self.added_time_ids)

    def to(self, device: torch.device, dtype: torch.dtype) -> ImageCondition:
        return ImageCondition(*(getattr(self, f.name).to(device, dtype) for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True, slots=True)
class EndConditions:
    """Conditions of clips whose two ends are given: the image of the first frame and that of the last."""

    first: ImageCondition
    last: ImageCondition


# Sigmas of ten steps, made for SVD by Align Your Steps (arXiv 2404.14507).
ALIGN_YOUR_STEPS = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)


def align_your_steps(steps: int) -> list[float]:
    """Sigmas of `steps` steps, one more than there are steps, the last one 0: the paper's ten steps or, as it advises
    for other numbers, linear interpolation between the logarithms of their sigmas."""
    places = torch.linspace(0, len(ALIGN_YOUR_STEPS) - 1, steps + 1, dtype=torch.float64)
    left = places.floor().long().clamp(max=len(ALIGN_YOUR_STEPS) - 2)
    logs = torch.tensor(ALIGN_YOUR_STEPS, dtype=torch.float64).log()
    sigmas = torch.lerp(logs[left], logs[left + 1], places - left).exp()
    return [*sigmas[:-1].tolist(), 0.0]


def join(first: ImageCondition, second: ImageCondition) -> ImageCondition:
    """Both in one batch."""
    names = [f.name for f in dataclasses.fields(ImageCondition)]
    return ImageCondition(*(torch.cat([getattr(first, n), getattr(second, n)]) for n in names))


def guidance_per_frame(scale: float | Tensor, device: torch.device) -> float | Tensor:
    """A scale, or one per frame [T], in a shape that broadcasts against [B, T, C, H, W]."""
    return scale.to(device)[:, None, None, None] if isinstance(scale, Tensor) else scale


def needs_guidance(scale: float | Tensor) -> bool:
    """Whether any frame is guided: as in diffusers, if a scale is above 1."""
    return float(scale.max()) > 1 if isinstance(scale, Tensor) else scale > 1


def towards_last(first: Tensor, last: Tensor) -> Tensor:
    """Two predictions [B, T, ...] of the same frames as one: the first at the first frame, the last at the last frame,
    and linear interpolation between them."""
    share = torch.linspace(0, 1, first.shape[1], device=first.device, dtype=first.dtype)
    return torch.lerp(first, last, share.view(-1, *[1] * (first.ndim - 2)))


def two_ended(
    first: Callable[[Tensor, Tensor], Tensor], last: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser from two that each continue an image: one forwards in time, the other from the end backwards.

    Time-reversal fusion (arXiv 2403.14611): weights that animate a first frame make, with time reversed, a clip that
    ends with that frame. Both read one latent, so the fused prediction of each step describes one clip with both ends.
    Every scheduler's step is linear in the prediction, so fusing the predictions fuses the steps.
    """

    def predict(latent: Tensor, timestep: Tensor) -> Tensor:
        return towards_last(first(latent, timestep), last(latent.flip(1), timestep).flip(1))

    return predict


def denoiser(
    unet: Any,
    cond: ImageCondition | EndConditions,
    uncond: ImageCondition | None = None,
    guidance_scale: float | Tensor = 1.0,
) -> Callable[[Tensor, Tensor], Tensor]:
    """`(latent [B, T, 4, h, w], timestep) -> v` in the latent's dtype, the U-Net computing in its own."""
    if isinstance(cond, EndConditions):
        first, last = (denoiser(unet, end, uncond, guidance_scale) for end in (cond.first, cond.last))
        return two_ended(first, last)
    guides = needs_guidance(guidance_scale)
    condition = join(cond.without_image() if uncond is None else uncond, cond) if guides else cond

    def predict(latent: Tensor, timestep: Tensor) -> Tensor:
        inputs = condition.to(latent.device, unet.dtype)
        image = inputs.latents
        image = image[:, None].expand(-1, latent.shape[1], -1, -1, -1) if image.ndim == 4 else image
        sample = torch.cat([latent.to(unet.dtype), image], dim=2)
        return unet(sample, timestep, inputs.embeds, inputs.added_time_ids).to(latent.dtype)

    return guided(predict, guidance_per_frame(guidance_scale, cond.latents.device)) if guides else predict
