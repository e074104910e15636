"""How content features enter the decoder: the paper's attention fusion and the two cheaper ones of its ablation.

Legend: B batch, C channels, T frames, H W rows, columns, L video tokens (T*H*W), S content tokens, N heads, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .initialization import on_meta


def sinusoid_table(length: int, dim: int) -> Tensor:
    """Fixed time embedding [length, dim]: angle = pos / 10000^(2*floor(j/2)/dim), sine at even j, cosine at odd j."""
    if on_meta():
        return torch.empty(length, dim)
    pos = torch.arange(length, dtype=torch.float64)[:, None]
    j = torch.arange(dim, dtype=torch.float64)[None, :]
    angle = pos / 10000 ** (2 * torch.floor(j / 2) / dim)
    return torch.where(j.long() % 2 == 0, angle.sin(), angle.cos()).float()


def place_table(height: int, width: int, dim: int, pixels: int, like: Tensor) -> Tensor:
    """Position embedding of a grid's cells: [dim, height, width], sines then cosines, x in the first half of channels.

    A cell is `pixels` wide. Its position is that of its middle, in units of 8 pixels (a cell of the deepest content
    feature): equal values mean equal places on every grid and in a frame of any size. Wavelengths run from 50 to 5000
    pixels.
    """
    waves = torch.arange(dim // 4, dtype=torch.float64, device=like.device) / max(1, dim // 4)
    frequency = 100.0**-waves

    def axis(count: int) -> Tensor:
        place = (torch.arange(count, dtype=torch.float64, device=like.device) + 0.5) * (pixels / 8)
        angle = frequency[:, None] * place
        return torch.cat([angle.sin(), angle.cos()])  # [dim / 2, count]

    x, y = axis(width)[:, None, :], axis(height)[:, :, None]
    return torch.cat([x.expand(-1, height, -1), y.expand(-1, -1, width)]).to(like.dtype)


def split_windows(x_BCTHW: Tensor, window: tuple[int, int]) -> Tensor:
    """Zero-pad to whole windows and cut: [B, C, T, H, W] -> [B * windows, C, T, window_h, window_w]."""
    B, C, T, H, W = x_BCTHW.shape
    h, w = window
    x = F.pad(x_BCTHW, (0, -W % w, 0, -H % h))
    x = x.reshape(B, C, T, x.shape[3] // h, h, x.shape[4] // w, w)
    return x.permute(0, 3, 5, 1, 2, 4, 6).reshape(-1, C, T, h, w)


def join_windows(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Inverse of `split_windows`: drop the padding and return [B, C, T, *size]."""
    _, C, T, h, w = x.shape
    H, W = size
    rows, columns = math.ceil(H / h), math.ceil(W / w)
    x = x.reshape(-1, rows, columns, C, T, h, w).permute(0, 3, 4, 1, 5, 2, 6)
    return x.reshape(x.shape[0], C, T, rows * h, columns * w)[..., :H, :W]


def window_padding_mask(
    size: tuple[int, int], window: tuple[int, int], batch: int, frames: int, like: Tensor
) -> Tensor:
    """True at real keys, False at padding, in the order of `split_windows`: [batch * windows, 1, 1, frames * h * w]."""
    ones = torch.ones(batch, 1, frames, *size, dtype=torch.bool, device=like.device)
    return split_windows(ones, window).flatten(1)[:, None, None]


def tokens(x_BCTHW: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B, T*H*W, C]."""
    return x_BCTHW.flatten(2).transpose(1, 2)


class CrossAttention(nn.Module):
    """Multi-head cross-attention; query, key and value without bias, output with bias. Scale 1/sqrt(head_dim)."""

    def __init__(self, dim: int, context_dim: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = dim // head_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # a list so that the name is to_out.0, as published

    def forward(
        self, x_BLC: Tensor, context_BSC: Tensor, key_mask: Tensor | None = None, keys_BSC: Tensor | None = None
    ) -> Tensor:
        """`keys_BSC`: the input of the keys, if it is not that of the values (`context_BSC`)."""
        keys_BSC = context_BSC if keys_BSC is None else keys_BSC

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q_BNLD, k_BNSD, v_BNSD = heads(self.to_q(x_BLC)), heads(self.to_k(keys_BSC)), heads(self.to_v(context_BSC))
        out_BNLD = F.scaled_dot_product_attention(q_BNLD, k_BNSD, v_BNSD, attn_mask=key_mask)
        return self.to_out[0](out_BNLD.transpose(1, 2).flatten(2))


class AttentionFusion(nn.Module):
    """Every video token attends to the content tokens: y = x + p_t; out = y + Attn(LayerNorm(y), content).

    The fixed time embedding p_t stays in the residual stream. Content has no norm and is shared by all frames. `cells`:
    pixels per cell of the video's and of the content's grid; with it, `place_table` is added to the inputs of queries
    and keys, never to those of values. Above `window_size`^2 content cells, a window of the video attends only to its
    window of the content.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_frames: int,
        head_dim: int,
        window_size: int,
        mask_padding: bool,
        cells: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.cells = cells
        self.window_size, self.mask_padding = window_size, mask_padding
        # Fixed, yet part of the published checkpoints: a persistent buffer.
        self.register_buffer("pos_embed", sinusoid_table(num_frames, dim)[None, :, None])
        self.attn = CrossAttention(dim, context_dim, head_dim)
        self.norm = nn.LayerNorm(dim)

    def windows(self, query: torch.Size, context: torch.Size) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Window of the query grid and of the context grid, or None for global attention."""
        (H, W), (Hc, Wc), size = query[-2:], context[-2:], self.window_size
        if Hc * Wc <= size**2 or size**2 > H * W:
            return None
        return (math.ceil(size * H / Hc), math.ceil(size * W / Wc)), (size, size)

    def forward(self, x_BCTHW: Tensor, content_BCHW: Tensor) -> Tensor:
        B, C, T, H, W = x_BCTHW.shape
        y = x_BCTHW + self.pos_embed[0, :, 0].T[None, :, :, None, None]
        h = self.norm(y.movedim(1, -1)).movedim(-1, 1)
        context = keys = content_BCHW[:, :, None]
        if self.cells is not None:
            h = h + place_table(H, W, C, self.cells[0], h)[:, None]
            keys = keys + place_table(*keys.shape[-2:], keys.shape[1], self.cells[1], keys)[:, None]
        windows = self.windows(h.shape, context.shape)
        if windows is None:
            return y + self.attn(tokens(h), tokens(context), None, tokens(keys)).transpose(1, 2).reshape(y.shape)
        query_window, context_window = windows
        key_mask = None
        if self.mask_padding:
            key_mask = window_padding_mask(content_BCHW.shape[-2:], context_window, B, 1, h)
        h_windows = split_windows(h, query_window)
        values, keys = (tokens(split_windows(t, context_window)) for t in (context, keys))
        out = self.attn(tokens(h_windows), values, key_mask, keys)
        return y + join_windows(out.transpose(1, 2).reshape(h_windows.shape), (H, W))


class AddFusion(nn.Module):
    """Content is projected, given a learned embedding per frame, added to the video and mixed by one convolution.

    out = x + SiLU(GroupNorm(Conv3d(x + e_t + Conv2d(content)))). The release starts both convolutions and the norm's
    affine at zero, so no gradient ever reaches the convolutions; here all of them start live. Names are the release's.
    """

    def __init__(self, dim: int, context_dim: int, num_frames: int, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv_context = nn.Conv2d(context_dim, dim, 3, padding=1)
        self.temp_embed = nn.Parameter(torch.empty(1, dim, num_frames, 1, 1))
        if not on_meta():
            nn.init.trunc_normal_(self.temp_embed, std=0.02)
        self.conv, self.norm = conv, norm

    def forward(self, x_BCTHW: Tensor, content_BCHW: Tensor) -> Tensor:
        content = same_grid(self.conv_context(content_BCHW), x_BCTHW)
        return x_BCTHW + F.silu(self.norm(self.conv(x_BCTHW + self.temp_embed + content[:, :, None])))


class LinearFusion(nn.Module):
    """Content becomes one more frame, and a linear map over the frame axis brings T + 1 frames back to T.

    out = x + SiLU(GroupNorm(conv([x, Conv2d(content)]))). Starts live, for the reason given at `AddFusion`. If
    `causal`, the map from a later frame to an earlier one is masked out; the content frame stays visible to all.
    """

    def __init__(self, dim: int, context_dim: int, num_frames: int, norm: nn.Module, causal: bool) -> None:
        super().__init__()
        self.conv_context = nn.Conv2d(context_dim, dim, 3, padding=1)
        self.conv = nn.Conv3d(num_frames + 1, num_frames, 1)  # frames are its channels
        self.norm = norm
        visible = torch.ones(num_frames, num_frames + 1)
        if causal:
            visible[:, :num_frames].tril_()
        self.register_buffer("visible", visible[:, :, None, None, None], persistent=False)

    def forward(self, x_BCTHW: Tensor, content_BCHW: Tensor) -> Tensor:
        content = same_grid(self.conv_context(content_BCHW), x_BCTHW)
        frames_BTCHW = torch.cat([x_BCTHW, content[:, :, None]], dim=2).transpose(1, 2)
        mixed = F.conv3d(frames_BTCHW, self.conv.weight * self.visible, self.conv.bias)
        return x_BCTHW + F.silu(self.norm(mixed.transpose(1, 2)))


def same_grid(content_BCHW: Tensor, x_BCTHW: Tensor) -> Tensor:
    """Cut the content to the video's grid: in the tiled path the content tile may read further than the latent tile."""
    H, W = x_BCTHW.shape[-2:]
    if content_BCHW.shape[-2] < H or content_BCHW.shape[-1] < W:
        raise ValueError(f"content feature is {tuple(content_BCHW.shape[-2:])}, smaller than the video's {(H, W)}")
    return content_BCHW[..., :H, :W]
