"""stream_layer_norm: s = x + row + branch; y = LayerNorm(s) * weight + bias; also writes s, or s blended with another.

Twin: the additions, the norm and the blend around a transformer block of SVD (`reference/svd/unet.py`) in plain
PyTorch. Legend: B items, L tokens of each, D channels.
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

OP = "stream_layer_norm"
WIDTHS = (320, 640, 1280)  # of SVD's levels


@triton.jit
def token_offsets(first, tokens: tl.constexpr, D: tl.constexpr):
    """Where each token's channels begin, in int64: 50 frames of 72x128 tokens of 1280 channels are 2^29 elements, and
    larger pictures pass 2^31."""
    return (first + tl.arange(0, tokens)).to(tl.int64) * D


@triton.jit
def stream_layer_norm_kernel(
    x_ptr,
    row_ptr,
    branch_ptr,
    other_ptr,
    other_row_ptr,
    share_ptr,
    weight_ptr,
    bias_ptr,
    stream_ptr,
    out_ptr,
    count,
    L,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    BLENDS: tl.constexpr,
):
    """One program TOKENS tokens, each read once and written once. The norm sees sums in float32, before rounding."""
    first = tl.program_id(0) * TOKENS
    token = first + tl.arange(0, TOKENS)
    d = tl.arange(0, BLOCK_D)
    place = token_offsets(first, TOKENS, D)[:, None] + d[None, :]
    item_place = (token // L).to(tl.int64)[:, None] * D + d[None, :]
    inside = (token < count)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_ROW:
        x += tl.load(row_ptr + item_place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        x += tl.load(branch_ptr + place, mask=inside, other=0.0).to(tl.float32)
    # Two passes over registers: the mean first, since E[x^2] - E[x]^2 would cancel where it is large.
    mean = tl.sum(x, 1) / D
    centred = tl.where((d < D)[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / D
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    y = centred * tl.rsqrt(variance + eps)[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)
    if BLENDS:
        other = tl.load(other_ptr + place, mask=inside, other=0.0).to(tl.float32)
        other += tl.load(other_row_ptr + item_place, mask=inside, other=0.0).to(tl.float32)
        x += tl.load(share_ptr).to(tl.float32) * (other - x)
    if BLENDS or HAS_BRANCH:
        tl.store(stream_ptr + place, x.to(stream_ptr.dtype.element_ty), mask=inside)


@on_device
def launch(
    x_BLD: Tensor,
    row_BD: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    branch_BLD: Tensor | None = None,
    other_BLD: Tensor | None = None,
    other_row_BD: Tensor | None = None,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the kernel: on a GPU, or on CPU tensors in Triton's interpreter. Arguments as the op's."""
    B, L, D = x_BLD.shape
    writes_stream = branch_BLD is not None or other_BLD is not None
    out, stream = torch.empty_like(x_BLD), torch.empty_like(x_BLD) if writes_stream else x_BLD.new_zeros(0)
    chosen = settings(OP, str(D), arch_of(x_BLD.device))
    launcher(stream_layer_norm_kernel)[(triton.cdiv(B * L, chosen["TOKENS"]),)](
        x_BLD,
        # Pointers that the kernel does not read still need a tensor.
        x_BLD if row_BD is None else row_BD,
        x_BLD if branch_BLD is None else branch_BLD,
        x_BLD if other_BLD is None else other_BLD,
        x_BLD if other_row_BD is None else other_row_BD,
        weight_D if share is None else share,
        weight_D,
        bias_D,
        out if not writes_stream else stream,
        out,
        B * L,
        L,
        eps,
        D=D,
        BLOCK_D=triton.next_power_of_2(D),
        HAS_ROW=row_BD is not None,
        HAS_BRANCH=branch_BLD is not None,
        BLENDS=other_BLD is not None,
        **chosen,
    )
    return out, stream


def twin(
    x_BLD: Tensor,
    row_BD: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float = 1e-5,
    branch_BLD: Tensor | None = None,
    other_BLD: Tensor | None = None,
    other_row_BD: Tensor | None = None,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch: what runs on a CPU, and the oracle of the tests."""
    total = x_BLD if row_BD is None else x_BLD + row_BD[:, None]
    if branch_BLD is not None:
        total = total + branch_BLD if row_BD is None else total.add_(branch_BLD)
    out = F.layer_norm(total, total.shape[-1:], weight_D, bias_D, eps)
    if other_BLD is not None:
        assert other_row_BD is not None and share is not None, "checked by the op"
        return out, torch.lerp(total, other_BLD + other_row_BD[:, None], share)
    return out, x_BLD.new_zeros(0) if branch_BLD is None else total


@triton_op("stream_layer_norm")
def stream_layer_norm(
    x_BLD: Tensor,
    row_BD: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float = 1e-5,
    branch_BLD: Tensor | None = None,
    other_BLD: Tensor | None = None,
    other_row_BD: Tensor | None = None,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (LayerNorm of x + row + branch, the stream after it), in one pass over memory.

    Args:
        x_BLD: tokens [B, L, D], contiguous. row_BD: added to all tokens of an item; None adds nothing.
        weight_D, bias_D: of the norm.
        branch_BLD: added too; the stream is then the sum. Without it and without `other_BLD` the stream is empty, and
            only the normed tokens are written.
        other_BLD, other_row_BD, share: the stream is sum + share * (other + other_row - sum); share [1] or [].

    Raises ValueError for arguments that differ in device, dtype or size.
    """
    streams = {"x_BLD": x_BLD, "branch_BLD": branch_BLD, "other_BLD": other_BLD}
    rows = {"row_BD": row_BD, "other_row_BD": other_row_BD}
    check_tensors(OP, **streams, **rows, weight_D=weight_D, bias_D=bias_D, share=share)
    check_contiguous(OP, **streams, **rows, weight_D=weight_D, bias_D=bias_D)
    B, _, D = x_BLD.shape
    check_same(OP, "shape", **{name: tuple(x.shape) for name, x in streams.items() if x is not None})
    for name, row in rows.items():
        if row is not None:
            check_shape(OP, name, row, B, D)
    check_shape(OP, "weight_D", weight_D, D)
    check_shape(OP, "bias_D", bias_D, D)
    blend = {"other_BLD": other_BLD, "other_row_BD": other_row_BD, "share": share}
    check_same(OP, "presence", **{name: x is not None for name, x in blend.items()})
    if share is not None and share.numel() != 1:
        raise ValueError(f"{OP}: share has shape {tuple(share.shape)}, it must be one number")
    run = launch if x_BLD.is_cuda else twin
    return run(x_BLD, row_BD, weight_D, bias_D, eps, branch_BLD, other_BLD, other_row_BD, share)


def variants(arch: str) -> Iterator[Variant]:
    """What is shipped for `arch`: SVD's widths and the three places in a block, in the dtypes it runs in."""
    pointers = (
        *("x_ptr", "row_ptr", "branch_ptr", "other_ptr", "other_row_ptr", "share_ptr"),
        *("weight_ptr", "bias_ptr", "stream_ptr", "out_ptr"),
    )
    shapes = [(dtype, D) for dtype in (torch.bfloat16, torch.float16) for D in WIDTHS]
    for dtype, D in [*shapes, (torch.float32, WIDTHS[0])]:
        options = dict(settings(OP, str(D), arch))
        constants = {"D": D, "BLOCK_D": triton.next_power_of_2(D), "TOKENS": options.pop("TOKENS"), "HAS_ROW": True}
        for name, has_branch, blends in (("", False, False), (" branch", True, False), (" blend", False, True)):
            yield Variant(
                name=f"{OP} {TYPES[dtype]} {D}{name}",
                kernel=stream_layer_norm_kernel,
                signature={
                    **dict.fromkeys(pointers, f"*{TYPES[dtype]}"),
                    **dict.fromkeys(("count", "L"), "i32"),
                    "eps": "fp32",
                },
                constants={**constants, "HAS_BRANCH": has_branch, "BLENDS": blends},
                options=options,
            )
