"""conv3d: y = conv(x, w) + bias + residual; 3x3 in space, 1 or 3 taps in time, over a buffer that already has its halo.

Twin: `F.conv3d` over the padded buffer (`VideoConv` of `reference/reducio/vae.py`).

Implicit GEMM with no masks in the inner loop: the padded channels-last buffer is one matrix [rows, C], and a tap of the
kernel is a constant shift of rows. Positions whose window wraps around a border are computed too and come out as halo.
Legend: N items, T frames, H height, W width, C channels in, K channels out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .cpu_convolution import convolve
from .launch import TYPES, Variant, launcher, on_device, triton_op, use_descriptors
from .shape_checks import check_contiguous, check_multiple, check_shape, check_tensors
from .tables import OPTIONS, Settings, arch_of, settings

OP = "conv3d"


@triton.jit
def row_number(item, t, y, x, FRAMES, HEIGHT, WIDTH):
    """Row of a position in a [N, FRAMES, HEIGHT, WIDTH, channels] tensor seen as a matrix; int64, as `item` must be."""
    return ((item * FRAMES + t) * HEIGHT + y) * WIDTH + x


@triton.jit
def shifted_gemm(
    x_ptr,  # [N, FRAMES, HEIGHT, WIDTH, C], padded
    w_ptr,  # [w_rows, taps * C]
    item,  # which of N, int64
    first,  # row of x, within the item, of the first position at the first tap
    N,  # items
    FRAMES,  # of the padded input
    HEIGHT,  # rows, padded
    WIDTH,  # columns, padded
    w_rows,  # rows of the weights
    w_row,  # first of them
    live,  # 1, or 0 where the tile holds nothing but padding
    C: tl.constexpr,  # channels in
    TIME: tl.constexpr,  # taps along time: 1 or 3
    SPACE: tl.constexpr,  # taps along each axis of the frame
    DESCRIPTORS: tl.constexpr,  # whether blocks come by bulk copy (sm_90 on)
    SWAP: tl.constexpr,  # whether products have channels as rows, with bulk copies only
    BLOCK_M: tl.constexpr,  # positions a program
    BLOCK_K: tl.constexpr,  # rows of weights a program
    BLOCK_C: tl.constexpr,  # channels in a step of the loop
    SUMS: tl.constexpr = tl.float32,  # type of the sums: int32 of 8-bit integers
    PROMOTED: tl.constexpr = None,  # of 8-bit floats: products that sm_90 may add in its 14 bits before float32 does
):
    """acc[m, k] = sum over taps of x[first + m + shift(tap), :] . w[w_row + k, tap, :], rows counted within `item`.

    Rows from which a tap would leave the buffer yield sums of unrelated values, which are never read. `live` = 0 skips
    the work. The weights are a matrix [w_rows, taps * C].
    """
    TAPS: tl.constexpr = TIME * SPACE * SPACE
    acc = tl.zeros((BLOCK_K if SWAP else BLOCK_M, BLOCK_M if SWAP else BLOCK_K), SUMS)
    # Taps are the inner loop: neighbours read nearly the same rows, which then are in the cache.
    steps = TAPS * tl.cdiv(C, BLOCK_C) * live
    if DESCRIPTORS:
        x_rows = tl.make_tensor_descriptor(
            x_ptr, [(N * FRAMES * HEIGHT * WIDTH).to(tl.int32), C], [C, 1], [BLOCK_M, BLOCK_C]
        )
        w_taps = tl.make_tensor_descriptor(w_ptr, [w_rows, TAPS * C], [TAPS * C, 1], [BLOCK_K, BLOCK_C])
        start = (row_number(item, 0, 0, 0, FRAMES, HEIGHT, WIDTH) + first).to(tl.int32)
        for step in range(0, steps):
            tap = step % TAPS
            c = step // TAPS * BLOCK_C
            shift = ((tap // (SPACE * SPACE)) * HEIGHT + tap // SPACE % SPACE) * WIDTH + tap % SPACE
            # Past C this reads the weights of the next tap, against channels of x that the hardware fills with zeros.
            x = x_rows.load([start + shift, c])
            w = w_taps.load([w_row, tap * C + c])
            if SWAP:
                acc = tl.dot(w, x.T, acc, input_precision="ieee", max_num_imprecise_acc=PROMOTED, out_dtype=SUMS)
            else:
                acc = tl.dot(x, w.T, acc, input_precision="ieee", max_num_imprecise_acc=PROMOTED, out_dtype=SUMS)
        if SWAP:
            acc = acc.T
    else:
        last = FRAMES * HEIGHT * WIDTH - 1 - (((TIME - 1) * HEIGHT + SPACE - 1) * WIDTH + SPACE - 1)
        base = tl.minimum(tl.maximum(first, 0), last)
        m = tl.minimum(tl.maximum(first + tl.arange(0, BLOCK_M), 0), last) - base  # clamped: cheaper than masks
        k = tl.minimum(w_row + tl.arange(0, BLOCK_K), w_rows - 1)
        channels = tl.arange(0, BLOCK_C)
        x_ptrs = x_ptr + (row_number(item, 0, 0, 0, FRAMES, HEIGHT, WIDTH) + base) * C
        x_offsets = m[:, None] * C + channels[None, :]
        w_offsets = k[None, :] * (TAPS * C) + channels[:, None]
        for step in range(0, steps):
            tap = step % TAPS
            c = step // TAPS * BLOCK_C
            shift = ((tap // (SPACE * SPACE)) * HEIGHT + tap // SPACE % SPACE) * WIDTH + tap % SPACE
            if C % BLOCK_C == 0:
                x = tl.load(x_ptrs + (shift.to(tl.int64) * C + c) + x_offsets)
                w = tl.load(w_ptr + (tap * C + c) + w_offsets)
            else:
                inside = channels < C - c
                x = tl.load(x_ptrs + (shift.to(tl.int64) * C + c) + x_offsets, mask=inside[None, :], other=0.0)
                w = tl.load(w_ptr + (tap * C + c) + w_offsets, mask=inside[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee", max_num_imprecise_acc=PROMOTED, out_dtype=SUMS)
    return acc


@triton.jit
def store_statistics(stats_ptr, tile, values, inside, k, K: tl.constexpr):
    """(count, mean, sum of squared deviations) of each channel over the rows inside, to stats[tile, 3, K]."""
    count = tl.sum(inside.to(tl.float32), 0)
    mean = tl.sum(tl.where(inside[:, None], values, 0.0), 0) / tl.maximum(count, 1.0)
    deviation = tl.where(inside[:, None], values - mean[None, :], 0.0)
    to = stats_ptr + tile.to(tl.int64) * (3 * K) + k
    tl.store(to, tl.zeros_like(mean) + count, mask=k < K)
    tl.store(to + K, mean, mask=k < K)
    tl.store(to + 2 * K, tl.sum(deviation * deviation, 0), mask=k < K)


@triton.jit
def halves(x):
    """Left and right half of the columns."""
    M: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (M, 2, K // 2)), (0, 2, 1)))


@triton.jit
def finish(
    acc,  # float32 [BLOCK_M, BLOCK_K] sums
    k0,  # first channel out
    bias_ptr,  # [K], or None
    residual_ptr,  # [N, T, H, W, K] to add, or None
    out_ptr,  # the result, whose rows may be wider than K
    stats_ptr,  # float32 [tiles, 3, K]: count, mean, squared deviations; or None
    tile,  # row of the statistics
    in_rows,  # int64 [BLOCK_M]: rows of the residual
    inside,  # bool [BLOCK_M]: positions that are no padding
    out_at,  # int64 [BLOCK_M]: where each row of the output begins
    stored,  # bool [BLOCK_M]: positions that the output has
    K: tl.constexpr,  # channels out
    PIECES: tl.constexpr,  # parts of the columns that are finished one after the other
):
    """Adds bias and residual, takes the statistics, stores zeros outside and the result inside.

    In PIECES of the columns, since the whole tile in float32 twice over does not fit into a thread's registers."""
    BLOCK_K: tl.constexpr = acc.shape[1]
    if PIECES > 1:
        left, right = halves(acc)
        finish(
            left,
            k0,
            bias_ptr,
            residual_ptr,
            out_ptr,
            stats_ptr,
            tile,
            in_rows,
            inside,
            out_at,
            stored,
            K,
            PIECES // 2,
        )
        finish(
            right,
            k0 + BLOCK_K // 2,
            bias_ptr,
            residual_ptr,
            out_ptr,
            stats_ptr,
            tile,
            in_rows,
            inside,
            out_at,
            stored,
            K,
            PIECES // 2,
        )
    else:
        k = k0 + tl.arange(0, BLOCK_K)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            mask = inside[:, None] & (k < K)[None, :]
            acc += tl.load(residual_ptr + (in_rows[:, None] * K + k[None, :]), mask=mask, other=0.0).to(tl.float32)
        if stats_ptr is not None:
            store_statistics(stats_ptr, tile, acc, inside, k, K)
        acc = tl.where(inside[:, None], acc, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (out_at[:, None] + k[None, :]), acc, mask=stored[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["N", "T", "H", "W", "FRONT", "FRAMES", "TILES"])
def conv3d_kernel(
    x_ptr,  # [N, frames, H + 2, W + 2, C]
    w_ptr,  # [K, taps * C]
    bias_ptr,  # [K], or None
    residual_ptr,  # [N, T, H, W, K] to add, or None
    out_ptr,  # [N, FRAMES, H, W, K], or with a halo [N, FRAMES, H + 2, W + 2, K]
    stats_ptr,  # float32 [tiles, 3, K]: count, mean, squared deviations; or None
    N,  # items
    T,  # frames of the input without padding
    H,  # rows without padding
    W,  # columns without padding
    FRONT,  # frames of zeros before the result
    FRAMES,  # of the output, zeros included
    TILES,  # blocks of positions an item
    C: tl.constexpr,  # channels in
    K: tl.constexpr,  # channels out
    TIME: tl.constexpr,  # taps along time: 1 or 3
    HALO: tl.constexpr,  # 1: the output has a border of zeros
    DESCRIPTORS: tl.constexpr,  # whether blocks come by bulk copy (sm_90 on)
    BLOCK_M: tl.constexpr,  # positions a program
    BLOCK_K: tl.constexpr,  # channels out a program
    BLOCK_C: tl.constexpr,  # channels in a step of the loop
    PIECES: tl.constexpr,  # parts of the columns that are finished one after the other
):
    """One program a tile of BLOCK_M positions x BLOCK_K channels; programs on the same positions are neighbours.

    Positions are counted over FRAMES frames of (H + 2) x (W + 2). With a halo that is the output itself; without one
    the last two rows and columns are dropped. FRAMES = front + T + back.
    """
    blocks = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    tile = pid // blocks
    k0 = pid % blocks * BLOCK_K
    item = (tile // TILES).to(tl.int64)
    q0 = tile % TILES * BLOCK_M
    width = W + 2
    frame = (H + 2) * width

    # Hopper's and Blackwell's matrix units take rows by 64 and up to 256 columns: a layer of 128 channels fills these
    # with positions only. On sm_90 the loop then reads less shared memory, and what follows it has 52 barriers and not
    # 82. Without a residual, whose blocks set the layout of the rest, registers are spilled: 144 bytes.
    SWAP: tl.constexpr = (
        DESCRIPTORS
        and residual_ptr is not None
        and BLOCK_K >= 64
        and BLOCK_M > BLOCK_K
        and x_ptr.dtype.element_ty != tl.float32
    )
    first = q0 - FRONT * frame - HALO * (width + 1)
    live = ((q0 + BLOCK_M > FRONT * frame) & (q0 < (FRONT + T) * frame)).to(tl.int32)
    acc = shifted_gemm(
        x_ptr,
        w_ptr,
        item,
        first,
        N,
        T + TIME - 1,
        H + 2,
        width,
        K,
        k0,
        live,
        C,
        TIME,
        3,
        DESCRIPTORS,
        SWAP,
        BLOCK_M,
        BLOCK_K,
        BLOCK_C,
    )

    q = q0 + tl.arange(0, BLOCK_M)
    f = q // frame
    t = f - FRONT
    y = q % frame // width - HALO
    x = q % width - HALO
    inside = (t >= 0) & (t < T) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    in_rows = row_number(item, t, y, x, T, H, W)
    out_rows = row_number(item, f, y + HALO, x + HALO, FRAMES, H + 2 * HALO, W + 2 * HALO)
    stored = (f < FRAMES) & (y < H + HALO) & (x < W + HALO)
    finish(acc, k0, bias_ptr, residual_ptr, out_ptr, stats_ptr, tile, in_rows, inside, out_rows * K, stored, K, PIECES)


def blocks_for(op: str, dtype: torch.dtype, C: int, K: int, arch: str) -> Settings:
    """Launch settings by precision and number of outputs. Narrow layers get smaller blocks, not below the minimum of
    a matrix unit, 16. Where blocks of 64 divide K but wider ones do not, they are narrower: 320 are five of 64."""
    # With an odd number of blocks of 128, blocks of 256 would waste half of the last one.
    narrow = triton.cdiv(K, 128) % 2 == 1
    width = "32-bit" if dtype == torch.float32 else "K<=16" if K <= 16 else "K<=128" if narrow else "*"
    chosen = settings(op, width, arch)
    chosen["BLOCK_C"] = min(chosen["BLOCK_C"], max(16, triton.next_power_of_2(C)))
    chosen["BLOCK_K"] = min(chosen["BLOCK_K"], max(16, triton.next_power_of_2(K)))
    if C <= 16 and "num_stages" in chosen:  # nine steps hide nothing; Triton 3.6 spills 8 bytes on sm_80 with 4 stages
        chosen["num_stages"] = min(chosen["num_stages"], 2)
    # By the rate model, SVD's finest level (320) gains: 587 TFLOP/s and not 523 on sm_90, 714 and not 632 on gfx942.
    while K % 64 == 0 and K % chosen["BLOCK_K"]:
        chosen["BLOCK_K"] //= 2
    return chosen


def descriptors_fit(x: Tensor, weight: Tensor) -> bool:
    """Whether bulk copies can run: rows are multiples of 16 bytes and start at one; a view of a workspace may not."""
    sizes = (x.shape[-1], x.storage_offset(), weight.storage_offset())
    return all(size * x.element_size() % 16 == 0 for size in sizes) and use_descriptors(x.device)


@on_device
def launch(
    x_padded: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stats: bool = False,
    front: int = 0,
    back: int = 0,
    halo: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs the kernel: on a GPU, or on CPU tensors in Triton's interpreter. Arguments as `conv3d`."""
    N, padded_T, padded_H, padded_W, C = x_padded.shape
    K, time = len(weight), weight.shape[1] // (9 * C)
    T, H, W = padded_T - time + 1, padded_H - 2, padded_W - 2
    chosen = blocks_for(OP, x_padded.dtype, C, K, arch_of(x_padded.device))
    frames = front + T + back
    tiles = triton.cdiv(frames * padded_H * padded_W, chosen["BLOCK_M"])
    out = x_padded.new_empty(N, frames, H + 2 * halo, W + 2 * halo, K)
    partials = x_padded.new_empty((N, tiles, 3, K) if stats else (0,), dtype=torch.float32)
    launcher(conv3d_kernel)[(N * tiles * triton.cdiv(K, chosen["BLOCK_K"]),)](
        x_padded,
        weight,
        bias,
        residual,
        out,
        partials if stats else None,
        N,
        T,
        H,
        W,
        front,
        frames,
        tiles,
        C=C,
        K=K,
        TIME=time,
        HALO=int(halo),
        DESCRIPTORS=descriptors_fit(x_padded, weight),
        **chosen,
    )
    return out, partials


def twin(
    x_padded: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stats: bool = False,
    front: int = 0,
    back: int = 0,
    halo: bool = False,
    pad: bool = False,
    winograd: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch: what runs on a CPU, and the oracle of the tests. Statistics are one tile per item.

    `pad`: the input has no border; the library pads with zeros on all sides, which costs a CPU less than writing them.
    `winograd`: see `convolve`.
    """
    C = x_padded.shape[-1]
    kernel = weight.view(len(weight), -1, 3, 3, C).permute(0, 4, 1, 2, 3)
    border = [size // 2 if pad else 0 for size in kernel.shape[2:]]
    y = convolve(x_padded.permute(0, 4, 1, 2, 3), kernel, bias, border, winograd).permute(0, 2, 3, 4, 1)
    if residual is not None:
        y = y + residual
    return with_halo(y, front, back, halo), statistics(y) if stats else y.new_empty(0, dtype=torch.float32)


def statistics(y: Tensor) -> Tensor:
    """(count, mean, sum of squared deviations) of each channel: [N, 1, 3, K] in float32, float64 stays."""
    rows = y.flatten(1, 3).to(torch.promote_types(y.dtype, torch.float32))
    mean = rows.mean(1)  # `var_mean` takes a CPU 5 times as long
    squares = (rows - mean[:, None]).square_().sum(1)
    return torch.stack((torch.full_like(mean, rows.shape[1]), mean, squares), 1)[:, None]


def with_halo(y: Tensor, front: int, back: int, halo: bool) -> Tensor:
    """`y` [N, T, H, W, K] inside a border of zeros, contiguous."""
    return F.pad(y, (0, 0, *[int(halo)] * 4, front, back)) if front or back or halo else y.contiguous()


@triton_op("conv3d")
def conv3d(
    x_padded: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stats: bool = False,
    front: int = 0,
    back: int = 0,
    halo: bool = False,
) -> tuple[Tensor, Tensor]:
    """3x3 convolution in space, over 1 or 3 frames, plus bias and residual; on request with statistics for GroupNorm.

    Args:
        x_padded: [N, T + kt - 1, H + 2, W + 2, C], contiguous, its border already zero. The caller chooses the padding
            in time by where it puts the frames: on both sides or, for a causal model, in front only.
        weight: [K, kt * 9 * C] as `pack_weight` makes it. bias: [K]. residual: [N, T, H, W, K].
        stats: also return partial statistics.
        front, back: frames of zeros before and after the result. halo: a border of zeros around each of its frames.

    Returns the result [N, front + T + back, H (+ 2), W (+ 2), K], and float32 [N, tiles, 3, K]: for each tile of
    positions (the launch decides how many) and channel, the count, the mean and the sum of squared deviations from
    that mean, taken in float32 before the result is rounded. Without `stats` it is empty.

    Raises ValueError for arguments that differ in device, dtype or size.
    """
    check_tensors(OP, x_padded=x_padded, weight=weight, bias=bias, residual=residual)
    check_contiguous(OP, x_padded=x_padded, weight=weight, bias=bias, residual=residual)
    check_shape(OP, "x_padded", x_padded, None, None, None, None, None)
    check_shape(OP, "weight", weight, None, None)
    (N, padded_T, padded_H, padded_W, C), K = x_padded.shape, len(weight)
    check_multiple(OP, "weight.shape[1]", weight.shape[1], 9 * C)
    time = weight.shape[1] // (9 * C)
    if time not in (1, 3):
        raise ValueError(f"{OP}: weight has {time} taps in time for C={C}, it must have 1 or 3")
    check_buffer(OP, x_padded, time)
    if bias is not None:
        check_shape(OP, "bias", bias, K)
    if residual is not None:
        check_shape(OP, "residual", residual, N, padded_T - time + 1, padded_H - 2, padded_W - 2, K)
    if min(front, back) < 0:
        raise ValueError(f"{OP}: front={front}, back={back} must not be negative")
    return (launch if x_padded.is_cuda else twin)(x_padded, weight, bias, residual, stats, front, back, halo)


def check_buffer(op: str, x_padded: Tensor, time: int) -> None:
    """The buffer holds at least one position besides its halo, and its rows can be counted in int32."""
    N, T, H, W, _ = x_padded.shape
    if N < 1 or time > T or H < 3 or W < 3:
        raise ValueError(f"{op}: x_padded has T={T}, H={H}, W={W} with halo, it must have at least {time}, 3, 3")
    # Row numbers of a tile at the end go beyond the last row: half of the int32 range is left for them.
    if N * T * H * W >= 2**30:
        raise ValueError(f"{op}: x_padded has {N * T * H * W} positions, it must have fewer than {2**30}")


def pack_weight(weight: Tensor) -> Tensor:
    """[K, C, kt, 3, 3] or [K, C, 3, 3] to [K, taps * C]: time, row, column, then channel."""
    return weight.movedim(1, -1).flatten(1).contiguous()


def variants(arch: str) -> Iterator[Variant]:
    """What is shipped for `arch`: the widths of the full-size networks, each with all that its epilogue may do."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    # dtype, C, K, taps in time, residual, statistics, halo. For bfloat16 everything that a full-size clip launches,
    # as listed by the dry run of `fast.launches`; for the other dtypes the cases hardest for the compiler.
    shapes = [
        (bf16, 128, 128, 3, True, True, False),
        (bf16, 128, 128, 3, False, True, False),
        (bf16, 256, 128, 3, False, True, False),
        (bf16, 256, 256, 3, True, True, False),
        (bf16, 256, 256, 3, False, True, False),
        (bf16, 256, 256, 3, True, False, False),
        (bf16, 256, 256, 3, True, False, True),
        (bf16, 512, 256, 3, False, True, False),
        (bf16, 512, 512, 3, True, True, False),
        (bf16, 512, 512, 3, False, True, False),
        (bf16, 512, 512, 3, True, False, False),
        (bf16, 512, 512, 3, True, False, True),
        (bf16, 16, 512, 3, False, True, False),
        (bf16, 128, 3, 3, False, False, False),
        (bf16, 3, 128, 1, False, True, False),
        (bf16, 128, 128, 1, True, True, False),
        (bf16, 128, 128, 1, False, True, False),
        (bf16, 128, 128, 1, True, False, False),
        (bf16, 128, 256, 1, False, True, False),
        (bf16, 256, 256, 1, True, True, False),
        (bf16, 256, 256, 1, False, True, False),
        (bf16, 256, 256, 1, True, False, False),
        (bf16, 256, 512, 1, False, True, False),
        (bf16, 512, 512, 1, True, True, False),
        (bf16, 512, 512, 1, False, True, False),
        (bf16, 512, 512, 1, True, False, False),
        # SVD's, then the image autoencoder's
        *((dtype, C, C, 1, True, False, False) for dtype in (bf16, fp16) for C in (320, 640, 1280)),
        *((bf16, C, K, 1, False, False, False) for C, K in ((4, 512), (512, 512), (512, 256), (256, 256))),
        *((bf16, C, K, 1, False, False, False) for C, K in ((256, 128), (128, 128), (128, 3))),
        *((fp16, C, C, 1, True, False, False) for C in (128, 256, 512)),
        (fp16, 128, 128, 3, True, True, False),
        (fp16, 256, 256, 3, True, True, False),
        (fp16, 128, 3, 3, False, False, False),
        (fp32, 128, 128, 3, True, True, False),
        (fp32, 512, 512, 3, True, False, True),
        (fp32, 128, 3, 3, False, False, False),
    ]
    for dtype, C, K, time, residual, stats, halo in shapes:
        yield variant(
            OP,
            conv3d_kernel,
            arch,
            dtype,
            C,
            K,
            pointers=("x_ptr", "w_ptr", "bias_ptr", *["residual_ptr"] * residual, "out_ptr"),
            absent=(["residual_ptr"] if not residual else []) + (["stats_ptr"] if not stats else []),
            name=f"k{time}" + " residual" * residual + " stats" * stats + " halo" * halo,
            constants={"TIME": time, "HALO": int(halo)},
            integers=("N", "T", "H", "W", "FRONT", "FRAMES", "TILES"),
        )


def variant(
    op: str,
    kernel: object,
    arch: str,
    dtype: torch.dtype,
    C: int,
    K: int,
    *,
    pointers: tuple[str, ...],
    absent: list[str],
    name: str,
    constants: dict[str, int],
    integers: tuple[str, ...],
) -> Variant:
    """One variant of a convolution. All convolution kernels derive the same settings from precision and widths."""
    chosen = blocks_for(op, dtype, C, K, arch)
    options = {name: chosen.pop(name) for name in OPTIONS if name in chosen}
    signature = {**dict.fromkeys(pointers, f"*{TYPES[dtype]}"), **dict.fromkeys(integers, "i32")}
    if "stats_ptr" not in absent:
        signature["stats_ptr"] = "*fp32"
    half = dtype != torch.float32
    descriptors = arch in ("sm_90", "sm_100") and C * dtype.itemsize % 16 == 0
    return Variant(
        name=f"{op} {TYPES[dtype]} {C}->{K} {name}",
        kernel=kernel,
        signature=signature,
        constants={"C": C, "K": K, "DESCRIPTORS": descriptors, **constants, **chosen, **dict.fromkeys(absent)},
        options=options,
        unaligned=integers,
        matrix=half,
        bulk_copy=half and C % 16 == 0,
    )
