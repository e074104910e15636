"""group_norm_silu: y = silu(GroupNorm(x)) in NDHWC, written into the interior of a zero-padded buffer.

Twin: `F.silu(nn.GroupNorm(x))`, or `PerFrameGroupNorm`, of `reference/reducio/vae.py`,
then the next convolution's padding.
Legend: N batch, T frames, H W rows and columns, C channels, R rows of C channels that share statistics (an item's).

Three kernels: statistics of tiles of rows, in parallel over the whole tensor; from these, one scale and shift per
channel; the apply pass. A tile yields (count, mean, M2 = sum of squared deviations from that mean) per channel, merged
by Chan's formula in a fixed order. E[x^2] - E[x]^2 would cancel for a large mean, and atomics would not be repeatable.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .eight_bits import EIGHT_BIT, best_eight_bit, limit_of, quantise, to_eight_bits
from .launch import TYPES, Variant, launcher, on_device, triton_op
from .shape_checks import check_contiguous, check_multiple, check_same, check_shape, check_tensors
from .tables import Settings, arch_of
from .tables import settings as table_settings

OP = "group_norm_silu"
NOT_QUANTISED = {"multiplier_ptr": None, "LIMIT": 0.0}


@triton.jit
def row_offset(item, rows, row, C: tl.constexpr):
    """Where a row of C channels begins, in int64: two clips of 16x320x320 at 256 channels are near 2^31 elements."""
    return (item.to(tl.int64) * rows + row) * C


# Sizes are not specialised on: one build serves every tile shape, and C alone decides how wide the loads are.
@triton.jit(do_not_specialize=["R", "tiles", "steps"])
def statistics_kernel(
    x_ptr, partials_ptr, R, tiles, steps, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One program a tile of steps * BLOCK_R rows: Welford's update a lane, no reduction before the end."""
    item, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    x_ptr += row_offset(item, R, tile * steps * BLOCK_R, C)
    left = R - tile * steps * BLOCK_R  # rows from the tile's first to the item's last
    r, c = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_C)[None, :]
    mean = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    M2 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    count = tl.zeros((BLOCK_R, 1), tl.float32)
    step = 0.0
    for i in range(steps):
        step += 1.0
        inside = r < left - i * BLOCK_R
        x = tl.load(x_ptr + r * C + c, mask=inside & (c < C), other=0.0).to(tl.float32)
        delta = tl.where(inside, x - mean, 0.0)  # once outside a lane stays outside, its state as it was
        mean += delta * (1.0 / step)
        M2 += delta * (x - mean)
        count += inside.to(tl.float32)
        x_ptr += BLOCK_R * C
    rows = tl.sum(tl.sum(count, 1), 0)
    average = tl.sum(count * mean, 0)[None, :] / rows
    # A sum of large means rounds: once more, of what is left.
    average += tl.sum(count * (mean - average), 0)[None, :] / rows
    delta = mean - average
    M2 = tl.sum(M2 + count * delta * delta, 0)[None, :]
    out_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * 3 * C
    tl.store(out_ptr + c, tl.zeros((1, BLOCK_C), tl.float32) + rows, mask=c < C)
    tl.store(out_ptr + C + c, average, mask=c < C)
    tl.store(out_ptr + 2 * C + c, M2, mask=c < C)


@triton.jit(do_not_specialize=["tiles", "eps"])
def finalise_kernel(
    partials_ptr,  # float32 [items, tiles, 3, C]: count, mean, squared deviations
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    centre_ptr,  # float32 [items, C], to subtract
    scale_ptr,  # float32 [items, C]
    shift_ptr,  # float32 [items, C]
    tiles,  # an item
    eps,  # added to the variance
    C: tl.constexpr,  # channels
    GROUPS: tl.constexpr,  # of channels, normalised together
    BLOCK_R: tl.constexpr,  # tiles a step of the loop
    BLOCK_C: tl.constexpr,  # channels of a group, up to a power of two
):
    """One program an item and group: merges tiles lane by lane, then lanes, then writes the group's scale and shift."""
    PER_GROUP: tl.constexpr = C // GROUPS
    item = (tl.program_id(0) // GROUPS).to(tl.int64)
    first = tl.program_id(0) % GROUPS * PER_GROUP
    r, c = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_C)[None, :]
    count = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    mean = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    M2 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, tiles, BLOCK_R):
        at = partials_ptr + (item * tiles + start + r) * 3 * C + first + c
        n = tl.load(at, mask=(start + r < tiles) & (c < PER_GROUP), other=0.0)
        delta = tl.load(at + C, mask=n > 0.0, other=0.0) - mean  # a tile of no rows has no mean
        total = count + n
        share = n / tl.maximum(total, 1.0)
        M2 += tl.load(at + 2 * C, mask=n > 0.0, other=0.0) + delta * delta * count * share
        mean += delta * share
        count = total
    total = tl.sum(tl.sum(count, 1), 0)
    rough = tl.sum(tl.sum(count * mean, 1), 0) / total
    # A large mean has no digits left for what a small deviation needs: the rest of it goes into the shift.
    delta = mean - rough
    rest = tl.sum(tl.sum(count * delta, 1), 0) / total
    delta -= rest
    variance = tl.sum(tl.sum(M2 + count * delta * delta, 1), 0) / total
    k = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + first + k, mask=k < PER_GROUP, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + first + k, mask=k < PER_GROUP, other=0.0).to(tl.float32)
    scale = weight * tl.rsqrt(variance + eps)
    tl.store(scale_ptr + item * C + first + k, scale, mask=k < PER_GROUP)
    tl.store(shift_ptr + item * C + first + k, bias - rest * scale, mask=k < PER_GROUP)
    tl.store(centre_ptr + item * C + first + k, tl.zeros((BLOCK_C,), tl.float32) + rough, mask=k < PER_GROUP)


@triton.jit(do_not_specialize=["T", "H", "W", "front", "back"])
def apply_kernel(
    x_ptr,  # [N, T, H, W, C]
    centre_ptr,  # float32 [items, C], to subtract
    scale_ptr,  # float32 [items, C]
    shift_ptr,  # float32 [items, C]
    multiplier_ptr,  # float32 [C], of the result before it becomes an 8-bit number; or None
    out_ptr,  # [N, front + T + back, H (+ 2), W (+ 2), C]
    T,  # frames
    H,  # rows
    W,  # columns
    front,  # frames of zeros before
    back,  # frames of zeros after
    HALO: tl.constexpr,  # 1: the output has a border of zeros
    SILU: tl.constexpr,  # whether y * sigmoid(y) follows
    PER_FRAME: tl.constexpr,  # whether an item is a frame, not a clip
    LIMIT: tl.constexpr,  # largest 8-bit number, see `quantise`; not read without a multiplier
    C: tl.constexpr,  # channels
    BLOCK_R: tl.constexpr,  # columns of a line a program
    BLOCK_C: tl.constexpr,  # channels, up to a power of two
):
    """One program BLOCK_R rows of one line of the padded output: what is padding is decided a line, not an element."""
    out_T, out_H, out_W = T + front + back, H + 2 * HALO, W + 2 * HALO
    blocks = (out_W + BLOCK_R - 1) // BLOCK_R
    line, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, out_t, out_h = line // out_H // out_T, line // out_H % out_T, line % out_H
    t, h = out_t - front, out_h - HALO
    out_w, c = (block * BLOCK_R + tl.arange(0, BLOCK_R))[:, None], tl.arange(0, BLOCK_C)[None, :]
    w = out_w - HALO
    channel = c < C
    interior = (t >= 0) & (t < T) & (h >= 0) & (h < H)
    # In the bounds and not as a mask: the interpreter cannot spread a scalar condition over a block.
    inside = (w >= 0) & (w < tl.where(interior, W, 0))
    known = c < tl.where(interior, C, 0)
    x = tl.load(x_ptr + row_offset(n, T * H * W, (t * H + h) * W, C) + (w * C + c), mask=inside & channel, other=0.0)
    item = n * T + t if PER_FRAME else n
    item = row_offset(item, 1, 0, C)
    scale = tl.load(scale_ptr + item + c, mask=known, other=0.0)
    shift = tl.load(shift_ptr + item + c, mask=known, other=0.0)
    centre = tl.load(centre_ptr + item + c, mask=known, other=0.0)
    y = (x.to(tl.float32) - centre) * scale + shift
    if SILU:
        if out_ptr.dtype.element_ty == tl.float32:
            y = y / (1.0 + tl.exp(-y))
        else:
            # 1 / d as the square of 1 / sqrt(d): two instructions and an error of 2^-22, where the division takes
            # eight and the kernel then waits for instructions, not for memory. d >= 1; of infinity it is 0.
            root = tl.rsqrt(1.0 + tl.exp(-y))
            y = y * root * root
    y = tl.where(inside, y, 0.0)
    if multiplier_ptr is not None:
        y = quantise(y * tl.load(multiplier_ptr + c, mask=channel, other=0.0), LIMIT, out_ptr.dtype.element_ty)
    out_ptr += row_offset(n, out_T * out_H * out_W, (out_t * out_H + out_h) * out_W, C)
    tl.store(out_ptr + (out_w * C + c), y.to(out_ptr.dtype.element_ty), mask=(out_w < out_W) & channel)


def blocks(part: str, C: int, arch: str) -> Settings:
    """Settings of one of the kernels. The table's ELEMENTS per program, divided by BLOCK_C, give BLOCK_R."""
    entry = table_settings(OP, part, arch)
    BLOCK_C = triton.next_power_of_2(C)
    return {"BLOCK_R": max(1, entry.pop("ELEMENTS") // BLOCK_C), "BLOCK_C": BLOCK_C, **entry}


@on_device
def statistics(x: Tensor, per_frame: bool = False) -> Tensor:
    """Runs the first kernel: float32 [items, tiles, 3, C]; an item is a clip, or a frame."""
    N, T, H, W, C = x.shape
    items, R = (N * T, H * W) if per_frame else (N, T * H * W)
    entry = blocks("statistics", C, arch_of(x.device))
    max_tiles = entry.pop("TILES")  # of all items: enough programs to fill a GPU, few enough to merge quickly
    steps = triton.cdiv(R * items, entry["BLOCK_R"] * max_tiles)
    tiles = triton.cdiv(R, entry["BLOCK_R"] * steps)
    partials = torch.empty((items, tiles, 3, C), dtype=torch.float32, device=x.device)
    launcher(statistics_kernel)[(items * tiles,)](x, partials, R, tiles, steps, C=C, **entry)
    return partials


@on_device
def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-6,
    silu: bool = True,
    per_frame: bool = False,
    partials: Tensor | None = None,
    front: int = 0,
    back: int = 0,
    halo: bool = False,
    multiplier: Tensor | None = None,
    eight_bit: torch.dtype | None = None,
) -> Tensor:
    """Runs the kernels: on a GPU, or on CPU tensors in Triton's interpreter. Arguments as `group_norm_silu`."""
    N, T, H, W, C = x.shape
    arch = arch_of(x.device)
    if partials is None:
        partials = statistics(x, per_frame)
    items, tiles = partials.shape[:2]
    affine = torch.empty((3, items, C), dtype=torch.float32, device=x.device).unbind()  # centre, scale, shift
    launcher(finalise_kernel)[(items * groups,)](
        partials, weight, bias, *affine, tiles, eps, C=C, GROUPS=groups, **blocks("finalise", C // groups, arch)
    )
    out_T, out_H, out_W = T + front + back, H + 2 * halo, W + 2 * halo
    out = torch.empty((N, out_T, out_H, out_W, C), dtype=eight_bit or x.dtype, device=x.device)
    entry = blocks("apply", C, arch)
    launcher(apply_kernel)[(N * out_T * out_H * triton.cdiv(out_W, entry["BLOCK_R"]),)](
        x,
        *affine,
        multiplier,
        out,
        T,
        H,
        W,
        front,
        back,
        HALO=int(halo),
        SILU=silu,
        PER_FRAME=per_frame,
        LIMIT=limit_of(eight_bit),
        C=C,
        **entry,
    )
    return out


def _merged(partials_NT3C: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each group, repeated for its channels: two tensors [N, C]."""
    count, mean, squares = (x.unflatten(-1, (groups, -1)) for x in partials_NT3C.unbind(2))  # [N, tiles, G, C / G]
    mean, squares = (torch.where(count > 0, x, 0) for x in (mean, squares))  # a tile of no rows has neither
    total = count.sum((1, 3), keepdim=True)
    centre = (count * mean).sum((1, 3), keepdim=True) / total
    variance = (squares + count * (mean - centre).square()).sum((1, 3), keepdim=True) / total
    shape = (-1, -1, count.shape[-1])
    return centre[:, 0].expand(shape).flatten(1), torch.rsqrt(variance + eps)[:, 0].expand(shape).flatten(1)


def twin(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-6,
    silu: bool = True,
    per_frame: bool = False,
    partials: Tensor | None = None,
    front: int = 0,
    back: int = 0,
    halo: bool = False,
    multiplier: Tensor | None = None,
    eight_bit: torch.dtype | None = None,
) -> Tensor:
    """The same in plain PyTorch: what runs on a CPU, and the oracle of the tests."""
    N, T, H, W, C = x.shape
    if partials is not None:
        mean_NC, scale_NC = (each[:, None, None, None] for each in _merged(partials, groups, eps))
        y = torch.addcmul(bias.to(mean_NC.dtype), x - mean_NC, scale_NC * weight).to(x.dtype)
    elif x.dtype in (torch.float16, torch.bfloat16):
        sets = (x.flatten(0, 1)[:, None] if per_frame else x).permute(0, 4, 1, 2, 3)
        # Below 1024 positions torch's channels-last GroupNorm reads one group of one position at a time. Groups of less
        # than 16 channels take it 2 to 8 times as long as two copies and the norm of the other layout (Xeon, AVX-512).
        if sets.shape[2:].numel() < 1024 and C // groups < 16:
            sets = sets.contiguous()
        y = F.group_norm(sets, groups, weight, bias, eps).permute(0, 2, 3, 4, 1).contiguous()
    else:
        # torch's channels-last GroupNorm sums a whole clip into one float32. That is exact enough for half precision,
        # but here has 60 times the error of two passes with `mean`, which adds pairwise.
        sets = x.reshape(N * T if per_frame else N, -1, C)
        mean_SC = sets.mean(1).unflatten(1, (groups, -1)).mean(2, keepdim=True).expand(-1, -1, C // groups).flatten(1)
        centred = sets - mean_SC[:, None]
        variance_SG = centred.square().mean(1).unflatten(1, (groups, -1)).mean(2)
        scale_SC = torch.rsqrt(variance_SG + eps).repeat_interleave(C // groups, dim=1) * weight
        y = torch.addcmul(bias, centred, scale_SC[:, None])
    y = (F.silu(y, inplace=True) if silu else y).view(x.shape)
    if multiplier is not None and eight_bit is not None:
        y = to_eight_bits(y * multiplier, eight_bit)
    if not (front or back or halo):
        return y
    out = y.new_empty((N, T + front + back, H + 2 * halo, W + 2 * halo, C))
    borders = [out[:, :front], out[:, front + T :]]
    borders += [border for edge in (0, -1) if halo for border in (out[:, :, edge], out[:, :, :, edge])]
    for border in borders:
        border.zero_()  # not `= 0`, which a tracer turns into a constant tensor
    out[:, front : front + T, int(halo) : halo + H, int(halo) : halo + W] = y
    return out


@triton_op("group_norm_silu")
def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-6,
    silu: bool = True,
    per_frame: bool = False,
    partials: Tensor | None = None,
    front: int = 0,
    back: int = 0,
    halo: bool = False,
    multiplier: Tensor | None = None,
    eight_bit: torch.dtype | None = None,
) -> Tensor:
    """GroupNorm and SiLU, in the buffer that the next convolution reads: [N, T + front + back, H + 2, W + 2, C].

    Args:
        x: activations [N, T, H, W, C], contiguous.
        weight, bias: of the norm, [C].
        silu: False leaves the activation out.
        per_frame: statistics of one frame at a time, as causal models need, instead of the clip's.
        partials: float32 [N, tiles, 3, C], statistics of `x` from the epilogue of the convolution that wrote it: count,
            mean and sum of squared deviations from that mean, per tile and channel. Tiles of count 0 are skipped.
        front, back: frames of zeros before and after.
        halo: one row and column of zeros around each frame.
        multiplier, eight_bit: float32 [C] and one of `eight_bits.EIGHT_BIT`, both or neither: each channel of the
            result times its multiplier, rounded to that type, as `quantised_conv3d` reads it.

    Raises ValueError for arguments that differ in device, dtype or size.
    """
    check_shape(OP, "x", x, None, None, None, None, None)
    N, T, H, W, C = x.shape
    check_tensors(OP, x=x, weight=weight, bias=bias)
    check_contiguous(OP, x=x, weight=weight, bias=bias, partials=partials)
    check_shape(OP, "weight", weight, C)
    check_shape(OP, "bias", bias, C)
    if groups < 1 or min(front, back) < 0 or x.numel() == 0:
        raise ValueError(
            f"{OP}: groups={groups}, front={front}, back={back}, x has shape {tuple(x.shape)}; "
            "it must not be empty, groups at least 1, front and back at least 0"
        )
    check_multiple(OP, "C", C, groups)
    if partials is not None:
        if per_frame:
            raise ValueError(f"{OP}: partials are a clip's, per_frame=True needs statistics of frames")
        check_shape(OP, "partials", partials, N, None, 3, C)
        check_same(OP, "device", x=x.device, partials=partials.device)
        check_same(OP, "dtype", needed=torch.float32, partials=partials.dtype)
    if (multiplier is None) != (eight_bit is None) or eight_bit not in (None, *EIGHT_BIT):
        raise ValueError(
            f"{OP}: multiplier is {'absent' if multiplier is None else 'given'} and eight_bit={eight_bit}; "
            f"both or neither, and one of {', '.join(map(str, EIGHT_BIT))}"
        )
    if multiplier is not None:
        check_shape(OP, "multiplier", multiplier, C)
        check_contiguous(OP, multiplier=multiplier)
        check_same(OP, "device", x=x.device, multiplier=multiplier.device)
        check_same(OP, "dtype", needed=torch.float32, multiplier=multiplier.dtype)
    run = launch if x.is_cuda else twin
    return run(x, weight, bias, groups, eps, silu, per_frame, partials, front, back, halo, multiplier, eight_bit)


@triton_op("clip_statistics")
def clip_statistics(x: Tensor) -> Tensor:
    """The `partials` of `group_norm_silu` for clips x [N, T, H, W, C], contiguous, on a GPU: float32 [N, tiles, 3, C].

    An op of its own: torch keeps an entry for each launch of a kernel that torch.compile may see outside of an op, 1.4
    KB each (torch 2.14), and a streamed decode of SVD makes 450. Raises ValueError for another layout.
    """
    check_shape("clip_statistics", "x", x, None, None, None, None, None)
    check_contiguous("clip_statistics", x=x)
    return statistics(x)


DECODER = (128, 256, 512)  # channels of the full-size decoder
LEVELS, WITH_SKIPS = (320, 640, 1280), (960, 1920, 2560)  # channels of SVD's levels; with a skip concatenated


def variants(arch: str) -> Iterator[Variant]:
    """What is shipped for `arch`: the full-size decoder's widths with 32 groups, clips and frames, padded or dense; in
    bfloat16 SVD's widths too."""
    # SiLU, halo, per-frame statistics. The norms of fusion and attention have no activation; those of residual branches
    # always have one.
    dense, padded, plain = (True, 0, False), (True, 1, False), (False, 0, False)
    widths = [
        (dtype, C, (padded, (True, 1, True), dense, plain))
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for C in DECODER
    ]
    widths += [(torch.bfloat16, C, (padded, dense, plain)) for C in LEVELS]
    widths += [(torch.bfloat16, C, (dense,)) for C in WITH_SKIPS]
    for dtype, C, kinds in widths:
        pointer = f"*{TYPES[dtype]}"
        statistics_entry = blocks("statistics", C, arch)
        statistics_entry.pop("TILES")
        yield _variant(
            f"statistics {TYPES[dtype]} {C}", statistics_kernel, {"x_ptr": pointer}, {"C": C}, statistics_entry
        )
        yield _variant(
            f"finalise {TYPES[dtype]} {C}",
            finalise_kernel,
            {"weight_ptr": pointer, "bias_ptr": pointer},
            {"C": C, "GROUPS": 32},
            blocks("finalise", C // 32, arch),
        )
        for silu, halo, per_frame in kinds:
            yield _variant(
                f"apply {TYPES[dtype]} {C}{' silu' * silu}{' halo' * halo}{' per frame' * per_frame}",
                apply_kernel,
                {"x_ptr": pointer, "out_ptr": pointer},
                {"HALO": halo, "SILU": silu, "PER_FRAME": per_frame, "C": C, **NOT_QUANTISED},
                blocks("apply", C, arch),
            )
        eight_bit = best_eight_bit(arch)
        if dtype == torch.bfloat16 and eight_bit is not None and C in DECODER:
            yield _variant(
                f"apply {TYPES[eight_bit]} {C} silu halo",
                apply_kernel,
                {"x_ptr": pointer, "out_ptr": f"*{TYPES[eight_bit]}"},
                {"HALO": 1, "SILU": True, "PER_FRAME": False, "C": C, "LIMIT": limit_of(eight_bit)},
                blocks("apply", C, arch),
            )


def _variant(name: str, kernel: triton.JITFunction, types: dict, constants: dict, entry: Settings) -> Variant:
    block = {key: entry.pop(key) for key in ("BLOCK_R", "BLOCK_C")}
    constants = constants | block
    given = [name for name in kernel.arg_names if name not in constants]
    scalars = tuple(name for name in given if not name.endswith("_ptr"))
    signature = {name: types.get(name, "*fp32") for name in given if name not in scalars}
    signature |= {name: "fp32" if name == "eps" else "i32" for name in scalars}
    return Variant(
        name=f"{OP} {name}", kernel=kernel, signature=signature, constants=constants, options=entry, unaligned=scalars
    )
