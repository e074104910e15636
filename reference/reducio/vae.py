"""Reducio-VAE (arXiv 2411.13552): a video as one content image plus a motion latent 4096 times smaller than its pixels.

Module names equal the published checkpoints (microsoft/Reducio-VAE). Sizes below are those of the ft4 model on a
16x256x256 clip. Legend: B batch, C channels, T frames, H W rows and columns, L tokens, N heads, D head dim.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .. import cancellation
from .config import VAEConfig
from .fusion import (
    AddFusion,
    AttentionFusion,
    LinearFusion,
    join_windows,
    same_grid,
    split_windows,
    tokens,
    window_padding_mask,
)
from .tiling import Grid, blend_grid, stitch, tile_grid

# One tensor [B, C, H, W] per level, then the middle: 128@256, 256@128, 512@64, 512@32, 512@32. With `output="warp"` the
# content image itself comes last: it is cut in tiles, blended and kept as the features are.
Features = list[Tensor]
NORM_EPS = 1e-6
LATENT_NORM_EPS = 1e-5


class VideoConv(nn.Conv3d):
    """3D convolution with "same" zero padding at stride 1. `causal`: all padding of the time axis goes to the front."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, causal: bool) -> None:
        pad = kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, padding=(0 if causal else pad, pad, pad))
        self.front = kernel_size - 1 if causal else 0

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return super().forward(F.pad(x_BCTHW, (0, 0, 0, 0, self.front, 0)) if self.front else x_BCTHW)


class PerFrameGroupNorm(nn.GroupNorm):
    """GroupNorm with statistics per frame, as a causal model needs: a clip-wide mean depends on later frames."""

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        frames = x_BCTHW.transpose(1, 2)
        return super().forward(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


class Layers:
    """Factories for the building blocks, so that the 3D and the 2D networks are written once."""

    def __init__(self, config: VAEConfig, dims: int) -> None:
        self.dims, self.causal, self.num_heads = dims, config.causal and dims == 3, config.num_heads
        self.window_size = config.window_size if dims == 3 else config.content_window_size
        self.mask_padding, self.norm_groups = config.mask_window_padding, config.norm_groups

    def norm(self, channels: int) -> nn.GroupNorm:
        return (PerFrameGroupNorm if self.causal else nn.GroupNorm)(self.norm_groups, channels, eps=NORM_EPS)

    def conv(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> nn.Module:
        if self.dims == 2:
            return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        return VideoConv(in_channels, out_channels, kernel_size, self.causal)


class ResBlock(nn.Module):
    """GroupNorm - SiLU - conv3 - GroupNorm - SiLU - conv3 plus the input; a 1x1 convolution where the width changes."""

    def __init__(self, layers: Layers, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = layers.norm(in_channels), layers.conv(in_channels, out_channels)
        self.norm2, self.conv2 = layers.norm(out_channels), layers.conv(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = layers.conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SelfAttention(nn.Module):
    """Joint self-attention over all positions of the clip (or image); in windows only above `window_size`^2 cells."""

    def __init__(self, layers: Layers, channels: int) -> None:
        super().__init__()
        self.num_heads, self.window_size = layers.num_heads, layers.window_size
        self.causal, self.mask_padding = layers.causal, layers.mask_padding
        self.norm = layers.norm(channels)
        self.q, self.k, self.v, self.proj_out = (layers.conv(channels, channels, 1) for _ in range(4))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        def heads(t_BCTHW: Tensor) -> Tensor:
            return tokens(t_BCTHW).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        out_BNLD = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=mask)
        return out_BNLD.transpose(2, 3).reshape(q.shape)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        (H, W), size = h.shape[-2:], self.window_size
        window, windowed = (size, size), size**2 < H * W
        if windowed:  # before the projections, as in the release: a padded key is then the bias of `k`, not zero
            h = F.pad(h, (0, -W % size, 0, -H % size))
        q, k, v = (t if t.ndim == 5 else t[:, :, None] for t in (self.q(h), self.k(h), self.v(h)))
        B, _, T = q.shape[:3]
        mask = None
        if windowed:
            if self.mask_padding:
                mask = window_padding_mask((H, W), window, B, T, q)
            q, k, v = (split_windows(t, window) for t in (q, k, v))
        if self.causal:
            frame = torch.arange(T, device=q.device).repeat_interleave(q.shape[-2] * q.shape[-1])
            past = frame[:, None] >= frame[None, :]
            mask = past if mask is None else mask & past
        out = self.attend(q, k, v, mask)
        if windowed:
            out = join_windows(out, (H, W))
        return x + self.proj_out(out.reshape(x.shape))


class Downsample(nn.Module):
    """Stride-2 convolution, kernel 3, zero padding at the right and bottom only (as in LDM; a half-pixel shift).

    `time` adds the time axis to kernel and stride, padded by one frame at the end, or by two at the front when causal:
    then latent step i sees frames up to 2i and no later one.
    """

    def __init__(self, layers: Layers, channels: int, time: bool) -> None:
        super().__init__()
        self.pad: tuple[int, ...] = (0, 1, 0, 1)
        if layers.dims == 2:
            self.conv: nn.Module = nn.Conv2d(channels, channels, 3, stride=2)
        elif time:
            self.pad += (2, 0) if layers.causal else (0, 1)
            self.conv = nn.Conv3d(channels, channels, 3, stride=2)
        else:
            self.conv = nn.Conv3d(channels, channels, (1, 3, 3), stride=(1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad))


class Upsample(nn.Module):
    """Nearest x2 in space, and in time if `time`, then a full 3x3x3 convolution."""

    def __init__(self, layers: Layers, channels: int, time: bool) -> None:
        super().__init__()
        self.scale = (2.0 if time else 1.0, 2.0, 2.0)
        self.conv = layers.conv(channels, channels)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCTHW, scale_factor=self.scale, mode="nearest"))


class Middle(nn.Module):
    """Res-block, (fusion), self-attention, res-block at the lowest resolution."""

    def __init__(self, layers: Layers, channels: int, fuse: nn.ModuleList | None = None) -> None:
        super().__init__()
        self.block_1 = ResBlock(layers, channels, channels)
        if fuse is not None:
            self.fuse = fuse
        self.attn_1 = SelfAttention(layers, channels)
        self.block_2 = ResBlock(layers, channels, channels)

    def forward(self, x: Tensor, content: Tensor | None = None) -> Tensor:
        x = self.block_1(x)
        for fuse in getattr(self, "fuse", ()):
            x = fuse(x, content)
        return self.block_2(self.attn_1(x))


class EncoderLevel(nn.Module):
    def __init__(self, layers: Layers, in_channels: int, channels: int, blocks: int, down: str | None) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * blocks
        self.block = nn.ModuleList(ResBlock(layers, a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        if down is not None:
            self.downsample = Downsample(layers, channels, time=down == "space+time")

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class Encoder3D(nn.Module):
    """Clip [B, 3, T, H, W] -> moments [B, 2 * latent_channels, T/f, H/32, W/32] before the quant convolution."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        layers = Layers(config, dims=3)
        widths = [config.base_channels * m for m in config.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = layers.conv(3, config.base_channels)
        self.down = nn.ModuleList(
            EncoderLevel(
                layers,
                widths[max(i - 1, 0)] if i else config.base_channels,
                width,
                config.res_blocks_at(i),
                None if i == last else "space+time" if config.halves_time(i) else "space",
            )
            for i, width in enumerate(widths)
        )
        self.mid = Middle(layers, widths[-1])
        self.norm_out = layers.norm(widths[-1])
        self.conv_out = layers.conv(widths[-1], 2 * config.latent_channels)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        h = self.conv_in(x_BCTHW)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class ContentEncoder(nn.Module):
    """Content image [B, 3, H, W] -> its feature pyramid (an LDM f8 encoder).

    The list holds every level before its down-sampling and, last, the middle after its self-attention. `mid.block_2`
    and `norm_out` exist in the checkpoints but influence nothing; they are kept for the names and never run.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        layers = Layers(config, dims=2)
        self.hands_on_image = config.warps
        widths = [config.content_base_channels * m for m in config.content_channel_multipliers]
        last = len(widths) - 1
        self.conv_in = layers.conv(3, config.content_base_channels)
        self.down = nn.ModuleList(
            EncoderLevel(
                layers,
                widths[i - 1] if i else config.content_base_channels,
                width,
                config.res_blocks_at(i),
                None if i == last else "space",
            )
            for i, width in enumerate(widths)
        )
        self.mid = Middle(layers, widths[-1])
        self.norm_out = layers.norm(widths[-1])

    def forward(self, image_BCHW: Tensor) -> Features:
        h, features, last = self.conv_in(image_BCHW), [], [image_BCHW] if self.hands_on_image else []
        for level in self.down:
            h = level(h)
            features.append(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return [*features, self.mid.attn_1(self.mid.block_1(h)), *last]


class DecoderLevel(nn.Module):
    """Res-blocks, (fusion), res-blocks, (up-sampling)."""

    def __init__(
        self, layers: Layers, in_channels: int, channels: int, blocks: int, fuse: nn.ModuleList | None, up: str | None
    ) -> None:
        super().__init__()
        self.block_1 = nn.ModuleList(ResBlock(layers, channels if i else in_channels, channels) for i in range(blocks))
        if fuse is not None:
            self.fuse = fuse
        self.block_2 = nn.ModuleList(ResBlock(layers, channels, channels) for _ in range(blocks))
        if up is not None:
            self.upsample = Upsample(layers, channels, time=up == "space+time")

    def forward(self, x: Tensor, content: Tensor | None) -> Tensor:
        for block in self.block_1:
            x = block(x)
        for fuse in getattr(self, "fuse", ()):
            x = fuse(x, content)
        for block in self.block_2:
            x = block(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Decoder(nn.Module):
    """Motion latent [B, 16, T/f, H/32, W/32] and content features -> clip [B, 3, T, H, W], not clamped.

    With `output="warp"` it returns the input of `Warp`, [B, 5, T, H, W].
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.sources, self.middle = config.fusion_levels, config.content_levels
        layers = Layers(config, dims=3)
        widths = [config.base_channels * m for m in config.channel_multipliers]
        last = len(widths) - 1
        fusion = partial(fusion_modules, config, layers)
        self.conv_in = layers.conv(config.latent_channels, widths[-1])
        self.mid = Middle(layers, widths[-1], fusion("attn", last, config.content_levels))
        self.up = nn.ModuleList(  # indexed by level as published: 0 is full resolution, the last runs first
            DecoderLevel(
                layers,
                widths[min(i + 1, last)],
                width,
                config.res_blocks_at(i),
                None if self.sources[i] is None else fusion(config.fusion_kinds[i], i, self.sources[i]),
                None if i == 0 else "space+time" if config.halves_time(i - 1) else "space",
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = layers.norm(widths[0])
        self.conv_out = layers.conv(widths[0], 5 if config.warps else 3)

    def forward(self, z_BCTHW: Tensor, features: Features) -> Tensor:
        h = self.mid(self.conv_in(z_BCTHW), features[self.middle])
        for level, source in zip(reversed(self.up), reversed(self.sources), strict=True):
            h = level(h, None if source is None else features[source])
        return self.conv_out(F.silu(self.norm_out(h)))


class Warp(nn.Module):
    """The content image moved by a flow, plus a residual: a decoder that copies instead of drawing again.

    Frame t at (y, x) is the image at (y, x) + flow (bilinear, the border repeated) plus the residual. The flow's coarse
    part comes straight from the latent, by a path without norms (in the deep decoder the magnitude of a motion passes a
    dozen of them), and is resized to the frame (bicubic); the decoder refines it. Flows are in latent cells, 32 pixels.
    Published decoders do not warp. Without it a 2M-parameter decoder returned even the frame it was given at 20 dB.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        layers, width = Layers(config, dims=3), config.base_channels * config.channel_multipliers[-1]
        self.frames, self.cell = config.temporal_factor, config.spatial_factor
        self.hidden = layers.conv(config.latent_channels, width)
        self.flow = layers.conv(width, 2 * self.frames, 1)

    def coarse_flow(self, z_BCTHW: Tensor) -> Tensor:
        """[B, 2, T, H/32, W/32]: x, then y."""
        flow = self.flow(F.silu(self.hidden(z_BCTHW)))
        return flow.unflatten(1, (2, self.frames)).transpose(2, 3).flatten(2, 3)

    def forward(self, x_BCTHW: Tensor, z_BCTHW: Tensor, image_BCHW: Tensor) -> Tensor:
        """`x_BCTHW`: refinement of the flow (2 channels), then the residual (3)."""
        fine, residual = x_BCTHW.split((2, 3), dim=1)
        B, _, T, H, W = x_BCTHW.shape
        coarse = self.coarse_flow(z_BCTHW).transpose(1, 2).flatten(0, 1)
        flow = F.interpolate(coarse, (H, W), mode="bicubic", align_corners=False) + fine.transpose(1, 2).flatten(0, 1)
        moved = move(same_grid(image_BCHW, x_BCTHW), flow, self.cell)
        return moved.unflatten(0, (B, T)).transpose(1, 2).to(x_BCTHW.dtype) + residual


def move(image_BCHW: Tensor, flow_N2HW: Tensor, cell: int) -> Tensor:
    """[N, C, H, W], at least in float32: N / B frames of each image, read at (y, x) + flow, bilinear.

    The flow is x, then y, in cells of `cell` pixels. The image's border is repeated.
    """
    N, _, H, W = flow_N2HW.shape
    # In float32 at least: 16-bit coordinates of a 256-pixel frame are whole pixels (bfloat16) or sixteenths.
    exact = torch.promote_types(flow_N2HW.dtype, torch.float32)
    step = cell * 2 / torch.tensor((W, H), dtype=exact, device=flow_N2HW.device)
    rows = (torch.arange(H, dtype=exact, device=flow_N2HW.device) * 2 + 1) / H - 1
    columns = (torch.arange(W, dtype=exact, device=flow_N2HW.device) * 2 + 1) / W - 1
    place = torch.stack([columns.expand(H, W), rows[:, None].expand(H, W)], dim=-1)
    grid = place + flow_N2HW.movedim(1, -1) * step
    frames = image_BCHW.to(exact).repeat_interleave(N // len(image_BCHW), dim=0)
    return F.grid_sample(frames, grid, mode="bilinear", padding_mode="border", align_corners=False)


def fusion_modules(config: VAEConfig, layers: Layers, kind: str, level: int, source: int) -> nn.ModuleList:
    """The chain of fusion blocks of one decoder level: one block, or two for `add+attn`."""
    dim = config.base_channels * config.channel_multipliers[level]
    multiplier = config.content_channel_multipliers[min(source, config.content_levels - 1)]
    context_dim, frames = config.content_base_channels * multiplier, config.frames_at(level)
    pixels = 2**level, 2 ** min(source, config.content_levels - 1)
    cells = pixels if config.fusion_position == "sincos" else None
    build = {
        "attn": lambda: AttentionFusion(
            dim, context_dim, frames, config.fusion_head_dim, config.window_size, config.mask_window_padding, cells
        ),
        "add": lambda: AddFusion(dim, context_dim, frames, layers.conv(dim, dim), layers.norm(dim)),
        "linear": lambda: LinearFusion(dim, context_dim, frames, layers.norm(dim), config.causal),
    }
    return nn.ModuleList(build[part]() for part in kind.split("+"))


class DiagonalGaussian:
    """Posterior over motion latents: `mean` and `logvar` [B, 16, t, h, w], logvar clamped to [-30, 20]."""

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + exp(logvar / 2) * noise, which is drawn on the generator's device: a CPU generator suits any GPU."""
        device = generator.device if generator is not None else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + (0.5 * self.logvar).exp() * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence to N(0, 1) per item [B], summed over channels, time and space."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)


class ReducioVAE(nn.Module):
    """The whole autoencoder. Videos and images lie in [-1, 1]; the content image is frame `config.content_frame`.

    A clip is compressed with `encode` and `normalize_latent`, restored with `decode` from that latent and the features
    of `encode_content`. `tiled=True` works in tiles of `config.tile_size` pixels as the release does;
    `config.needs_tiling` says which frames are too large without.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder_3d = Encoder3D(config)
        self.encoder_2d = ContentEncoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, 1)
        self.warp = Warp(config) if config.warps else None

    def encode(self, video: Tensor, tiled: bool = False) -> DiagonalGaussian:
        """Posterior of the motion latent [B, 16, T/f, H/32, W/32] of a clip [B, 3, T, H, W].

        Raises ValueError for a size that is not a multiple of 32 (the release silently shrinks it) or a frame count
        other than `config.num_frames` (the time embeddings have that length).
        """
        self.check_video(video)
        if not tiled:
            return DiagonalGaussian(self._moments(video))
        stride, extent, latent_stride, _ = self.tile_sizes()
        grid = [[self._moments(tile) for tile in row] for row in tile_grid(video, stride, extent)]
        overlap = int(latent_stride * self.config.tile_overlap)
        return DiagonalGaussian(stitch(grid, overlap, latent_stride))

    def encode_content(self, image: Tensor, tiled: bool = False) -> Features | list[list[Features]]:
        """Feature pyramid of the content image [B, 3, H, W]; tiled, a grid of pyramids that `decode(tiled=True)` takes.

        Tiles are blended level by level at their top and left sides and stay uncropped: each serves one decoder tile.
        """
        self.check_image(image)
        if not tiled:
            return self.encoder_2d(image)
        stride, extent, _, _ = self.tile_sizes()
        grid = [[self.encoder_2d(tile) for tile in row] for row in tile_grid(image, stride, extent)]
        share = self.config.tile_overlap

        def overlap(tile: Tensor, dim: int) -> int:
            return int(tile.shape[dim] / (1 + share) * share)

        levels = [blend_grid([[f[i] for f in row] for row in grid], overlap) for i in range(len(grid[0][0]))]
        return [[[level[i][j] for level in levels] for j in range(len(row))] for i, row in enumerate(grid)]

    def decode(self, latent: Tensor, features: Features | list[list[Features]], tiled: bool = False) -> Tensor:
        """Clip [B, 3, T, H, W], not clamped, from a normalised latent [B, 16, T/f, H/32, W/32] and content features.

        The latent is not normalised again. Raises ValueError for a latent whose channels or time steps do not fit.
        """
        self.check_latent(latent, features, tiled)
        if not tiled:
            return self._decode(latent, features)
        stride, _, latent_stride, latent_extent = self.tile_sizes()
        grid: Grid = [
            [self._decode_tile(tile, pyramid) for tile, pyramid in zip(tiles, pyramids, strict=True)]
            for tiles, pyramids in zip(tile_grid(latent, latent_stride, latent_extent), features, strict=True)
        ]
        return stitch(grid, int(stride * self.config.tile_overlap), stride)

    def normalize_latent(self, z: Tensor) -> Tensor:
        """Parameter-free layer norm of each sample over all of C, T, H, W: the decoder and the DiT see only these.

        With `causal`, each time step is normalised on its own, so that no step depends on a later one.
        """
        if not self.config.causal:
            return F.layer_norm(z, z.shape[1:], eps=LATENT_NORM_EPS)
        steps = z.transpose(1, 2)
        return F.layer_norm(steps, steps.shape[2:], eps=LATENT_NORM_EPS).transpose(1, 2)

    def _moments(self, video: Tensor) -> Tensor:
        return self.quant_conv(self.encoder_3d(video))

    def _decode_tile(self, latent: Tensor, features: Features) -> Tensor:
        cancellation.check()
        if torch.is_grad_enabled() and latent.requires_grad:  # keeps one tile's activations, not the whole frame's
            return checkpoint(self._decode, latent, features, use_reentrant=False)
        return self._decode(latent, features)

    def _decode(self, latent: Tensor, features: Features) -> Tensor:
        x = self.decoder(self.post_quant_conv(latent), features)
        return x if self.warp is None else self.warp(x, latent, features[-1])

    def tile_sizes(self) -> tuple[int, int, int, int]:
        """Stride and read extent in pixels, then in latent cells: 256, 320, 8, 10 in the release."""
        grow, factor = 1 + self.config.tile_overlap, self.config.spatial_factor
        stride, latent_stride = self.config.tile_size, self.config.tile_size // factor
        return stride, int(stride * grow), latent_stride, int(latent_stride * grow)

    def check_video(self, video: Tensor) -> None:
        """ValueError for what `encode` cannot take."""
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video must be [B, 3, T, H, W], not {list(video.shape)}")
        if video.shape[2] != self.config.num_frames:
            raise ValueError(f"video has {video.shape[2]} frames, this VAE has num_frames={self.config.num_frames}")
        self._check_size("video", video.shape[-2:])

    def check_image(self, image: Tensor) -> None:
        """ValueError for what `encode_content` cannot take."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"image must be [B, 3, H, W], not {list(image.shape)}")
        self._check_size("image", image.shape[-2:])

    def check_latent(self, latent: Tensor, features: Features | list[list[Features]], tiled: bool) -> None:
        """ValueError for what `decode` cannot take."""
        steps = self.config.num_frames // self.config.temporal_factor
        expected = (self.config.latent_channels, steps)
        if latent.ndim != 5 or tuple(latent.shape[1:3]) != expected:
            raise ValueError(f"latent must be [B, {expected[0]}, {expected[1]}, h, w], not {list(latent.shape)}")
        if tiled != isinstance(features[0], list):
            raise ValueError(f"decode(tiled={tiled}) needs the features of encode_content(tiled={tiled})")

    def _check_size(self, name: str, size: torch.Size) -> None:
        factor = self.config.spatial_factor
        for axis, n in zip(("height", "width"), size, strict=True):
            if n == 0 or n % factor:
                near = " or ".join(str(k) for k in (n // factor * factor, n // factor * factor + factor) if k > 0)
                raise ValueError(f"{name} {axis} {n} is not a multiple of {factor}; nearest are {near}")
