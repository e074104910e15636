"""The content autoencoder of the tiny model: diffusers' class with few channels, saved in diffusers' format.

Images are B 3 H W in [-1, 1]; latents are B 4 H/8 W/8.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ...data import photos
from ...media.pixels import to_unit
from ...media.similarity import psnr_of_error
from ..loop import LoopConfig
from ..recipe import Context
from .image_encoder import draw_still

FRAME_SIZE = 128


def to_image(frames: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to float32 B 3 H W in [-1, 1]."""
    return to_unit(np.ascontiguousarray(frames))


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentSettings:
    """An f8 autoencoder with 4 latent channels, trained in phases of growing size: many cheap steps come first.

    The last phase has the full size, because the statistics of group norm and of the middle attention depend on it.
    """

    loop: LoopConfig
    phases: tuple[tuple[float, int, int], ...] = ((0.55, 64, 4), (0.8, 64, 8), (1.0, FRAME_SIZE, 6))
    """(share of the steps at which the phase ends, pixels per side, batch)"""
    photo_share: float = 0.25
    kl_weight: float = 3e-4  # keeps latents near zero mean and smooth enough for stage one to model
    model: dict[str, Any] = field(
        default_factory=lambda: {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (16, 32, 64, 64),
            "layers_per_block": 1,
            "latent_channels": 4,
            # 4 channels per group at full resolution, as in Stable Diffusion: fewer would normalise a flat colour away.
            "norm_num_groups": 4,
            "sample_size": FRAME_SIZE,
        }
    )


@torch.no_grad()
def start_as_identity(model: AutoencoderKL) -> None:
    """Initialise the autoencoder so that it nearly reproduces colours from the first step.

    Residual branches start at zero, the convolutions between them as the identity plus a little noise. From diffusers'
    own initialisation, training needs the first 500 steps to reach this state.
    """
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        nn.init.zeros_(module.bias)
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if name.endswith(("conv2", "to_out.0")):
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Conv2d) and not name.endswith("conv1"):
            noise = 0.25 * module.weight
            nn.init.dirac_(module.weight).add_(noise)
    model.quant_conv.bias[
        model.config.latent_channels :
    ] = -3.0  # log variance, so that the decoder sees little noise at first


def normalize_latents(model: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold (z - mean) / std, per channel, into the 1x1 convolutions around the latent; decoded images do not change.

    diffusers' pipelines support one scaling factor for all channels and no offset; normalised latents need neither.
    """
    to_latent, from_latent, channels = model.quant_conv, model.post_quant_conv, len(mean)
    to_latent.bias[:channels] = (to_latent.bias[:channels] - mean) / std
    to_latent.weight[:channels] /= std[:, None, None, None]
    to_latent.bias[channels:] -= 2 * std.log()  # the posterior's log variance
    from_latent.bias += from_latent.weight[:, :, 0, 0] @ mean
    from_latent.weight *= std[:, None, None]


def train_content(context: Context, settings: ContentSettings) -> dict[str, float]:
    """Train and save `content_encoder/`; its latents of held-out scenes have mean 0 and standard deviation 1."""
    torch.manual_seed(settings.loop.seed)
    model = AutoencoderKL(**settings.model)
    start_as_identity(model)

    def draw(rng: np.random.Generator, size: int) -> np.ndarray:
        if rng.random() < settings.photo_share:
            return photos.render(rng, size, num_frames=1)[0]
        _, frame, truth = draw_still(rng)
        # Crop around the shape, off centre by up to half the crop: crops of pure background teach little.
        corner = truth.centres[0] * FRAME_SIZE - size / 2 + rng.uniform(-size / 2, size / 2, 2)
        left, top = np.clip(corner, 0, FRAME_SIZE - size).astype(int)
        return frame[top : top + size, left : left + size]

    def loss_fn(step: int, _micro: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        size, count = next((s, b) for end, s, b in settings.phases if step < end * settings.loop.steps)
        x = to_image(np.stack([draw(rng, size) for _ in range(count)])).to(context.device)
        posterior = model.encode(x).latent_dist
        error = model.decode(posterior.sample()).sample.float() - x
        figures = {
            "l1": error.abs().mean(),
            "mse": error.square().mean(),
            "kl": posterior.kl().mean() / posterior.mean[0].numel(),
        }
        return figures["l1"] + figures["mse"] + settings.kl_weight * figures["kl"], figures

    outcome = context.train("content", model, loss_fn, settings)
    figures = {"steps": outcome.step, "seconds": outcome.seconds}
    rng = np.random.default_rng((settings.loop.seed, 1 << 40))
    held_out = {
        "world": np.stack([draw_still(rng, held_out=True)[1] for _ in range(64)]),
        "photos": np.stack([photos.render(rng, FRAME_SIZE, num_frames=1, held_out=True)[0] for _ in range(24)]),
    }
    with torch.inference_mode():
        world_latents = encode(model, to_image(held_out["world"]).to(context.device))
        normalize_latents(model, world_latents.mean((0, 2, 3)), world_latents.std((0, 2, 3)))
        for kind, frames in held_out.items():
            x = to_image(frames).to(context.device)
            restored = torch.cat([model.decode(z[None]).sample for z in encode(model, x)]).clamp(-1, 1)
            errors = (restored - x.clamp(-1, 1)).square().flatten(1).mean(1)
            figures[f"psnr_{kind}"] = float(psnr_of_error(errors, 2.0).mean())
        figures["latent_std"] = float(encode(model, to_image(held_out["world"]).to(context.device)).std())
    model.register_to_config(scaling_factor=1.0)
    model.save_pretrained(context.out / "content_encoder", safe_serialization=True)
    return context.record("content", figures)


@torch.inference_mode()
def encode(model: AutoencoderKL, images: Tensor, batch: int = 32) -> Tensor:
    """The mode of the posterior, B 4 H/8 W/8, unscaled: the content latent of the video model."""
    return torch.cat([model.encode(part).latent_dist.mode() for part in images.split(batch)])
