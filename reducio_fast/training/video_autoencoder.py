"""The video autoencoder of the tiny model.

It learns first on 64-pixel clips, where a sample costs a quarter, then at its own 128 pixels. Letters in shapes: B batch,
T frames, H W rows and columns, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reducio_fast.checkpoints import WEIGHTS, load_tensors, save_model, save_tensors
from reducio_fast.reference import ReducioVAE, VAEConfig

from . import photos, world
from .loop import LoopConfig
from .stage import Context

TINY_VAE = VAEConfig(
    base_channels=16,  # 16 wide at full resolution: narrower is slower, vector units of a CPU hold 16 floats
    channel_multipliers=(1, 1, 2, 4, 4, 4),
    content_base_channels=16,
    content_channel_multipliers=(1, 1, 2, 4),
    # Adding aligns content and video in space from the first step; attention alone has to learn that. Fusing at half
    # resolution too is what keeps still backgrounds sharp at this width.
    fusion=("attn", "add", "add", "add+attn", "attn", "attn"),
    fusion_levels=(None, 1, 2, 3, None, None),
    num_res_blocks=1,
    norm_groups=8,
    num_heads=4,
    fusion_head_dim=16,
)

START_LOGVAR = -6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VAESettings:
    """One phase of VAE training; a phase starts from the averaged weights of the one named `after`."""

    loop: LoopConfig
    size: int  # pixels a side
    batch: int
    after: str | None = None
    train_encoder: bool = True  # False keeps the latent space: the transformer may already be learning it
    photo_share: float = 0.3
    crop_share: float = 0.0  # of clips drawn at twice `size` and cropped: true scale of edges and motion, shapes cut off
    # Clips whose content image is blanked. With the content always there, copying it is so good a start that the motion
    # latent stays unused for hundreds of steps; this opens its path from the first one.
    content_drop: float = 0.0
    kl_weight: float = 1e-6  # on the KL summed over a latent, as in the release
    config: VAEConfig = field(default_factory=lambda: TINY_VAE)


def as_video(frames_BTHWC: np.ndarray) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames_BTHWC).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def draw_clip(rng: np.random.Generator, size: int, photo_share: float, crop_share: float) -> np.ndarray:
    """One training clip, uint8 [T, size, size, 3]: a scene of the world or a photograph under a camera move."""
    scale = 2 if rng.random() < crop_share else 1
    if rng.random() < photo_share:
        frames = photos.render(rng, size * scale)
    else:
        frames = world.render(world.sample_scene(rng), rng, size * scale)
    top, left = rng.integers(size * (scale - 1) + 1, size=2)
    return frames[:, top : top + size, left : left + size]


def train_vae(context: Context, settings: VAESettings, stage: str) -> dict[str, float]:
    """Trains one phase and saves `vae/`. Loss: mean absolute plus mean squared error plus the weighted KL."""
    torch.manual_seed(settings.loop.seed)
    vae = ReducioVAE(settings.config)
    if settings.after is None:
        # A posterior that starts as wide as the prior hides the motion in noise, and the decoder learns to ignore it.
        nn.init.constant_(vae.quant_conv.bias[settings.config.latent_channels :], START_LOGVAR)
    else:
        vae.load_state_dict(load_tensors(context.run_folder(settings.after) / WEIGHTS))
    # The two dead modules never run; without gradient, weight decay leaves them alone as well.
    frozen = [vae.encoder_2d.mid.block_2, vae.encoder_2d.norm_out]
    if not settings.train_encoder:
        frozen += [vae.encoder_3d, vae.quant_conv]
    for module in frozen:
        module.requires_grad_(False)

    def loss_fn(step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        clips = [draw_clip(rng, settings.size, settings.photo_share, settings.crop_share) for _ in range(settings.batch)]
        video = as_video(np.stack(clips)).to(context.device)
        content = video[:, :, settings.config.content_frame]
        keep = torch.from_numpy(rng.random(settings.batch) >= settings.content_drop).to(video)
        with torch.set_grad_enabled(settings.train_encoder):
            posterior = vae.encode(video)
        output = vae.decode(vae.normalize_latent(posterior.sample()), vae.encode_content(content * keep[:, None, None, None])).float()
        absolute, squared, kl = F.l1_loss(output, video), F.mse_loss(output, video), posterior.kl().float().mean()
        still = F.mse_loss(content[:, :, None].expand_as(video), video)
        figures = {"psnr": _psnr(squared.detach()), "still_psnr": _psnr(still), "kl": kl}
        return absolute + squared + settings.kl_weight * kl, figures

    outcome = context.train(stage, vae, loss_fn, settings.loop)
    save_tensors(vae.state_dict(), context.run_folder(stage) / WEIGHTS)
    save_model(vae, context.out / "vae")
    figures = {"steps": outcome.step, "seconds": outcome.seconds} | outcome.last
    return context.record(stage, figures)


def _psnr(squared_error: Tensor) -> Tensor:
    """PSNR in dB of values in [-1, 1]."""
    return 10 * torch.log10(4 / squared_error)
