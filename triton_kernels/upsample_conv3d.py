"""upsample_conv3d: y = conv(nearest x2 of x in space, or space and time; w) + bias, w 3x3x3, or 3x3, with zero padding.

Twin: `Upsample` of `reference/reducio/vae.py`. Source: sub-pixel (phase) decomposition of nearest up-sampling, exact.

The up-sampled tensor is never made. Along a doubled axis the outputs of one parity (a phase) see only two inputs, so a
phase is a smaller convolution of x with sums of taps: 27 taps become 12 (space) or 8 (space and time), 9 become 4.
Legend: N items, T frames, H height, W width (of x), C channels in, K channels out, P phases.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv3d import (
    blocks_for,
    check_buffer,
    descriptors_fit,
    finish,
    pack_weight,
    row_number,
    shifted_gemm,
    statistics,
    variant,
)
from .cpu_convolution import convolve
from .launch import Variant, launcher, on_device, triton_op
from .shape_checks import check_contiguous, check_shape, check_tensors
from .tables import arch_of

OP = "upsample_conv3d"


@triton.jit(do_not_specialize=["N", "T", "H", "W", "FRONT", "LEAD", "FRAMES", "TILES"])
def upsample_conv3d_kernel(
    x_ptr,  # [N, frames, H + 2, W + 2, C]
    w_ptr,  # [phases, K, taps * C]
    bias_ptr,  # [K], or None
    out_ptr,  # [N, FRAMES, 2H, 2W, K + ROOM], or with a halo two more rows and columns
    stats_ptr,  # float32 [tiles, 3, K], or None
    N,  # items
    T,  # frames of the input without padding
    H,  # rows without padding
    W,  # columns without padding
    FRONT,  # frames of zeros before the result
    LEAD,  # frames of the input that stand for FRONT
    FRAMES,  # of the output, zeros included
    TILES,  # blocks of positions an item
    C: tl.constexpr,  # channels in
    K: tl.constexpr,  # channels out
    ROOM: tl.constexpr,  # channels behind them that are not written
    TIME: tl.constexpr,  # taps along time: 3, 2 where it is doubled, 1 for frames that do not see each other
    DOUBLE: tl.constexpr,  # 2 where time is doubled, else 1
    CAUSAL: tl.constexpr,  # whether time looks back alone
    HALO: tl.constexpr,  # 1: the output has a border of zeros
    DESCRIPTORS: tl.constexpr,  # whether blocks come by bulk copy (sm_90 on)
    BLOCK_M: tl.constexpr,  # positions a program
    BLOCK_K: tl.constexpr,  # channels out a program
    BLOCK_C: tl.constexpr,  # channels in a step of the loop
    PIECES: tl.constexpr,  # parts of the columns that are finished one after the other
):
    """One program a tile of BLOCK_M positions of x, one phase, and BLOCK_K channels.

    Positions are counted over frames of (H + 2) x (W + 2), as in conv3d. With a halo those around the frame, and the
    LEAD frames before the first, stand for the zeros: each phase writes the ones that have its parity.
    DOUBLE: 2 where time is doubled, else 1. FRAMES: of the output, FRONT + DOUBLE * T + back.
    """
    BORDER: tl.constexpr = 0 if TIME == 1 else 2  # frames of the input that are padding
    blocks = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0) // blocks  # of the statistics: item, position, phase
    k0 = tl.program_id(0) % blocks * BLOCK_K
    phase = tile % (4 * DOUBLE)
    column = phase % 2
    line = phase // 2 % 2
    instant = phase // 4
    item = (tile // (4 * DOUBLE * TILES)).to(tl.int64)
    q0 = tile // (4 * DOUBLE) % TILES * BLOCK_M
    width = W + 2
    frame = (H + 2) * width

    # First of the two inputs: the one before for parity 0, the same one for parity 1; in causal time always the one
    # before, and the buffer's two leading frames put that at index 1.
    ahead = 1 if DOUBLE == 2 and CAUSAL else instant
    first = q0 - LEAD * frame - HALO * (width + 1) + ahead * frame + line * width + column
    live = ((q0 + BLOCK_M > LEAD * frame) & (q0 < (LEAD + T) * frame)).to(tl.int32)
    acc = shifted_gemm(
        x_ptr,
        w_ptr,
        item,
        first,
        N,
        T + BORDER,
        H + 2,
        width,
        4 * DOUBLE * K,
        phase * K + k0,
        live,
        C,
        TIME,
        2,
        DESCRIPTORS,
        False,
        BLOCK_M,
        BLOCK_K,
        BLOCK_C,
    )

    q = q0 + tl.arange(0, BLOCK_M)
    t = q // frame - LEAD
    y = q % frame // width - HALO
    x = q % width - HALO
    inside = (t >= 0) & (t < T) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    f = DOUBLE * t + instant + FRONT
    y = 2 * y + line + HALO
    x = 2 * x + column + HALO
    height = 2 * (H + HALO)
    width = 2 * (W + HALO)
    stored = (f >= 0) & (f < FRAMES) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    out_rows = row_number(item, f, y, x, FRAMES, height, width)
    out_at = out_rows * (K + ROOM)
    finish(acc, k0, bias_ptr, None, out_ptr, stats_ptr, tile, out_rows, inside, out_at, stored, K, PIECES)


@on_device
def launch(
    x_padded: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    stats: bool = False,
    front: int = 0,
    back: int = 0,
    halo: bool = False,
    room: int = 0,
) -> tuple[Tensor, Tensor]:
    """Runs the kernel: on a GPU, or on CPU tensors in Triton's interpreter. Arguments as `upsample_conv3d`."""
    N, padded_T, padded_H, padded_W, C = x_padded.shape
    P, K, width = weight.shape
    time, double = width // (4 * C), P // 4
    T, H, W = padded_T - border(time), padded_H - 2, padded_W - 2
    chosen = blocks_for(OP, x_padded.dtype, C, K, arch_of(x_padded.device))
    lead, frames = triton.cdiv(front, double), front + double * T + back
    tiles = triton.cdiv((lead + T + triton.cdiv(back, double)) * padded_H * padded_W, chosen["BLOCK_M"])
    out = x_padded.new_empty(N, frames, 2 * (H + halo), 2 * (W + halo), K + room)
    partials = x_padded.new_empty((N, P * tiles, 3, K) if stats else (0,), dtype=torch.float32)
    launcher(upsample_conv3d_kernel)[(N * tiles * P * triton.cdiv(K, chosen["BLOCK_K"]),)](
        x_padded,
        weight,
        bias,
        out,
        partials if stats else None,
        N,
        T,
        H,
        W,
        front,
        lead,
        frames,
        tiles,
        C=C,
        K=K,
        ROOM=room,
        TIME=time,
        DOUBLE=double,
        CAUSAL=causal,
        HALO=int(halo),
        DESCRIPTORS=descriptors_fit(x_padded, weight),
        **chosen,
    )
    return out, partials


def twin(
    x_padded: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    stats: bool = False,
    front: int = 0,
    back: int = 0,
    halo: bool = False,
    room: int = 0,
    winograd: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch: what runs on a CPU, and the oracle of the tests. Statistics are one tile per item.
    `winograd`: see `convolve`."""
    N, padded_T, padded_H, padded_W, C = x_padded.shape
    P, K, width = weight.shape
    time, double = width // (4 * C), P // 4
    T, H, W = padded_T - border(time), padded_H - 2, padded_W - 2
    make = x_padded.new_zeros if front or back or halo else x_padded.new_empty
    out = make(N, front + double * T + back, 2 * (H + halo), 2 * (W + halo), K + room)
    inner = out[:, front : front + double * T, halo : halo + 2 * H, halo : halo + 2 * W, :K]
    for phase in range(P):
        instant, line, column = phase // 4, phase // 2 % 2, phase % 2
        ahead = 1 if double == 2 and causal else instant
        window = x_padded[:, ahead : ahead + T + time - 1, line : line + H + 1, column : column + W + 1]
        kernel = weight[phase].view(K, time, 2, 2, C).permute(0, 4, 1, 2, 3)
        y = convolve(window.permute(0, 4, 1, 2, 3), kernel, bias, winograd=winograd)
        inner[:, instant::double, line::2, column::2] = y.permute(0, 2, 3, 4, 1)
    return out, statistics(inner) if stats else out.new_empty(0, dtype=torch.float32)


@triton_op("upsample_conv3d")
def upsample_conv3d(
    x_padded: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    stats: bool = False,
    front: int = 0,
    back: int = 0,
    halo: bool = False,
    room: int = 0,
) -> tuple[Tensor, Tensor]:
    """Nearest x2 in space, and in time if the weight has 8 phases, then 3x3x3 convolution with zero padding, plus bias.
    With a weight of one tap in time, the convolution is 3x3, frame by frame.

    Args:
        x_padded: [N, T + 2, H + 2, W + 2, C], contiguous, its border already zero: one frame on each side, or two in
            front if `causal`; T frames for one tap in time.
        weight: [P, K, taps * C] as `fold_weight` makes it, with the same `causal`. bias: [K].
        stats, front, back, halo: as for `conv3d`.
        room: channels after the K of each position, for a tensor that will be joined to them; their values are
            arbitrary.

    Returns the result [N, front + T (or 2T) + back, 2H (+ 2), 2W (+ 2), K + room], and partial statistics as `conv3d`
    does.

    Raises ValueError for arguments that differ in device, dtype or size.
    """
    check_tensors(OP, x_padded=x_padded, weight=weight, bias=bias)
    check_contiguous(OP, x_padded=x_padded, weight=weight, bias=bias)
    check_shape(OP, "x_padded", x_padded, None, None, None, None, None)
    check_shape(OP, "weight", weight, None, None, None)
    P, K, width = weight.shape
    one_tap = P == 4 and width == 4 * x_padded.shape[-1]
    check_buffer(OP, x_padded, 1 if one_tap else 3)
    if P not in (4, 8):
        raise ValueError(f"{OP}: weight has {P} phases, it must have 4 (space) or 8 (space and time)")
    if not one_tap:
        check_shape(OP, "weight", weight, P, K, (12 if P == 4 else 8) * x_padded.shape[-1])
    if bias is not None:
        check_shape(OP, "bias", bias, K)
    if min(front, back, room) < 0:
        raise ValueError(f"{OP}: front={front}, back={back}, room={room} must not be negative")
    return (launch if x_padded.is_cuda else twin)(x_padded, weight, bias, causal, stats, front, back, halo, room)


def border(time: int) -> int:
    """Frames of padding in a buffer for `time` taps along time."""
    return 0 if time == 1 else 2


def fold_weight(weight: Tensor, time: bool, causal: bool) -> Tensor:
    """[K, C, 3 or 1, 3, 3] to [P, K, taps * C]: for each phase (time if doubled, row, column) the sums of its taps.

    Sums are taken in float32 (float64 stays) and rounded once. They cannot be unfolded: save the original weight.
    """
    phases = [weight.to(torch.promote_types(weight.dtype, torch.float32))]
    for dim in (2, 3, 4) if time else (3, 4):
        phases = [half for phase in phases for half in _fold(phase, dim, causal and dim == 2)]
    return torch.stack([pack_weight(phase) for phase in phases]).to(weight.dtype)


def _fold(weight: Tensor, dim: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Both phases along one doubled axis. Parity 0 sees inputs (i-1, i), parity 1 (i, i+1), or causally (i-1, i)."""
    a, b, c = weight.unbind(dim)
    late, early = torch.stack((a, b + c), dim), torch.stack((a + b, c), dim)
    return (early, late) if causal else (late, early)


def variants(arch: str) -> Iterator[Variant]:
    """What is shipped for `arch`: the widths of the full-size decoder's up-sampling layers."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    # dtype, channels, time doubled, causal (with per-frame norms, so without statistics), statistics, one tap in time
    # (as in SVD), room after the channels
    shapes = [
        (bf16, 256, False, False, True, False, 0),
        (bf16, 512, False, False, True, False, 0),
        (bf16, 512, True, False, True, False, 0),
        (bf16, 512, True, True, False, False, 0),
        (fp16, 256, False, False, True, False, 0),
        (fp32, 256, True, False, True, False, 0),
        *((dtype, C, False, False, False, True, 0) for dtype in (bf16, fp16) for C in (256, 512)),
        # SVD's U-Net, whose skip connections fill the room
        *(
            (dtype, C, False, False, False, True, room)
            for dtype in (bf16, fp16)
            for C, room in ((640, 320), (1280, 640), (1280, 1280))
        ),
        (fp32, 256, False, False, False, True, 0),
    ]
    for dtype, C, time, causal, stats, frames, room in shapes:
        yield variant(
            OP,
            upsample_conv3d_kernel,
            arch,
            dtype,
            C,
            C,
            pointers=("x_ptr", "w_ptr", "bias_ptr", "out_ptr"),
            absent=[] if stats else ["stats_ptr"],
            name=("space+time" if time else "space")
            + " causal" * causal
            + " stats" * stats
            + " frames" * frames
            + f" room {room}" * bool(room),
            constants={
                "ROOM": room,
                "TIME": 1 if frames else 3 - time,
                "DOUBLE": 1 + time,
                "CAUSAL": causal,
                "HALO": 0,
            },
            integers=("N", "T", "H", "W", "FRONT", "LEAD", "FRAMES", "TILES"),
        )
