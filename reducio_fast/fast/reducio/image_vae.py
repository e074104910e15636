"""The fast twin of `reference/reducio/image_vae.py`: the decoder on channels-last tensors [N, 1, H, W, C].

What differs from the reference, and why:
- convolutions, GroupNorm with SiLU and residuals are those of the video autoencoder, on a clip of one frame;
- up-sampling and the convolution after it are four 2x2 convolutions of the coarser image;
- attention reads query, key and value from one product.

The encoder is the reference's own: a clip encodes one image, a tenth of the work of decoding it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...compile.compiled_blocks import Regional
from ...compile.graphs import Graphs
from ...reference.reducio.image_vae import Attention, ImageVAE, Level, Middle, ResBlock
from ..packed_layers import (
    DENSE,
    Activation,
    FastConv,
    FastNorm,
    Padding,
    UpConv,
    channels_first,
    channels_last,
    frozen,
    pad,
)
from ..plan import Plan


class FastImageResBlock(nn.Module):
    def __init__(self, block: ResBlock, plan: Plan, path: str) -> None:
        super().__init__()
        self.norm1 = FastNorm(block.norm1, plan, f"{path}.norm1")
        self.conv1 = FastConv(block.conv1, plan, f"{path}.conv1")
        self.norm2 = FastNorm(block.norm2, plan, f"{path}.norm2")
        self.conv2 = FastConv(block.conv2, plan, f"{path}.conv2")
        if block.conv_shortcut is not None:
            self.shortcut_weight = frozen(block.conv_shortcut.weight.flatten(1))
            self.shortcut_bias = block.conv_shortcut.bias

    def forward(self, act: Activation, out: Padding = DENSE) -> Activation:
        h = self.conv1(self.norm1(act, self.conv1.padding))
        h = self.norm2(h, self.conv2.padding)
        shortcut = act.x
        if hasattr(self, "shortcut_weight"):
            shortcut = F.linear(act.x, self.shortcut_weight, self.shortcut_bias)
        return self.conv2(h, shortcut, out)


class FastImageAttention(nn.Module):
    """One head over all positions of an image; a head of 512 channels stays with torch."""

    def __init__(self, attention: Attention, plan: Plan, path: str) -> None:
        super().__init__()
        self.norm = FastNorm(attention.group_norm, plan, f"{path}.group_norm", silu=False)
        parts = (attention.to_q, attention.to_k, attention.to_v)
        self.qkv_weight = frozen(torch.cat([linear.weight for linear in parts]))
        self.qkv_bias = frozen(torch.cat([linear.bias for linear in parts]))
        self.out = attention.to_out[0]

    def forward(self, act: Activation) -> Activation:
        tokens_NLC = self.norm(act).flatten(1, 3)
        q, k, v = F.linear(tokens_NLC, self.qkv_weight, self.qkv_bias)[:, None].chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return Activation(act.x + F.linear(attended, self.out.weight, self.out.bias).view(act.x.shape))


class FastImageMiddle(nn.Module):
    def __init__(self, middle: Middle, plan: Plan, path: str) -> None:
        super().__init__()
        first, second = middle.resnets
        self.first = FastImageResBlock(first, plan, f"{path}.resnets.0")
        self.attentions = nn.ModuleList(
            FastImageAttention(a, plan, f"{path}.attentions.{i}") for i, a in enumerate(middle.attentions)
        )
        self.second = FastImageResBlock(second, plan, f"{path}.resnets.1")

    def forward(self, act: Activation) -> Activation:
        act = self.first(act)
        for attention in self.attentions:
            act = attention(act)
        return self.second(act)


class FastImageLevel(nn.Module):
    def __init__(self, level: Level, plan: Plan, path: str) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            FastImageResBlock(block, plan, f"{path}.resnets.{i}") for i, block in enumerate(level.resnets)
        )
        up = getattr(level, "upsamplers", None)
        self.up = None if up is None else UpConv(up[0].conv, plan, f"{path}.upsamplers.0")

    def forward(self, act: Activation) -> Activation:
        for block in self.resnets:
            act = block(act)
        return act if self.up is None else Activation(self.up(act.x[:, 0])[:, None])


class FastImageVAE(Regional):
    """Built from an `ImageVAE`. Evaluation only."""

    compiled_on_cpu = True
    graph_names = ("content.decode",)

    def __init__(self, model: ImageVAE, plan: Plan) -> None:
        super().__init__()
        self.config = model.config
        self.reference = (model,)  # in a tuple: else its weights would count as this module's
        decoder, after = model.decoder, model.post_quant_conv
        if after is not None:
            self.after_weight, self.after_bias = frozen(after.weight.flatten(1)), after.bias
        self.conv_in = FastConv(decoder.conv_in, plan, "decoder.conv_in")
        self.middle = FastImageMiddle(decoder.mid_block, plan, "decoder.mid_block")
        self.levels = nn.ModuleList(
            FastImageLevel(level, plan, f"decoder.up_blocks.{i}") for i, level in enumerate(decoder.up_blocks)
        )
        self.norm_out = FastNorm(decoder.conv_norm_out, plan, "decoder.conv_norm_out")
        self.conv_out = FastConv(decoder.conv_out, plan, "decoder.conv_out")
        self.graphs: Graphs | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Runs the reference's `encode`."""
        return self.reference[0].encode(images)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """As the reference's: [N, C, h, w] -> [N, 3, H, W], a tensor that the caller owns."""
        z = latents.to(self.dtype)
        run: Any = self._decode
        if self.graphs is not None:
            run = functools.partial(self.graphs, self.graph_names[0], self._decode)
        return run(z)

    def _decode(self, z_NChw: Tensor) -> Tensor:
        x = channels_last(z_NChw[:, :, None])
        if hasattr(self, "after_weight"):
            x = F.linear(x, self.after_weight, self.after_bias)
        act = self.conv_in(pad(x, self.conv_in.padding))
        act = self.block("content.middle", self.middle, act)
        for level in self.levels:
            act = self.block("content.level", level, act)
        out = self.conv_out(self.norm_out(act, self.conv_out.padding)).x
        return channels_first(out)[:, :, 0].contiguous()
