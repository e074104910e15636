"""The fast twin of SVD's space-time U-Net.

Beside what `layers` folds:
- the image is one token, over which softmax is 1: cross-attention adds the constant W_o W_v e + b_o, computed once a
  clip, and its norm, queries, keys and attention are gone (several tokens, or one a frame, take the general path);
- constants that a block adds to the tokens of a frame, of cross-attention, positions and biases, are not added to the
  stream but in the norms that read it, and so are the residual of the block in time and its blend with the spatial one;
- what the time, the frame rate and the motion add in all res blocks is one table a schedule;
- blocks over time read frames where they lie: no permutation, and attention sees T keys at a stride;
- the kernel before a skip connection is joined leaves room for it, so only the skip is copied;
- guidance a frame, EDM's preconditioning and the Euler step are one row of the sampler's kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...compile.compiled_blocks import Regional
from ...compile.graphs import Graphs
from ...reference.svd.sampler import (
    EndConditions,
    ImageCondition,
    guidance_per_frame,
    join,
    needs_guidance,
    towards_last,
)
from ...reference.svd.unet import VideoUNet, check_inputs, embed_numbers, sinusoid
from ..packed_layers import UpConv, frozen
from ..plan import Plan
from .layers import Conv, Norm, SpatioTemporalRes, folded, spatial_share


class BlockRows(NamedTuple):
    """What a block in space and the one in time behind it add to all tokens of a frame, [B * T, C] each.

    in_space, in_time: of cross-attention to one token; None on the general path. The stream never gets `in_space`, nor
    the bias of the spatial feed-forward: `before_time` has both and the frame's position, `blended` both.
    """

    in_space: Tensor | None
    before_time: Tensor
    in_time: Tensor | None
    blended: Tensor


class Told(NamedTuple):
    """What stays the same over all steps of a clip, for a batch of both halves of guidance together.

    image [B, T, h, w, 4]: latents beside the noisy ones. added [B, n or T, n]: time ids. context: None, or tokens
    [B, S, E] or [B, T, S, E] for the general path. rows: of each transformer, of each of its blocks.
    """

    image: Tensor
    added: Tensor
    context: Tensor | None
    rows: list[list[BlockRows]]


class StepInputs(NamedTuple):
    """rows: of each res block, in space and in time, in turn."""

    rows: list[Tensor]
    told: Told


class FeedForward(nn.Module):
    """GEGLU. `factor` is folded into the last product."""

    def __init__(self, ff: Any, plan: Plan, path: str, factor: Tensor | float = 1.0) -> None:
        super().__init__()
        self.proj = ff.net[0].proj
        self.weight, self.bias = folded(ff.net[2].weight, factor), folded(ff.net[2].bias, factor)
        self.geglu = plan.pick(path, "geglu_linear", f"{self.proj.in_features}->{self.weight.shape[1]}")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.geglu(x, self.proj.weight, self.proj.bias), self.weight, self.bias)

    def add_to(self, stream: Tensor, x: Tensor) -> Tensor:
        """Add what x gives to `stream`, in place and but for `bias`, which a later layer owes."""
        hidden = self.geglu(x, self.proj.weight, self.proj.bias)
        stream.view(-1, stream.shape[-1]).addmm_(hidden.flatten(0, -2), self.weight.t())
        return stream


class SelfAttention(nn.Module):
    """Query, key and value from one product. Over the tokens of a frame, or over the frames of a token.

    The last product is added in place, its bias later, with what cross-attention adds: the stream is read once less.
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
        """Add, but for the bias, what x [N, L, C] gives to `stream`; with `over_frames` x is [B, T, L, C] and each
        position attends over the frames of its clip."""
        qkv = F.linear(x, self.qkv).unflatten(-1, (3, self.heads, -1))
        attended = self.attend(qkv) if x.ndim == 4 else self.attend(*qkv.unbind(2))
        stream.view(-1, stream.shape[-1]).addmm_(attended.reshape(-1, x.shape[-1]), self.out.weight.t())
        return stream


class CrossAttention(nn.Module):
    """To the image's tokens: a constant where it is one token. `owed` is the bias of the self-attention before it."""

    def __init__(self, attention: Any, norm: nn.LayerNorm, owed: Tensor) -> None:
        super().__init__()
        self.owed = owed
        self.heads, self.norm = attention.heads, norm
        self.to_q, self.to_k, self.to_v, self.out = (
            attention.to_q,
            attention.to_k,
            attention.to_v,
            attention.to_out[0],
        )

    def constant(self, token: Tensor) -> Tensor:
        """[..., E] -> [..., C]: what attention to one token adds, wherever it is asked from, with what is owed."""
        return F.linear(F.linear(token, self.to_v.weight), self.out.weight, self.out.bias) + self.owed

    def add_to(self, x_NLC: Tensor, context_NSE: Tensor) -> Tensor:
        x_NLC = x_NLC + self.owed
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
    """Without the bias of its feed-forward and without `in_space`: the temporal block behind it has both."""

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
    """With the blend behind it, a * spatial + (1 - a) * block(spatial + position), but for its last product's bias.

    `before` is the bias that the spatial block left out.
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
            if embeds.ndim == 3 and embeds.shape[1] == 1:
                in_space, in_time = (
                    block.attn2.constant(embeds[:, 0]).repeat_interleave(frames, 0) for block in (spatial, temporal)
                )
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
    """A transformer's last product, added to what the transformer was given, with the bias that its last block owes.

    A module of its own, outside of what compiles: no other kernel fuses with it, and transformers that leave rooms of
    different widths would each be compiled.
    """

    def __init__(self, proj_out: nn.Linear, owed: Tensor, plan: Plan, path: str) -> None:
        super().__init__()
        weight, bias = proj_out.weight, proj_out.bias
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.weight = frozen(weight.t()[None])
        self.bias = frozen((bias.to(wide) + weight.to(wide) @ owed.to(wide)).to(bias.dtype))
        self.channels = len(weight)
        pick = "temporal_conv", f"{weight.shape[1]}->{weight.shape[0]} alone"
        self.run, self.in_one = plan.pick(path, *pick), plan.runs_kernel(*pick)
        self.room = 0  # channels to leave free behind the result's, for a skip connection

    def forward(self, x_NLC: Tensor, residual_NHWC: Tensor) -> Tensor:
        rows, residual = (x.reshape(1, -1, x.shape[-1]) for x in (x_NLC, residual_NHWC))
        y = self.run(None, rows, None, self.weight, self.bias, residual, self.room)
        return y.view(*residual_NHWC.shape[:-1], -1)


class Level(nn.Module):
    """Res blocks, each with its transformer where there is one, and what changes the size behind them."""

    def __init__(self, level: Any, plan: Plan, path: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SpatioTemporalRes(b, plan, f"{path}.resnets.{i}") for i, b in enumerate(level.resnets)
        )
        self.transformers = nn.ModuleList(
            Transformer(t, plan, f"{path}.attentions.{i}")
            for i, t in enumerate(getattr(level, "attentions", None) or ())
        )
        self.last_products = nn.ModuleList(
            LastProduct(theirs.proj_out, ours.temporal[-1].ff.bias, plan, f"{path}.attentions.{i}.proj_out")
            for i, (theirs, ours) in enumerate(
                zip(getattr(level, "attentions", None) or (), self.transformers, strict=True)
            )
        )
        down, up = (getattr(level, name, None) for name in ("downsamplers", "upsamplers"))
        self.down = None if down is None else Conv(down[0].conv)
        self.up = None if up is None else UpConv(up[0].conv, plan, f"{path}.upsamplers.0")

    def last(self, index: int) -> UpConv | LastProduct | None:
        """What writes the result of block `index`, or of the level behind its last one; None: the block itself."""
        if self.up is not None and index + 1 == len(self.blocks):
            return self.up
        return self.last_products[index] if index < len(self.last_products) else None


class FastVideoUNet(Regional):
    """Built from a `VideoUNet`, or from diffusers' class, whose modules have the same names. Evaluation only.

    Its res blocks and transformers are what compiles: none of them writes to its arguments.
    """

    compiled_on_cpu = False
    graph_names = ("dit.step",)

    def __init__(self, model: VideoUNet, plan: Plan) -> None:
        super().__init__()
        self.config = model.config
        self.reference = (model,)  # in a tuple: else its weights would count as this module's
        self.conv_in = Conv(model.conv_in)
        self.down = nn.ModuleList(Level(b, plan, f"down_blocks.{i}") for i, b in enumerate(model.down_blocks))
        self.middle = Level(model.mid_block, plan, "mid_block")
        self.ups = nn.ModuleList(Level(b, plan, f"up_blocks.{i}") for i, b in enumerate(model.up_blocks))
        self.norm_out = Norm(model.conv_norm_out, plan, "conv_norm_out")
        self.conv_out = Conv(model.conv_out)
        self.time_embedding, self.add_embedding = model.time_embedding, model.add_embedding
        # Of every res block, in space and in time, what it makes of the time embedding: one product for all.
        halves = [
            getattr(block, name) for block in _res_blocks(model) for name in ("spatial_res_block", "temporal_res_block")
        ]
        linears = [half.time_emb_proj for half in halves]
        self.row_weight = frozen(torch.cat([linear.weight for linear in linears]))
        self.row_bias = frozen(torch.cat([half.time_emb_proj.bias + half.conv1.bias for half in halves]))
        self.row_sizes = [len(linear.weight) for linear in linears]
        self.step_update = plan.pick("sampler", "guidance_dpm_step")
        self.graphs: Graphs | None = None
        # The kernel before a block of the second half leaves room for the skip connection that joins its result; res
        # blocks without a transformer do not, since they are small and each room would be compiled apart.
        places = [(level, index) for level in self.ups for index in range(len(level.blocks))]
        for (level, index), (following, place) in pairwise(places):
            writer = level.last(index)
            if writer is not None and writer.in_one:
                writer.room = following.blocks[place].channels_in - writer.channels

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.kernel.dtype

    @torch.no_grad()
    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, added_time_ids: Tensor
    ) -> Tensor:
        """As the reference's. All clips of a batch share one timestep."""
        check_inputs(self.config, sample, encoder_hidden_states, added_time_ids)
        latent_channels = self.config.out_channels
        image = sample[:, :, latent_channels:].permute(0, 1, 3, 4, 2)
        told = self.told(image, encoder_hidden_states, added_time_ids)
        rows = self.rows(timestep.flatten()[:1], added_time_ids, *sample.shape[:2])[0]
        run = self.denoise if self.graphs is None else functools.partial(self.graphs, "dit.step", self.denoise)
        return run(sample[:, :, :latent_channels], StepInputs(rows, told))

    def told(self, image_BThwC: Tensor, embeds: Tensor, added: Tensor) -> Told:
        """embeds [B, S, E] or [B, T, S, E]."""
        embeds, frames = embeds.to(self.dtype), image_BThwC.shape[1]
        levels = [*self.down, self.middle, *self.ups]
        rows = [transformer.rows(embeds, frames) for level in levels for transformer in level.transformers]
        constant = all(own.in_time is not None for blocks in rows for own in blocks)
        return Told(image_BThwC.to(self.dtype), added, None if constant else embeds, rows)

    def rows(self, timesteps: Tensor, added: Tensor, batch: int, frames: int) -> list[list[Tensor]]:
        """Of each step, what the first convolution of each res block adds, its bias and the time embedding: [C] where
        all frames of all clips are told the same, else [batch * frames, C]."""
        embed, config = self.time_embedding, self.config
        wave = sinusoid(timesteps, config.block_out_channels[0]).to(self.dtype)
        time = embed.linear_2(F.silu(embed.linear_1(wave)))  # [steps, E]
        flat = added.flatten(0, -2)
        same = bool((flat == flat[:1]).all())
        ids = flat[:1] if same else flat
        told = embed_numbers(config, ids).to(self.dtype)
        more = self.add_embedding.linear_2(F.silu(self.add_embedding.linear_1(told)))
        if not same and added.ndim == 2:
            more = more.repeat_interleave(frames, 0)
        table = F.linear(F.silu(time[:, None] + more), self.row_weight, self.row_bias)  # [steps, 1 or B * T, sum C]
        return [[row[0] if same else row for row in step.split(self.row_sizes, -1)] for step in table]

    @torch.no_grad()
    def denoise(self, latent: Tensor, inputs: StepInputs) -> Tensor:
        """latent [B, T, 4, h, w], scaled; of both halves of guidance, or of one where they share it. Returns v,
        [told's batch, T, 4, h, w]."""
        told, rows = inputs.told, iter(inputs.rows)
        batch, frames = told.image.shape[:2]
        noisy = latent.to(self.dtype).permute(0, 1, 3, 4, 2)
        noisy = noisy if len(noisy) == batch else noisy.repeat(batch // len(noisy), 1, 1, 1, 1)
        block_rows = iter(told.rows)

        def run(level: Level, index: int, x: Tensor) -> Tensor:
            x = self.block("dit.res", level.blocks[index], x, frames, (next(rows), next(rows)))
            if index >= len(level.transformers):
                return x
            transformer = level.transformers[index]
            tokens = self.block("dit.transformer", transformer, x, frames, next(block_rows), told.context)
            return level.last_products[index](tokens, x)

        x = self.conv_in(torch.cat([noisy, told.image], dim=-1).flatten(0, 1))
        skips = [x]
        for level in self.down:
            for index in range(len(level.blocks)):
                x = run(level, index, x)
                skips.append(x)
            if level.down is not None:
                x = level.down(x)
                skips.append(x)
        x = run(self.middle, 0, x)
        x = run(self.middle, 1, x)
        for level in self.ups:
            for index in range(len(level.blocks)):
                x = run(level, index, _joined(x, skips.pop(), level.blocks[index].channels_in))
            if level.up is not None:
                x = level.up(x, skips[-1].shape[1:3])
        out = self.conv_out(self.norm_out(x[:, None])[:, 0])
        return out.permute(0, 3, 1, 2).unflatten(0, (batch, frames))

    @torch.no_grad()
    def denoiser(
        self,
        cond: ImageCondition | EndConditions,
        uncond: ImageCondition | None = None,
        guidance_scale: float | Tensor = 1.0,
    ) -> FastVideoDenoiser | TwoEndedDenoiser:
        """As the reference's, for `fast.sampler.sample`: constants of the condition are made here, once."""
        if isinstance(cond, EndConditions):
            return TwoEndedDenoiser(*(self.denoiser(end, uncond, guidance_scale) for end in (cond.first, cond.last)))
        guides = needs_guidance(guidance_scale)
        told = join(cond.without_image() if uncond is None else uncond, cond) if guides else cond
        told = told.to(self.conv_in.bias.device, self.dtype)
        scale = guidance_per_frame(guidance_scale, self.conv_in.bias.device) if guides else None
        return FastVideoDenoiser(self, told, scale)


@dataclass(slots=True)
class FastVideoDenoiser:
    """The twin under a condition, both halves of guidance in one batch: what `fast.sampler.sample` runs.

    scale: of guidance, a number or one a frame [T, 1, 1, 1]; None: without guidance, half of the batch.
    """

    model: FastVideoUNet
    condition: ImageCondition
    scale: float | Tensor | None
    guidance_scale: float = 1.0  # of the sampler's kernel: `predict` has guided already, frame by frame
    graph_name: str = "dit.step"

    @property
    def graphs(self) -> Graphs | None:
        return self.model.graphs

    @property
    def update(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return self.model.step_update

    def bare(self) -> FastVideoDenoiser:
        """This denoiser itself: it lends nothing of its condition to a graph."""
        return self

    def plain(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The same for the reference's sampler, which any scheduler steps."""
        return lambda latent, timestep: self.predict(latent, self.schedule(timestep.reshape(1), latent)[0]).to(
            latent.dtype
        )

    def schedule(self, timesteps: Tensor, latent: Tensor) -> list[StepInputs]:
        condition, frames = self.condition, latent.shape[1]
        image = condition.latents
        image = image[:, None].expand(-1, frames, -1, -1, -1) if image.ndim == 4 else image
        told = self.model.told(image.permute(0, 1, 3, 4, 2), condition.embeds, condition.added_time_ids)
        rows = self.model.rows(timesteps, condition.added_time_ids, len(image), frames)
        return [StepInputs(step, told) for step in rows]

    def predict(self, latent: Tensor, inputs: StepInputs) -> Tensor:
        prediction = self.model.denoise(latent, inputs).to(latent.dtype)
        if self.scale is None:
            return prediction
        without, with_image = prediction.chunk(2)
        return without + self.scale * (with_image - without)


class EndInputs(NamedTuple):
    first: StepInputs
    last: StepInputs


@dataclass(slots=True)
class TwoEndedDenoiser:
    """`reference.svd.sampler.two_ended` of two denoisers of one twin, one after the other: no more memory than one."""

    first: FastVideoDenoiser
    last: FastVideoDenoiser
    guidance_scale: float = 1.0
    graph_name: str = "dit.step"

    @property
    def graphs(self) -> Graphs | None:
        return self.first.graphs

    @property
    def update(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return self.first.update

    def schedule(self, timesteps: Tensor, latent: Tensor) -> list[EndInputs]:
        schedules = (self.first.schedule(timesteps, latent), self.last.schedule(timesteps, latent))
        return [EndInputs(*pair) for pair in zip(*schedules, strict=True)]

    def predict(self, latent: Tensor, inputs: EndInputs) -> Tensor:
        last = self.last.predict(latent.flip(1), inputs.last).flip(1)
        return towards_last(self.first.predict(latent, inputs.first), last)

    def bare(self) -> TwoEndedDenoiser:
        """This denoiser itself: it lends nothing of its conditions to a graph."""
        return self

    def plain(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The same for the reference's sampler, which any scheduler steps."""
        first, last = self.first.plain(), self.last.plain()
        return lambda latent, timestep: towards_last(first(latent, timestep), last(latent.flip(1), timestep).flip(1))


def _joined(x: Tensor, skip: Tensor, channels: int) -> Tensor:
    """x and a skip connection side by side: in place where the kernel that wrote x left room."""
    if x.shape[-1] < channels:
        return torch.cat([x, skip], dim=-1)
    x[..., channels - skip.shape[-1] :] = skip
    return x


def _res_blocks(model: Any) -> list[Any]:
    """Every res block, in the order in which they run."""
    levels = [*model.down_blocks, model.mid_block, *model.up_blocks]
    return [block for level in levels for block in level.resnets]
