"""quantised_conv3d: y = scale * conv(x, w) + bias + residual; products of 8-bit x and w cost half of bfloat16's.

Twin: `conv3d` of the values that the 8-bit numbers represent.

The weight has one scale per output channel, which factors out of the sum over inputs and is applied once, after the
loop. The scale of an input channel needs no work here: the norm that writes x divides by it, and `pack` multiplies the
weight by it before rounding. Legend: N items, T frames, H height, W width, C channels in, K channels out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import conv3d
from .conv3d import check_buffer, descriptors_fit, finish, pack_weight, row_number, shifted_gemm
from .eight_bits import EIGHT_BIT, best_eight_bit, to_eight_bits
from .launch import TYPES, Variant, launcher, on_device, triton_op
from .shape_checks import check_contiguous, check_multiple, check_same, check_shape, check_tensors
from .tables import OPTIONS, Settings, arch_of, settings

OP = "quantised_conv3d"


@triton.jit(do_not_specialize=["N", "T", "H", "W", "FRONT", "FRAMES", "TILES"])
def quantised_conv3d_kernel(
    x_ptr,  # 8-bit [N, frames, H + 2, W + 2, C]
    w_ptr,  # 8-bit [K, taps * C]
    scale_ptr,  # float32 [K]
    bias_ptr,  # [K]
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
    """As `conv3d_kernel`, whose positions and tiles these are.

    sm_90 adds products of FP8 in some 14 bits. A sum over 27 * C of them would lose more than the rounding of x: after
    each step of the loop they move to float32, which costs a second set of sums in registers.
    """
    INTEGERS: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    blocks = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0) // blocks
    k0 = tl.program_id(0) % blocks * BLOCK_K
    item = (tile // TILES).to(tl.int64)
    q0 = tile % TILES * BLOCK_M
    width = W + 2
    frame = (H + 2) * width
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
        False,
        BLOCK_M,
        BLOCK_K,
        BLOCK_C,
        tl.int32 if INTEGERS else tl.float32,
        None if INTEGERS else BLOCK_C,
    )
    k = k0 + tl.arange(0, BLOCK_K)
    acc = acc.to(tl.float32) * tl.load(scale_ptr + k, mask=k < K, other=0.0)[None, :]

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


def blocks_for(C: int, K: int, arch: str) -> Settings:
    """Launch settings by number of outputs. Narrow layers get smaller blocks, not below a matrix unit's minimum."""
    chosen = settings(OP, "K<=128" if K <= 128 else "*", arch)
    chosen["BLOCK_C"] = min(chosen["BLOCK_C"], max(32, triton.next_power_of_2(C)))
    chosen["BLOCK_K"] = min(chosen["BLOCK_K"], max(16, triton.next_power_of_2(K)))
    return chosen


@on_device
def launch(
    x_padded: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    stats: bool = False,
    front: int = 0,
    back: int = 0,
    halo: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs the kernel: on a GPU, or on CPU tensors in Triton's interpreter. Arguments as `quantised_conv3d`."""
    N, padded_T, padded_H, padded_W, C = x_padded.shape
    K, time = len(weight), weight.shape[1] // (9 * C)
    T, H, W = padded_T - time + 1, padded_H - 2, padded_W - 2
    chosen = blocks_for(C, K, arch_of(x_padded.device))
    frames = front + T + back
    tiles = triton.cdiv(frames * padded_H * padded_W, chosen["BLOCK_M"])
    out = bias.new_empty(N, frames, H + 2 * halo, W + 2 * halo, K)
    partials = bias.new_empty((N, tiles, 3, K) if stats else (0,), dtype=torch.float32)
    launcher(quantised_conv3d_kernel)[(N * tiles * triton.cdiv(K, chosen["BLOCK_K"]),)](
        x_padded,
        weight,
        scale,
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
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    stats: bool = False,
    front: int = 0,
    back: int = 0,
    halo: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch: what runs on a CPU, and the oracle of the tests. Sums, scale,
    bias and residual are in float32 (float64 stays), rounded once."""
    wide = torch.promote_types(bias.dtype, torch.float32)
    y, _ = conv3d.twin(x_padded.to(wide), weight.to(wide))
    y = y * scale.to(wide) + bias.to(wide)
    if residual is not None:
        y = y + residual
    partials = conv3d.statistics(y) if stats else y.new_empty(0, dtype=torch.float32)
    return conv3d.with_halo(y.to(bias.dtype), front, back, halo), partials


@triton_op("quantised_conv3d")
def quantised_conv3d(
    x_padded: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    stats: bool = False,
    front: int = 0,
    back: int = 0,
    halo: bool = False,
) -> tuple[Tensor, Tensor]:
    """`conv3d` of 8-bit numbers; the result has the dtype of `bias`.

    Args:
        x_padded: one of `eight_bits.EIGHT_BIT`, [N, T + kt - 1, H + 2, W + 2, C], as `group_norm_silu` writes it.
        weight, scale: as `pack` makes them, [K, kt * 9 * C] in the type of x, and float32 [K].
        bias: [K]. residual: [N, T, H, W, K].
        stats, front, back, halo: as for `conv3d`.

    Returns what `conv3d` does. Raises ValueError for arguments that differ in device, dtype or size.
    """
    check_tensors(OP, bias=bias, residual=residual)
    check_contiguous(OP, x_padded=x_padded, weight=weight, scale=scale, bias=bias, residual=residual)
    check_shape(OP, "x_padded", x_padded, None, None, None, None, None)
    check_shape(OP, "weight", weight, None, None)
    check_same(OP, "dtype", x_padded=x_padded.dtype, weight=weight.dtype)
    if x_padded.dtype not in EIGHT_BIT:
        raise ValueError(f"{OP}: x_padded has dtype={x_padded.dtype}, it must be of {', '.join(map(str, EIGHT_BIT))}")
    check_same(OP, "dtype", needed=torch.float32, scale=scale.dtype)
    check_same(OP, "device", x_padded=x_padded.device, weight=weight.device, scale=scale.device, bias=bias.device)
    (N, padded_T, padded_H, padded_W, C), K = x_padded.shape, len(weight)
    check_multiple(OP, "weight.shape[1]", weight.shape[1], 9 * C)
    time = weight.shape[1] // (9 * C)
    if time not in (1, 3):
        raise ValueError(f"{OP}: weight has {time} taps in time for C={C}, it must have 1 or 3")
    check_buffer(OP, x_padded, time)
    check_shape(OP, "scale", scale, K)
    check_shape(OP, "bias", bias, K)
    if residual is not None:
        check_shape(OP, "residual", residual, N, padded_T - time + 1, padded_H - 2, padded_W - 2, K)
    if min(front, back) < 0:
        raise ValueError(f"{OP}: front={front}, back={back} must not be negative")
    run = launch if x_padded.is_cuda else twin
    return run(x_padded, weight, scale, bias, residual, stats, front, back, halo)


def pack(weight: Tensor, largest_C: Tensor, eight_bit: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises a weight [K, C, (kt,) 3, 3], given the largest magnitude of each channel of its input, measured on
    clips. Returns the multiplier of x, float32 [C], and the weight and scale that the op takes.

    Each channel of x is divided, and of w multiplied, by the square root of the ratio of their largest magnitudes
    (SmoothQuant, arXiv 2211.10438, at one half): with one scale for all of x, channels of small values would have few
    numbers left. Then x as a whole, and each output channel of w, is scaled to the largest number of the type. A
    channel that was always zero, or that no weight reads, counts as one of 1e-4 of the largest.
    """
    w = weight.detach().float()
    limit = EIGHT_BIT[eight_bit]
    w_largest = w.abs().amax([d for d in range(w.ndim) if d != 1])
    x_floor, w_floor = max(float(largest_C.max()) * 1e-4, 1e-12), max(float(w_largest.max()) * 1e-4, 1e-12)
    x_largest, w_largest = largest_C.float().clamp(min=x_floor), w_largest.clamp(min=w_floor)
    smooth = (x_largest / w_largest).sqrt()
    x_scale = (x_largest / smooth).max() / limit
    multiplier = 1 / (smooth * x_scale)
    w = w / multiplier.view(-1, *[1] * (w.ndim - 2))
    scale = (w.flatten(1).abs().amax(1) / limit).clamp(min=1e-30)
    packed = to_eight_bits(pack_weight(w) / scale[:, None], eight_bit)
    return multiplier.contiguous(), packed, scale


def variants(arch: str) -> Iterator[Variant]:
    """What is shipped for `arch`: the residual blocks of the full-size decoder."""
    eight_bit = best_eight_bit(arch)
    if eight_bit is None:
        return
    # C, K, residual, statistics, halo
    shapes = [
        (128, 128, True, True, False),
        (128, 128, False, True, False),
        (256, 128, False, True, False),
        (256, 256, True, True, False),
        (256, 256, False, True, False),
        (256, 256, True, False, False),
        (256, 256, True, False, True),
        (512, 256, False, True, False),
        (512, 512, True, True, False),
        (512, 512, False, True, False),
        (512, 512, True, False, False),
        (512, 512, True, False, True),
    ]
    integers = ("N", "T", "H", "W", "FRONT", "FRAMES", "TILES")
    for C, K, residual, stats, halo in shapes:
        chosen = blocks_for(C, K, arch)
        options = {name: chosen.pop(name) for name in OPTIONS if name in chosen}
        absent = ["residual_ptr"] * (not residual) + ["stats_ptr"] * (not stats)
        signature = {
            "x_ptr": f"*{TYPES[eight_bit]}",
            "w_ptr": f"*{TYPES[eight_bit]}",
            "scale_ptr": "*fp32",
            **dict.fromkeys(("bias_ptr", "residual_ptr", "out_ptr"), "*bf16"),
            "stats_ptr": "*fp32",
            **dict.fromkeys(integers, "i32"),
        }
        yield Variant(
            name=f"{OP} {TYPES[eight_bit]} {C}->{K} k3" + " residual" * residual + " stats" * stats + " halo" * halo,
            kernel=quantised_conv3d_kernel,
            signature={name: type_ for name, type_ in signature.items() if name not in absent},
            constants={
                "C": C,
                "K": K,
                "TIME": 3,
                "HALO": int(halo),
                "DESCRIPTORS": arch in ("sm_90", "sm_100"),
                **chosen,
                **dict.fromkeys(absent),
            },
            options=options,
            unaligned=integers,
            matrix=True,
            bulk_copy=True,
            eight_bit=True,
        )
