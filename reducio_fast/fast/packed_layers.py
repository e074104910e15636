"""Layers of the fast twins on channels-last tensors [N, T, H, W, C], with packed weights."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference.reducio import vae as ref
from ..triton_kernels import quantised_conv3d
from ..triton_kernels.conv3d import pack_weight, with_halo
from ..triton_kernels.upsample_conv3d import fold_weight
from .plan import Plan


class Padding(NamedTuple):
    """Zero frames before and after a clip, and whether a ring of zeros surrounds every frame."""

    front: int = 0
    back: int = 0
    halo: bool = False


DENSE = Padding()


class Activation(NamedTuple):
    """A tensor [N, T, H, W, C] and, where its producer has computed them, its statistics (see `conv3d`)."""

    x: Tensor
    partials: Tensor | None = None


def pad(x: Tensor, padding: Padding) -> Tensor:
    return with_halo(x, *padding)


def channels_first(x: Tensor) -> Tensor:
    """[N, T, H, W, C] -> [N, C, T, H, W], a view."""
    return x.permute(0, 4, 1, 2, 3)


def channels_last(x: Tensor) -> Tensor:
    """[N, C, T, H, W] -> [N, T, H, W, C], dense."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def as_images(x_NHWC: Tensor) -> Tensor:
    """[N, H, W, C] -> [N, C, H, W] in torch's channels-last format, a view."""
    return x_NHWC.permute(0, 3, 1, 2)


def as_frames(x_NCHW: Tensor) -> Tensor:
    """The inverse of `as_images`, dense."""
    return x_NCHW.permute(0, 2, 3, 1).contiguous()


Takes = tuple[Tensor, torch.dtype]  # see `multiplier` and `eight_bit` of `group_norm_silu`


class FastConv(nn.Module):
    """A 3x3x3 (or, of an image, 3x3) convolution at stride 1 over a buffer padded by `padding`, which is zero if the
    library adds the border. `stats`: a GroupNorm over the clip reads the result and needs its statistics."""

    takes: Takes | None = None

    def __init__(self, conv: nn.Conv3d | nn.Conv2d, plan: Plan, path: str, stats: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = frozen(pack_weight(conv.weight)), conv.bias
        self.padding = padding_of(conv)
        pick = ("conv3d", f"{conv.in_channels}->{conv.out_channels}")
        self.stats = stats and plan.takes_statistics(*pick) and not getattr(conv, "front", 0)
        self.run = plan.pick(path, *pick)
        if self.padding.front == self.padding.back and plan.library_pads(*pick):
            self.padding, self.run = DENSE, functools.partial(self.run, pad=True)

    def forward(self, padded: Tensor, residual: Tensor | None = None, out: Padding = DENSE) -> Activation:
        y, partials = self.run(padded, self.weight, self.bias, residual, self.stats, *out)
        return Activation(y, partials if self.stats else None)


class QuantisedConv(nn.Module):
    """The same in 8-bit numbers. The norm before it writes them, with the multiplier and dtype of `takes`."""

    def __init__(self, conv: nn.Conv3d, plan: Plan, path: str, largest_C: Tensor, eight_bit: torch.dtype, stats: bool):
        super().__init__()
        multiplier, weight, scale = quantised_conv3d.pack(conv.weight, largest_C.to(conv.weight.device), eight_bit)
        self.multiplier, self.weight, self.scale = frozen(multiplier), frozen(weight), frozen(scale)
        self.eight_bit, self.padding = eight_bit, padding_of(conv)
        self.bias = frozen(conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias)
        pick = ("quantised_conv3d", f"{conv.in_channels}->{conv.out_channels}")
        self.stats = stats and plan.takes_statistics(*pick) and not getattr(conv, "front", 0)
        self.run = plan.pick(path, *pick)

    @property
    def takes(self) -> Takes:
        return self.multiplier, self.eight_bit

    def forward(self, padded: Tensor, residual: Tensor | None = None, out: Padding = DENSE) -> Activation:
        y, partials = self.run(padded, self.weight, self.scale, self.bias, residual, self.stats, *out)
        return Activation(y, partials if self.stats else None)


def conv_after_norm(conv: nn.Conv3d | nn.Conv2d, plan: Plan, path: str, stats: bool) -> FastConv | QuantisedConv:
    """A convolution in 8-bit numbers if the plan quantises it, else a plain one."""
    if (quantised := plan.quantised(path)) is not None:
        return QuantisedConv(conv, plan, path, *quantised, stats)
    return FastConv(conv, plan, path, stats)


class FastNorm(nn.Module):
    """GroupNorm, then SiLU if `silu`, into a buffer with the padding and the dtype that the next layer takes."""

    def __init__(self, norm: nn.GroupNorm, plan: Plan, path: str, silu: bool = True) -> None:
        super().__init__()
        self.weight, self.bias, self.groups, self.eps = norm.weight, norm.bias, norm.num_groups, norm.eps
        self.silu, self.per_frame = silu, isinstance(norm, ref.PerFrameGroupNorm)
        self.run = plan.pick(path, "group_norm_silu")

    def forward(self, act: Activation, out: Padding = DENSE, takes: Takes | None = None) -> Tensor:
        partials = None if self.per_frame else act.partials
        norm = (self.weight, self.bias, self.groups, self.eps, self.silu, self.per_frame)
        return self.run(act.x, *norm, partials, *out, *(takes or ()))


class UpConv(nn.Module):
    """Nearest x2 and the 3x3 convolution after it, as a 2x2 convolution per phase, in one kernel or by the library."""

    def __init__(self, conv: nn.Conv2d, plan: Plan, path: str) -> None:
        super().__init__()
        channels, pick = conv.in_channels, ("upsample_conv3d", f"{conv.in_channels}->{conv.out_channels} frames")
        phases = fold_weight(conv.weight[:, :, None], time=False, causal=False)  # [4, K, 4 * C]
        self.run, self.in_one = plan.pick(path, *pick), plan.runs_kernel(*pick)
        if self.in_one:
            self.phases = frozen(phases)
        else:
            kernels = phases.unflatten(2, (2, 2, channels)).movedim(-1, 2)  # [4, K, C, 2, 2]
            self.kernels = nn.ParameterList(frozen(k, torch.channels_last) for k in kernels)
        self.whole = (conv,)  # for a size that is not twice the input's
        self.bias, self.channels = conv.bias, conv.out_channels
        self.room = 0  # channels to leave free behind the result's, for a skip connection

    def forward(self, x_NHWC: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        N, H, W, _ = x_NHWC.shape
        images = as_images(x_NHWC)
        if size is not None and tuple(size) != (2 * H, 2 * W):
            return as_frames(self.whole[0](F.interpolate(images, size=size, mode="nearest")))
        if self.in_one:
            padded = F.pad(x_NHWC, (0, 0, 1, 1, 1, 1))
            return self.run(padded[None], self.phases, self.bias, room=self.room)[0][0]
        padded = F.pad(images, (1, 1, 1, 1))
        out = x_NHWC.new_empty((N, H, 2, W, 2, len(self.bias)))
        for phase, kernel in enumerate(self.kernels):
            row, column = divmod(phase, 2)
            window = padded[:, :, row : row + H + 1, column : column + W + 1]
            out[:, :, row, :, column] = F.conv2d(window, kernel, self.bias).permute(0, 2, 3, 1)
        return out.view(N, 2 * H, 2 * W, -1)


def padding_of(conv: nn.Module) -> Padding:
    """The padding that a convolution reads around its input."""
    if isinstance(conv, nn.Conv2d):
        return Padding(0, 0, True)
    return Padding(conv.front, 0, True) if conv.front else Padding(1, 1, True)


def frozen(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Parameter:
    """A packed weight: dense, and without the gradient of what it was packed from."""
    return nn.Parameter(x.detach().contiguous(memory_format=memory_format), requires_grad=False)
