"""Reducio-DiT: PixArt-alpha's transformer over the latent of a whole clip, conditioned on text and one content image.

Sources: Reducio (arXiv 2411.13552) for full 3D attention and the joint condition, PixArt-alpha for everything else;
what neither states is a field of `DiTConfig`. State-dict names equal diffusers' `PixArtTransformer2DModel` where the
two coincide.

Legend: B batch, C channels, T H W latent frames, rows, columns (lower case t h w: in patches), L latent tokens (t*h*w),
S condition tokens, D hidden size, N heads, K channels of a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sampler import Denoiser
from .condition import Condition, denoiser
from .config import DiTConfig
from .initialization import normal, on_meta

NORM_EPS = 1e-6
SINUSOID_CHANNELS = 256  # of the timestep, height, width and aspect ratio before their MLPs
Grid = tuple[int, int, int]  # t, h, w


class JointCondition(NamedTuple):
    """What the cross-attention sees. Block b reads `tokens[b % len(tokens)]`; the mask is the same for every group."""

    tokens: list[Tensor]  # one [B, S, D] per content group
    mask: Tensor | None  # bool [B, S], False is hidden; None shows everything


def sinusoid(positions: Tensor, channels: int) -> Tensor:
    """[n] -> [n, channels], sines first, frequencies 10000^(-2i/channels); in float64."""
    exponents = torch.arange(channels // 2, dtype=torch.float64, device=positions.device) / (channels / 2)
    angles = positions.double()[:, None] * 10000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def position_2d(rows: int, columns: int, channels: int, base: int, scale: float, device: torch.device) -> Tensor:
    """PixArt-alpha's position of every cell: [rows * columns, channels], row by row, the column in the first half."""
    row = sinusoid(torch.arange(rows, device=device) / (rows / base) / scale, channels // 2)
    column = sinusoid(torch.arange(columns, device=device) / (columns / base) / scale, channels // 2)
    return torch.cat([column.repeat(rows, 1), row.repeat_interleave(columns, dim=0)], dim=1)


def modulate(x_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    return x_BLD * (1 + scale_B1D) + shift_B1D


class PatchEmbedding(nn.Module):
    """Latent -> tokens in (t, h, w) order, plus fixed positions. The weight has PixArt's axes [D, C*pt, ph, pw]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        pt, *patch = config.patch_size
        self.proj = nn.Conv2d(config.latent_channels * pt, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, latent_BCTHW: Tensor) -> Tensor:
        config, (B, C, T, H, W) = self.config, latent_BCTHW.shape
        pt = config.patch_size[0]
        frames = latent_BCTHW.reshape(B, C, T // pt, pt, H, W).transpose(1, 2).reshape(-1, C * pt, H, W)
        x = self.proj(frames)
        h, w = x.shape[-2:]
        x_BtsD = x.flatten(2).transpose(1, 2).unflatten(0, (B, T // pt))
        return (x_BtsD + self.position(T // pt, h, w, x.device)).flatten(1, 2).to(self.proj.weight.dtype)

    def position(self, t: int, h: int, w: int, device: torch.device) -> Tensor:
        """Fixed positions, float32 [t or 1, h * w, D]."""
        config = self.config
        position = position_2d(h, w, config.hidden_size, config.position_base_size, config.position_scale, device)[None]
        # A single frame gets no temporal position, so an image is processed exactly as in PixArt.
        if config.temporal_position and t > 1:
            position = position + sinusoid(torch.arange(t, device=device), config.hidden_size)[:, None]
        return position.float()


class TimestepEmbedding(nn.Module):
    """A number (timestep, pixels or ratio) -> 256 cosines and sines, cosine first -> two-layer SiLU MLP."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(SINUSOID_CHANNELS, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, values_B: Tensor) -> Tensor:
        half = SINUSOID_CHANNELS // 2
        exponents = torch.arange(half, dtype=torch.float32, device=values_B.device) / half
        angles = values_B.float()[:, None] * torch.exp(-math.log(10000) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.linear_2(F.silu(self.linear_1(waves.to(self.linear_1.weight.dtype))))


class TimeSizeEmbedding(nn.Module):
    """Timestep embedding, plus (PixArt's 1024 model) height, width and aspect ratio, each a third of the channels, plus
    (`clip_conditioning`) frame rate and motion."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(config.hidden_size)
        self.size_conditioning = config.size_conditioning
        if config.size_conditioning:
            self.resolution_embedder = TimestepEmbedding(config.hidden_size // 3)
            self.aspect_ratio_embedder = TimestepEmbedding(config.hidden_size // 3)
        self.clip_conditioning = config.clip_conditioning
        if config.clip_conditioning:
            self.fps_embedder = TimestepEmbedding(config.hidden_size)
            self.motion_embedder = TimestepEmbedding(config.hidden_size)

    def forward(self, timestep_B: Tensor, size_B2: Tensor, clip_B2: Tensor | None = None) -> Tensor:
        embedding_BD = self.timestep_embedder(timestep_B)
        if self.size_conditioning:
            size_BE = self.resolution_embedder(size_B2.flatten()).unflatten(0, (-1, 2)).flatten(1)
            ratio_BE = self.aspect_ratio_embedder(size_B2[:, 0] / size_B2[:, 1])
            embedding_BD = embedding_BD + torch.cat([size_BE, ratio_BE], dim=1)
        if self.clip_conditioning and clip_B2 is not None:
            for embedder, values_B in zip((self.fps_embedder, self.motion_embedder), clip_B2.unbind(1), strict=True):
                known_B1 = values_B.isfinite()[:, None]
                embedding_BD = embedding_BD + torch.where(known_B1, embedder(values_B.nan_to_num()), 0)
        return embedding_BD


class AdaLNSingle(nn.Module):
    """One modulation for all blocks; each block adds its own table to it (PixArt-alpha, AdaLN-single)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.emb = TimeSizeEmbedding(config)
        self.linear = nn.Linear(config.hidden_size, 6 * config.hidden_size)

    def forward(self, timestep_B: Tensor, size_B2: Tensor, clip_B2: Tensor | None = None) -> tuple[Tensor, Tensor]:
        embedding_BD = self.emb(timestep_B, size_B2, clip_B2)
        return self.linear(F.silu(embedding_BD)).unflatten(1, (6, -1)), embedding_BD


class CaptionProjection(nn.Module):
    """Text features -> condition tokens: two layers with tanh-GELU between."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.caption_channels, config.hidden_size)
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, text_BLC: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(text_BLC), approximate="tanh"))


class SemanticProjection(nn.Module):
    """OpenCLIP patch tokens -> condition tokens. No position is added: the image tower's tokens carry one already."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.semantic_channels, config.hidden_size)
        two_layers = config.semantic_projection == "mlp"
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size) if two_layers else None

    def forward(self, semantic_BSC: Tensor) -> Tensor:
        x = self.linear_1(semantic_BSC)
        return x if self.linear_2 is None else self.linear_2(F.gelu(x, approximate="tanh"))


class ContentEmbedding(nn.Module):
    """SD-VAE latent of the content image -> condition tokens with 2D positions, split into dilated groups."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.content_patch_size
        self.proj = nn.Conv2d(config.content_channels, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, content_BCHW: Tensor) -> list[Tensor]:
        """-> one [B, S / groups, D] per group: group (i, j) holds every stride-th row from i and column from j."""
        config = self.config
        x_BDhw = self.proj(content_BCHW)
        h, w = x_BDhw.shape[-2:]
        position = position_2d(
            h, w, config.hidden_size, config.position_base_size, config.position_scale, x_BDhw.device
        )
        x_BhwD = x_BDhw.movedim(1, -1) + position.float().unflatten(0, (h, w))
        x_BhwD, stride = x_BhwD.to(self.proj.weight.dtype), config.content_stride
        return [x_BhwD[:, i::stride, j::stride].flatten(1, 2) for i in range(stride) for j in range(stride)]


class Attention(nn.Module):
    """Multi-head attention of tokens over themselves, or over `context` where one is given."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list: the published name is to_out.0

    def forward(self, x_BLD: Tensor, context_BSD: Tensor | None = None, mask_BS: Tensor | None = None) -> Tensor:
        context_BSD = x_BLD if context_BSD is None else context_BSD
        q_BNLK, k_BNSK, v_BNSK = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for y in (self.to_q(x_BLD), self.to_k(context_BSD), self.to_v(context_BSD))
        )
        mask_B11S = None if mask_BS is None else mask_BS[:, None, None]
        out_BNLK = F.scaled_dot_product_attention(q_BNLK, k_BNSK, v_BNSK, attn_mask=mask_B11S)
        return self.to_out[0](out_BNLK.transpose(1, 2).flatten(2))


class FeedForwardInput(nn.Module):
    def __init__(self, channels: int, inner_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, inner_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear, tanh-GELU, linear. The middle of the list is the published layout's dropout (names net.0.proj, net.2)."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        inner = int(channels * ratio)
        self.net = nn.ModuleList([FeedForwardInput(channels, inner), nn.Identity(), nn.Linear(inner, channels)])

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.net[2](self.net[0](x_BLD))


class DiTBlock(nn.Module):
    """Modulated self-attention, plain cross-attention (no norm, no gate: PixArt-alpha), modulated feed-forward."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.per_frame = config.attention == "2d+1d"
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=NORM_EPS)
        self.attn1 = Attention(D, config.num_heads)
        if self.per_frame:
            self.norm_temporal = nn.LayerNorm(D, elementwise_affine=False, eps=NORM_EPS)
            self.attn_temporal = Attention(D, config.num_heads)
        self.attn2 = Attention(D, config.num_heads)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=NORM_EPS)
        self.ff = FeedForward(D, config.mlp_ratio)
        self.scale_shift_table = nn.Parameter(normal(6, D, scale=D**-0.5))

    def forward(
        self, x_BLD: Tensor, modulation_B6D: Tensor, condition_BSD: Tensor, mask_BS: Tensor | None, grid: Grid
    ) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (self.scale_shift_table + modulation_B6D).split(1, dim=1)
        x_BLD = x_BLD + gate_1 * self.self_attention(modulate(self.norm1(x_BLD), shift_1, scale_1), grid)
        if self.per_frame:
            x_BLD = x_BLD + self.temporal_attention(self.norm_temporal(x_BLD), grid)
        x_BLD = x_BLD + self.attn2(x_BLD, condition_BSD, mask_BS)
        return x_BLD + gate_2 * self.ff(modulate(self.norm2(x_BLD), shift_2, scale_2))

    def self_attention(self, x_BLD: Tensor, grid: Grid) -> Tensor:
        if not self.per_frame:
            return self.attn1(x_BLD)
        B, t = len(x_BLD), grid[0]
        return self.attn1(x_BLD.unflatten(1, (t, -1)).flatten(0, 1)).unflatten(0, (B, t)).flatten(1, 2)

    def temporal_attention(self, x_BLD: Tensor, grid: Grid) -> Tensor:
        """Each place of the frame attends along time."""
        B, t = len(x_BLD), grid[0]
        x_BstD = x_BLD.unflatten(1, (t, -1)).transpose(1, 2)
        return self.attn_temporal(x_BstD.flatten(0, 1)).unflatten(0, (B, -1)).transpose(1, 2).flatten(1, 2)


class LatentTransformer(nn.Module):
    """What `ReducioDiT` and `PixArt` have in common: their blocks and their final layer."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; inputs are cast to it."""
        return self.proj_out.weight.dtype

    def forward_tokens(self, x_BLD: Tensor, modulation_B6D: Tensor, condition: JointCondition, grid: Grid) -> Tensor:
        """The stack of blocks."""
        for index, block in enumerate(self.transformer_blocks):
            tokens_BSD = condition.tokens[index % len(condition.tokens)]
            x_BLD = block(x_BLD, modulation_B6D, tokens_BSD, condition.mask, grid)
        return x_BLD

    def final_layer(self, x_BLD: Tensor, embedding_BD: Tensor) -> Tensor:
        """Modulated norm and output projection. The table is added to the raw time embedding."""
        shift_B1D, scale_B1D = (self.scale_shift_table + embedding_BD[:, None]).split(1, dim=1)
        return self.proj_out(modulate(self.norm_out(x_BLD), shift_B1D, scale_B1D))

    def unpatchify(self, x_BLP: Tensor, grid: Grid) -> Tensor:
        """[B, t*h*w, pt*ph*pw*C] -> [B, C, T, H, W]."""
        x = x_BLP.unflatten(2, (*self.pos_embed.config.patch_size, -1)).unflatten(1, grid)  # B t h w pt ph pw C
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class ReducioDiT(LatentTransformer):
    """Predicts the noise (or the flow) in a clip's motion latent. `null_text` stands for the absent prompt."""

    null_text: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.pos_embed = PatchEmbedding(config)
        self.adaln_single = AdaLNSingle(config)
        self.caption_projection = CaptionProjection(config)
        self.semantic_projection = SemanticProjection(config)
        self.content_embedding = ContentEmbedding(config)
        self.transformer_blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        # The final layer: at the root, not in a module of its own, because the published names are there.
        self.norm_out = nn.LayerNorm(D, elementwise_affine=False, eps=NORM_EPS)
        self.scale_shift_table = nn.Parameter(normal(2, D, scale=D**-0.5))
        self.proj_out = nn.Linear(D, math.prod(config.patch_size) * config.out_channels)
        # Fixed, never trained (PixArt-alpha).
        null_text = normal(config.caption_length, config.caption_channels, scale=config.caption_channels**-0.5)
        self.register_buffer("null_text", null_text)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """PixArt-alpha's initialisation: Xavier linears, and zeros where a branch or the output starts at zero."""
        if on_meta():
            return
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # flatten: a patch convolution is a linear layer
                nn.init.zeros_(module.bias)
        small = (self.adaln_single, self.caption_projection, self.semantic_projection)
        for linear in (m for part in small for m in part.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.02)
        zeroed = [self.proj_out]
        for block in self.transformer_blocks:
            zeroed += [block.attn2.to_out[0], *([block.attn_temporal.to_out[0]] if block.per_frame else [])]
        for linear in zeroed:
            nn.init.zeros_(linear.weight)

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
        """One denoising prediction.

        latent [B, 16, T, H, W]; timestep [B] (or one number for all), 0..1000, fractions allowed; text [B, L,
        caption_channels]; text_mask [B, L], nonzero = attend, None = all; semantic [B, n, semantic_channels] image
        tokens or None; content [B, content_channels, h, w] SD latent or None; size [B, 2] height and width in pixels,
        used with `size_conditioning` only, by default spatial_factor times the latent's; clip [B, 2] frame rate and
        motion in percent of the short side in half a second (NaN where not known), used with `clip_conditioning` only.
        Returns [B, 16 or 32, T, H, W] in the weights' dtype: the prediction, then, with `learn_sigma`, the variance.

        Raises ValueError naming the argument and both values where a shape does not fit the configuration.
        """
        inputs = {"text": text, "text_mask": text_mask, "semantic": semantic, "content": content}
        self.check_inputs(latent, timestep, **inputs, size=size, clip=clip)
        B, T, H, W = len(latent), *latent.shape[2:]
        if size is None:
            pixels = (n * self.config.spatial_factor for n in (H, W))
            size = torch.stack([latent.new_full((B,), n, dtype=torch.float32) for n in pixels], dim=1)
        pt, ph, pw = self.config.patch_size
        grid = (T // pt, H // ph, W // pw)

        x_BLD = self.pos_embed(latent.to(self.dtype))
        modulation_B6D, embedding_BD = self.adaln_single(timestep.expand(B), size, clip)
        x_BLD = self.forward_tokens(
            x_BLD, modulation_B6D, self.embed_condition(text, text_mask, semantic, content), grid
        )
        return self.unpatchify(self.final_layer(x_BLD, embedding_BD), grid)

    def denoiser(self, cond: Condition, uncond: Condition | None = None, guidance_scale: float = 1.0) -> Denoiser:
        """See `condition.denoiser`."""
        return denoiser(self, cond, uncond, guidance_scale)

    def embed_condition(
        self,
        text: Tensor,
        text_mask: Tensor | None = None,
        semantic: Tensor | None = None,
        content: Tensor | None = None,
    ) -> JointCondition:
        """The joint condition [semantic, content, text] (see `forward` for shapes). It depends on no timestep."""
        image = [] if semantic is None else [self.semantic_projection(semantic.to(self.dtype))]
        groups = [[]] if content is None else [[g] for g in self.content_embedding(content.to(self.dtype))]
        caption = self.caption_projection(text.to(self.dtype))
        tokens = [torch.cat([*image, *group, caption], dim=1) for group in groups]
        if text_mask is None:
            return JointCondition(tokens, None)
        # Image tokens are never padding.
        visible = text_mask.new_ones(len(text), tokens[0].shape[1] - text.shape[1], dtype=torch.bool)
        return JointCondition(tokens, torch.cat([visible, text_mask.bool()], dim=1))

    def check_inputs(self, latent: Tensor, timestep: Tensor, **inputs: Tensor | None) -> None:
        """ValueError, naming the argument, for a shape that `forward` cannot take."""
        config, B = self.config, len(latent)
        shapes = {
            "latent": (None, config.latent_channels, None, None, None),
            "text": (B, None, config.caption_channels),
            "text_mask": tuple(inputs["text"].shape[:2]),
            "semantic": (B, None, config.semantic_channels),
            "content": (B, config.content_channels, None, None),
            "size": (B, 2),
            "clip": (B, 2),
        }
        for name, x in {"latent": latent, **inputs}.items():
            if x is None:
                continue
            expected = shapes[name]
            if x.ndim != len(expected) or any(e not in (None, n) for n, e in zip(x.shape, expected, strict=True)):
                wanted = ", ".join("any" if e is None else str(e) for e in expected)
                raise ValueError(f"{name} has shape {tuple(x.shape)}, the configuration needs ({wanted})")
        if timestep.numel() not in (1, B) or timestep.ndim > 1:
            raise ValueError(f"timestep has shape {tuple(timestep.shape)}, latent has a batch of {B}")
        if any(n % p for n, p in zip(latent.shape[2:], config.patch_size, strict=True)):
            raise ValueError(
                f"latent has size {tuple(latent.shape[2:])}, not a multiple of patch_size={config.patch_size}"
            )
        content, cell = inputs["content"], config.content_patch_size * config.content_stride
        if content is not None and any(n % cell for n in content.shape[2:]):
            raise ValueError(
                f"content has size {tuple(content.shape[2:])}, not a multiple of {cell} "
                f"(content_patch_size={config.content_patch_size}, content_groups={config.content_groups})"
            )
