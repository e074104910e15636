"""The U-Net of the small embedded SVD, trained by EDM's objective on latents that are encoded once.

The pipeline's own networks make its conditioning inputs. Letters in shapes: B batch, T frames, C channels, H W rows and
columns, h w latent cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...checkpoints.networks import load_foreign, load_model, save_model
from ...checkpoints.strict_files import load_tensors, save_tensors
from ...media.pixels import to_unit
from ...reference.svd.config import (
    ATTENTION_DOWN,
    ATTENTION_UP,
    PLAIN_DOWN,
    PLAIN_UP,
    TemporalVAEConfig,
    VideoUNetConfig,
)
from ...reference.svd.sampler import ImageCondition
from ...reference.svd.unet import VideoUNet
from ...reference.svd.vae import TemporalVAE
from ...system.atomic_files import written_whole
from ..edm import AUGMENTATION, PUBLISHED_LEVELS, NoiseLevels, velocity_error, without_some
from ..loop import LoopConfig
from ..mixed_precision import autocast
from ..recipe import Context
from .tiny_image_encoder import preprocess
from .toy_clips import FRAMES, SIZE, draw_clip

TINY_UNET = VideoUNetConfig(
    sample_size=SIZE // 4,
    block_out_channels=(64, 64),
    down_block_types=(ATTENTION_DOWN, PLAIN_DOWN),
    up_block_types=(PLAIN_UP, ATTENTION_UP),
    addition_time_embed_dim=32,
    projection_class_embeddings_input_dim=96,
    layers_per_block=1,
    cross_attention_dim=32,
    num_attention_heads=2,
    num_frames=FRAMES,
)
LEVELS_SHOWN = (0.1, 1.0, 10.0, 100.0)  # noise levels whose error on held-out clips is a figure


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetSettings:
    loop: LoopConfig
    pool: int = 2048  # encoded clips
    held_out_pool: int = 64  # encoded clips of held-out scenes, for the figures
    batch: int = 4
    condition_drop: float = 0.1  # share of clips without their picture, for classifier-free guidance
    levels: NoiseLevels = PUBLISHED_LEVELS["image-to-video-320x576"]
    size: int = SIZE
    config: VideoUNetConfig = field(default_factory=lambda: TINY_UNET)


def pool_key(context: Context, settings: UNetSettings) -> str:
    """What clip i of the pools depends on besides i."""
    frames = settings.config.num_frames
    return context.pool_key(("vae", "image_encoder"), seed=settings.loop.seed, size=settings.size, frames=frames)


class Pool:
    """Encoded clips in memory. Clip i depends on (seed, held_out, i) alone; a resumed run reads their file."""

    def __init__(
        self, context: Context, settings: UNetSettings, held_out: bool, vae: TemporalVAE, encoder: object
    ) -> None:
        self.vae, key = vae, pool_key(context, settings)
        path = context.run_folder("unet") / "pool" / f"{'held_out' if held_out else 'training'}.safetensors"
        count = settings.held_out_pool if held_out else settings.pool
        if not context.has_pool(path, key) or len(load_tensors(path)["told"]) != count:
            path.parent.mkdir(parents=True, exist_ok=True)
            encoded = [self._encode(settings, held_out, i, encoder) for i in range(count)]
            with written_whole(path) as temporary:
                stacked = {name: torch.stack([clip[name] for clip in encoded]) for name in encoded[0]}
                save_tensors(stacked, temporary, key=key)
        self.tensors = load_tensors(path)

    def __len__(self) -> int:
        return len(self.tensors["told"])

    @torch.no_grad()
    def _encode(self, settings: UNetSettings, held_out: bool, index: int, encoder: object) -> dict[str, Tensor]:
        rng = np.random.default_rng((settings.loop.seed, int(held_out), index))
        clip = draw_clip(rng, held_out, settings.size, settings.config.num_frames)
        video = to_unit(clip.frames)
        with autocast(torch.device("cpu")):
            latents = self.vae.encode(video) * self.vae.config.scaling_factor
        return {
            "latents": latents.half(),
            "picture": torch.from_numpy(clip.frames[0].copy()),
            "embeds": encoder(preprocess(video[:1])).image_embeds,  # type: ignore[operator]
            "told": torch.tensor([clip.fps - 1.0, clip.motion_bucket_id]),
        }

    @torch.no_grad()
    def batch(self, index: Tensor, device: torch.device) -> tuple[Tensor, ImageCondition]:
        """Clean latents [B, T, 4, h, w] and conditions; each picture gets its own noise."""
        rows = {name: tensor[index].to(device) for name, tensor in self.tensors.items()}
        pictures = rows["picture"].permute(0, 3, 1, 2).float() / 127.5 - 1
        strength = AUGMENTATION.draw(len(index)).to(device)
        noisy = pictures + strength[:, None, None, None] * torch.randn_like(pictures)
        ids = torch.cat([rows["told"], strength[:, None]], dim=1)
        return rows["latents"].float(), ImageCondition(rows["embeds"], self.vae.encode(noisy).float(), ids)


def train_unet(context: Context, settings: UNetSettings) -> dict[str, float]:
    """Train and save `unet/`. Figures: error of v on clips of held-out scenes by noise level, and, as a bound that the
    error with the picture must beat, the error without the picture at the highest level."""
    torch.manual_seed(settings.loop.seed)
    device = context.device
    vae = load_model(TemporalVAE, TemporalVAEConfig, context.out / "vae", torch.float32)
    encoder = load_foreign(
        "transformers", "CLIPVisionModelWithProjection", context.out / "image_encoder", torch.float32, "cpu"
    )
    pool, held_out_pool = (Pool(context, settings, held_out, vae, encoder) for held_out in (False, True))
    vae.to(device)
    unet = VideoUNet(settings.config)

    def loss_fn(step: int, _micro: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        clean, condition = pool.batch(torch.from_numpy(rng.integers(len(pool), size=settings.batch)), device)
        sigma = settings.levels.draw(settings.batch).to(device)
        dropped = (torch.rand(settings.batch) < settings.condition_drop).to(device)
        with sdpa_kernel(SDPBackend.MATH):
            error = velocity_error(unet, clean, torch.randn_like(clean), sigma, without_some(condition, dropped))
        high = sigma > 1
        parts = {"low_noise": error[~high], "high_noise": error[high]}
        return error.mean(), {name: part.mean().detach() for name, part in parts.items() if len(part)}

    outcome = context.train("unet", unet, loss_fn, settings, encoded=pool_key(context, settings))
    figures = {"steps": outcome.step, "seconds": outcome.seconds}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.loop.seed)
        clean, condition = held_out_pool.batch(torch.arange(len(held_out_pool)), device)
        noise = torch.randn_like(clean)
        for level in LEVELS_SHOWN:
            sigma = torch.full((len(clean),), level, device=device)
            figures[f"held_out_{level:g}"] = float(velocity_error(unet, clean, noise, sigma, condition).mean())
        bare = condition.without_image()
        figures["without_picture"] = float(velocity_error(unet, clean, noise, sigma, bare).mean())
    save_model(unet, context.out / "unet")
    return context.record("unet", figures)
