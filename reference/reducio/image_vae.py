"""Stable Diffusion's image autoencoder: it decodes drawn content frames, and encodes them for the Reducio-DiT.

Source: arXiv 2112.10752 and diffusers' `AutoencoderKL`, whose state-dict names and configuration it has.
Legend: N images, C channels, h w rows and columns.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DictMixin

EPS = 1e-6


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageVAEConfig(DictMixin):
    """diffusers' fields and defaults of the autoencoder of Stable Diffusion. Raises ValueError for other blocks."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        self.check_numbers()
        levels = len(self.block_out_channels)
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if getattr(self, name) != (kind,) * levels:
                raise ValueError(f"{name}={getattr(self, name)}: must be {levels} of {kind}")
        if self.act_fn != "silu":
            raise ValueError(f"act_fn={self.act_fn!r}: must be silu")
        if bad := [c for c in self.block_out_channels if c % self.norm_num_groups]:
            raise ValueError(f"block_out_channels: {bad[0]} is no multiple of norm_num_groups={self.norm_num_groups}")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell, in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)


class ResBlock(nn.Module):
    def __init__(self, config: ImageVAEConfig, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, channels, EPS)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, out_channels, EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x_NChw: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_NChw)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x_NChw if self.conv_shortcut is None else self.conv_shortcut(x_NChw))


class Attention(nn.Module):
    """One head over all positions of an image."""

    def __init__(self, config: ImageVAEConfig, channels: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(config.norm_num_groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list: the published name is to_out.0

    def forward(self, x_NChw: Tensor) -> Tensor:
        tokens_NLC = self.group_norm(x_NChw).flatten(2).transpose(1, 2)
        q, k, v = (to(tokens_NLC)[:, None] for to in (self.to_q, self.to_k, self.to_v))
        out_NLC = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x_NChw + out_NLC.transpose(1, 2).unflatten(2, x_NChw.shape[2:])


class Middle(nn.Module):
    def __init__(self, config: ImageVAEConfig, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(config, channels)] if config.mid_block_add_attention else [])
        self.resnets = nn.ModuleList(ResBlock(config, channels, channels) for _ in range(2))

    def forward(self, x_NChw: Tensor) -> Tensor:
        x_NChw = self.resnets[0](x_NChw)
        for attention in self.attentions:
            x_NChw = attention(x_NChw)
        return self.resnets[1](x_NChw)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_NChw: Tensor) -> Tensor:
        return self.conv(F.pad(x_NChw, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_NChw: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_NChw, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Res blocks, then half or twice the side. Published names: `downsamplers` and `upsamplers`, lists of one."""

    def __init__(self, config: ImageVAEConfig, channels: int, out_channels: int, layers: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(config, channels if i == 0 else out_channels, out_channels) for i in range(layers)
        )

    def forward(self, x_NChw: Tensor) -> Tensor:
        for block in self.resnets:
            x_NChw = block(x_NChw)
        for resample in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x_NChw = resample(x_NChw)
        return x_NChw


class Coder(nn.Module):
    """What encoder and decoder share: the first convolution, and norm, SiLU and convolution at the end."""

    def __init__(self, config: ImageVAEConfig, in_channels: int, first: int, last: int, out_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, last, EPS)
        self.conv_out = nn.Conv2d(last, out_channels, 3, padding=1)

    def finish(self, x_NChw: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_norm_out(x_NChw)))


class Encoder(Coder):
    """[N, 3, H, W] -> mean and log-variance [N, 2 * latent_channels, h, w]."""

    def __init__(self, config: ImageVAEConfig) -> None:
        widths = config.block_out_channels
        super().__init__(config, config.in_channels, widths[0], widths[-1], 2 * config.latent_channels)
        self.down_blocks = nn.ModuleList(
            Level(config, widths[max(i - 1, 0)], width, config.layers_per_block) for i, width in enumerate(widths)
        )
        for level, width in zip(self.down_blocks[:-1], widths[:-1], strict=True):
            level.downsamplers = nn.ModuleList([Downsample(width)])
        self.mid_block = Middle(config, widths[-1])

    def forward(self, image_N3HW: Tensor) -> Tensor:
        x_NChw = self.conv_in(image_N3HW)
        for level in self.down_blocks:
            x_NChw = level(x_NChw)
        return self.finish(self.mid_block(x_NChw))


class Decoder(Coder):
    """[N, latent_channels, h, w] -> [N, 3, H, W]."""

    def __init__(self, config: ImageVAEConfig) -> None:
        widths = config.block_out_channels[::-1]
        super().__init__(config, config.latent_channels, widths[0], widths[-1], config.out_channels)
        self.mid_block = Middle(config, widths[0])
        self.up_blocks = nn.ModuleList(
            Level(config, widths[max(i - 1, 0)], width, config.layers_per_block + 1) for i, width in enumerate(widths)
        )
        for level, width in zip(self.up_blocks[:-1], widths[:-1], strict=True):
            level.upsamplers = nn.ModuleList([Upsample(width)])

    def forward(self, z_NChw: Tensor) -> Tensor:
        x_NChw = self.mid_block(self.conv_in(z_NChw))
        for level in self.up_blocks:
            x_NChw = level(x_NChw)
        return self.finish(x_NChw)


class ImageVAE(nn.Module):
    """Images to latents and back. Latents here are not yet multiplied by `scaling_factor`."""

    def __init__(self, config: ImageVAEConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_out.weight.dtype

    def encode(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] in [-1, 1], sides multiples of `spatial_factor` -> the mode of the posterior [N, C, h, w]."""
        moments = self.encoder(images.to(self.dtype))
        return (moments if self.quant_conv is None else self.quant_conv(moments)).chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """[N, C, h, w] -> images [N, 3, H, W], not clamped. Raises ValueError for other channels."""
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, must be [N, {self.config.latent_channels}, h, w]"
            )
        latents = latents.to(self.dtype)
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))
