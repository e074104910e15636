"""The fast twin of `reference/reducio/dit.py`: the same network, with all step-independent work done once per clip.

What differs from the reference, and why:
- query, key and value of self-attention are one matrix product;
- cross-attention keys and values do not depend on the step: `prepare` computes them, with hidden tokens moved to the
  end, so that a count per item replaces the mask;
- the modulation of every block and step is a table computed once per schedule: it depends on the timestep and, where
  the model has them, on size and clip conditions, but not on the latent;
- residual, gate, LayerNorm and modulation are one pass, across block boundaries and into the final layer;
- both halves of guidance share everything up to the first cross-attention;
- the variance half of the final layer is never computed.

Legend as in the reference: B batch, L latent tokens, S condition tokens, D hidden size, N heads, K channels of a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...compile.compiled_blocks import Regional
from ...compile.graphs import Graphs
from ...reference import DiTConfig, ReducioDiT
from ...reference.reducio.condition import Condition, join
from ...reference.reducio.dit import NORM_EPS, Attention, DiTBlock, Grid, JointCondition, LatentTransformer
from ...reference.sampler import Denoiser, Guided
from ...triton_kernels import attention
from ..packed_layers import frozen
from ..parallel import Lanes, Ranks
from ..plan import Plan
from ..sampler import BlockCache

POSITIONS = 8  # clip sizes whose position tables are kept


class Prepared(NamedTuple):
    """Cross-attention inputs, the same in all steps of a clip, for a batch of B items (both halves of guidance)."""

    keys_values: list[tuple[Tensor, Tensor]]  # one pair per block, [B, S, N, K] each
    key_count: Tensor | None  # int32 [B]; None: every key is visible

    @property
    def batch(self) -> int:
        return len(self.keys_values[0][0])

    def half(self, number: int) -> Prepared:
        """Views of one half of guidance: 0 is the unconditional half, 1 the conditional one."""
        items = slice(self.batch // 2) if number == 0 else slice(self.batch // 2, None)
        keys_values = [(k[items], v[items]) for k, v in self.keys_values]
        return Prepared(keys_values, None if self.key_count is None else self.key_count[items])


class Modulation(NamedTuple):
    """Shifts, scales and gates of every block and of the final layer, for one step [1, ...] or a schedule [steps, ...].

    `blocks` [steps, depth, 6, D] in the reference's order (shift, scale, gate of attention, then of feed-forward),
    `final` [steps, 2, D] (shift, scale). `position` [t or 1, h * w, D]: of the clip's patches, the same for every step.
    """

    blocks: Tensor
    final: Tensor
    position: Tensor

    def step(self, index: int) -> Modulation:
        return Modulation(self.blocks[index : index + 1], self.final[index : index + 1], self.position)


StepInputs = tuple[Modulation, Prepared]


@dataclass(slots=True, weakref_slot=True, eq=False)
class FastDenoiser:
    """The twin with its condition, both halves of guidance in one batch. `fast.sampler.sample` runs it.

    size: height and width in pixels, for models with size conditioning (None: those of the latent).
    """

    model: FastTransformer
    prepared: Prepared
    guidance_scale: float
    size: Tensor | None = None  # [1, 2]
    clip: Tensor | None = None  # [1, 2], see the reference's `forward`

    @property
    def graphs(self) -> Graphs | None:
        return self.model.graphs

    @property
    def graph_name(self) -> str:
        return self.model.graph_names[0]

    @property
    def update(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return self.model.step_update

    def schedule(self, timesteps: Tensor, latent: Tensor) -> list[StepInputs]:
        modulation = self.model.modulations(timesteps, latent.shape[2:], self.size, self.clip)
        return [(modulation.step(step), self.prepared) for step in range(len(timesteps))]

    def conditional(self, inputs: StepInputs) -> StepInputs:
        """From the inputs of a step, those that predict with the condition alone."""
        return inputs[0], inputs[1].half(1) if self.guidance_scale > 1 else inputs[1]

    def predict(self, latent: Tensor, inputs: StepInputs) -> Tensor:
        return self.model.denoise(latent, *inputs)

    def predict_cached(self, latent: Tensor, inputs: StepInputs, cache: BlockCache) -> Tensor:
        return self.model.denoise(latent, *inputs, cache)

    def bare(self) -> FastDenoiser:
        """The same without its condition: a graph may keep it, and the next clip reuses the condition's buffers."""
        return FastDenoiser(self.model, Prepared([], None), self.guidance_scale)

    def plain(self) -> Denoiser:
        """The same for the reference's sampler, which works with any scheduler."""

        def prediction(latent: Tensor, timestep: Tensor, alone: bool) -> Tensor:
            inputs = self.schedule(timestep.reshape(1), latent)[0]
            return self.predict(latent, self.conditional(inputs) if alone else inputs).to(latent.dtype)

        conditional = functools.partial(prediction, alone=True)
        if not self.guidance_scale > 1:
            return conditional
        return Guided(functools.partial(prediction, alone=False), conditional, self.guidance_scale)


@dataclass(slots=True, weakref_slot=True, eq=False)
class DividedDenoiser(FastDenoiser):
    """The same, divided between several processes: by halves of guidance, and within each half by tokens and heads.
    Its steps run without graphs, which cannot hold every backend's exchanges."""

    @property
    def graphs(self) -> None:
        return None

    def bare(self) -> DividedDenoiser:
        return self

    def predict(self, latent: Tensor, inputs: StepInputs) -> Tensor:
        model, (modulation, prepared) = self.model, inputs
        assert model.ranks is not None
        halves = 1 if prepared.batch == len(latent) else 2

        def predict(half: int, lanes: Lanes | None) -> Tensor:
            own = prepared if halves == 1 else prepared.half(half)
            return model.denoise(latent, modulation, own, lanes=lanes)

        tokens = math.prod(model.grid(latent.shape[2:])) if model.sizes.attention == "3d" else 1
        return model.ranks.predict(predict, halves, tokens, latent.to(model.dtype))


class FastSelfAttention(nn.Module):
    """Query, key and value from one product [D, 3D]; the kernel reads them in place."""

    lanes: Lanes | None = None  # processes that share the tokens

    def __init__(self, attention: Attention, plan: Plan, path: str) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        parts = (attention.to_q, attention.to_k, attention.to_v)
        self.qkv_weight = frozen(torch.cat([linear.weight for linear in parts]))
        self.qkv_bias = frozen(torch.cat([linear.bias for linear in parts]))
        self.to_out = attention.to_out[0]
        head_dim = len(self.to_out.weight) // self.num_heads
        self.attend = plan.pick(path, "attention", f"self {head_dim}")

    def forward(self, y_BLD: Tensor) -> Tensor:
        q, k, v = F.linear(y_BLD, self.qkv_weight, self.qkv_bias).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if self.lanes is not None:
            q, k, v = (self.lanes.to_heads(x) for x in (q, k, v))
            return self.to_out(self.lanes.to_tokens(self.attend(q, k, v)).flatten(2))
        return self.to_out(self.attend(q, k, v).flatten(2))


class FastCrossAttention(nn.Module):
    def __init__(self, attention: Attention, plan: Plan, path: str) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = attention.to_out[0]
        head_dim = len(self.to_out.weight) // self.num_heads
        self.attend = plan.pick(path, "attention", f"cross {head_dim}")

    def keys_values(self, context_BSD: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (to(context_BSD).unflatten(-1, (self.num_heads, -1)) for to in (self.to_k, self.to_v))
        return k, v

    def forward(self, x_BLD: Tensor, keys_values: tuple[Tensor, Tensor], key_count: Tensor | None) -> Tensor:
        q = self.to_q(x_BLD).unflatten(-1, (self.num_heads, -1))
        return self.to_out(self.attend(q, *keys_values, key_count).flatten(2))


class FastDiTBlock(nn.Module):
    """One block. Its first modulated norm is an input; it returns that of the next block or of the final layer."""

    def __init__(self, block: DiTBlock, plan: Plan, path: str) -> None:
        super().__init__()
        self.per_frame = block.per_frame
        self.attn1 = FastSelfAttention(block.attn1, plan, f"{path}.attn1")
        if self.per_frame:
            self.attn_temporal = FastSelfAttention(block.attn_temporal, plan, f"{path}.attn_temporal")
        self.attn2 = FastCrossAttention(block.attn2, plan, f"{path}.attn2")
        self.ff = block.ff
        self.residual_norm = plan.pick(f"{path}.norm2, and the norm after it", "gated_residual_ada_layer_norm")

    def forward(
        self,
        x_BLD: Tensor,
        y_BLD: Tensor,
        modulation_6D: Tensor,
        following_2D: tuple[Tensor, Tensor],
        keys_values: tuple[Tensor, Tensor],
        key_count: Tensor | None,
        frames: int,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and its modulated norm -> both at the end of the block. `following_2D`: shift and scale
        of the norm that is returned.

        In the first block the batch may be half of the keys' batch: it is then repeated for both halves of guidance.
        """
        _, _, gate_1, shift_2, scale_2, gate_2 = modulation_6D
        x_BLD = torch.addcmul(x_BLD, gate_1, self.self_attention(y_BLD, frames))
        if self.per_frame:
            x_BLD = x_BLD + self.temporal_attention(x_BLD, frames)
        if len(x_BLD) != len(keys_values[0]):
            x_BLD = torch.cat([x_BLD, x_BLD])
        branch = self.attn2(x_BLD, keys_values, key_count)
        B = len(x_BLD)
        x_BLD, y_BLD = self.residual_norm(x_BLD, branch, None, _rows(shift_2, B), _rows(scale_2, B), NORM_EPS)
        shift, scale = following_2D
        return self.residual_norm(x_BLD, self.ff(y_BLD), _rows(gate_2, B), _rows(shift, B), _rows(scale, B), NORM_EPS)

    def self_attention(self, y_BLD: Tensor, frames: int) -> Tensor:
        if not self.per_frame:
            return self.attn1(y_BLD)
        B = len(y_BLD)
        return self.attn1(y_BLD.unflatten(1, (frames, -1)).flatten(0, 1)).unflatten(0, (B, frames)).flatten(1, 2)

    def temporal_attention(self, x_BLD: Tensor, frames: int) -> Tensor:
        B = len(x_BLD)
        y = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=NORM_EPS).unflatten(1, (frames, -1)).transpose(1, 2)
        return self.attn_temporal(y.flatten(0, 1)).unflatten(0, (B, -1)).transpose(1, 2).flatten(1, 2)


class FastTransformer(Regional):
    """What the twins of `ReducioDiT` and `PixArt` share: a step, given the keys and values of a condition."""

    compiled_on_cpu = True
    graph_names: tuple[str, ...]  # the first is that of a step
    block_name = "dit.block"

    def __init__(self, model: LatentTransformer, sizes: DiTConfig, plan: Plan) -> None:
        super().__init__()
        self.config, self.sizes = model.config, sizes
        self.pos_embed, self.adaln_single = model.pos_embed, model.adaln_single
        self.patch_weight = frozen(self.pos_embed.proj.weight.flatten(1))  # patches do not overlap: a matrix product
        self.conditioner = (model,)  # embeds conditions; in a tuple, so that its weights are not listed twice
        self.transformer_blocks = nn.ModuleList(
            FastDiTBlock(block, plan, f"transformer_blocks.{i}") for i, block in enumerate(model.transformer_blocks)
        )
        self.tables = frozen(torch.stack([block.scale_shift_table for block in model.transformer_blocks]))
        self.final_table = model.scale_shift_table
        keep, patch = sizes.latent_channels, math.prod(sizes.patch_size)
        self.out_weight, self.out_bias = (
            frozen(p.unflatten(0, (patch, -1))[:, :keep].flatten(0, 1))
            for p in (model.proj_out.weight, model.proj_out.bias)
        )
        self.first_norm = plan.pick("transformer_blocks.0.norm1", "ada_layer_norm")
        self.step_update = plan.pick("sampler", "guidance_dpm_step")
        self.masks_keys = self.transformer_blocks[0].attn2.attend is attention.twin  # our kernel takes a count
        self.positions: dict[Grid, Tensor] = {}  # of the last sizes; graphs read copies
        self.graphs: Graphs | None = None  # the sampler runs a step through them; None: eagerly

    @property
    def dtype(self) -> torch.dtype:
        return self.out_weight.dtype

    def keys_values(self, condition: JointCondition) -> Prepared:
        """Keys and values of every block, computed once per clip."""
        tokens, count = condition.tokens, None
        if condition.mask is not None:
            # Attention does not depend on the order of its keys: visible keys go first, and a count replaces the mask.
            order = condition.mask.int().argsort(dim=1, descending=True, stable=True)
            tokens = [t.gather(1, order[..., None].expand_as(t)) for t in tokens]
            count = condition.mask.sum(1, dtype=torch.int32)
            if count.is_meta and self.masks_keys:
                count = None  # a forecast has no prompt and assumes the longest, whose keys are all visible
            elif count.device.type == "cpu" and self.graphs is None:
                # Keep only keys that some item sees, and no mask if all see equally many: 20% of a small model's step.
                # On a GPU the kernel stops at the count; reading it here would wait for the device. Graphs need one
                # shape for prompts of any length; compiled blocks take any number of keys.
                seen = max(int(count.max()), 1)
                tokens = [t[:, :seen] for t in tokens]
                count = None if bool((count == seen).all()) else count
        keys_values = [
            block.attn2.keys_values(tokens[index % len(tokens)]) for index, block in enumerate(self.transformer_blocks)
        ]
        return Prepared(keys_values, count)

    def lent(self, denoiser: FastDenoiser) -> FastDenoiser:
        """The denoiser, its keys and values in buffers that a step's graph reads in place: 361 MB at 1024x1024."""
        if self.graphs is not None:
            pairs = denoiser.prepared.keys_values
            flat = self.graphs.lend(denoiser.graph_name, [x for pair in pairs for x in pair], denoiser)
            keys_values = list(zip(flat[::2], flat[1::2], strict=True))
            denoiser.prepared = denoiser.prepared._replace(keys_values=keys_values)
        return denoiser

    @torch.no_grad()
    def modulations(
        self,
        timesteps: Tensor,
        latent_size: Grid | torch.Size,
        size: Tensor | None = None,
        clip: Tensor | None = None,
    ) -> Modulation:
        """Modulations of a schedule: timesteps [steps]; latent_size (T, H, W) in cells; size and clip [1, 2]."""
        if size is None:
            pixels = [float(n * self.sizes.spatial_factor) for n in latent_size[1:]]
            size = torch.tensor([pixels], device=timesteps.device)
        conditions = [None if x is None else x.to(timesteps.device).expand(len(timesteps), 2) for x in (size, clip)]
        shared_S6D, embedding_SD = self.adaln_single(timesteps, *conditions)
        blocks, final = self.tables + shared_S6D[:, None], self.final_table + embedding_SD[:, None]
        return Modulation(blocks, final, self.position(self.grid(latent_size), timesteps.device))

    def grid(self, latent_size: Grid | torch.Size) -> Grid:
        """Patches along time, height and width."""
        (T, H, W), (pt, ph, pw) = latent_size, self.sizes.patch_size
        return T // pt, H // ph, W // pw

    def position(self, grid: Grid, device: torch.device) -> Tensor:
        """The position table of a grid. Those of the last POSITIONS sizes are kept: 18.9 MB each at 1024x1024."""
        table = self.positions.pop(grid, None)
        if table is None or table.device != device:
            table = self.pos_embed.position(*grid, device)
        self.positions[grid] = table
        if len(self.positions) > POSITIONS:
            self.positions.pop(next(iter(self.positions)))
        return table

    @torch.no_grad()
    def denoise(
        self,
        latent: Tensor,
        modulation: Modulation,
        prepared: Prepared,
        cache: BlockCache | None = None,
        lanes: Lanes | None = None,
    ) -> Tensor:
        """One prediction. latent [B, C, T, H, W], where B is the batch of `prepared` or half of it: then both halves of
        guidance, the unconditional first, are predicted from one latent. Returns [prepared.batch, latent_channels, T,
        H, W]. lanes: processes that share its tokens."""
        x, y, grid = self.run_blocks(latent, modulation, prepared, cache, lanes)
        out = F.linear(y, self.out_weight, self.out_bias)
        return self.conditioner[0].unpatchify(out if lanes is None else lanes.all_tokens(out), grid)

    def run_blocks(
        self,
        latent: Tensor,
        modulation: Modulation,
        prepared: Prepared,
        cache: BlockCache | None = None,
        lanes: Lanes | None = None,
    ) -> tuple[Tensor, Tensor, Grid]:
        """The residual stream after all blocks, its norm modulated for the final layer, both [B, L, D], and the grid of
        patches."""
        grid, blocks_M6D, (shift, scale) = self.grid(latent.shape[2:]), modulation.blocks[0], modulation.final[0]
        x = self.tokens(latent, modulation.position)
        x = x if lanes is None else lanes.own(x)
        if self.regions is not None and len(x) != prepared.batch:
            x = torch.cat([x, x])  # all blocks then compile for one shape; costs at most half a self-attention
        y = self.first_norm(x, _rows(blocks_M6D[0, 0], len(x)), _rows(blocks_M6D[0, 1], len(x)), NORM_EPS)
        last = len(self.transformer_blocks) - 1
        for block in self.transformer_blocks:
            if block.attn1.lanes is not lanes:
                block.attn1.lanes = lanes
        before = after_first = x
        for i, block in enumerate(self.transformer_blocks):
            if cache is not None and i == 1:
                after_first, before = x, before if len(before) == len(x) else torch.cat([before, before])
                first = x - before
                if cache.serves(first):
                    cache.kept += 1
                    x = x + cache.others[x.shape]
                    return x, self.first_norm(x, _rows(shift, len(x)), _rows(scale, len(x)), NORM_EPS), grid
                cache.first[first.shape] = first
            following = (blocks_M6D[i + 1, 0], blocks_M6D[i + 1, 1]) if i < last else (shift, scale)
            condition = (prepared.keys_values[i], prepared.key_count)
            free = prepared.keys_values[i] if x.device.type == "cpu" else ()
            x, y = self.block(self.block_name, block, x, y, blocks_M6D[i], following, *condition, grid[0], free=free)
        if cache is not None:
            cache.computed += 1
            cache.others[x.shape] = x - after_first
        return x, y, grid

    def tokens(self, latent: Tensor, position: Tensor) -> Tensor:
        """Patches and their positions, [B, L, D]."""
        (B, C), (T, H, W), (pt, ph, pw) = latent.shape[:2], self.grid(latent.shape[2:]), self.sizes.patch_size
        patches = latent.to(self.dtype).view(B, C, T, pt, H, ph, W, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        x = F.linear(patches.reshape(B, T, H * W, -1), self.patch_weight, self.pos_embed.proj.bias)
        return (x + position).flatten(1, 2).to(self.dtype)


class FastReducioDiT(FastTransformer):
    """Built from a reference model, whose unpacked weights it shares. Evaluation only.

    To sample a clip, call `prepare` once, `modulations` once per schedule and `denoise` once per step; `denoiser` ties
    them together. Called like the reference, it does all three. Source of the network: see `reference/reducio/dit.py`.
    """

    graph_names = ("dit.step",)
    ranks: Ranks | None = None  # processes that make each clip together

    def __init__(self, model: ReducioDiT, plan: Plan) -> None:
        super().__init__(model, model.config, plan)
        self.null_text = model.null_text

    @torch.no_grad()
    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        semantic: Tensor | None = None,
        content: Tensor | None = None,
        *,
        size: Tensor | None = None,
        clip: Tensor | None = None,
    ) -> Tensor:
        """As the reference's, without the variance: [B, latent_channels, T, H, W]. All items share one timestep.

        Raises ValueError as the reference does, and for timesteps, sizes or clips that differ between the items.
        """
        inputs = {"text": text, "text_mask": text_mask, "semantic": semantic, "content": content}
        self.conditioner[0].check_inputs(latent, timestep, **inputs, size=size, clip=clip)
        first = {name: _shared(name, value) for name, value in (("timestep", timestep), ("size", size), ("clip", clip))}
        modulation = self.modulations(first["timestep"].flatten(), latent.shape[2:], first["size"], first["clip"])
        return self.denoise(latent, modulation, self.prepare(text, text_mask, semantic, content))

    @torch.no_grad()
    def denoiser(self, cond: Condition, uncond: Condition | None = None, guidance_scale: float = 1.0) -> FastDenoiser:
        """As the reference's, for `fast.sampler.sample`: computes keys and values of the condition, once."""
        if guidance_scale > 1:
            cond = join(cond.without_text(self.null_text) if uncond is None else uncond, cond)
        prepared = self.prepare(cond.text, cond.text_mask, cond.semantic, cond.content)
        clip = _shared("clip", cond.clip)
        if self.ranks is not None:
            return DividedDenoiser(self, prepared, guidance_scale, clip=clip)
        return self.lent(FastDenoiser(self, prepared, guidance_scale, clip=clip))

    @torch.no_grad()
    def prepare(
        self,
        text: Tensor,
        text_mask: Tensor | None = None,
        semantic: Tensor | None = None,
        content: Tensor | None = None,
    ) -> Prepared:
        """Cross-attention keys and values of every block; arguments as in the reference's `forward`."""
        return self.keys_values(self.conditioner[0].embed_condition(text, text_mask, semantic, content))


def _shared(name: str, values: Tensor | None) -> Tensor | None:
    """The value that all items of a batch share, as a batch of one. Raises ValueError if they differ."""
    if values is None or not values.ndim:
        return values
    same = (values == values[:1]) | (values.isnan() & values[:1].isnan())
    if not bool(same.all()):
        raise ValueError(f"{name} differs between the items of the batch: {values.tolist()}")
    return values[:1]


def _rows(row_D: Tensor, batch: int) -> Tensor:
    """One modulation for every item: [D] -> [B, D] of stride 0."""
    return row_D.expand(batch, -1)
