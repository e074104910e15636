"""The preview decoder of the tiny model, distilled from its video autoencoder.

While a clip is denoised, the data prediction is first weak and then exact. So the latents of the training are encoded
clips, made weaker and noisy at random; the target is what the autoencoder decodes from the same latent, at half the
size. Letters in shapes: B batch, C channels, T frames, H W rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.networks import load_model, save_model
from ...data import photos, toy_world
from ...media.similarity import psnr_of_error
from ...reference import ReducioVAE, VAEConfig
from ...reference.reducio.preview import PreviewConfig, PreviewDecoder
from ..loop import LoopConfig
from ..recipe import Context
from .video_autoencoder import FULL_SIZE, as_video


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewSettings:
    """Settings of the distillation."""

    loop: LoopConfig
    phases: tuple[tuple[float, int, int], ...] = ((0.7, 64, 4), (1.0, FULL_SIZE, 2))
    """(share of the steps at which the phase ends, pixels per side, batch)"""
    photo_share: float = 0.3
    portrait_share: float = 0.7  # as the transformer's training, whose latents are previewed
    weakest: float = 0.3  # least factor of a latent
    noise: float = 0.3  # greatest standard deviation of the noise added to it
    evaluated: int = 24  # held-out clips behind the figures


@torch.no_grad()
def initialize(model: PreviewDecoder) -> None:
    """The untrained decoder returns the content image in every frame; branches start at zero."""
    for block in model.res_blocks:
        nn.init.zeros_(block[-1].weight)
    for layer in (model.flow, model.residual[0]):
        nn.init.zeros_(layer.bias)
        nn.init.normal_(layer.weight, std=1e-3)


def train_preview(context: Context, settings: PreviewSettings) -> dict[str, float]:
    """Distil and save `preview_decoder/`. Figures: PSNR of held-out scenes against the autoencoder's clip in half size.

    `psnr_still` is the same for the repeated content image.
    """
    torch.manual_seed(settings.loop.seed)
    vae = load_model(ReducioVAE, VAEConfig, context.out / "vae", torch.float32, context.device)
    config = vae.config
    model = PreviewDecoder(PreviewConfig(config.latent_channels, config.temporal_factor, config.spatial_factor))
    initialize(model)

    def draw(rng: np.random.Generator, size: int, held_out: bool = False) -> np.ndarray:
        if not held_out and rng.random() < settings.photo_share:
            clip = photos.render(rng, FULL_SIZE)
        else:
            scene = toy_world.sample_scene(rng, held_out=held_out)
            clip = toy_world.render(scene, rng, FULL_SIZE, portrait=rng.random() < settings.portrait_share)
        top, left = rng.integers(FULL_SIZE - size + 1, size=2)
        return clip[:, top : top + size, left : left + size]

    @torch.no_grad()
    def examples(rng: np.random.Generator, size: int, count: int, held_out: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, content images [B, 3, H, W] and targets [B, 3, T, H/2, W/2]."""
        video = as_video(np.stack([draw(rng, size, held_out) for _ in range(count)])).to(context.device)
        z = vae.normalize_latent(vae.encode(video).mode())
        if not held_out:
            factor, spread = (torch.from_numpy(rng.random((count, 1, 1, 1, 1))).to(z) for _ in range(2))
            noise = torch.from_numpy(rng.normal(size=z.shape)).to(z)
            z = z * (settings.weakest + (1 - settings.weakest) * factor) + settings.noise * spread * noise
        image = video[:, :, config.content_frame]
        return z, image, F.avg_pool3d(vae.decode(z, vae.encode_content(image)).clamp(-1, 1), (1, 2, 2))

    def loss_fn(step: int, _micro: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        size, count = next((s, b) for end, s, b in settings.phases if step < end * settings.loop.steps)
        z, image, target = examples(rng, size, count, held_out=False)
        error = model(z, image).float() - target
        figures = {"l1": error.abs().mean(), "mse": error.square().mean()}
        return figures["l1"] + 4 * figures["mse"], {name: value.detach() for name, value in figures.items()}

    outcome = context.train("preview", model, loss_fn, settings)
    save_model(model, context.out / "preview_decoder")
    rng = np.random.default_rng((settings.loop.seed, 1 << 40))
    errors, still = [], []
    with torch.inference_mode():
        for _ in range(settings.evaluated):
            z, image, target = examples(rng, FULL_SIZE, 1, held_out=True)
            errors.append((model(z, image) - target).square().mean())
            still.append((F.avg_pool2d(image, 2)[:, :, None] - target).square().mean())
    figures = {
        name: float(psnr_of_error(torch.stack(squares), 2.0).mean())
        for name, squares in (("psnr", errors), ("psnr_still", still))
    }
    return context.record("preview", {"steps": outcome.step, "seconds": outcome.seconds} | figures)
