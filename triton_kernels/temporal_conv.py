"""temporal_conv: y = before @ w[0] + frame @ w[1] + after @ w[2] + bias (+ residual): a convolution over 3 frames.

Twin: the `Conv3d` with a kernel of (3, 1, 1) in SVD's temporal res blocks (`reference/svd/layers.py`).

Without neighbours, and with one tap, it is a linear layer whose bias and residual cost no separate pass.

Rows of the three inputs are positions of a frame and its neighbours. In one buffer with a zero frame at each end they
lie H * W rows apart; a streaming decoder has one tensor for each. All is done in one pass: three library products would
write their sum, and read it again, twice more, which at 128 channels takes longer than the products.
Legend: B items, M rows per item, C channels in, K channels out.
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
from .tables import OPTIONS, Settings, arch_of, settings

OP = "temporal_conv"


@triton.jit
def add_product(
    acc,  # float32 [BLOCK_M, BLOCK_K]
    x_ptr,  # [rows, C]
    rows,  # int64 [BLOCK_M], clamped to rows that exist
    w_ptr,  # [C, K]
    k,  # [BLOCK_K], columns of the weight
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """acc + x[rows] @ w[:, k]."""
    c = tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + rows[:, None] * C + c[None, :]
    w_ptrs = w_ptr + c[:, None] * K + k[None, :]
    for start in range(0, C, BLOCK_C):
        if C % BLOCK_C == 0:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(c < C - start)[None, :], other=0.0)
        if C % BLOCK_C == 0 and K % BLOCK_K == 0:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(c < C - start)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_C
        w_ptrs += BLOCK_C * K
    return acc


@triton.jit
def temporal_conv_kernel(
    before_ptr,  # [B, M, C], or None: zeros
    frame_ptr,  # [B, M, C]
    after_ptr,  # [B, M, C], or None: zeros
    w_ptr,  # [taps, C, K]
    bias_ptr,  # [K]
    residual_ptr,  # [B, M, K] to add, or None
    out_ptr,  # [B, M, out_stride], of which the first K are written
    M,  # rows an item
    item_stride,  # elements between items of the factors
    out_stride,  # elements between rows of the result
    C: tl.constexpr,  # channels in
    K: tl.constexpr,  # channels out
    CENTRE: tl.constexpr,  # which tap is of the frame itself: 1 of three, 0 of one
    BLOCK_M: tl.constexpr,  # rows a program
    BLOCK_K: tl.constexpr,  # channels out a program
    BLOCK_C: tl.constexpr,  # channels in a step of the loop
):
    """One program a tile of rows and channels. Tiles of one block of rows follow each other: they read the same rows,
    which are then in the cache."""
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0) // blocks
    item = (tile // tiles).to(tl.int64)
    m = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.minimum(m, M - 1).to(tl.int64)
    start = item * item_stride
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if before_ptr is not None:
        acc = add_product(acc, before_ptr + start, rows, w_ptr, k, C, K, BLOCK_K, BLOCK_C)
    acc = add_product(acc, frame_ptr + start, rows, w_ptr + CENTRE * C * K, k, C, K, BLOCK_K, BLOCK_C)
    if after_ptr is not None:
        acc = add_product(acc, after_ptr + start, rows, w_ptr + 2 * C * K, k, C, K, BLOCK_K, BLOCK_C)
    acc += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    row = (item * M + m)[:, None]
    mask = (m < M)[:, None] & (k < K)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + (row * K + k[None, :]), mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + (row * out_stride + k[None, :]), acc.to(out_ptr.dtype.element_ty), mask=mask)


def product_blocks(op: str, dtype: torch.dtype, C: int, K: int, arch: str) -> Settings:
    """Launch settings of a product with K outputs. Blocks of 64 or more divide K if possible: 320 are five of 64."""
    chosen = settings(op, "32-bit" if dtype == torch.float32 else "*", arch)
    chosen["BLOCK_C"] = min(chosen["BLOCK_C"], max(16, triton.next_power_of_2(C)))
    chosen["BLOCK_K"] = min(chosen["BLOCK_K"], max(16, triton.next_power_of_2(K)))
    while K % chosen["BLOCK_K"] and chosen["BLOCK_K"] > 64:
        chosen["BLOCK_K"] //= 2
    return chosen


@on_device
def launch(
    before: Tensor | None,
    frame: Tensor,
    after: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    room: int = 0,
) -> Tensor:
    """Runs the kernel: on a GPU, or on CPU tensors in Triton's interpreter. Arguments as `temporal_conv`."""
    (B, M, C), K = frame.shape, weight.shape[-1]
    out = frame.new_empty(B, M, K + room)
    chosen = product_blocks(OP, frame.dtype, C, K, arch_of(frame.device))
    grid = (B * triton.cdiv(M, chosen["BLOCK_M"]) * triton.cdiv(K, chosen["BLOCK_K"]),)
    sizes = {"C": C, "K": K, "CENTRE": len(weight) // 2}
    launcher(temporal_conv_kernel)[grid](
        before, frame, after, weight, bias, residual, out, M, frame.stride(0), K + room, **sizes, **chosen
    )
    return out


# Values up to which a call of the library costs a CPU more than its sums. There the twin makes one product of all taps
# in half precision (0.4 to 0.5 of the time of three, Xeon with AMX), and one per tap for all items in float32 (0.6 to
# 0.8).
SMALL = 2**19


def twin(
    before: Tensor | None,
    frame: Tensor,
    after: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    room: int = 0,
) -> Tensor:
    """The same in plain PyTorch: what runs on a CPU, and the oracle of the tests."""
    taps = [(before, weight[0]), (frame, weight[len(weight) // 2]), (after, weight[-1])]
    neighbours = [(source, tap) for source, tap in (taps[0], taps[2]) if source is not None]
    taps = [(source, tap) for source, tap in taps if source is not None]
    addend = residual  # what is added after the products
    if frame.numel() > SMALL:
        out = frame.new_empty(*frame.shape[:-1], weight.shape[-1])
        for item, y in enumerate(out):
            torch.addmm(bias, frame[item], weight[len(weight) // 2], out=y)
            for source, tap in neighbours:  # which at a clip's ends may be the frame itself
                y.addmm_(source[item], tap)
    elif frame.dtype in (torch.float16, torch.bfloat16):
        rows = torch.cat([source for source, _ in taps], dim=-1).flatten(0, 1)
        together = weight.flatten(0, 1) if len(taps) == len(weight) else torch.cat([tap for _, tap in taps])
        out = torch.addmm(bias, rows, together).view(*frame.shape[:-1], -1)
    else:
        # A product that adds what is there saves a pass over the result; the smaller addend comes last.
        out, addend = (bias, None) if residual is None else (residual, bias)
        for source, tap in taps:
            out = torch.baddbmm(out, source, tap.expand(len(frame), -1, -1))
    out = out if addend is None else out.add_(addend)
    return F.pad(out, (0, room)) if room else out


@triton_op("temporal_conv")
def temporal_conv(
    before: Tensor | None,
    frame: Tensor,
    after: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    room: int = 0,
) -> Tensor:
    """A convolution over a frame and its neighbours in time, at each position separately.

    Args:
        before, frame, after: [B, M, C] with equal strides and dense rows, usually views of one buffer. A neighbour of
            None counts as zeros.
        weight: [3, C, K], for before, frame and after; [1, C, K] where there are no neighbours. bias: [K].
        residual: [B, M, K] to add, contiguous.
        room: channels after the K of each row, for a tensor that will be joined to them; their values are arbitrary.

    Returns [B, M, K + room]. Raises ValueError for arguments that differ in device, dtype or size, or a negative room.
    """
    check_tensors(OP, before=before, frame=frame, after=after, weight=weight, bias=bias, residual=residual)
    check_shape(OP, "frame", frame, None, None, None)
    B, M, C = frame.shape
    check_shape(OP, "weight", weight, 1 if before is None and after is None and len(weight) == 1 else 3, C, None)
    check_shape(OP, "bias", bias, weight.shape[-1])
    check_contiguous(OP, weight=weight, bias=bias, residual=residual)
    sources = {"frame": frame, "before": before, "after": after}
    given = {name: x for name, x in sources.items() if x is not None}
    check_same(OP, "shape", **{name: tuple(x.shape) for name, x in given.items()})
    check_same(OP, "strides", **{name: x.stride() for name, x in given.items()})
    check_contiguous(OP, **{f"{name}[0]": x[0] for name, x in given.items()})
    if residual is not None:
        check_shape(OP, "residual", residual, B, M, weight.shape[-1])
    if room < 0:
        raise ValueError(f"{OP}: room={room} must not be negative")
    run = launch if frame.is_cuda else twin
    return run(before, frame, after, weight, bias, residual, room)


def variants(arch: str) -> Iterator[Variant]:
    """What is shipped for `arch`: the widths of SVD's U-Net and decoder."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    missing = {"": (), "first": ("before_ptr",), "last": ("after_ptr",), "alone": ("before_ptr", "after_ptr")}
    # For bfloat16 everything that a step and a decode launch; for the other dtypes the cases hardest for the compiler.
    shapes = [(bf16, width, "", residual) for width in (128, 256, 320, 512, 640, 1280) for residual in (True, False)]
    shapes += [(fp16, width, "", True) for width in (128, 320, 512, 1280)]
    shapes += [(bf16, 3, "first", False), (bf16, 3, "last", False), (fp16, 128, "first", True), (fp16, 320, "", False)]
    shapes += [(dtype, width, "alone", True) for dtype in (bf16, fp16) for width in (320, 640, 1280)]
    shapes += [(fp32, 128, "", True), (fp32, 320, "", False)]
    for dtype, width, kind, residual in shapes:
        chosen = product_blocks(OP, dtype, width, width, arch)
        options = {name: chosen.pop(name) for name in OPTIONS if name in chosen}
        absent = [*missing[kind], *["residual_ptr"] * (not residual)]
        pointers = ("before_ptr", "frame_ptr", "after_ptr", "w_ptr", "bias_ptr", "residual_ptr", "out_ptr")
        yield Variant(
            name=f"{OP} {TYPES[dtype]} {width}{f' {kind}' * bool(kind)}{' residual' * residual}",
            kernel=temporal_conv_kernel,
            signature={
                **dict.fromkeys((p for p in pointers if p not in absent), f"*{TYPES[dtype]}"),
                "M": "i32",
                "item_stride": "i64",
                "out_stride": "i32",
            },
            constants={"C": width, "K": width, "CENTRE": int(kind != "alone"), **chosen, **dict.fromkeys(absent)},
            options=options,
            unaligned=("M",) if width % 16 == 0 else ("M", "out_stride"),
            matrix=dtype != torch.float32,
        )
