"""Layers of SVD's twins on channels-last frames [N, H, W, C], N = B * T.

The reference and diffusers have the same attribute names, so a twin can be built from the modules of either.

What is folded when a twin is built, all exact:
- AlphaBlender: with x_temporal = x_spatial + h, the blend a * x_spatial + (1 - a) * x_temporal is
  x_spatial + (1 - a) * h, so the last layer of h takes the factor.
- A convolution after a nearest up-sampling: nine taps read at most four different values, so each of the four phases of
  the finer grid is a 2x2 convolution of the coarser one.
- A convolution over 3 frames and one position is three products on rows that lie H * W apart.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...triton_kernels.conv3d import pack_weight
from ..packed_layers import as_frames, as_images, frozen
from ..plan import Plan


def folded(weight: Tensor, factor: Tensor | float) -> nn.Parameter:
    """weight * factor, rounded once, to the weight's dtype."""
    return frozen((weight * factor).to(weight.dtype))


class Conv(nn.Module):
    """A 3x3 convolution in space, by the library."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.kernel, self.bias = frozen(conv.weight, torch.channels_last), frozen(conv.bias)
        self.stride, self.padding = conv.stride, conv.padding

    def forward(self, x_NHWC: Tensor, bias: Tensor | None = None) -> Tensor:
        """bias: replaces the layer's own."""
        bias = self.bias if bias is None else bias
        return as_frames(F.conv2d(as_images(x_NHWC), self.kernel, bias, self.stride, self.padding))


class Norm(nn.Module):
    """GroupNorm over a clip [B, T, H, W, C] or over frames [N, 1, H, W, C], and SiLU."""

    def __init__(self, norm: nn.GroupNorm, plan: Plan, path: str, silu: bool = True) -> None:
        super().__init__()
        self.weight, self.bias, self.groups, self.eps = norm.weight, norm.bias, norm.num_groups, norm.eps
        self.silu = silu
        self.run, self._statistics = plan.pick(path, "group_norm_silu"), plan.clip_statistics()

    def forward(self, x: Tensor, front: int = 0, back: int = 0, halo: bool = False) -> Tensor:
        """x [B, T, H, W, C] -> the same shape plus `front` and `back` frames of zeros, or a ring of zeros per frame."""
        return self.run(x, self.weight, self.bias, self.groups, self.eps, self.silu, False, None, front, back, halo)

    def statistics(self, x_HWC: Tensor) -> Tensor:
        """A frame's statistics for `of_frame`, [tiles, 3, C]: count, mean and squared deviations."""
        return self._statistics(x_HWC[None, None])[0]

    def of_frame(self, x_HWC: Tensor, sums_T3C: Tensor) -> Tensor:
        """Normalise one frame [H, W, C] of a clip; `sums` are the concatenated statistics of all its frames."""
        arguments = (self.weight, self.bias, self.groups, self.eps, self.silu, False, sums_T3C[None])
        return self.run(x_HWC[None, None], *arguments, 0, 0, False)[0, 0]


class TimeConv(nn.Module):
    """A convolution over 3 frames at one position: three products on rows that lie H * W apart."""

    def __init__(self, conv: nn.Conv3d, plan: Plan, path: str, factor: Tensor | float = 1.0) -> None:
        super().__init__()
        taps = folded(conv.weight, factor)[:, :, :, 0, 0].movedim(-1, 0).transpose(1, 2)  # [3, C, K]
        self.taps = frozen(taps)
        self.bias = folded(conv.bias, factor)
        self.run = plan.pick(path, "temporal_conv", f"{conv.in_channels}->{conv.out_channels}")

    def forward(self, padded: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """[B, T + 2, H, W, C] with a zero frame at each end -> [B, T, H, W, K]."""
        B, frames, H, W, C = padded.shape
        rows, cells = padded.view(B, -1, C), (frames - 2) * H * W
        sources = (rows[:, start : start + cells] for start in (0, H * W, 2 * H * W))
        added = None if residual is None else residual.reshape(B, cells, -1)
        y = self.run(*sources, self.taps, self.bias if bias is None else bias, added)
        return y.view(B, frames - 2, H, W, -1)

    def of_frames(
        self, before: Tensor | None, frame: Tensor, after: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        """One frame [H, W, C] between its neighbours (None: zeros) -> [H, W, K], by the same products."""
        rows = [None if x is None else x.view(1, -1, x.shape[-1]) for x in (before, frame, after, residual)]
        y = self.run(*rows[:3], self.taps, self.bias, rows[3])
        return y.view(*frame.shape[:2], -1)


class ResidualConv(nn.Module):
    """A 3x3 convolution in space plus a residual, in one kernel. Each input frame has a ring of zeros around it."""

    def __init__(self, conv: nn.Conv2d, plan: Plan, path: str) -> None:
        super().__init__()
        self.weight, self.bias = frozen(pack_weight(conv.weight)), conv.bias
        self.run = plan.pick(path, "conv3d", self.shape(conv))

    @staticmethod
    def shape(conv: nn.Conv2d) -> str:
        """The shape class of the convolution in a plan's table."""
        return f"{conv.in_channels}->{conv.out_channels} frames"

    def forward(self, padded: Tensor, residual_NHWC: Tensor) -> Tensor:
        """padded [1, N, H + 2, W + 2, C]"""
        return self.run(padded, self.weight, self.bias, residual_NHWC[None])[0][0]


class SpatialRes(nn.Module):
    """A spatial res block; `row` is its projected time embedding plus conv1's bias, [C] or one per frame [N, C].

    Where our kernel runs, conv2 adds the residual without another pass over memory. A 1x1 shortcut is added in place;
    its bias is folded into conv2's.
    """

    def __init__(self, block: Any, plan: Plan, path: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = (Norm(getattr(block, n), plan, f"{path}.{n}") for n in ("norm1", "norm2"))
        self.conv1, self.shortcut = Conv(block.conv1), None
        in_one = block.conv_shortcut is None and plan.runs_kernel("conv3d", ResidualConv.shape(block.conv2))
        self.conv2 = ResidualConv(block.conv2, plan, f"{path}.conv2") if in_one else Conv(block.conv2)
        if (shortcut := block.conv_shortcut) is not None:
            self.shortcut = frozen(shortcut.weight.flatten(1).t())
            wide = torch.promote_types(shortcut.bias.dtype, torch.float32)
            self.conv2.bias = frozen((self.conv2.bias.to(wide) + shortcut.bias.to(wide)).to(shortcut.bias.dtype))

    def forward(self, x_NHWC: Tensor, row: Tensor | None = None) -> Tensor:
        normed = self.norm1(x_NHWC[:, None])[:, 0]
        h = self.conv1(normed, row if row is None or row.ndim == 1 else torch.zeros_like(self.conv1.bias))
        if row is not None and row.ndim == 2:
            h = h.add_(row[:, None, None])
        if isinstance(self.conv2, ResidualConv):
            return self.conv2(self.norm2(h[:, None], halo=True).transpose(0, 1), x_NHWC)
        y = self.conv2(self.norm2(h[:, None])[:, 0])
        if self.shortcut is None:
            return y.add_(x_NHWC)
        y.view(-1, y.shape[-1]).addmm_(x_NHWC.reshape(-1, x_NHWC.shape[-1]), self.shortcut)
        return y


class TemporalRes(nn.Module):
    """A res block over the frames of each position. The blend with its input is folded into conv2."""

    def __init__(self, block: Any, spatial_share: Tensor, plan: Plan, path: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = (Norm(getattr(block, n), plan, f"{path}.{n}") for n in ("norm1", "norm2"))
        self.conv1 = TimeConv(block.conv1, plan, f"{path}.conv1")
        self.conv2 = TimeConv(block.conv2, plan, f"{path}.conv2", 1 - spatial_share)

    def forward(self, x_BTHWC: Tensor, row: Tensor | None = None) -> Tensor:
        """row: projected time embedding plus conv1's bias, [C], or one per frame [B, T, C]."""
        bias = row if row is None or row.ndim == 1 else torch.zeros_like(self.conv1.bias)
        h = self.conv1(self.norm1(x_BTHWC, 1, 1), bias)
        if row is not None and row.ndim == 3:
            h = h.add_(row[:, :, None, None])
        return self.conv2(self.norm2(h, 1, 1), residual=x_BTHWC)

    def streamed(self, frames: list[Tensor]) -> list[Tensor]:
        """The forward pass on one clip, given as a list of frames [H, W, C], which is emptied on the way.

        Beside the frames, one more clip and three normed frames are alive. The result is exact, since the norms use the
        statistics of all frames.
        """
        hidden = self._convolve(frames, self.norm1, self.conv1)
        return self._convolve(hidden, self.norm2, self.conv2, onto=frames)

    @staticmethod
    def _convolve(frames: list[Tensor], norm: Norm, conv: TimeConv, onto: list[Tensor] | None = None) -> list[Tensor]:
        """conv(norm(frames)), added to `onto`, which is emptied on the way."""
        sums = torch.cat([norm.statistics(frame) for frame in frames])
        window: list[Tensor | None] = [None, None, norm.of_frame(frames[0], sums)]
        results = []
        for index in range(len(frames)):
            window = [*window[1:], norm.of_frame(frames[index + 1], sums) if index + 1 < len(frames) else None]
            before, frame, after = window
            assert frame is not None
            results.append(conv.of_frames(before, frame, after, None if onto is None else onto.pop(0)))
        return results


class SpatioTemporalRes(nn.Module):
    def __init__(self, block: Any, plan: Plan, path: str) -> None:
        super().__init__()
        share = spatial_share(block.time_mixer)
        self.spatial = SpatialRes(block.spatial_res_block, plan, f"{path}.spatial_res_block")
        self.temporal = TemporalRes(block.temporal_res_block, share, plan, f"{path}.temporal_res_block")
        self.channels_in = len(self.spatial.norm1.weight)

    def forward(self, x_NHWC: Tensor, frames: int, rows: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """rows: the projected time embeddings of the spatial and of the temporal res block."""
        spatial_row, temporal_row = rows if rows is not None else (None, None)
        x = self.spatial(x_NHWC, spatial_row)
        if temporal_row is not None and temporal_row.ndim == 2:
            temporal_row = temporal_row.unflatten(0, (-1, frames))
        return self.temporal(x.unflatten(0, (-1, frames)), temporal_row).flatten(0, 1)


def spatial_share(mixer: Any) -> Tensor:
    """a of the blend a * spatial + (1 - a) * temporal; diffusers' `AlphaBlender` has the same attributes."""
    factor = mixer.mix_factor.detach()
    share = torch.sigmoid(factor.to(torch.promote_types(factor.dtype, torch.float32)))
    return 1.0 - share if mixer.switch_spatial_to_temporal_mix else share
