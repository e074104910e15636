"""The space-time U-Net: Stable Diffusion 2's U-Net with a block over time behind every block in space.

Source: arXiv 2311.15127 and diffusers' `UNetSpatioTemporalConditionModel`, whose attribute and tensor names it has: a
published state dict loads as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import sampler
from .config import ATTENTION_DOWN, ATTENTION_UP, NORM_GROUPS, VideoUNetConfig, time_id_widths
from .layers import Attention, Blend, Downsample, SpatioTemporalResBlock, Upsample

MAX_PERIOD = 10000


def sinusoid(values: Tensor, channels: int) -> Tensor:
    """values [...] -> float32 [..., channels], cosines first."""
    half = channels // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=values.device) * -math.log(MAX_PERIOD) / half
    )
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def embed_numbers(config: Any, numbers: Tensor) -> Tensor:
    """Time ids of a network of this config, ours or diffusers': [..., n] -> float32 [..., sum of widths]."""
    each = zip(numbers.unbind(-1), time_id_widths(config), strict=True)
    return torch.cat([sinusoid(number, width) for number, width in each], dim=-1)


class TimestepEmbedding(nn.Module):
    def __init__(self, channels: int, hidden: int, out_channels: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, hidden)
        self.linear_2 = nn.Linear(hidden, out_channels or hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class GEGLU(nn.Module):
    """value * gelu(gate), both from one product."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        # The middle entry was a dropout: it keeps the published name `net.2`.
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class SpatialBlock(nn.Module):
    """Self-attention over the tokens of a frame, cross-attention to the image, feed-forward."""

    def __init__(self, channels: int, heads: int, context_channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(channels), nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.attn2 = Attention(channels, heads, context_channels)
        self.ff = FeedForward(channels)

    def forward(self, x_NLC: Tensor, context_NSE: Tensor) -> Tensor:
        x = x_NLC + self.attn1(self.norm1(x_NLC))
        x = x + self.attn2(self.norm2(x), context_NSE)
        return x + self.ff(self.norm3(x))


class TemporalBlock(nn.Module):
    """The same over the frames of each position, after a feed-forward of its own."""

    def __init__(self, channels: int, heads: int, context_channels: int) -> None:
        super().__init__()
        self.norm_in, self.ff_in = nn.LayerNorm(channels), FeedForward(channels)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(channels), nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.attn2 = Attention(channels, heads, context_channels)
        self.ff = FeedForward(channels)

    def forward(self, x_NLC: Tensor, frames: int, context_BSE: Tensor) -> Tensor:
        positions = x_NLC.shape[1]
        x = x_NLC.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)  # [B * L, T, C]
        x = x + self.ff_in(self.norm_in(x))
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context_BSE.repeat_interleave(positions, 0))
        x = x + self.ff(self.norm3(x))
        return x.unflatten(0, (-1, positions)).transpose(1, 2).flatten(0, 1)


class SpatioTemporalTransformer(nn.Module):
    """Blocks in space and time in turn, each pair blended; linear projections around them."""

    def __init__(self, channels: int, heads: int, layers: int, context_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, channels, 1e-6)
        self.proj_in, self.proj_out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(SpatialBlock(channels, heads, context_channels) for _ in range(layers))
        self.temporal_transformer_blocks = nn.ModuleList(
            TemporalBlock(channels, heads, context_channels) for _ in range(layers)
        )
        self.time_pos_embed = TimestepEmbedding(channels, 4 * channels, channels)
        self.time_mixer = Blend(0.5)

    def forward(self, x_NChw: Tensor, frames: int, context_NSE: Tensor) -> Tensor:
        h, w = x_NChw.shape[2:]
        x = self.proj_in(self.norm(x_NChw).flatten(2).transpose(1, 2).contiguous())
        numbers_N = torch.arange(frames, device=x.device).repeat(len(x) // frames)
        position_N1C = self.time_pos_embed(sinusoid(numbers_N, x.shape[-1]).to(x.dtype))[:, None]
        # Blocks over time attend to the context of the first frame.
        context_BSE = context_NSE.unflatten(0, (-1, frames))[:, 0]
        for spatial, temporal in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            x = spatial(x, context_NSE)
            x = self.time_mixer(x, temporal(x + position_N1C, frames, context_BSE))
        return x_NChw + self.proj_out(x).transpose(1, 2).unflatten(2, (h, w))


class Level(nn.Module):
    """The res blocks of one level, each with a transformer behind it where the level has attention."""

    def __init__(self, config: VideoUNetConfig, level: int, widths: list[tuple[int, int]], eps: float, attends: bool):
        super().__init__()
        embedding = 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(SpatioTemporalResBlock(*width, eps, embedding) for width in widths)
        if attends:
            sizes = (
                config.per_level(name)[level]
                for name in ("num_attention_heads", "transformer_layers_per_block", "cross_attention_dim")
            )
            heads, layers, context = sizes
            self.attentions = nn.ModuleList(
                SpatioTemporalTransformer(width[1], heads, layers, context) for width in widths
            )
        else:
            self.attentions = None

    def block(self, index: int, x: Tensor, frames: int, embedding: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[index](x, frames, embedding)
        return x if self.attentions is None else self.attentions[index](x, frames, context)


class DownLevel(Level):
    def __init__(self, config: VideoUNetConfig, level: int) -> None:
        channels = config.block_out_channels
        before, after = channels[max(level - 1, 0)], channels[level]
        attends = config.down_block_types[level] == ATTENTION_DOWN
        eps = config.attention_down_eps if attends else config.plain_down_eps
        count = config.per_level("layers_per_block")[level]
        super().__init__(config, level, [(before if i == 0 else after, after) for i in range(count)], eps, attends)
        last = level == len(channels) - 1
        self.downsamplers = None if last else nn.ModuleList([Downsample(after)])

    def forward(self, x: Tensor, frames: int, embedding: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for index in range(len(self.resnets)):
            x = self.block(index, x, frames, embedding, context)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class Middle(nn.Module):
    def __init__(self, config: VideoUNetConfig) -> None:
        super().__init__()
        channels, embedding = config.block_out_channels[-1], 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            SpatioTemporalResBlock(channels, channels, config.middle_eps, embedding) for _ in range(2)
        )
        names = ("num_attention_heads", "transformer_layers_per_block", "cross_attention_dim")
        heads, layers, context = (config.per_level(name)[-1] for name in names)
        self.attentions = nn.ModuleList([SpatioTemporalTransformer(channels, heads, layers, context)])

    def forward(self, x: Tensor, frames: int, embedding: Tensor, context: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, frames, embedding), frames, context)
        return self.resnets[1](x, frames, embedding)


class UpLevel(Level):
    """`level` counts from the finest, as everywhere in the configuration; the coarsest runs first."""

    def __init__(self, config: VideoUNetConfig, level: int) -> None:
        channels = config.block_out_channels
        coarser, after, finer = (
            channels[min(level + 1, len(channels) - 1)],
            channels[level],
            channels[max(level - 1, 0)],
        )
        count = config.per_level("layers_per_block")[level] + 1
        before = [coarser] + [after] * (count - 1)
        skips = [after] * (count - 1) + [finer]
        widths = [(b + s, after) for b, s in zip(before, skips, strict=True)]
        attends = config.up_block_types[len(channels) - 1 - level] == ATTENTION_UP
        super().__init__(config, level, widths, config.up_eps, attends)
        self.upsamplers = nn.ModuleList([Upsample(after)]) if level else None

    def forward(
        self, x: Tensor, skips: list[Tensor], frames: int, embedding: Tensor, context: Tensor, size: torch.Size | None
    ) -> Tensor:
        """`skips`: of the matching down level, used last to first. `size`: of the next level, if not twice this."""
        for index in range(len(self.resnets)):
            x = self.block(index, torch.cat([x, skips.pop()], dim=1), frames, embedding, context)
        return x if self.upsamplers is None else self.upsamplers[0](x, size)


class VideoUNet(nn.Module):
    """Predicts v for every frame of a noisy latent, concatenated with the conditioning image's latent."""

    def __init__(self, config: VideoUNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0])
        self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, 4 * channels[0])
        levels = range(len(channels))
        self.down_blocks = nn.ModuleList(DownLevel(config, level) for level in levels)
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList(UpLevel(config, level) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(NORM_GROUPS, channels[0], 1e-5)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv_in.weight.device

    def embed(self, timestep: Tensor, added_time_ids: Tensor, batch: int, frames: int) -> Tensor:
        """timestep [] or [B], added_time_ids [B, n] or, per frame, [B, T, n] -> [B * T, E]."""
        channels = self.config.block_out_channels[0]
        time = self.time_embedding(sinusoid(timestep.expand(batch), channels).to(self.dtype))
        added = self.add_embedding(embed_numbers(self.config, added_time_ids).to(self.dtype))
        added = added[:, None].expand(-1, frames, -1) if added.ndim == 2 else added
        return (time[:, None] + added).flatten(0, 1)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, added_time_ids: Tensor
    ) -> Tensor:
        """sample [B, T, in_channels, H, W], of any H and W of at least one cell on the coarsest level; timestep [] or
        [B], for the published schedule a quarter of the logarithm of sigma; encoder_hidden_states [B, S, C] or, per
        frame, [B, T, S, C]; added_time_ids [B, n] or, per frame, [B, T, n]: fps - 1, motion bucket, noise augmentation.
        Returns [B, T, out_channels, H, W]. Raises ValueError for shapes that do not fit.
        """
        check_inputs(self.config, sample, encoder_hidden_states, added_time_ids)
        batch, frames = sample.shape[:2]
        embedding = self.embed(timestep, added_time_ids, batch, frames)
        context = encoder_hidden_states
        context = context[:, None].expand(-1, frames, -1, -1) if context.ndim == 3 else context
        context = context.flatten(0, 1)

        x = self.conv_in(sample.flatten(0, 1))
        skips = [x]
        for level in self.down_blocks:
            x, level_skips = level(x, frames, embedding, context)
            skips += level_skips
        x = self.mid_block(x, frames, embedding, context)
        uneven = any(n % 2 ** (len(self.up_blocks) - 1) for n in sample.shape[-2:])
        for level in self.up_blocks:
            count = len(level.resnets)
            level_skips, skips = skips[-count:], skips[:-count]
            size = skips[-1].shape[2:] if uneven and skips else None
            x = level(x, level_skips, frames, embedding, context, size)
        out = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out.unflatten(0, (batch, frames))

    def denoiser(
        self,
        cond: sampler.ImageCondition | sampler.EndConditions,
        uncond: sampler.ImageCondition | None = None,
        guidance_scale: float | Tensor = 1.0,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """See `sampler.denoiser`."""
        return sampler.denoiser(self, cond, uncond, guidance_scale)


def check_inputs(config: Any, sample: Tensor, encoder_hidden_states: Tensor, added_time_ids: Tensor) -> None:
    """Raise ValueError for tensors that a U-Net of this `config`, ours or diffusers', cannot take."""
    if sample.ndim != 5 or sample.shape[2] != config.in_channels:
        raise ValueError(f"sample has shape {tuple(sample.shape)}, must be [B, T, {config.in_channels}, H, W]")
    batch, frames = sample.shape[:2]
    ids = len(time_id_widths(config))
    if added_time_ids.shape not in ((batch, ids), (batch, frames, ids)):
        raise ValueError(
            f"added_time_ids has shape {tuple(added_time_ids.shape)}, must be [{batch}, {ids}] or "
            f"[{batch}, {frames}, {ids}]"
        )
    width = config.cross_attention_dim if isinstance(config.cross_attention_dim, int) else config.cross_attention_dim[0]
    shape = encoder_hidden_states.shape
    if len(shape) not in (3, 4) or shape[0] != batch or shape[-1] != width or (len(shape) == 4 and shape[1] != frames):
        raise ValueError(
            f"encoder_hidden_states has shape {tuple(shape)}, must be [{batch}, S, {width}] or "
            f"[{batch}, {frames}, S, {width}]"
        )
