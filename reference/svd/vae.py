"""The autoencoder: Stable Diffusion's image encoder, and a decoder that also convolves over the frames of a clip.

Source: arXiv 2311.15127 and diffusers' `AutoencoderKLTemporalDecoder`, whose names it has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import cancellation
from .config import NORM_GROUPS, FrameVAEConfig, TemporalVAEConfig
from .layers import Attention, Downsample, SpatialResBlock, SpatioTemporalResBlock, Upsample

EPS, TEMPORAL_EPS = 1e-6, 1e-5


class FrameAttention(Attention):
    """One head over all positions of a frame, around a norm: [N, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1, bias=True)
        self.group_norm = nn.GroupNorm(NORM_GROUPS, channels, EPS)

    def forward(self, x_NChw: Tensor) -> Tensor:  # type: ignore[override]
        tokens = self.group_norm(x_NChw).flatten(2).transpose(1, 2)
        return super().forward(tokens).transpose(1, 2).unflatten(2, x_NChw.shape[2:]) + x_NChw


class EncoderLevel(nn.Module):
    def __init__(self, channels: int, out_channels: int, layers: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            SpatialResBlock(channels if i == 0 else out_channels, out_channels, EPS) for i in range(layers)
        )
        self.downsamplers = None if last else nn.ModuleList([Downsample(out_channels, asymmetric=True)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class EncoderMiddle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameAttention(channels)])
        self.resnets = nn.ModuleList(SpatialResBlock(channels, channels, EPS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Images [N, 3, H, W] -> mean and log-variance, [N, 2 * latent channels, H/8, W/8]."""

    def __init__(self, config: TemporalVAEConfig | FrameVAEConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            EncoderLevel(channels[max(i - 1, 0)], width, config.layers_per_block, i == len(channels) - 1)
            for i, width in enumerate(channels)
        )
        self.mid_block = EncoderMiddle(channels[-1])
        self.conv_norm_out = nn.GroupNorm(NORM_GROUPS, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


def _res_block(channels: int, out_channels: int) -> SpatioTemporalResBlock:
    return SpatioTemporalResBlock(channels, out_channels, EPS, temporal_eps=TEMPORAL_EPS, mix_factor=0.0, switched=True)


class DecoderMiddle(nn.Module):
    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameAttention(channels)])
        self.resnets = nn.ModuleList(_res_block(channels, channels) for _ in range(layers))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        x = self.resnets[0](x, frames)
        # diffusers pairs the blocks after the first with its one attention: those after the second never run.
        for attention, block in zip(self.attentions, self.resnets[1:], strict=False):
            x = block(attention(x), frames)
        return x


class DecoderLevel(nn.Module):
    def __init__(self, channels: int, out_channels: int, layers: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            _res_block(channels if i == 0 else out_channels, out_channels) for i in range(layers)
        )
        self.upsamplers = None if last else nn.ModuleList([Upsample(out_channels)])

    def forward(self, x: Tensor, frames: int) -> Tensor:
        for block in self.resnets:
            x = block(x, frames)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class TemporalDecoder(nn.Module):
    """Latents of whole clips, [B * T, 4, H/8, W/8] -> frames [B * T, 3, H, W]."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = DecoderMiddle(channels[0], config.layers_per_block)
        self.up_blocks = nn.ModuleList(
            DecoderLevel(channels[max(i - 1, 0)], width, config.layers_per_block + 1, i == len(channels) - 1)
            for i, width in enumerate(channels)
        )
        self.conv_norm_out = nn.GroupNorm(NORM_GROUPS, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)
        self.time_conv_out = nn.Conv3d(config.out_channels, config.out_channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, z: Tensor, frames: int) -> Tensor:
        x = self.mid_block(self.conv_in(z), frames)
        for level in self.up_blocks:
            x = level(x, frames)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return self.time_conv_out(x.unflatten(0, (-1, frames)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)


class TemporalVAE(nn.Module):
    """Images to latents, and clips of latents to frames. Latents here are not yet multiplied by `scaling_factor`."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.decoder = TemporalDecoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.quant_conv.weight.device

    def encode(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] in [-1, 1], sides multiples of 8 -> the mode of the posterior, [N, 4, H/8, W/8]."""
        factor = self.config.spatial_factor
        if images.ndim != 4 or images.shape[-2] % factor or images.shape[-1] % factor:
            raise ValueError(f"images have shape {tuple(images.shape)}, sides must be multiples of {factor}")
        return self.quant_conv(self.encoder(images)).chunk(2, dim=1)[0]

    def decode(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """[B, T, 4, H/8, W/8] -> frames [B, T, 3, H, W], not clamped.

        chunk: frames decoded at once, as diffusers' `decode_chunk_size`, over the frames of all clips in a row. Each
        chunk then depends only on its own frames, so the clip differs from that of all frames together (None).
        """
        if latents.ndim != 5 or latents.shape[2] != self.config.latent_channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, must be [B, T, {self.config.latent_channels}, h, w]"
            )
        batch, frames = latents.shape[:2]
        z = latents.flatten(0, 1)
        pieces = [z] if chunk is None else z.split(min(chunk, len(z)))
        decoded = []
        for piece in pieces:
            cancellation.check()
            decoded.append(self.decoder(piece, frames if chunk is None else len(piece)))
        return torch.cat(decoded).unflatten(0, (batch, frames))


class FrameDecoderLevel(nn.Module):
    def __init__(self, channels: int, out_channels: int, layers: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            SpatialResBlock(channels if i == 0 else out_channels, out_channels, EPS) for i in range(layers)
        )
        self.upsamplers = None if last else nn.ModuleList([Upsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class FrameDecoder(nn.Module):
    """Latents [N, 4, H/8, W/8] -> images [N, 3, H, W], each by itself."""

    def __init__(self, config: FrameVAEConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = EncoderMiddle(channels[0])
        self.up_blocks = nn.ModuleList(
            FrameDecoderLevel(channels[max(i - 1, 0)], width, config.layers_per_block + 1, i == len(channels) - 1)
            for i, width in enumerate(channels)
        )
        self.conv_norm_out = nn.GroupNorm(NORM_GROUPS, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class FrameVAE(nn.Module):
    """Stable Diffusion's autoencoder of images, behind the methods of `TemporalVAE`: frames are decoded one by one."""

    def __init__(self, config: FrameVAEConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None
        self.decoder = FrameDecoder(config)

    dtype = TemporalVAE.dtype
    encode = TemporalVAE.encode

    def decode(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """[B, T, 4, H/8, W/8] -> frames [B, T, 3, H, W], not clamped; `chunk` frames at once, which changes nothing."""
        if latents.ndim != 5 or latents.shape[2] != self.config.latent_channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, must be [B, T, {self.config.latent_channels}, h, w]"
            )
        z = latents.flatten(0, 1)
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        decoded = []
        for piece in z.split(min(chunk or 1, len(z))):
            cancellation.check()
            decoded.append(self.decoder(piece))
        return torch.cat(decoded).unflatten(0, latents.shape[:2])
