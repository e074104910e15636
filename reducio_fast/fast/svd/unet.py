"""The fast twin of SVD's space-time U-Net.

Beside what `layers` and `transformer` fold:
- one table per schedule holds the projected embeddings of time, frame rate and motion for all steps and res blocks;
- the kernel that runs before a skip connection is concatenated leaves room for it, so only the skip is copied;
- guidance per frame, EDM's preconditioning of the prediction and the Euler step are one row of the sampler's kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
from .layers import Conv, Norm, SpatioTemporalRes
from .transformer import BlockRows, LastProduct, Transformer


class Conditions(NamedTuple):
    """The conditioning inputs, constant over all steps of a clip. B includes both halves of guidance.

    image [B, T, h, w, 4]: concatenated to the noisy latents. added [B, n] or [B, T, n]: time ids. context: tokens
    [B, S, E] or [B, T, S, E] for the general path, else None. rows: one list per transformer, one entry per block.
    """

    image: Tensor
    added: Tensor
    context: Tensor | None
    rows: list[list[BlockRows]]


class StepInputs(NamedTuple):
    """Inputs of one step. rows: two per res block, the spatial half's and the temporal half's."""

    rows: list[Tensor]
    conditions: Conditions


class Level(nn.Module):
    """Res blocks, each followed by its transformer if it has one, and the down- or up-sampler behind them."""

    def __init__(self, level: Any, plan: Plan, path: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SpatioTemporalRes(b, plan, f"{path}.resnets.{i}") for i, b in enumerate(level.resnets)
        )
        attentions = getattr(level, "attentions", None) or ()
        self.transformers = nn.ModuleList(
            Transformer(t, plan, f"{path}.attentions.{i}") for i, t in enumerate(attentions)
        )
        self.last_products = nn.ModuleList(
            LastProduct(t.proj_out, ours.temporal[-1].ff.bias, plan, f"{path}.attentions.{i}.proj_out")
            for i, (t, ours) in enumerate(zip(attentions, self.transformers, strict=True))
        )
        down, up = (getattr(level, name, None) for name in ("downsamplers", "upsamplers"))
        self.down = None if down is None else Conv(down[0].conv)
        self.up = None if up is None else UpConv(up[0].conv, plan, f"{path}.upsamplers.0")

    def last(self, index: int) -> UpConv | LastProduct | None:
        """The module that writes the result of block `index`: up-sampler or last product; None: the block itself."""
        if self.up is not None and index + 1 == len(self.blocks):
            return self.up
        return self.last_products[index] if index < len(self.last_products) else None


class FastVideoUNet(Regional):
    """Built from a `VideoUNet`, or from diffusers' class, whose modules have the same names. Evaluation only.

    `torch.compile` gets its res blocks and transformers: none of them writes to its arguments.
    """

    compiled_on_cpu = True
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
        # One matrix product projects the time embedding for the spatial and temporal halves of all res blocks.
        halves = [
            getattr(block, name) for block in _res_blocks(model) for name in ("spatial_res_block", "temporal_res_block")
        ]
        linears = [half.time_emb_proj for half in halves]
        self.row_weight = frozen(torch.cat([linear.weight for linear in linears]))
        self.row_bias = frozen(torch.cat([half.time_emb_proj.bias + half.conv1.bias for half in halves]))
        self.row_sizes = [len(linear.weight) for linear in linears]
        self.step_update = plan.pick("sampler", "guidance_dpm_step")
        self.graphs: Graphs | None = None
        # In the up path the kernel before a block leaves room behind its channels for the skip connection. Res blocks
        # without a transformer leave none: they are small, and torch.compile would compile each width of room anew.
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
        conditions = self.conditions(image, encoder_hidden_states, added_time_ids)
        rows = self.rows(timestep.flatten()[:1], added_time_ids, sample.shape[1])[0]
        run = self.denoise if self.graphs is None else functools.partial(self.graphs, "dit.step", self.denoise)
        return run(sample[:, :, :latent_channels], StepInputs(rows, conditions))

    def conditions(self, image_BThwC: Tensor, embeds: Tensor, added: Tensor) -> Conditions:
        """embeds [B, S, E] or [B, T, S, E]; added [B, n] or [B, T, n]."""
        embeds, frames = embeds.to(self.dtype), image_BThwC.shape[1]
        levels = [*self.down, self.middle, *self.ups]
        rows = [transformer.rows(embeds, frames) for level in levels for transformer in level.transformers]
        constant = all(own.in_time is not None for blocks in rows for own in blocks)
        return Conditions(image_BThwC.to(self.dtype), added, None if constant else embeds, rows)

    def rows(self, timesteps: Tensor, added: Tensor, frames: int) -> list[list[Tensor]]:
        """Per step and half of a res block, the sum of its first convolution's bias and its projected time embedding:
        [C] if the time ids of all clips and frames are equal, else [B * frames, C]."""
        embed, config = self.time_embedding, self.config
        wave = sinusoid(timesteps, config.block_out_channels[0]).to(self.dtype)
        time = embed.linear_2(F.silu(embed.linear_1(wave)))  # [steps, E]
        flat = added.flatten(0, -2)
        same = bool((flat == flat[:1]).all())
        ids = flat[:1] if same else flat
        numbers = embed_numbers(config, ids).to(self.dtype)
        added_embedding = self.add_embedding.linear_2(F.silu(self.add_embedding.linear_1(numbers)))
        if not same and added.ndim == 2:
            added_embedding = added_embedding.repeat_interleave(frames, 0)
        embedding = F.silu(time[:, None] + added_embedding)  # [steps, 1 or B * T, E]
        table = F.linear(embedding, self.row_weight, self.row_bias)
        return [[row[0] if same else row for row in step.split(self.row_sizes, -1)] for step in table]

    @torch.no_grad()
    def denoise(self, latent: Tensor, inputs: StepInputs) -> Tensor:
        """latent [N, T, 4, h, w], scaled. N is the batch B of the conditions, or B / 2 if both halves of guidance share
        the latent. Returns the velocity [B, T, 4, h, w]."""
        conditions, rows = inputs.conditions, iter(inputs.rows)
        batch, frames = conditions.image.shape[:2]
        noisy = latent.to(self.dtype).permute(0, 1, 3, 4, 2)
        halves = batch // len(noisy)  # a latent that both share is not copied before it is joined to their images
        joined = torch.cat(
            [noisy.expand(halves, *noisy.shape), conditions.image.unflatten(0, (halves, len(noisy)))], dim=-1
        )
        block_rows = iter(conditions.rows)

        def run(level: Level, index: int, x: Tensor) -> Tensor:
            x = self.block("dit.res", level.blocks[index], x, frames, (next(rows), next(rows)))
            if index >= len(level.transformers):
                return x
            transformer = level.transformers[index]
            tokens = self.block("dit.transformer", transformer, x, frames, next(block_rows), conditions.context)
            return level.last_products[index](tokens, x)

        x = self.conv_in(joined.flatten(0, 2))
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
        """As the reference's, for `fast.sampler.sample`. Computes the constants of the condition, once per clip."""
        if isinstance(cond, EndConditions):
            return TwoEndedDenoiser(*(self.denoiser(end, uncond, guidance_scale) for end in (cond.first, cond.last)))
        guides = needs_guidance(guidance_scale)
        condition = join(cond.without_image() if uncond is None else uncond, cond) if guides else cond
        condition = condition.to(self.conv_in.bias.device, self.dtype)
        return FastVideoDenoiser(self, condition, guidance_scale if guides else 1.0)


@dataclass(slots=True)
class FastVideoDenoiser:
    """The twin with a condition, both halves of guidance in one batch, as `fast.sampler.sample` takes it.

    condition: None in what a graph keeps, see `bare`. guidance_scale: one number or one per frame [T]. The step's
    kernel guides, by values in its row of the sampler's table, which is an input of the graph.
    """

    model: FastVideoUNet
    condition: ImageCondition | None = None
    guidance_scale: float | Tensor = 1.0
    graph_name: str = "dit.step"

    @property
    def graphs(self) -> Graphs | None:
        return self.model.graphs

    @property
    def update(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return self.model.step_update

    def bare(self) -> FastVideoDenoiser:
        """Without the condition and the scale of one clip: `predict` reads the condition from its inputs."""
        return FastVideoDenoiser(self.model)

    def plain(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The same for the reference's sampler, which any scheduler steps."""
        return lambda latent, timestep: self.guided(
            latent, self.schedule(timestep.reshape(1), latent)[0], self.scale(latent)
        )

    def scale(self, latent: Tensor) -> Tensor | None:
        """Of guidance, [] or [T, 1, 1, 1]; None: no guidance, and half the batch."""
        if not needs_guidance(self.guidance_scale):
            return None
        scale = guidance_per_frame(self.guidance_scale, latent.device)
        return scale if isinstance(scale, Tensor) else latent.new_full((), scale)

    def schedule(self, timesteps: Tensor, latent: Tensor) -> list[StepInputs]:
        condition, frames = self.condition, latent.shape[1]
        assert condition is not None, "a bare denoiser has no schedule"
        image = condition.latents
        image = image[:, None].expand(-1, frames, -1, -1, -1) if image.ndim == 4 else image
        conditions = self.model.conditions(image.permute(0, 1, 3, 4, 2), condition.embeds, condition.added_time_ids)
        rows = self.model.rows(timesteps, condition.added_time_ids, frames)
        return [StepInputs(step, conditions) for step in rows]

    def predict(self, latent: Tensor, inputs: StepInputs) -> Tensor:
        """Not guided; in the network's dtype if the latent is float32, else in the latent's, as the kernel takes it."""
        prediction = self.model.denoise(latent, inputs)
        return prediction if latent.dtype == torch.float32 else prediction.to(latent.dtype)

    def guided(self, latent: Tensor, inputs: StepInputs, scale: Tensor | None) -> Tensor:
        """The prediction in the latent's dtype, guided by torch. scale: see `scale`."""
        prediction = self.model.denoise(latent, inputs).to(latent.dtype)
        if scale is None:
            return prediction
        without, with_image = prediction.chunk(2)
        return without + scale * (with_image - without)


class EndInputs(NamedTuple):
    """scale: of guidance, see `FastVideoDenoiser.scale`. It is an input because a CUDA graph would keep any other value
    of its capture."""

    first: StepInputs
    last: StepInputs
    scale: Tensor | None


@dataclass(slots=True)
class TwoEndedDenoiser:
    """The twin of `reference.svd.sampler.two_ended`. Its two denoisers run in turn, in the memory of one."""

    first: FastVideoDenoiser
    last: FastVideoDenoiser
    guidance_scale: float = 1.0  # of the sampler's kernel: each end is guided before the two are joined
    graph_name: str = "dit.step"

    @property
    def graphs(self) -> Graphs | None:
        return self.first.graphs

    @property
    def update(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return self.first.update

    def schedule(self, timesteps: Tensor, latent: Tensor) -> list[EndInputs]:
        schedules = (self.first.schedule(timesteps, latent), self.last.schedule(timesteps, latent))
        scale = self.first.scale(latent)
        return [EndInputs(*pair, scale) for pair in zip(*schedules, strict=True)]

    def predict(self, latent: Tensor, inputs: EndInputs) -> Tensor:
        last = self.last.guided(latent.flip(1), inputs.last, inputs.scale).flip(1)
        return towards_last(self.first.guided(latent, inputs.first, inputs.scale), last)

    def bare(self) -> TwoEndedDenoiser:
        """Without the conditions and the scales of one clip."""
        return TwoEndedDenoiser(self.first.bare(), self.last.bare())

    def plain(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The same for the reference's sampler, which any scheduler steps."""
        first, last = self.first.plain(), self.last.plain()
        return lambda latent, timestep: towards_last(first(latent, timestep), last(latent.flip(1), timestep).flip(1))


def _joined(x: Tensor, skip: Tensor, channels: int) -> Tensor:
    """Concatenate x and a skip connection; in place if the kernel that wrote x left room for it."""
    if x.shape[-1] < channels:
        return torch.cat([x, skip], dim=-1)
    x[..., channels - skip.shape[-1] :] = skip
    return x


def _res_blocks(model: Any) -> list[Any]:
    """Every res block, in the order in which they run."""
    levels = [*model.down_blocks, model.mid_block, *model.up_blocks]
    return [block for level in levels for block in level.resnets]
