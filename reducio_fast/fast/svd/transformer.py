"""The fast twin of the transformers in SVD's U-Net: spatial and temporal blocks in turn.

What differs from the reference, and why:
- The image is one token, and softmax over one token is 1. So cross-attention adds the constant W_o W_v e + b_o, which
  is computed once per clip; its norm, queries, keys and attention are not computed. The same holds for one token per
  frame. Several tokens take the general path.
- A block adds constants to all tokens of a frame: from cross-attention, positions and biases. The norms that read the
  residual stream add them, so they need no pass over memory. The same norms add the temporal block's residual and
  blend its result with the spatial block's.
- Temporal blocks read the frames in place: nothing is permuted, and attention reads its T keys at a stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...reference.svd.unet import sinusoid
from ..packed_layers import frozen
from ..plan import Plan
from .layers import Norm, folded, spatial_share


class BlockRows(NamedTuple):
    """Constants that a spatial block and the temporal block after it add to all tokens of a frame, [B * T, C] each.

    in_space, in_time: the result of cross-attention to one token; None on the general path. The residual stream does
    not contain `in_space` and the bias of the spatial feed-forward. `blended` is their sum; `before_time` is that sum
    plus the embedding of the frame's position.
    """

    in_space: Tensor | None
    before_time: Tensor
    in_time: Tensor | None
    blended: Tensor


class FeedForward(nn.Module):
    """GEGLU feed-forward. `factor` multiplies the result and is folded into the last product."""

    def __init__(self, ff: Any, plan: Plan, path: str, factor: Tensor | float = 1.0) -> None:
        super().__init__()
        self.proj = ff.net[0].proj
        self.weight, self.bias = folded(ff.net[2].weight, factor), folded(ff.net[2].bias, factor)
        self.geglu = plan.pick(path, "geglu_linear", f"{self.proj.in_features}->{self.weight.shape[1]}")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.geglu(x, self.proj.weight, self.proj.bias), self.weight, self.bias)

    def add_to(self, stream: Tensor, x: Tensor) -> Tensor:
        """Add the result for x to `stream` in place, without `bias`, which a later layer adds."""
        hidden = self.geglu(x, self.proj.weight, self.proj.bias)
        stream.view(-1, stream.shape[-1]).addmm_(hidden.flatten(0, -2), self.weight.t())
        return stream


class SelfAttention(nn.Module):
    """Self-attention over the tokens of a frame, or over the frames of a token; one product makes q, k and v.

    The last product is added to the stream in place. Its bias is added later, with the result of cross-attention:
    this saves one read of the stream.
    """

    def __init__(self, attention: Any, plan: Plan, path: str, over_frames: bool = False) -> None:
        super().__init__()
        self.heads = attention.heads
        parts = (attention.to_q, attention.to_k, attention.to_v)
        self.qkv = frozen(torch.cat([linear.weight for linear in parts]))
        self.out = attention.to_out[0]
        width = len(self.out.weight) // self.heads
        name, shape = ("frame_attention", "") if over_frames else ("attention", "self")
        self.attend = plan.pick(path, name, f"{shape} {width}".strip())

    def add_to(self, stream: Tensor, x: Tensor) -> Tensor:
        """Add the result for x [N, L, C] to `stream`, without the bias. With `over_frames` x is [B, T, L, C], and each
        position attends over the frames of its clip."""
        qkv = F.linear(x, self.qkv).unflatten(-1, (3, self.heads, -1))
        attended = self.attend(qkv) if x.ndim == 4 else self.attend(*qkv.unbind(2))
        stream.view(-1, stream.shape[-1]).addmm_(attended.reshape(-1, x.shape[-1]), self.out.weight.t())
        return stream


class CrossAttention(nn.Module):
    """Cross-attention to the image's tokens; a constant if there is one token.

    `bias_before`: the bias of the self-attention before it, which is added here.
    """

    def __init__(self, attention: Any, norm: nn.LayerNorm, bias_before: Tensor) -> None:
        super().__init__()
        self.bias_before = bias_before
        self.heads, self.norm = attention.heads, norm
        self.to_q, self.to_k, self.to_v, self.out = (
            attention.to_q,
            attention.to_k,
            attention.to_v,
            attention.to_out[0],
        )

    def constant(self, token: Tensor) -> Tensor:
        """[..., E] -> [..., C]: the result of attention to one token, the same for every query, plus `bias_before`."""
        return F.linear(F.linear(token, self.to_v.weight), self.out.weight, self.out.bias) + self.bias_before

    def add_to(self, x_NLC: Tensor, context_NSE: Tensor) -> Tensor:
        x_NLC = x_NLC + self.bias_before
        q = F.linear(_norm(x_NLC, self.norm), self.to_q.weight).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (
            F.linear(context_NSE, linear.weight).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x_NLC.add_(F.linear(attended, self.out.weight, self.out.bias))


def _affine(norm: Any) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps


def _norm(x: Tensor, norm: Any) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *_affine(norm))


class SpatialBlock(nn.Module):
    """A spatial block without the bias of its feed-forward and without `in_space`: the temporal block adds both."""

    def __init__(self, block: Any, plan: Plan, path: str) -> None:
        super().__init__()
        self.norm1, self.norm3 = block.norm1, block.norm3
        self.row_norm = plan.pick(f"{path}.norm3", "stream_layer_norm")
        self.attn1 = SelfAttention(block.attn1, plan, f"{path}.attn1")
        self.attn2 = CrossAttention(block.attn2, block.norm2, self.attn1.out.bias)
        self.ff = FeedForward(block.ff, plan, f"{path}.ff")

    def forward(self, x_NLC: Tensor, in_space: Tensor | None, context: Tensor | None) -> Tensor:
        """Changes x in place."""
        x = self.attn1.add_to(x_NLC, _norm(x_NLC, self.norm1))
        if in_space is None:
            assert context is not None, "the general path's tokens"
            x = self.attn2.add_to(x, context)
        return self.ff.add_to(x, self.row_norm(x, in_space, *_affine(self.norm3))[0])


class TemporalBlock(nn.Module):
    """A temporal block and the blend after it: a * spatial + (1 - a) * block(spatial + position).

    The result lacks the bias of the last product. `before` is the bias that the spatial block left out.
    """

    def __init__(self, block: Any, before: Tensor, share: Tensor, plan: Plan, path: str) -> None:
        super().__init__()
        self.norm_in, self.norm1, self.norm3 = block.norm_in, block.norm1, block.norm3
        self.stream_norm = plan.pick(f"{path}.norm_in, norm1 and norm3", "stream_layer_norm")
        self.ff_in = FeedForward(block.ff_in, plan, f"{path}.ff_in")
        self.attn1 = SelfAttention(block.attn1, plan, f"{path}.attn1", over_frames=True)
        self.attn2 = CrossAttention(block.attn2, block.norm2, self.attn1.out.bias)
        self.ff = FeedForward(block.ff, plan, f"{path}.ff", 1 - share)
        self.share = frozen(share.to(block.norm3.weight.dtype))
        self.before = before

    def forward(self, spatial_NLC: Tensor, frames: int, rows: BlockRows, context: Tensor | None) -> Tensor:
        """spatial [B * T, L, C]"""
        normed, _ = self.stream_norm(spatial_NLC, rows.before_time, *_affine(self.norm_in))
        branch = self.ff_in(normed)
        normed, x = self.stream_norm(spatial_NLC, rows.before_time, *_affine(self.norm1), branch)
        x = self.attn1.add_to(x, normed.unflatten(0, (-1, frames)))
        if rows.in_time is None:
            (N, L, C), T = x.shape, frames
            assert context is not None, "the general path's tokens"
            tokens = x.view(-1, T, L, C).transpose(1, 2).reshape(-1, T, C)
            first = context[:, 0] if context.ndim == 4 else context
            x = self.attn2.add_to(tokens, first.repeat_interleave(L, 0))
            x = x.view(-1, L, T, C).transpose(1, 2).reshape(N, L, C)
        blend = (spatial_NLC, rows.blended, self.share)
        normed, x = self.stream_norm(x, rows.in_time, *_affine(self.norm3), None, *blend)
        return self.ff.add_to(x, normed)


class Transformer(nn.Module):
    def __init__(self, transformer: Any, plan: Plan, path: str) -> None:
        super().__init__()
        self.norm = Norm(transformer.norm, plan, f"{path}.norm", silu=False)
        self.proj_in = transformer.proj_in
        share = spatial_share(transformer.time_mixer)
        self.spatial = nn.ModuleList(
            SpatialBlock(b, plan, f"{path}.transformer_blocks.{i}")
            for i, b in enumerate(transformer.transformer_blocks)
        )
        self.temporal = nn.ModuleList(
            TemporalBlock(b, space.ff.bias, share, plan, f"{path}.temporal_transformer_blocks.{i}")
            for i, (space, b) in enumerate(zip(self.spatial, transformer.temporal_transformer_blocks, strict=True))
        )
        self.time_pos_embed = transformer.time_pos_embed

    def rows(self, embeds: Tensor, frames: int) -> list[BlockRows]:
        """embeds [B, S, E] or [B, T, S, E]."""
        embed, weight = self.time_pos_embed, self.proj_in.weight
        wave = sinusoid(torch.arange(frames, device=weight.device), len(weight)).to(weight.dtype)
        position = embed.linear_2(F.silu(embed.linear_1(wave))).repeat(len(embeds), 1)
        rows = []
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            in_space, in_time, blended = None, None, temporal.before.expand(position.shape)
            if embeds.shape[-2] == 1:
                token, first = embeds[..., 0, :], embeds.flatten(1, -2)[:, 0]  # blocks over time read the first frame's
                in_space, in_time = spatial.attn2.constant(token), temporal.attn2.constant(first)
                in_time = in_time.repeat_interleave(frames, 0)
                in_space = in_space.repeat_interleave(frames, 0) if token.ndim == 2 else in_space.flatten(0, 1)
                blended = blended + in_space
            rows.append(BlockRows(in_space, position + blended, in_time, blended.contiguous()))
        return rows

    def forward(self, x_NHWC: Tensor, frames: int, rows: Sequence[BlockRows], context: Tensor | None) -> Tensor:
        """Tokens [B * T, L, C], which `LastProduct` takes."""
        N, H, W, C = x_NHWC.shape
        x = F.linear(self.norm(x_NHWC[:, None]).view(N, H * W, C), self.proj_in.weight, self.proj_in.bias)
        per_frame = None
        if context is not None:
            spread = context if context.ndim == 4 else context[:, None].expand(-1, frames, -1, -1)
            per_frame = spread.flatten(0, 1)
        for index, (spatial, temporal, own) in enumerate(zip(self.spatial, self.temporal, rows, strict=True)):
            x = temporal(spatial(x, own.in_space, per_frame), frames, own, context)
            if index + 1 < len(self.temporal):
                x = x.add_(temporal.ff.bias)
        return x


class LastProduct(nn.Module):
    """A transformer's last product, plus the transformer's input, plus the bias that its last block left out.

    It is a module of its own, which torch.compile does not see: no other kernel fuses with it, and as a part of the
    transformer it would have each width of `room` compiled anew.
    """

    def __init__(self, proj_out: nn.Linear, bias_before: Tensor, plan: Plan, path: str) -> None:
        super().__init__()
        weight, bias = proj_out.weight, proj_out.bias
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.weight = frozen(weight.t()[None])
        self.bias = frozen((bias.to(wide) + weight.to(wide) @ bias_before.to(wide)).to(bias.dtype))
        self.channels = len(weight)
        pick = "temporal_conv", f"{weight.shape[1]}->{weight.shape[0]} alone"
        self.run, self.in_one = plan.pick(path, *pick), plan.runs_kernel(*pick)
        self.room = 0  # channels to leave free after the result's, for a skip connection

    def forward(self, x_NLC: Tensor, residual_NHWC: Tensor) -> Tensor:
        rows, residual = (x.reshape(1, -1, x.shape[-1]) for x in (x_NLC, residual_NHWC))
        y = self.run(None, rows, None, self.weight, self.bias, residual, self.room)
        return y.view(*residual_NHWC.shape[:-1], -1)
