"""gated_residual_ada_layer_norm: r = x + gate * branch; y = LayerNorm(r) * (1 + scale) + shift; both are returned.

Twin: `x + gate * branch` and `modulate(LayerNorm(x), shift, scale)` of `reference/reducio/dit.py`.
Legend: B batch, L tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .ada_layer_norm import norm_and_modulate
from .launch import TYPES, Variant, launcher, on_device, triton_op
from .shape_checks import check_contiguous, check_same, check_shape, check_tensors
from .tables import arch_of, settings

OP = "gated_residual_ada_layer_norm"


@triton.jit
def row_offset(row, D: tl.constexpr):
    """Where a token's channels begin, in int64: a large batch at full resolution passes 2^31 elements."""
    return row.to(tl.int64) * D


@triton.jit
def gated_residual_ada_layer_norm_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    residual_ptr,
    out_ptr,
    L,
    modulation_stride,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GATED: tl.constexpr,
):
    """One program a token. The norm sees the sum in float32, before it is rounded for the residual stream."""
    row = tl.program_id(0)
    start = row_offset(row, D)
    item = (row // L).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    x = tl.load(x_ptr + start + d, mask=inside, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + start + d, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        branch *= tl.load(gate_ptr + item * modulation_stride + d, mask=inside, other=0.0).to(tl.float32)
    x += branch
    tl.store(residual_ptr + start + d, x.to(residual_ptr.dtype.element_ty), mask=inside)
    y = norm_and_modulate(x, shift_ptr, scale_ptr, item * modulation_stride, eps, d, D)
    tl.store(out_ptr + start + d, y.to(out_ptr.dtype.element_ty), mask=inside)


@on_device
def launch(
    x_BLD: Tensor, branch_BLD: Tensor, gate_BD: Tensor | None, shift_BD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Runs the kernel: on a GPU, or on CPU tensors in Triton's interpreter. Arguments as the op's."""
    residual, out = torch.empty_like(x_BLD), torch.empty_like(x_BLD)
    B, L, D = x_BLD.shape
    launcher(gated_residual_ada_layer_norm_kernel)[(B * L,)](
        x_BLD,
        branch_BLD,
        shift_BD if gate_BD is None else gate_BD,  # never read without a gate
        shift_BD,
        scale_BD,
        residual,
        out,
        L,
        shift_BD.stride(0),
        eps,
        D=D,
        BLOCK_D=triton.next_power_of_2(D),
        GATED=gate_BD is not None,
        **settings(OP, str(D), arch_of(x_BLD.device)),
    )
    return residual, out


def twin(
    x_BLD: Tensor,
    branch_BLD: Tensor,
    gate_BD: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch: what runs on a CPU, and the oracle of the tests."""
    residual = x_BLD + branch_BLD if gate_BD is None else torch.addcmul(x_BLD, gate_BD[:, None], branch_BLD)
    normed = F.layer_norm(residual, residual.shape[-1:], eps=eps)
    return residual, torch.addcmul(shift_BD[:, None], normed, 1 + scale_BD[:, None])


@triton_op("gated_residual_ada_layer_norm")
def gated_residual_ada_layer_norm(
    x_BLD: Tensor,
    branch_BLD: Tensor,
    gate_BD: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Adds a branch to the residual stream and normalises the sum for the next branch: (residual, normed) in one pass.

    Args:
        x_BLD, branch_BLD: tokens [B, L, D], contiguous.
        gate_BD: [B, D], factor of the branch; None adds the branch unchanged.
        shift_BD, scale_BD: [B, D], with the same strides as the gate, such as slices of one modulation table.

    Raises ValueError for arguments that differ in device, dtype or size.
    """
    modulation = {"shift_BD": shift_BD, "scale_BD": scale_BD} | ({} if gate_BD is None else {"gate_BD": gate_BD})
    check_tensors(OP, x_BLD=x_BLD, branch_BLD=branch_BLD, **modulation)
    check_same(OP, "shape", x_BLD=tuple(x_BLD.shape), branch_BLD=tuple(branch_BLD.shape))
    check_contiguous(OP, x_BLD=x_BLD, branch_BLD=branch_BLD)
    check_shape(OP, "x_BLD", x_BLD, None, None, None)
    check_same(OP, "D", x_BLD=x_BLD.shape[-1], **{name: x.shape[-1] for name, x in modulation.items()})
    check_same(OP, "B", x_BLD=len(x_BLD), **{name: len(x) for name, x in modulation.items()})
    for name, row in modulation.items():
        check_shape(OP, name, row, len(x_BLD), x_BLD.shape[-1])
    check_same(OP, "strides", **{name: x.stride() for name, x in modulation.items()})
    check_same(OP, "stride(-1)", contiguous=1, shift_BD=shift_BD.stride(-1))
    run = launch if x_BLD.is_cuda else twin
    return run(x_BLD, branch_BLD, gate_BD, shift_BD, scale_BD, eps)


def variants(arch: str) -> Iterator[Variant]:
    """What is shipped for `arch`: the full-size transformer's width, in the dtypes it runs in."""
    pointers = ("x_ptr", "branch_ptr", "gate_ptr", "shift_ptr", "scale_ptr", "residual_ptr", "out_ptr")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for gated in (True, False):
            yield Variant(
                name=f"{OP} {TYPES[dtype]} 1152{' gated' if gated else ''}",
                kernel=gated_residual_ada_layer_norm_kernel,
                signature={
                    **dict.fromkeys(pointers, f"*{TYPES[dtype]}"),
                    "L": "i32",
                    "modulation_stride": "i32",
                    "eps": "fp32",
                },
                constants={"D": 1152, "BLOCK_D": 2048, "GATED": gated},
                options=settings(OP, "1152", arch),
            )
