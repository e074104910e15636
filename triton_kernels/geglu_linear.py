"""geglu_linear: y = (x @ v.T + b_v) * gelu(x @ g.T + b_g): the first half of a GEGLU feed-forward, with exact gelu.

Twin: `GEGLU` of `reference/svd/layers.py`. Source: Shazeer 2020 (arXiv 2002.05202).

Both matrix products read the same rows, and neither result goes to memory: only value * gelu(gate) does. This moves a
quarter of the bytes that two matrix products, gelu and a multiplication move.
Legend: M rows, C channels in, K channels out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import TYPES, Variant, launcher, on_device, triton_op
from .shape_checks import check_contiguous, check_shape, check_tensors
from .tables import OPTIONS, arch_of
from .temporal_conv import product_blocks

OP = "geglu_linear"


@triton.jit
def row_number(m, M):
    """Of a row that exists, in int64: 25 frames of 576x1024 latents times 1280 channels pass 2^31 elements."""
    return tl.minimum(m, M - 1).to(tl.int64)


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def geglu_linear_kernel(
    x_ptr,  # [M, C]
    w_ptr,  # [2 * K, C]: value, then gate
    bias_ptr,  # [2 * K]
    out_ptr,  # [M, K]
    M,  # rows
    C: tl.constexpr,  # channels in
    K: tl.constexpr,  # channels out
    BLOCK_M: tl.constexpr,  # rows a program
    BLOCK_K: tl.constexpr,  # channels out a program
    BLOCK_C: tl.constexpr,  # channels in a step of the loop
):
    """One program a tile of rows and channels, which holds the sums of value and gate."""
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + row_number(m, M)[:, None] * C + c[None, :]
    w_ptrs = w_ptr + k[None, :] * C + c[:, None]
    value = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, C, BLOCK_C):
        if C % BLOCK_C == 0 and K % BLOCK_K == 0:
            x = tl.load(x_ptrs)
            v = tl.load(w_ptrs)
            g = tl.load(w_ptrs + K * C)
        else:
            inside = c < C - start
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            mask = inside[:, None] & (k < K)[None, :]
            v = tl.load(w_ptrs, mask=mask, other=0.0)
            g = tl.load(w_ptrs + K * C, mask=mask, other=0.0)
        value = tl.dot(x, v, value, input_precision="ieee")
        gate = tl.dot(x, g, gate, input_precision="ieee")
        x_ptrs += BLOCK_C
        w_ptrs += BLOCK_C
    value += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias_ptr + K + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    y = (value * gelu(gate)).to(out_ptr.dtype.element_ty)
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out_ptr + at, y, mask=(m < M)[:, None] & (k < K)[None, :])


@on_device
def launch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Runs the kernel: on a GPU, or on CPU tensors in Triton's interpreter. Arguments as `geglu_linear`."""
    C, K = x.shape[-1], len(weight) // 2
    out = x.new_empty(*x.shape[:-1], K)
    M = math.prod(x.shape[:-1])
    chosen = product_blocks(OP, x.dtype, C, K, arch_of(x.device))
    grid = (triton.cdiv(M, chosen["BLOCK_M"]) * triton.cdiv(K, chosen["BLOCK_K"]),)
    launcher(geglu_linear_kernel)[grid](x, weight, bias, out, M, C=C, K=K, **chosen)
    return out


def twin(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same in plain PyTorch: what runs on a CPU, and the oracle of the tests. It uses two matrix products, since
    gelu over half of a wider row takes a CPU twice as long."""
    (value_weight, gate_weight), (value_bias, gate_bias) = weight.chunk(2), bias.chunk(2)
    gate = torch.ops.aten.gelu_(F.linear(x, gate_weight, gate_bias))
    return gate.mul_(F.linear(x, value_weight, value_bias))


@triton_op("geglu_linear")
def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The value times the gelu of the gate, both linear in x.

    Args:
        x: [..., C], contiguous.
        weight: [2 * K, C], rows of the value first. bias: [2 * K].

    Returns [..., K]. Raises ValueError for arguments that differ in device, dtype or size.
    """
    check_tensors(OP, x=x, weight=weight, bias=bias)
    if not x.ndim:
        raise ValueError(f"{OP}: x has no dimension, its last one must be the channels")
    check_contiguous(OP, x=x, weight=weight, bias=bias)
    check_shape(OP, "weight", weight, None, x.shape[-1])
    check_shape(OP, "bias", bias, len(weight))
    if len(weight) % 2:
        raise ValueError(f"{OP}: weight has {len(weight)} rows, it must have as many for the value as for the gate")
    return (launch if x.is_cuda else twin)(x, weight, bias)


def variants(arch: str) -> Iterator[Variant]:
    """What is shipped for `arch`: the widths of SVD's U-Net, four times as many out as in."""
    shapes = [(dtype, width) for dtype in (torch.bfloat16, torch.float16) for width in (320, 640, 1280)]
    for dtype, width in [*shapes, (torch.float32, 320)]:
        chosen = product_blocks(OP, dtype, width, 4 * width, arch)
        options = {name: chosen.pop(name) for name in OPTIONS if name in chosen}
        yield Variant(
            name=f"{OP} {TYPES[dtype]} {width}->{4 * width}",
            kernel=geglu_linear_kernel,
            signature={
                **dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "out_ptr"), f"*{TYPES[dtype]}"),
                "M": "i32",
            },
            constants={"C": width, "K": 4 * width, **chosen},
            options=options,
            unaligned=("M",),
            matrix=dtype != torch.float32,
        )
