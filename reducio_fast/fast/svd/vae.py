"""The fast twin of SVD's autoencoder. It decodes all frames of a clip in little more memory than two of their tensors.

Only the temporal blocks of the decoder read several frames. Up-sampling and spatial blocks therefore run frame by
frame. A temporal block needs its input, the result of its first convolution, and three normed frames. At 25x576x1024 in
half precision this is 7.5 GB; decoding all frames at once takes 30 GB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...reference import cancellation
from ...reference.svd.vae import FrameVAE, TemporalVAE
from ..packed_layers import UpConv, frozen
from ..plan import Plan
from .layers import Conv, Norm, SpatialRes, SpatioTemporalRes, TimeConv

Clip = Tensor | list[Tensor]  # [T, H, W, C], or frames [H, W, C]

# Up to this many bytes a clip's tensor stays whole: one frame would be too little work for a kernel call. For large
# clips the bound is a sixteenth of the finest level's tensor, so the two tensors of that level still set the peak.
TOGETHER = 2**25


class FrameAttention(nn.Module):
    """Attention with one head over all positions of a frame [1, H, W, C]. torch computes heads of 512 channels."""

    def __init__(self, attention: Any, plan: Plan, path: str) -> None:
        super().__init__()
        self.norm = Norm(attention.group_norm, plan, f"{path}.group_norm", silu=False)
        parts = (attention.to_q, attention.to_k, attention.to_v)
        self.qkv_weight = frozen(torch.cat([linear.weight for linear in parts]))
        self.qkv_bias = frozen(torch.cat([linear.bias for linear in parts]))
        self.out = attention.to_out[0]

    def forward(self, x_NHWC: Tensor) -> Tensor:
        tokens = self.norm(x_NHWC[:, None])[:, 0].flatten(1, 2)
        q, k, v = F.linear(tokens, self.qkv_weight, self.qkv_bias)[:, None].chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x_NHWC + F.linear(attended, self.out.weight, self.out.bias).view(x_NHWC.shape)


class FastTemporalVAE(nn.Module):
    """Built from a `TemporalVAE`, or from diffusers' class, whose modules have the same names. Evaluation only."""

    compiled_on_cpu = False
    graph_names = ("vae.decode",)

    def __init__(self, model: TemporalVAE, plan: Plan) -> None:
        super().__init__()
        self.config = model.config
        self.reference = (model,)  # in a tuple: else its weights would count as this module's
        decoder = model.decoder
        self.conv_in = Conv(decoder.conv_in)
        self.middle = nn.ModuleList(
            SpatioTemporalRes(block, plan, f"decoder.mid_block.resnets.{i}")
            for i, block in enumerate(decoder.mid_block.resnets)
        )
        self.attention = FrameAttention(decoder.mid_block.attentions[0], plan, "decoder.mid_block.attentions.0")
        self.levels = nn.ModuleList(
            nn.ModuleList(
                SpatioTemporalRes(block, plan, f"decoder.up_blocks.{i}.resnets.{j}")
                for j, block in enumerate(level.resnets)
            )
            for i, level in enumerate(decoder.up_blocks)
        )
        self.up = nn.ModuleList(
            UpConv(level.upsamplers[0].conv, plan, f"decoder.up_blocks.{i}.upsamplers.0")
            for i, level in enumerate(decoder.up_blocks[:-1])
        )
        self.norm_out = Norm(decoder.conv_norm_out, plan, "decoder.conv_norm_out")
        self.conv_out = Conv(decoder.conv_out)
        self.time_conv_out = TimeConv(decoder.time_conv_out, plan, "decoder.time_conv_out")
        self.graphs = None
        self._together = TOGETHER

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.kernel.dtype

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """As the reference's, and run by the reference: there is only one image per clip."""
        return self.reference[0].encode(images)

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """As the reference's, [B, T, 4, h, w] -> [B, T, 3, H, W]. `chunk` is diffusers' `decode_chunk_size`."""
        batch, frames = latents.shape[:2]
        z = latents.flatten(0, 1).to(self.dtype)
        pieces = z.split(frames if chunk is None else min(chunk, len(z)))
        decoded = [self._decode_clip(piece.permute(0, 2, 3, 1).contiguous()) for piece in pieces]
        return torch.cat(decoded).unflatten(0, (batch, frames))

    def _decode_clip(self, latents: Tensor) -> Tensor:
        """[T, h, w, 4] of one clip -> [T, 3, H, W]."""
        finest = len(latents) * latents[0, ..., 0].numel() * 4 ** len(self.up)
        self._together = max(TOGETHER, finest * self.config.block_out_channels[0] * self.dtype.itemsize // 16)
        x: Clip = self.conv_in(latents)
        x = self._block(x, self.middle[0])
        for block in self.middle[1:2]:
            x = self._block(_each(x, self.attention), block)
        for index, level in enumerate(self.levels):
            for number, block in enumerate(level):
                grow = self.up[index - 1] if index and number == 0 else None
                x = self._block(x, block, grow)
        x = list(_each(x, lambda frames: self.conv_out(self.norm_out(frames[:, None])[:, 0])))
        results = []
        for index, frame in enumerate(x):
            before = x[index - 1] if index else None
            after = x[index + 1] if index + 1 < len(x) else None
            results.append(self.time_conv_out.of_frames(before, frame, after))
        return torch.stack(results).permute(0, 3, 1, 2)

    def _block(self, x: Clip, block: SpatioTemporalRes, grow: UpConv | None = None) -> Clip:
        """The up-sampling `grow`, if any, and a spatio-temporal res block. Large clips run frame by frame, and each
        frame is freed after it was read."""
        cancellation.check()

        def in_space(x_NHWC: Tensor) -> Tensor:
            return block.spatial(x_NHWC if grow is None else grow(x_NHWC))

        if isinstance(x, Tensor):
            if x.numel() * x.element_size() * (1 if grow is None else 4) <= self._together:
                return block.temporal(in_space(x)[None])[0]
            x = list(x)
        return block.temporal.streamed(_each(x, in_space))


def _each(x: Clip, run: Callable[[Tensor], Tensor]) -> Any:
    """Apply `run` to a clip, or to each frame of a list as [1, H, W, C]; the list is emptied on the way."""
    if isinstance(x, Tensor):
        return run(x)
    results = []
    while x:
        results.append(run(x.pop(0)[None])[0])
    return results


class FastFrameVAE(nn.Module):
    """The twin of SV3D's `FrameVAE`: the same spatial layers, frame by frame. Evaluation only."""

    compiled_on_cpu = False
    graph_names = ("vae.decode",)

    def __init__(self, model: FrameVAE, plan: Plan) -> None:
        super().__init__()
        self.config = model.config
        self.reference = (model,)  # in a tuple: else its weights would count as this module's
        decoder = model.decoder
        self.post_quant_conv = None if model.post_quant_conv is None else Conv(model.post_quant_conv)
        self.conv_in = Conv(decoder.conv_in)
        self.middle = nn.ModuleList(
            SpatialRes(block, plan, f"decoder.mid_block.resnets.{i}")
            for i, block in enumerate(decoder.mid_block.resnets)
        )
        self.attention = FrameAttention(decoder.mid_block.attentions[0], plan, "decoder.mid_block.attentions.0")
        self.levels = nn.ModuleList(
            nn.ModuleList(
                SpatialRes(block, plan, f"decoder.up_blocks.{i}.resnets.{j}") for j, block in enumerate(level.resnets)
            )
            for i, level in enumerate(decoder.up_blocks)
        )
        self.up = nn.ModuleList(
            UpConv(level.upsamplers[0].conv, plan, f"decoder.up_blocks.{i}.upsamplers.0")
            for i, level in enumerate(decoder.up_blocks[:-1])
        )
        self.norm_out = Norm(decoder.conv_norm_out, plan, "decoder.conv_norm_out")
        self.conv_out = Conv(decoder.conv_out)
        self.graphs = None

    dtype = FastTemporalVAE.dtype
    encode = FastTemporalVAE.encode

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """As the reference's, [B, T, 4, h, w] -> [B, T, 3, H, W]."""
        frames = latents.flatten(0, 1).to(self.dtype)
        pieces = frames.split(min(chunk or 1, len(frames)))
        decoded = [self._decode(z.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2) for z in pieces]
        return torch.cat(decoded).unflatten(0, latents.shape[:2])

    def _decode(self, x_NHWC: Tensor) -> Tensor:
        x = x_NHWC if self.post_quant_conv is None else self.post_quant_conv(x_NHWC)
        cancellation.check()
        x = self.middle[0](self.conv_in(x))
        x = self.middle[1](self.attention(x))
        for index, level in enumerate(self.levels):
            for block in level:
                x = block(x)
            if index < len(self.up):
                x = self.up[index](x)
        return self.conv_out(self.norm_out(x[:, None])[:, 0])
