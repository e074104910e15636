"""A small decoder for previews: half the frame's size, a hundredth of the work, for latents that are being denoised.

This project's own; the paper has none. It is distilled from a video autoencoder (`training/tiny/preview.py`), whose
latents it reads. Like `Warp` it moves the content image by a flow and adds a residual, since an image that is moved
keeps details that so small a network could not draw.

Legend: B batch, C channels, T frames, t h w the latent's time steps, rows and columns, f frames per time step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DictMixin
from .vae import move

FINE = 4  # cells of the fine grid per latent cell, along each axis: an eighth of the frame if a cell is 32 pixels


@dataclass(frozen=True, slots=True)
class PreviewConfig(DictMixin):
    """Sizes of a `PreviewDecoder`. The first three are those of the autoencoder whose latents it reads."""

    latent_channels: int = 16
    temporal_factor: int = 4
    spatial_factor: int = 32
    width: int = 64  # channels on the latent's grid
    fine_width: int = 32  # channels on the fine grid
    num_res_blocks: int = 2  # on the fine grid

    def __post_init__(self) -> None:
        self.check_numbers()
        if self.spatial_factor % (2 * FINE):
            raise ValueError(f"spatial_factor={self.spatial_factor}: must be a multiple of {2 * FINE}")

    @property
    def scale(self) -> int:
        """Pixels of the preview per cell of the fine grid, along each axis."""
        return self.spatial_factor // 2 // FINE


class PreviewDecoder(nn.Module):
    """Latent and content image -> a rough clip at half the size."""

    def __init__(self, config: PreviewConfig) -> None:
        super().__init__()
        self.config = config
        width, fine, scale = config.width, config.fine_width, config.scale
        self.conv_in = nn.Conv3d(config.latent_channels, width, 3, padding=1)
        self.conv_mid = nn.Conv3d(width, width, 3, padding=1)
        self.expand = nn.Conv3d(width, config.temporal_factor * fine * FINE**2, 1)
        self.content = nn.Sequential(
            nn.PixelUnshuffle(scale), nn.Conv2d(3 * scale**2, fine, 3, padding=1), nn.SiLU(), nn.Conv2d(fine, fine, 1)
        )
        self.res_blocks = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(), nn.Conv2d(fine, fine, 3, padding=1), nn.SiLU(), nn.Conv2d(fine, fine, 3, padding=1)
            )
            for _ in range(config.num_res_blocks)
        )
        self.flow = nn.Conv2d(fine, 2, 3, padding=1)
        self.residual = nn.Sequential(nn.Conv2d(fine, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, z_BCthw: Tensor, image_BCHW: Tensor) -> Tensor:
        """Normalised latent [B, 16, t, h, w] and content image [B, 3, H, W] in [-1, 1] -> [B, 3, T, H/2, W/2]."""
        config, B = self.config, len(z_BCthw)
        x = self.conv_in(z_BCthw)
        x = x + self.conv_mid(F.silu(x))
        x = self.expand(F.silu(x)).unflatten(1, (config.temporal_factor, -1))  # [B, f, C * FINE^2, t, h, w]
        x = F.pixel_shuffle(x.permute(0, 3, 1, 2, 4, 5).flatten(0, 2), FINE)  # [B * T, C, fine grid]
        image = F.avg_pool2d(image_BCHW, 2)
        x = x + self.content(image).repeat_interleave(len(x) // B, dim=0)
        for block in self.res_blocks:
            x = x + block(x)
        flow = F.interpolate(self.flow(x), scale_factor=config.scale, mode="bilinear", align_corners=False)
        moved = move(image, flow, config.spatial_factor // 2)
        return (moved.to(x.dtype) + self.residual(x)).unflatten(0, (B, -1)).transpose(1, 2)
