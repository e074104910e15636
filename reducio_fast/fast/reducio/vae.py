"""The fast twin of `reference/reducio/vae.py`: the same autoencoder on channels-last tensors [N, T, H, W, C].

What differs from the reference, and why:
- a convolution reads a buffer whose zero halo the pass before it has written: no masks, no separate padding (on a CPU
  the library's own padding costs less);
- GroupNorm and SiLU are one pass over memory; on a GPU the convolution before them computes their statistics;
- residuals and biases are added where a convolution ends;
- up-sampling and the convolution after it are folded into smaller convolutions over the low-resolution tensor;
- content keys and values serve all frames of a clip, and attention reads query, key and value from one product;
- the second middle block of the content encoder, which influences nothing, is left out; of its levels only those are
  kept that the decoder reads (at 1024 pixels 80 MB instead of 710);
- a decoder that warps moves the content frame, refines and adds in one pass over the frames;
- tiles of one shape are decoded together where memory allows, and blended, cropped and converted in one pass.

Legend: N clips, T frames, H W rows and columns, C channels, L tokens (T*H*W), S content tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...compile.compiled_blocks import Regional
from ...compile.graphs import Graphs
from ...reference import ReducioVAE, cancellation
from ...reference.reducio import vae as ref
from ...reference.reducio.tiling import blend_grid, stitch, tile_grid
from ...triton_kernels.upsample_conv3d import fold_weight
from ..packed_layers import (
    DENSE,
    Activation,
    FastConv,
    FastNorm,
    Padding,
    channels_first,
    channels_last,
    conv_after_norm,
    frozen,
    pad,
    padding_of,
)
from ..parallel import Ranks
from ..plan import Plan
from .fusion import fusions

Features = list[Tensor]  # those of the reference that the decoder reads, [N, 1, H, W, C]


class FastResBlock(nn.Module):
    """`stats`: the next layer begins with a GroupNorm over the clip. Statistics that nothing reads would cost a
    convolution 5500 to 11200 cycles of 73000 to 139000 on an H200 (a simulation of its machine code)."""

    def __init__(self, block: ref.ResBlock, plan: Plan, path: str, stats: bool = True) -> None:
        super().__init__()
        self.norm1 = FastNorm(block.norm1, plan, f"{path}.norm1")
        self.conv1 = conv_after_norm(block.conv1, plan, f"{path}.conv1", stats=True)
        self.norm2 = FastNorm(block.norm2, plan, f"{path}.norm2")
        self.conv2 = conv_after_norm(block.conv2, plan, f"{path}.conv2", stats)
        if hasattr(block, "nin_shortcut"):
            self.shortcut_weight = frozen(block.nin_shortcut.weight.flatten(1))
            self.shortcut_bias = block.nin_shortcut.bias

    def forward(self, act: Activation, out: Padding = DENSE) -> Activation:
        h = self.conv1(self.norm1(act, self.conv1.padding, self.conv1.takes))
        h = self.norm2(h, self.conv2.padding, self.conv2.takes)
        shortcut = act.x
        if hasattr(self, "shortcut_weight"):
            shortcut = F.linear(act.x, self.shortcut_weight, self.shortcut_bias)
        return self.conv2(h, shortcut, out)


class FastSelfAttention(nn.Module):
    """Joint attention over all positions; in windows (above 128^2 cells) the reference's own code runs."""

    def __init__(self, attention: ref.SelfAttention, plan: Plan, path: str) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.causal = attention.num_heads, attention.window_size, attention.causal
        self.windowed = attention
        self.norm = FastNorm(attention.norm, plan, f"{path}.norm", silu=False)
        parts = (attention.q, attention.k, attention.v)
        self.qkv_weight = frozen(torch.cat([conv.weight.flatten(1) for conv in parts]))
        self.qkv_bias = frozen(torch.cat([conv.bias for conv in parts]))
        self.out_weight, self.out_bias = frozen(attention.proj_out.weight.flatten(1)), attention.proj_out.bias
        head_dim = len(self.out_weight) // self.num_heads
        self.attend = plan.pick(path, "attention", f"self {head_dim}" + " frames" * self.causal)

    def forward(self, act: Activation) -> Activation:
        N, _, H, W, C = act.x.shape
        if self.window_size**2 < H * W:
            x = channels_first(act.x)
            attention = self.windowed
            flat = isinstance(attention.q, nn.Conv2d)
            return Activation(channels_last(attention(x[:, :, 0])[:, :, None] if flat else attention(x)))
        qkv = F.linear(self.norm(act), self.qkv_weight, self.qkv_bias)
        q, k, v = qkv.view(N, -1, 3, self.num_heads, C // self.num_heads).unbind(2)
        out = self.attend(q, k, v, None, None, H * W if self.causal else 0).view(act.x.shape)
        return Activation(act.x + F.linear(out, self.out_weight, self.out_bias))


class FastDownsample(nn.Module):
    """The strided convolution stays with the vendor's library: 1% of the work."""

    def __init__(self, down: ref.Downsample) -> None:
        super().__init__()
        self.pad = down.pad
        weight = down.conv.weight
        self.weight = frozen(weight) if weight.ndim == 5 else frozen(weight[:, :, None])
        self.weight.data = self.weight.data.to(memory_format=torch.channels_last_3d)
        self.bias, self.stride = down.conv.bias, tuple(down.conv.stride)[-3:]
        self.stride = self.stride if len(self.stride) == 3 else (1, *self.stride)

    def forward(self, act: Activation) -> Activation:
        x = F.pad(channels_first(act.x), self.pad)
        return Activation(channels_last(F.conv3d(x, self.weight, self.bias, self.stride)))


class FastUpsample(nn.Module):
    """Nearest x2 and the convolution after it, as one convolution per phase of the finer grid."""

    def __init__(self, up: ref.Upsample, plan: Plan, path: str) -> None:
        super().__init__()
        self.causal, time = up.conv.front > 0, up.scale[0] == 2.0
        self.padding = padding_of(up.conv)
        self.weight = frozen(fold_weight(up.conv.weight, time, self.causal))
        self.bias = up.conv.bias
        pick = ("upsample_conv3d", f"{up.conv.in_channels}->{up.conv.out_channels}")
        self.stats = plan.takes_statistics(*pick) and not self.causal
        self.run = plan.pick(path, *pick)

    def forward(self, padded: Tensor) -> Activation:
        y, partials = self.run(padded, self.weight, self.bias, self.causal, self.stats)
        return Activation(y, partials if self.stats else None)


class FastMiddle(nn.Module):
    def __init__(self, middle: ref.Middle, plan: Plan, path: str, whole: bool = True) -> None:
        super().__init__()
        self.fuse = fusions(middle, plan, path)
        self.block_1 = FastResBlock(middle.block_1, plan, f"{path}.block_1", stats=not self.fuse)
        self.attn_1 = FastSelfAttention(middle.attn_1, plan, f"{path}.attn_1")
        self.block_2 = FastResBlock(middle.block_2, plan, f"{path}.block_2") if whole else None

    def forward(self, act: Activation, content: Tensor | None = None) -> Activation:
        act = self.block_1(act)
        for fuse in self.fuse:
            act = fuse(act, content)
        act = self.attn_1(act)
        return act if self.block_2 is None else self.block_2(act)


class FastEncoderLevel(nn.Module):
    def __init__(self, level: ref.EncoderLevel, plan: Plan, path: str) -> None:
        super().__init__()
        self.block = _res_blocks(level.block, plan, f"{path}.block", stats=not hasattr(level, "downsample"))
        if hasattr(level, "downsample"):
            self.downsample = FastDownsample(level.downsample)

    def forward(self, act: Activation) -> Activation:
        for block in self.block:
            act = block(act)
        return act


class FastEncoder3D(Regional):
    def __init__(self, encoder: ref.Encoder3D, plan: Plan, path: str) -> None:
        super().__init__()
        self.conv_in = FastConv(encoder.conv_in, plan, f"{path}.conv_in", stats=True)
        self.down = nn.ModuleList(FastEncoderLevel(x, plan, f"{path}.down.{i}") for i, x in enumerate(encoder.down))
        self.mid = FastMiddle(encoder.mid, plan, f"{path}.mid")
        self.norm_out = FastNorm(encoder.norm_out, plan, f"{path}.norm_out")
        self.conv_out = FastConv(encoder.conv_out, plan, f"{path}.conv_out")

    def forward(self, x: Tensor) -> Tensor:
        act = self.conv_in(pad(x, self.conv_in.padding))
        for level in self.down:
            act = self.block("vae.encoder_level", level, act)
            if hasattr(level, "downsample"):
                act = level.downsample(act)
        act = self.block("vae.middle", self.mid, act)
        return self.conv_out(self.block("vae.norm_out", self.norm_out, act, self.conv_out.padding)).x


class FastContentEncoder(Regional):
    """`kept`: indices of the features to return, in rising order; the last is the middle's."""

    def __init__(self, encoder: ref.ContentEncoder, kept: Sequence[int], plan: Plan, path: str) -> None:
        super().__init__()
        self.kept = kept
        self.conv_in = FastConv(encoder.conv_in, plan, f"{path}.conv_in", stats=True)
        self.down = nn.ModuleList(FastEncoderLevel(x, plan, f"{path}.down.{i}") for i, x in enumerate(encoder.down))
        self.mid = FastMiddle(encoder.mid, plan, f"{path}.mid", whole=False)
        self.hands_on_image = encoder.hands_on_image

    def forward(self, image: Tensor) -> Features:
        act, features = self.conv_in(pad(image, self.conv_in.padding)), []
        last = [image] if self.hands_on_image else []
        for i, level in enumerate(self.down):
            act = self.block("vae.encoder_level", level, act)
            if i in self.kept:
                features.append(act.x)
            if hasattr(level, "downsample"):
                act = level.downsample(act)
        return [*features, self.block("vae.middle", self.mid, act).x, *last]


class FastDecoderLevel(nn.Module):
    def __init__(self, level: ref.DecoderLevel, plan: Plan, path: str) -> None:
        super().__init__()
        self.fuse = fusions(level, plan, path)
        self.upsample = FastUpsample(level.upsample, plan, f"{path}.upsample") if hasattr(level, "upsample") else None
        # The first blocks are followed by a fusion, by the second blocks or, without either, by what follows those.
        normed = self.upsample is None  # a norm follows: the next level's first, or the decoder's last
        first = not self.fuse and (normed or len(level.block_2) > 0)
        self.block_1 = _res_blocks(level.block_1, plan, f"{path}.block_1", first)
        self.block_2 = _res_blocks(level.block_2, plan, f"{path}.block_2", normed)

    def forward(self, act: Activation, content: Tensor | None) -> Activation:
        for block in self.block_1:
            act = block(act)
        for fuse in self.fuse:
            act = fuse(act, content)
        if self.upsample is None:
            for block in self.block_2:
                act = block(act)
            return act
        # The last convolution before an up-sampling writes the padded buffer that the up-sampling reads.
        for block in self.block_2[:-1]:
            act = block(act)
        padding = self.upsample.padding
        if len(self.block_2):
            return self.upsample(self.block_2[-1](act, padding).x)
        return self.upsample(pad(act.x, padding))


class FastDecoder(Regional):
    """`kept`: indices of the content features that it is given."""

    def __init__(self, decoder: ref.Decoder, kept: Sequence[int], plan: Plan, path: str) -> None:
        super().__init__()
        self.sources = [None if source is None else kept.index(source) for source in decoder.sources]
        self.middle = kept.index(decoder.middle)
        self.conv_in = FastConv(decoder.conv_in, plan, f"{path}.conv_in", stats=True)
        self.mid = FastMiddle(decoder.mid, plan, f"{path}.mid")
        self.up = nn.ModuleList(FastDecoderLevel(x, plan, f"{path}.up.{i}") for i, x in enumerate(decoder.up))
        self.norm_out = FastNorm(decoder.norm_out, plan, f"{path}.norm_out")
        self.conv_out = FastConv(decoder.conv_out, plan, f"{path}.conv_out")

    def forward(self, z: Tensor, features: Features) -> Tensor:
        act = self.block("vae.middle", self.mid, self.conv_in(pad(z, self.conv_in.padding)), features[self.middle])
        for level, source in zip(reversed(self.up), reversed(self.sources), strict=True):
            act = self.block("vae.decoder_level", level, act, None if source is None else features[source])
        return self.conv_out(self.block("vae.norm_out", self.norm_out, act, self.conv_out.padding)).x


class FastWarp(nn.Module):
    def __init__(self, warp: ref.Warp, plan: Plan, path: str) -> None:
        super().__init__()
        self.cell = warp.cell
        self.hidden = FastConv(warp.hidden, plan, f"{path}.hidden")
        self.flow_weight, self.flow_bias = frozen(warp.flow.weight.flatten(1)), warp.flow.bias
        self.run = plan.pick(path, "warp_frames")

    def forward(self, mixed: Tensor, z: Tensor, image: Tensor) -> Tensor:
        coarse = F.linear(F.silu(self.hidden(pad(z, self.hidden.padding)).x), self.flow_weight, self.flow_bias)
        return self.run(mixed.contiguous(), coarse, image[:, 0].contiguous(), self.cell)


class FastReducioVAE(nn.Module):
    """Built from a reference model, whose unpacked weights it shares. Evaluation only.

    `encode`, `encode_content` and `decode` take and return what the reference's do, except that content features are
    channels-last and only those that `decode` reads. Source of the network: see `reference/reducio/vae.py`.
    """

    # On a CPU oneDNN's convolutions take a decoder's time. Compiling the rest of the default model gains nothing (0.98
    # of uncompiled) and takes most of the compile time.
    compiled_on_cpu = False
    graph_names = ("vae.encode_content", "vae.decode")
    makes_bytes = True  # `decode` has `as_uint8`

    def __init__(self, model: ReducioVAE, plan: Plan) -> None:
        super().__init__()
        self.config = model.config
        self.reference = (model,)  # in a tuple: else its weights would count as this module's
        self.encoder_3d = FastEncoder3D(model.encoder_3d, plan, "encoder_3d")
        kept = sorted({model.decoder.middle, *(x for x in model.decoder.sources if x is not None)})
        self.encoder_2d = FastContentEncoder(model.encoder_2d, kept, plan, "encoder_2d")
        self.decoder = FastDecoder(model.decoder, kept, plan, "decoder")
        self.quant_weight, self.quant_bias = frozen(model.quant_conv.weight.flatten(1)), model.quant_conv.bias
        self.post_weight, self.post_bias = frozen(model.post_quant_conv.weight.flatten(1)), model.post_quant_conv.bias
        self.warp = None if model.warp is None else FastWarp(model.warp, plan, "warp")
        self.blend = plan.pick("tiles", "blend_tiles")
        self.graphs: Graphs | None = None  # one graph per tile shape; None: eagerly
        # The memory forecast raises it when there is room for more tiles. On a CPU one is best: a single tile keeps
        # every core busy, and its activations closer.
        self.tile_batch = 1
        self.ranks: Ranks | None = None  # processes that decode each clip together

    @property
    def dtype(self) -> torch.dtype:
        return self.post_weight.dtype

    @torch.no_grad()
    def encode(self, video: Tensor, tiled: bool = False) -> ref.DiagonalGaussian:
        """As the reference's."""
        self.reference[0].check_video(video)
        if not tiled:
            return ref.DiagonalGaussian(self._moments(video))
        stride, extent, latent_stride, _ = self.reference[0].tile_sizes()
        grid = [[self._moments(tile) for tile in row] for row in tile_grid(video, stride, extent)]
        return ref.DiagonalGaussian(stitch(grid, int(latent_stride * self.config.tile_overlap), latent_stride))

    @torch.no_grad()
    def encode_content(self, image: Tensor, tiled: bool = False) -> Features | list[list[Features]]:
        """As the reference's, but only the levels that `decode` reads, [N, 1, H, W, C], and the middle."""
        self.reference[0].check_image(image)
        image = image[:, :, None]
        if not tiled:
            return self._encode_content(image)
        stride, extent, _, _ = self.reference[0].tile_sizes()
        share = self.config.tile_overlap
        grid = [[self._encode_content(t) for t in row] for row in tile_grid(image, stride, extent)]

        def overlap(tile: Tensor, dim: int) -> int:
            return int(tile.shape[dim] / (1 + share) * share)

        levels = [
            blend_grid([[channels_first(f[i]) for f in row] for row in grid], overlap) for i in range(len(grid[0][0]))
        ]
        return [[[channels_last(level[i][j]) for level in levels] for j in range(len(r))] for i, r in enumerate(grid)]

    @torch.no_grad()
    def decode(
        self, latent: Tensor, features: Features | list[list[Features]], tiled: bool = False, as_uint8: bool = False
    ) -> Tensor:
        """Clip [B, 3, T, H, W], not clamped, as the reference's; or, `as_uint8`, frames [B, T, H, W, 3] of 0..255.

        Raises ValueError as the reference does and, with `as_uint8`, for values that are not finite, which bytes cannot
        represent.
        """
        self.reference[0].check_latent(latent, features, tiled)
        stride, _, latent_stride, latent_extent = self.reference[0].tile_sizes()
        if tiled:
            tiles = [t for row in tile_grid(latent, latent_stride, latent_extent) for t in row]
            decoded = self._decode_tiles(tiles, [pyramid for row in features for pyramid in row])
            columns, overlap = len(features[0]), int(stride * self.config.tile_overlap)
        else:
            decoded, columns, overlap = [self._decode(latent, features)], 1, 0
            stride = max(decoded[0].shape)
        if as_uint8:
            if not torch.stack([torch.isfinite(tile).all() for tile in decoded]).all():
                raise ValueError("the clip has values that are not finite (NaN or infinite)")
            return self.blend(decoded, columns, stride, overlap)
        if not tiled:
            return channels_first(decoded[0])
        return channels_first(self.blend(decoded, columns, stride, overlap, False))

    def normalize_latent(self, z: Tensor) -> Tensor:
        return self.reference[0].normalize_latent(z)

    def _moments(self, video: Tensor) -> Tensor:
        return channels_first(F.linear(self.encoder_3d(channels_last(video)), self.quant_weight, self.quant_bias))

    def _encode_content(self, tile: Tensor) -> Features:
        # The tile is made dense outside of the graph, so that one graph serves tiles of images of any width.
        return self._graphed("vae.encode_content", self.encoder_2d, channels_last(tile))

    def _decode(self, latent: Tensor, features: Features) -> Tensor:
        def decode(latent: Tensor, features: Features) -> Tensor:
            z = channels_last(latent)
            x = self.decoder(F.linear(z, self.post_weight, self.post_bias), features)
            return x if self.warp is None else self.warp(x, z, features[-1])

        return self._graphed("vae.decode", decode, latent, features)

    def _graphed(self, name: str, fn: Callable[..., Any], *args: Any) -> Any:
        return fn(*args) if self.graphs is None else self.graphs(name, fn, *args)

    def _decode_tiles(self, latents: list[Tensor], features: list[Features]) -> list[Tensor]:
        """Every tile; with `ranks` each process decodes some of them."""

        def decode(numbers: Sequence[int]) -> dict[int, Tensor]:
            return self._decode_batches(latents, features, numbers)

        def empty(number: int) -> Tensor:
            (B, _, _, h, w), cell = latents[number].shape, self.config.spatial_factor
            return latents[number].new_empty((B, self.config.num_frames, h * cell, w * cell, 3), dtype=self.dtype)

        if self.ranks is not None:
            return self.ranks.pieces([z.shape[-2] * z.shape[-1] for z in latents], decode, empty)
        decoded = decode(range(len(latents)))
        return [decoded[i] for i in range(len(latents))]

    def _decode_batches(
        self, latents: list[Tensor], features: list[Features], numbers: Sequence[int]
    ) -> dict[int, Tensor]:
        """Decodes tiles of one shape in batches of at most `tile_batch`; items do not influence each other."""
        shapes: dict[tuple[Any, ...], list[int]] = {}
        for i in numbers:
            shapes.setdefault((tuple(latents[i].shape), *(tuple(f.shape) for f in features[i])), []).append(i)
        decoded: dict[int, Tensor] = {}
        for members in shapes.values():
            B = len(latents[0])
            for start in range(0, len(members), self.tile_batch):
                cancellation.check()
                chosen = members[start : start + self.tile_batch]
                z = torch.cat([latents[i] for i in chosen])
                pyramid = [torch.cat(level) for level in zip(*(features[i] for i in chosen), strict=True)]
                for i, tile in zip(chosen, self._decode(z, pyramid).split(B), strict=True):
                    decoded[i] = tile
        return decoded


def _res_blocks(blocks: nn.ModuleList, plan: Plan, path: str, stats: bool) -> nn.ModuleList:
    """The twins of a level's blocks. Each block but the last is followed by the norm of the next block."""
    last = len(blocks) - 1
    return nn.ModuleList(
        FastResBlock(block, plan, f"{path}.{i}", stats=stats or i < last) for i, block in enumerate(blocks)
    )
