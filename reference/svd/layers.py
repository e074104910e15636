"""Layers that the U-Net and the decoder share. Frames are items of the batch: N = B * T, in that order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import NORM_GROUPS


class SpatialResBlock(nn.Module):
    """norm, SiLU, conv, + embedding, norm, SiLU, conv, + shortcut: [N, C, H, W], each frame by itself."""

    def __init__(self, channels: int, out_channels: int, eps: float, embedding: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NORM_GROUPS, channels, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if embedding is None else nn.Linear(embedding, out_channels)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x_NChw: Tensor, embedding_NE: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_NChw)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(F.silu(embedding_NE))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x_NChw if self.conv_shortcut is None else self.conv_shortcut(x_NChw))


class TemporalResBlock(nn.Module):
    """The same over time: [B, C, T, H, W], convolutions of 3x1x1, norms over all frames of the clip."""

    def __init__(self, channels: int, eps: float, embedding: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NORM_GROUPS, channels, eps)
        self.conv1 = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
        self.time_emb_proj = None if embedding is None else nn.Linear(embedding, channels)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, channels, eps)
        self.conv2 = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x_BCThw: Tensor, embedding_BTE: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_BCThw)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(F.silu(embedding_BTE)).transpose(1, 2)[..., None, None]
        return x_BCThw + self.conv2(F.silu(self.norm2(h)))


class Blend(nn.Module):
    """a * spatial + (1 - a) * temporal with a = sigmoid(mix_factor), or, `switched`, a and 1 - a exchanged."""

    def __init__(self, mix_factor: float, switched: bool = False) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([mix_factor]))
        self.switch_spatial_to_temporal_mix = switched

    def spatial_share(self) -> Tensor:
        share = torch.sigmoid(self.mix_factor)
        return 1.0 - share if self.switch_spatial_to_temporal_mix else share

    def forward(self, spatial: Tensor, temporal: Tensor) -> Tensor:
        share = self.spatial_share().to(spatial.dtype)
        return share * spatial + (1.0 - share) * temporal


class SpatioTemporalResBlock(nn.Module):
    """A res block in space, one in time on its result, and their blend."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        eps: float,
        embedding: int | None = None,
        temporal_eps: float | None = None,
        mix_factor: float = 0.5,
        switched: bool = False,
    ) -> None:
        super().__init__()
        self.spatial_res_block = SpatialResBlock(channels, out_channels, eps, embedding)
        self.temporal_res_block = TemporalResBlock(
            out_channels, eps if temporal_eps is None else temporal_eps, embedding
        )
        self.time_mixer = Blend(mix_factor, switched)

    def forward(self, x_NChw: Tensor, frames: int, embedding_NE: Tensor | None = None) -> Tensor:
        spatial = self.spatial_res_block(x_NChw, embedding_NE)
        clip = spatial.unflatten(0, (-1, frames)).transpose(1, 2)
        embedding = None if embedding_NE is None else embedding_NE.unflatten(0, (-1, frames))
        mixed = self.time_mixer(clip, self.temporal_res_block(clip, embedding))
        return mixed.transpose(1, 2).flatten(0, 1)


class Downsample(nn.Module):
    """Half the height and width by a convolution of stride 2. The VAE pads only on the right and below."""

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x_NChw: Tensor) -> Tensor:
        return self.conv(F.pad(x_NChw, (0, 1, 0, 1)) if self.asymmetric else x_NChw)


class Upsample(nn.Module):
    """Twice the height and width, or `size`, by repetition, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_NChw: Tensor, size: torch.Size | None = None) -> Tensor:
        scale = 2.0 if size is None else None
        return self.conv(F.interpolate(x_NChw, size=size, scale_factor=scale, mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention of tokens [N, L, C] over `context` [N, S, E], or over themselves."""

    def __init__(self, channels: int, heads: int, context_channels: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias)
        self.to_k = nn.Linear(context_channels or channels, channels, bias)
        self.to_v = nn.Linear(context_channels or channels, channels, bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x_NLC: Tensor, context_NSE: Tensor | None = None) -> Tensor:
        context = x_NLC if context_NSE is None else context_NSE
        q, k, v = (
            linear(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, source in ((self.to_q, x_NLC), (self.to_k, context), (self.to_v, context))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](out.transpose(1, 2).flatten(2))
