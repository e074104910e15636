"""The recipe of a LoRA on SVD's attention over time: clips of one kind of camera motion in, a file of megabytes out.

arXiv 2311.15127 trained horizontal moves, zooms and stillness this way, at rank 16, in 5,000 steps. Everything but the
updates is frozen, and the pipeline's own parts make the network's conditioning inputs. Letters in shapes: B batch,
C channels, T frames, H W rows and columns.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...data.clip_files import ClipFiles, Drawn
from ...data.latent_shards import files_checksum
from ...pipelines.svd.conditioner import ImageConditioner
from ...pipelines.svd.pipeline import SVDPipeline
from ...reference.svd.layers import SpatioTemporalResBlock
from ...reference.svd.sampler import ImageCondition, join
from ...reference.svd.unet import SpatioTemporalTransformer, VideoUNet
from ...system.errors import ReducioError
from ..draw_ahead import DrawAhead
from ..edm import AUGMENTATION, PUBLISHED_LEVELS, NoiseLevels, velocity_error, without_some
from ..loop import LoopConfig, recorded_fields, run
from ..processes import joined
from ..recipe_file import check_least, check_positive, check_share, check_threads
from ..recompute import recompute
from .low_rank import TEMPORAL_ATTENTION, add_updates, save_updates

_LEVELS = PUBLISHED_LEVELS["image-to-video-576x1024"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRARecipe:
    """Settings of a LoRA's training. `batch` is global: all processes and micro-batches share it."""

    loop: LoopConfig
    batch: int
    rank: int = 16
    layers: str = TEMPORAL_ATTENTION  # a regular expression for the paths of linear layers
    size: tuple[int, int] = (576, 1024)  # rows and columns of the crops
    least_area: float = 0.8  # least area of a crop, as a share of the frame's largest crop of that shape
    mirror: bool = False  # mirrors half of the clips; this turns a pan to the left into one to the right
    num_frames: int | None = None  # None: what the weights were made for
    # Frames per second of the clips, as near as every n-th frame of a video comes: 6 to 8 for videos of 24 to 60. The
    # network's input is each clip's own rate - 1.
    rate: float = 7.0
    motion_bucket_id: float = 127.0
    noise_mean: float = _LEVELS.mean
    noise_std: float = _LEVELS.std
    condition_drop: float = 0.1  # share of clips without their image, for classifier-free guidance
    gradient_checkpointing: bool = False  # recompute the activations of a block in the backward pass
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or self.batch % self.loop.micro_batches:
            raise ReducioError(f"batch={self.batch} must be a multiple of loop.micro_batches={self.loop.micro_batches}")
        check_least(self, 1, "rank", "num_frames")
        check_threads(self.threads)
        check_least(self, -math.inf, "noise_mean")
        check_least(self, 0, "noise_std", "motion_bucket_id")
        check_positive(self, "rate")
        check_share(self, "least_area", "condition_drop")
        try:
            re.compile(self.layers)
        except re.error as error:
            raise ReducioError(f"layers={self.layers!r} is no regular expression: {error}") from error

    @property
    def levels(self) -> NoiseLevels:
        return NoiseLevels(mean=self.noise_mean, std=self.noise_std)


def add_trained(unet: VideoUNet, recipe: LoRARecipe) -> nn.ModuleDict:
    """Freeze the network and add the recipe's updates to it; returns the updates, as `add_updates` does."""
    updates = add_updates(unet, recipe.rank, recipe.layers)
    if recipe.gradient_checkpointing:
        kinds = (SpatioTemporalResBlock, SpatioTemporalTransformer)
        recompute(block for block in unet.modules() if isinstance(block, kinds))
    return updates


class Losses:
    """Loss of a batch. Each drawn clip depends only on (seed, step, place in the batch)."""

    def __init__(
        self, pipe: SVDPipeline, unet: VideoUNet, clips: ClipFiles, recipe: LoRARecipe, world_size: int = 1
    ) -> None:
        self.pipe, self.unet, self.clips, self.recipe = pipe, unet, clips, recipe
        self.drawn = DrawAhead(self.draw, recipe.batch, recipe.loop, world_size)

    def __call__(self, step: int, micro: int, _rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = [self.encode(*clip) for clip in self.drawn(step, micro)]
        clean = torch.cat([latents for latents, _, _ in drawn])
        condition = drawn[0][1]
        for _, other, _ in drawn[1:]:
            condition = join(condition, other)
        noise, sigma, dropped = (torch.stack(each) for each in zip(*(randoms for *_, randoms in drawn), strict=True))
        condition = without_some(condition, dropped.to(clean.device))
        error = velocity_error(self.unet, clean, noise.to(clean.device), sigma.to(clean.device), condition)
        return error.mean(), {"velocity_error": error.mean().detach()}

    def draw(self, step: int, row: int) -> tuple[Drawn, np.random.Generator]:
        """Row `row` of the global batch, and the generator of its other draws."""
        recipe = self.recipe
        rng = np.random.default_rng((recipe.loop.seed, step, row))
        return self.clips.draw(rng, recipe.size, recipe.least_area, recipe.mirror), rng

    @torch.no_grad()
    def encode(
        self, drawn: Drawn, rng: np.random.Generator
    ) -> tuple[Tensor, ImageCondition, tuple[Tensor, Tensor, Tensor]]:
        """A clip's latents [1, T, 4, h, w], its conditioning inputs, and (noise, noise level, whether the image is
        dropped)."""
        recipe, pipe = self.recipe, self.pipe
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        conditioner: ImageConditioner = pipe.conditioner
        images = drawn.clip.transpose(0, 1)
        latents = torch.cat([conditioner.encode(frame[None]).float() for frame in images])
        strength = AUGMENTATION.draw(1, generator)
        noisy = images[:1] + strength * torch.randn(images[:1].shape, generator=generator)
        picture = ((images[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
        embeds = conditioner.embed(picture).float()
        ids = torch.tensor([[drawn.fps - 1, recipe.motion_bucket_id, float(strength)]], device=embeds.device)
        condition = ImageCondition(embeds, conditioner.encode(noisy).float(), ids)
        clean = latents[None] * pipe.vae.config.scaling_factor
        noise = torch.randn(clean.shape[1:], generator=generator)
        dropped = torch.rand((), generator=generator) < recipe.condition_drop
        return clean, condition, (noise, recipe.levels.draw(1, generator)[0], dropped)


def train_lora(
    model: str | os.PathLike[str],
    clips: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: LoRARecipe,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    resume: bool = True,
    accept_changes: bool = False,
    progress: bool = True,
) -> dict[str, float]:
    """Train a LoRA for the SVD model `model` and write `out/lora`. Returns the last logged figures, with `steps` and
    `seconds`.

    Args:
        model: a folder or hub id of Stable Video Diffusion.
        clips: a manifest of `reducio-fast curate`.
        dtype: of the frozen weights; the updates are float32.
    """
    with joined(device, recipe.threads) as processes:
        folder = SVDPipeline.find_folder(model)
        weights = {name: files_checksum(folder / name) for name in ("unet", "vae", "image_encoder")}
        pipe = SVDPipeline.from_pretrained(folder, dtype=dtype, device=str(processes.device), backend="reference")
        factor = pipe.vae.config.spatial_factor
        if any(side < 1 or side % factor for side in recipe.size):
            raise ReducioError(f"size={list(recipe.size)}: must be positive multiples of {factor}")
        files = ClipFiles(clips, recipe.num_frames or pipe.unet.config.num_frames, recipe.rate)
        torch.manual_seed(recipe.loop.seed)
        updates = add_trained(pipe.unet, recipe)
        outcome = run(
            "svd-lora",
            updates,
            Losses(pipe, pipe.unet, files, recipe, processes.world_size),
            recipe.loop,
            Path(out) / "runs" / "svd-lora",
            processes,
            resume,
            accept_changes,
            progress,
            recorded=recorded_fields(recipe, clips=files.checksum(), model=weights, dtype=str(pipe.dtype)),
        )
        if processes.first:
            updates.load_state_dict(outcome.averaged)
            save_updates(updates, Path(out) / "lora")
        processes.barrier()
    return outcome.figures(processes.world_size)
