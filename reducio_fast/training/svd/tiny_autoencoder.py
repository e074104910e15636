"""The autoencoder of the small embedded SVD: images to latents of a quarter of the side, and whole clips back.

Letters in shapes: B batch, T frames, C channels, H W rows and columns.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ...checkpoints.networks import save_model
from ...media.pixels import to_unit
from ...media.similarity import psnr_of_error
from ...reference.svd.config import TemporalVAEConfig
from ...reference.svd.layers import SpatialResBlock, TemporalResBlock
from ...reference.svd.vae import FrameAttention, TemporalVAE
from ..loop import LoopConfig
from ..recipe import Context
from .toy_clips import FRAMES, SIZE, draw_clip

# SVD's norms have 32 groups. At the first level, next to the images, and at the last, next to the latents, each group
# needs several channels: with one channel per group, a norm over a whole frame removes every flat colour.
TINY_VAE = TemporalVAEConfig(
    block_out_channels=(64, 32, 64),
    down_block_types=("DownEncoderBlock2D",) * 3,
    layers_per_block=1,
    sample_size=SIZE,
)
START_LOGVAR = -4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderSettings:
    """A phase: the share of the steps at which it ends, frames of a clip, side of the square that is cut out of each
    clip, clips of a batch; whole clips come last.

    Cut squares are cheap: many different scenes fit into a batch, and bfloat16 convolutions of few frames have wrong
    gradients on images as large as the clips (see `training.mixed_precision`).
    """

    loop: LoopConfig
    phases: tuple[tuple[float, int, int, int], ...] = ((0.5, 2, 32, 16), (0.8, FRAMES, 32, 3), (1.0, FRAMES, SIZE, 1))
    kl_weight: float = 1e-4  # on the mean KL per latent value: keeps latents near zero and smooth enough to model
    evaluated: int = 32  # held-out clips reconstructed at the end
    config: TemporalVAEConfig = field(default_factory=lambda: TINY_VAE)


@torch.no_grad()
def initialize(vae: TemporalVAE) -> None:
    """Initialise variance-preserving convolutions and zero residual branches."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, SpatialResBlock | TemporalResBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, FrameAttention):
            nn.init.zeros_(module.to_out[0].weight)
    nn.init.dirac_(vae.decoder.time_conv_out.weight)
    vae.quant_conv.bias[vae.config.latent_channels :] = START_LOGVAR


def moments(vae: TemporalVAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the posterior, [N, 4, H/4, W/4] each."""
    mean, logvar = vae.quant_conv(vae.encoder(images)).float().chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def train_autoencoder(context: Context, settings: AutoencoderSettings) -> dict[str, float]:
    """Train and save `vae/`, with the scaling factor that gives its latents unit variance. Figures: PSNR on clips of
    held-out scenes, and PSNR of their frame-to-frame change."""
    torch.manual_seed(settings.loop.seed)
    vae = TemporalVAE(settings.config)
    initialize(vae)

    def batch(rng: np.random.Generator, clips: int, frames: int, side: int = SIZE, held_out: bool = False) -> Tensor:
        """float32 [B, T, 3, side, side] in [-1, 1]"""
        size, drawn = settings.config.sample_size, []
        for _ in range(clips):
            clip = draw_clip(rng, held_out, size, frames).frames
            top, left = rng.integers(size - side + 1, size=2)
            drawn.append(to_unit(clip[:, top : top + side, left : left + side]))
        return torch.stack(drawn)

    def loss_fn(step: int, _micro: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        frames, side, clips = next(phase[1:] for phase in settings.phases if step < phase[0] * settings.loop.steps)
        video = batch(rng, clips, frames, side).to(context.device)
        mean, logvar = moments(vae, video.flatten(0, 1))
        latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        error = vae.decode(latents.unflatten(0, (clips, frames))).float() - video
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        figures = {"l1": error.abs().mean(), "mse": error.square().mean(), "kl": kl.mean()}
        return figures["l1"] + figures["mse"] + settings.kl_weight * figures["kl"], figures

    outcome = context.train("autoencoder", vae, loss_fn, settings)
    figures = {"steps": outcome.step, "seconds": outcome.seconds} | outcome.last
    rng = np.random.default_rng((settings.loop.seed, 1 << 40))
    errors, changes, squares = [], [], []
    with torch.inference_mode():
        for _ in range(settings.evaluated):
            video = batch(rng, 1, FRAMES, held_out=True).to(context.device)
            latents = vae.encode(video[0])
            restored = vae.decode(latents[None]).clamp(-1, 1)
            errors.append((restored - video).square().mean())
            changes.append((restored.diff(dim=1) - video.diff(dim=1)).square().mean())
            squares.append(latents.square().mean())
    figures["psnr"] = float(psnr_of_error(torch.stack(errors), 2.0).mean())
    figures["psnr_of_change"] = float(psnr_of_error(torch.stack(changes), 2.0).mean())
    scale = float(torch.stack(squares).mean().rsqrt())
    figures["scaling_factor"] = scale
    vae.config = dataclasses.replace(settings.config, scaling_factor=scale)
    save_model(vae, context.out / "vae")
    return context.record("autoencoder", figures)
