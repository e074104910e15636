"""SVD's training objective: EDM's denoising (arXiv 2206.00364) with the noise levels of arXiv 2311.15127.

With data of unit variance, EDM's preconditioned denoiser D(x; s) = c_skip x + c_out F(c_in x; c_noise) has
c_skip = 1 / (s^2 + 1), c_out = -s / sqrt(s^2 + 1), c_in = 1 / sqrt(s^2 + 1) and c_noise = ln(s) / 4. The target of the
network F is then v = (n - s x) / sqrt(s^2 + 1) of clean x and noise n, which has unit variance at every s; and the
weight (1 + s^2) / s^2 on the squared error of D is one on that of F. Letters in shapes: B batch, T frames, h w cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.svd.sampler import ImageCondition, denoiser
from ..reference.svd.unet import VideoUNet
from ..system.errors import ReducioError


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseLevels:
    """ln s ~ N(mean, std^2). The larger a picture, the more noise it takes to hide it: the paper shifts the mean up."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 <= self.std < math.inf):
            raise ReducioError(f"noise levels: mean={self.mean} must be finite, std={self.std} finite and at least 0")

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """[count]"""
        return (self.mean + self.std * torch.randn(count, generator=generator)).exp()


# Noise levels of the paper's stages, by task and size of the clips.
PUBLISHED_LEVELS = {
    "image": NoiseLevels(mean=-1.2, std=1.0),
    "text-to-video-576x1024": NoiseLevels(mean=0.5, std=1.4),
    "image-to-video-320x576": NoiseLevels(mean=0.7, std=1.6),
    "image-to-video-576x1024": NoiseLevels(mean=1.0, std=1.6),
    "interpolation": NoiseLevels(mean=1.0, std=1.2),
}
# Noise on the conditioning picture; its strength is an input of the network.
AUGMENTATION = NoiseLevels(mean=-3.0, std=0.5)


def velocity(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The network's target v, [B, ...]; sigma: [B]."""
    s = _spread(sigma, clean)
    return (noise - s * clean) / (s.square() + 1).sqrt()


def denoised(noisy: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
    """D: the clean latent that a prediction implies."""
    s = _spread(sigma, noisy)
    total = s.square() + 1
    return noisy / total - s / total.sqrt() * prediction


def loss_weight(sigma: Tensor) -> Tensor:
    """Weight on the squared error of `denoised`, [B]."""
    return (1 + sigma.square()) / sigma.square()


def velocity_error(unet: VideoUNet, clean: Tensor, noise: Tensor, sigma: Tensor, condition: ImageCondition) -> Tensor:
    """The weighted denoising error of each clip, [B].

    clean: latents [B, T, 4, h, w], already times the autoencoder's scaling factor; sigma: [B].
    """
    s = _spread(sigma, clean)
    scaled = (clean + s * noise) / (s.square() + 1).sqrt()
    prediction = denoiser(unet, condition)(scaled, sigma.log() / 4)
    return (prediction.float() - velocity(clean, noise, sigma)).square().flatten(1).mean(1)


def without_some(condition: ImageCondition, dropped: Tensor) -> ImageCondition:
    """The condition, without the image in the clips where `dropped` [B] is true: the unconditional half of guidance."""
    bare = condition.without_image()
    chosen = [
        torch.where(_spread(dropped, full), none, full)
        for none, full in ((bare.embeds, condition.embeds), (bare.latents, condition.latents))
    ]
    return ImageCondition(*chosen, condition.added_time_ids)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] against `like` [B, ...]."""
    return values.to(like.device).view(-1, *[1] * (like.ndim - 1))
