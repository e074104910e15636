"""How the twins of the convolution kernels convolve: torch's `F.conv3d`, or on a CPU in float32 oneDNN or Winograd.

Legend: N items, C channels, T frames, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from .winograd import LEAST, convolve_by_winograd

ONE_DNN = torch.backends.mkldnn.is_available()


def convolve(
    x_NCTHW: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    padding: Sequence[int] = (0, 0, 0),
    winograd: bool = False,
) -> Tensor:
    """`F.conv3d`, but by oneDNN at every size on a CPU: up to N*C*T*H = 20480 torch unfolds, 2 to 10 times slower.
    With `winograd`, the larger ones by Winograd's algorithm: the caller knows that it is faster for these channels."""
    if ONE_DNN and x_NCTHW.device.type == "cpu" and x_NCTHW.dtype == torch.float32:
        if torch.compiler.is_compiling():
            return cpu_convolution(x_NCTHW, kernel, bias, padding, winograd)
        if type(x_NCTHW) is Tensor:
            return _on_cpu(x_NCTHW, kernel, bias, padding, winograd)
    return F.conv3d(x_NCTHW, kernel, bias, padding=tuple(padding))


def _on_cpu(x_NCTHW: Tensor, kernel: Tensor, bias: Tensor | None, padding: Sequence[int], winograd: bool) -> Tensor:
    if not winograd or len(x_NCTHW) * x_NCTHW.shape[2:].numel() < LEAST:
        return torch.mkldnn_convolution(x_NCTHW, kernel, bias, padding, (1, 1, 1), (1, 1, 1), 1)
    time, rows, columns = padding
    x_NTHWC = F.pad(x_NCTHW.permute(0, 2, 3, 4, 1), (0, 0, columns, columns, rows, rows, time, time))
    return convolve_by_winograd(x_NTHWC, kernel.permute(0, 2, 3, 4, 1), bias).permute(0, 4, 1, 2, 3)


@custom_op("reducio_fast::cpu_convolution", mutates_args=())
def cpu_convolution(
    x_NCTHW: Tensor, kernel: Tensor, bias: Tensor | None, padding: Sequence[int], winograd: bool
) -> Tensor:
    """`convolve` as an op for torch.compile: torch's own of oneDNN has no fake kernel. The result is channels-last."""
    return _on_cpu(x_NCTHW, kernel, bias, padding, winograd).contiguous(memory_format=torch.channels_last_3d)


@cpu_convolution.register_fake
def _(x_NCTHW: Tensor, kernel: Tensor, bias: Tensor | None, padding: Sequence[int], winograd: bool) -> Tensor:
    sides = zip(x_NCTHW.shape[2:], padding, kernel.shape[2:], strict=True)
    N, sizes = len(x_NCTHW), [n + 2 * p - k + 1 for n, p, k in sides]
    return x_NCTHW.new_empty(N, len(kernel), *sizes).contiguous(memory_format=torch.channels_last_3d)
