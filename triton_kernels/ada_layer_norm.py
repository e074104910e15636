"""ada_layer_norm: y = LayerNorm(x) * (1 + scale) + shift, no affine; statistics in float32.

Twin: `modulate(LayerNorm(x), shift, scale)` of `reference/reducio/dit.py`. Legend: B batch, L tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import TYPES, Variant, launcher, on_device, triton_op
from .shape_checks import check_contiguous, check_same, check_shape, check_tensors
from .tables import arch_of, settings

OP = "ada_layer_norm"


@triton.jit
def norm_and_modulate(x, shift_ptr, scale_ptr, start, eps, d, D: tl.constexpr):
    """One row, float32 and zero from D on: its LayerNorm times (1 + scale) plus shift, both from element `start` on.

    Two passes over registers: the mean first, since E[x^2] - E[x]^2 would cancel where it is large.
    """
    inside = d < D
    mean = tl.sum(x, 0) / D
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / D
    y = centred * tl.rsqrt(variance + eps)
    shift = tl.load(shift_ptr + start + d, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + start + d, mask=inside, other=0.0).to(tl.float32)
    return y * (1.0 + scale) + shift


@triton.jit
def ada_layer_norm_kernel(
    x_ptr, shift_ptr, scale_ptr, out_ptr, L, modulation_stride, eps, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program a token: a row of D channels fits into registers, so it is read once and written once."""
    row = tl.program_id(0).to(tl.int64)
    item = row // L
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    x = tl.load(x_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
    y = norm_and_modulate(x, shift_ptr, scale_ptr, item * modulation_stride, eps, d, D)
    tl.store(out_ptr + row * D + d, y.to(out_ptr.dtype.element_ty), mask=inside)


@on_device
def launch(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
    """Runs the kernel: on a GPU, or on CPU tensors in Triton's interpreter. Arguments as `ada_layer_norm`."""
    out = torch.empty_like(x_BLD)
    B, L, D = x_BLD.shape
    launcher(ada_layer_norm_kernel)[(B * L,)](
        x_BLD,
        shift_BD,
        scale_BD,
        out,
        L,
        shift_BD.stride(0),
        eps,
        D=D,
        BLOCK_D=triton.next_power_of_2(D),
        **settings(OP, str(D), arch_of(x_BLD.device)),
    )
    return out


def twin(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float = 1e-6) -> Tensor:
    """The same in plain PyTorch: what runs on a CPU, and the oracle of the tests."""
    return F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps) * (1 + scale_BD[:, None]) + shift_BD[:, None]


@triton_op("ada_layer_norm")
def ada_layer_norm(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over D without affine, then * (1 + scale) + shift. Source: AdaLN-single, PixArt-alpha.

    Args:
        x_BLD: tokens [B, L, D], contiguous.
        shift_BD, scale_BD: [B, D] with equal strides, such as slices of one modulation table; the last stride is 1.

    Raises ValueError for arguments that differ in device, dtype or size.
    """
    check_tensors(OP, x_BLD=x_BLD, shift_BD=shift_BD, scale_BD=scale_BD)
    check_contiguous(OP, x_BLD=x_BLD)
    check_shape(OP, "x_BLD", x_BLD, None, None, None)
    check_same(OP, "D", x_BLD=x_BLD.shape[-1], shift_BD=shift_BD.shape[-1], scale_BD=scale_BD.shape[-1])
    check_same(OP, "B", x_BLD=len(x_BLD), shift_BD=len(shift_BD), scale_BD=len(scale_BD))
    for name, row in (("shift_BD", shift_BD), ("scale_BD", scale_BD)):
        check_shape(OP, name, row, len(x_BLD), x_BLD.shape[-1])
    check_same(OP, "strides", shift_BD=shift_BD.stride(), scale_BD=scale_BD.stride())
    check_same(OP, "stride(-1)", shift_BD=shift_BD.stride(-1), contiguous=1)
    # The choice is made in the body, not by a separate CPU kernel: torch.compile traces the body on any device.
    return launch(x_BLD, shift_BD, scale_BD, eps) if x_BLD.is_cuda else twin(x_BLD, shift_BD, scale_BD, eps)


def variants(arch: str) -> Iterator[Variant]:
    """What is shipped for `arch`: the full-size transformer's width, in the dtypes it runs in."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for D in (1152,):
            yield Variant(
                name=f"{OP} {TYPES[dtype]} {D}",
                kernel=ada_layer_norm_kernel,
                signature={
                    **dict.fromkeys(("x_ptr", "shift_ptr", "scale_ptr", "out_ptr"), f"*{TYPES[dtype]}"),
                    "L": "i32",
                    "modulation_stride": "i32",
                    "eps": "fp32",
                },
                constants={"D": D, "BLOCK_D": triton.next_power_of_2(D)},
                options=settings(OP, str(D), arch),
            )
