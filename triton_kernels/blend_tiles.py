"""blend_tiles: blends overlapping tiles of a clip, crops them, joins them to frames and maps [-1, 1] to uint8.

Twin: `stitch` of `reference/reducio/tiling.py`, reimplemented here, then rounding. Legend: B batch, T frames, H W rows
and columns of the clip, h w those of a tile, C = 3 colours.

The reference blends each tile with its blended upper, then its blended left neighbour. If no cell of a tile lies in
the overlaps of two opposite sides, this ends after one step: a cell mixes at most four raw values (weights y, x):

    upper = (1 - x) * above_left + x * above        as the tile above was blended with its own left neighbour
    left  = (1 - y) * above_left + y * left         as the tile to the left was blended with its own upper neighbour
    out   = (1 - x) * left + x * ((1 - y) * upper + y * own)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import TYPES, Variant, launcher, on_device, triton_op
from .shape_checks import check_contiguous, check_tensors
from .tables import arch_of
from .tables import settings as table_settings

OP = "blend_tiles"
_SIZES = ("h", "w", "above_h", "left_w", "fade_y", "fade_x", "crop_h", "crop_w", "H", "W", "y0", "x0")


@triton.jit
def element(frame, y, x, h, w, C: tl.constexpr):
    """Where the first colour of a cell of a frame [h, w, C] lies, in int64."""
    return ((frame.to(tl.int64) * h + y) * w + x) * C


@triton.jit
def fade(k, n):
    """Weight of the own tile at cell k of n: 0 at first, never 1 before cell n, as in the release."""
    return tl.where(k < n, k.to(tl.float32) / tl.maximum(n, 1).to(tl.float32), 1.0)


@triton.jit(do_not_specialize=_SIZES)
def blend_tiles_kernel(
    own_ptr,  # [frames, h, w, 3], the tile to write
    above_ptr,  # [frames, above_h, w, 3], its neighbour above
    left_ptr,  # [frames, h, left_w, 3]
    corner_ptr,  # [frames, above_h, left_w, 3], above and left
    out_ptr,  # [frames, H, W, 3], the whole clip
    h,  # rows of the tile
    w,  # its columns
    above_h,  # rows of the neighbour above
    left_w,  # columns of the left one
    fade_y,  # rows shared with the neighbour above, 0 for none
    fade_x,  # columns shared with the left one
    crop_h,  # rows to write
    crop_w,  # columns to write
    H,  # rows of the clip
    W,  # its columns
    y0,  # row of the clip where the tile begins
    x0,  # its column
    AS_UINT8: tl.constexpr,  # whether [-1, 1] becomes bytes
    BLOCK_W: tl.constexpr,  # values, columns times colours, a program
):
    """One program BLOCK_W values, columns times colours, of a line of a tile. Neighbours are read in overlaps only."""
    blocks = (crop_w * 3 + BLOCK_W - 1) // BLOCK_W
    line, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    frame, y = line // crop_h, line % crop_h
    i = block * BLOCK_W + tl.arange(0, BLOCK_W)
    x = i // 3
    inside = i < crop_w * 3
    # Line y in a bound and not as a mask: the interpreter cannot spread a scalar condition over a block.
    in_y, in_x = i < tl.where(y < fade_y, crop_w * 3, 0), inside & (x < fade_x)
    above_y = above_h - fade_y + y
    value_here = tl.load(own_ptr + element(frame, y, 0, h, w, 3) + i, mask=inside, other=0.0).to(tl.float32)
    above = tl.load(above_ptr + element(frame, above_y, 0, above_h, w, 3) + i, mask=in_y, other=0.0).to(tl.float32)
    left = tl.load(left_ptr + element(frame, y, left_w - fade_x, h, left_w, 3) + i, mask=in_x, other=0.0).to(tl.float32)
    corner_ptr += element(frame, above_y, left_w - fade_x, above_h, left_w, 3)
    corner = tl.load(corner_ptr + i, mask=in_y & in_x, other=0.0).to(tl.float32)
    weight_y, weight_x = fade(y, fade_y), fade(x, fade_x)
    above = (1.0 - weight_x) * corner + weight_x * above
    left = (1.0 - weight_y) * corner + weight_y * left
    value_here = (1.0 - weight_y) * above + weight_y * value_here
    value = (1.0 - weight_x) * left + weight_x * value_here
    if AS_UINT8:
        value = tl.minimum(tl.maximum((value + 1.0) * 127.5, 0.0), 255.0)
        # 1.5 * 2^23: adding it leaves no bit for a fraction, so the hardware rounds, half to even as torch.round does.
        value = ((value + 12582912.0) - 12582912.0).to(tl.int32)
    out_ptr += element(frame, y + y0, x0, H, W, 3)
    tl.store(out_ptr + i, value.to(out_ptr.dtype.element_ty), mask=inside)


def overlaps(extents: list[int], overlap: int) -> list[int]:
    """Cells that each tile of a row or column shares with the tile before it."""
    return [0, *(min(a, b, overlap) for a, b in zip(extents, extents[1:], strict=False))]


@on_device
def launch(tiles: list[Tensor], columns: int, stride: int, overlap: int, as_uint8: bool = True) -> Tensor:
    """Runs the kernel: on a GPU, or on CPU tensors in Triton's interpreter. Arguments as `blend_tiles`."""
    B, T = tiles[0].shape[:2]
    heights, widths = [t.shape[2] for t in tiles[::columns]], [t.shape[3] for t in tiles[:columns]]
    rows_y, rows_x = overlaps(heights, overlap), overlaps(widths, overlap)
    crops_y, crops_x = [min(h, stride) for h in heights], [min(w, stride) for w in widths]
    starts_y, starts_x = list(accumulate(crops_y, initial=0)), list(accumulate(crops_x, initial=0))
    out = torch.empty(
        (B, T, starts_y[-1], starts_x[-1], 3), dtype=torch.uint8 if as_uint8 else tiles[0].dtype, device=tiles[0].device
    )
    entry = table_settings(OP, "*", arch_of(out.device))
    for k, tile in enumerate(tiles):
        i, j = divmod(k, columns)
        # Where there is no neighbour nothing fades, and the tile that stands in for it is never read.
        above, left = tiles[k - columns] if i else tile, tiles[k - 1] if j else tile
        corner = tiles[k - columns - 1] if i and j else tile
        launcher(blend_tiles_kernel)[(B * T * crops_y[i] * triton.cdiv(crops_x[j] * 3, entry["BLOCK_W"]),)](
            tile,
            above,
            left,
            corner,
            out,
            heights[i],
            widths[j],
            above.shape[2],
            left.shape[3],
            rows_y[i],
            rows_x[j],
            crops_y[i],
            crops_x[j],
            starts_y[-1],
            starts_x[-1],
            starts_y[i],
            starts_x[j],
            AS_UINT8=as_uint8,
            **entry,
        )
    return out


def twin(tiles: list[Tensor], columns: int, stride: int, overlap: int, as_uint8: bool = True) -> Tensor:
    """The same in plain PyTorch: what runs on a CPU, and the oracle of the tests."""
    dtype = tiles[0].dtype
    wide = [tile.to(torch.promote_types(dtype, torch.float32)).movedim(-1, -3) for tile in tiles]
    grid = [wide[k : k + columns] for k in range(0, len(wide), columns)]
    for i, row in enumerate(grid):
        for j in range(columns):
            if i > 0:
                row[j] = _faded(grid[i - 1][j], row[j], overlap, -2)
            if j > 0:
                row[j] = _faded(row[j - 1], row[j], overlap, -1)
    rows = [torch.cat([tile[..., :stride, :stride] for tile in row], dim=-1) for row in grid]
    clip = torch.cat(rows, dim=-2).movedim(-3, -1)
    if as_uint8:
        return ((clip + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8, memory_format=torch.contiguous_format)
    return clip.to(dtype).contiguous()


def _faded(a: Tensor, b: Tensor, overlap: int, dim: int) -> Tensor:
    """`b` with its first cells along `dim` mixed with the last ones of `a`, its upper or left neighbour."""
    n = min(a.shape[dim], b.shape[dim], overlap)
    shape = (n, 1) if dim == -2 else (n,)
    weight = (torch.arange(n, device=b.device, dtype=b.dtype) / max(n, 1)).view(shape)
    mixed = a.narrow(dim, a.shape[dim] - n, n) * (1 - weight) + b.narrow(dim, 0, n) * weight
    return torch.cat([mixed, b.narrow(dim, n, b.shape[dim] - n)], dim)


@triton_op("blend_tiles")
def blend_tiles(tiles: list[Tensor], columns: int, stride: int, overlap: int, as_uint8: bool = True) -> Tensor:
    """Frames [B, T, H, W, 3] of a clip that was decoded in tiles: blended at upper and left sides, cropped to `stride`.

    Args:
        tiles: in raster order, each [B, T, h, w, 3], contiguous, in [-1, 1]; one height per row, one width per column.
        columns: tiles per row.
        stride: rows and columns kept of each tile; the last tile of a row or column may have fewer.
        overlap: the most cells that neighbours share; fewer where a tile is smaller.
        as_uint8: True returns 0 to 255, rounded half to even; False returns the values in the tiles' dtype.

    Raises ValueError for tiles that do not make a grid, and for overlaps that would touch inside a tile.
    """
    if not tiles or columns < 1 or stride < 1 or overlap < 0:
        raise ValueError(
            f"{OP}: {len(tiles)} tiles, columns={columns}, stride={stride}, overlap={overlap}; "
            "all must be at least 1, overlap at least 0"
        )
    if len(tiles) % columns:
        raise ValueError(f"{OP}: {len(tiles)} tiles do not fill rows of columns={columns}")
    names = [f"tiles[{k}]" for k in range(len(tiles))]
    check_tensors(OP, **dict(zip(names, tiles, strict=True)))
    check_contiguous(OP, **dict(zip(names, tiles, strict=True)))
    for k, (name, tile) in enumerate(zip(names, tiles, strict=True)):
        wanted = (*tiles[0].shape[:2], *tiles[k - k % columns].shape[2:3], *tiles[k % columns].shape[3:4], 3)
        if tuple(tile.shape) != wanted or not tile.numel():
            raise ValueError(
                f"{OP}: {name} has shape {tuple(tile.shape)}, its row and column ask for {wanted}, not empty"
            )
    for axis, sizes in ("h", [t.shape[2] for t in tiles[::columns]]), ("w", [t.shape[3] for t in tiles[:columns]]):
        shared = overlaps(sizes, overlap)
        for k, (size, before, after) in enumerate(zip(sizes, shared, shared[1:], strict=False)):
            if size < before + after:
                raise ValueError(
                    f"{OP}: tile {k} has {axis}={size}, blended over {before} and {after}: "
                    f"the two overlaps meet, make overlap={overlap} smaller"
                )
    return (launch if tiles[0].is_cuda else twin)(tiles, columns, stride, overlap, as_uint8)


def variants(arch: str) -> Iterator[Variant]:
    """What is shipped for `arch`: frames as bytes, and as the decoder's own dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for as_uint8 in (True, False):
            entry = table_settings(OP, "*", arch)
            inputs = dict.fromkeys(("own_ptr", "above_ptr", "left_ptr", "corner_ptr"), f"*{TYPES[dtype]}")
            yield Variant(
                name=f"{OP} {TYPES[dtype]}{' to uint8' if as_uint8 else ''}",
                kernel=blend_tiles_kernel,
                signature={
                    **inputs,
                    "out_ptr": f"*{TYPES[torch.uint8 if as_uint8 else dtype]}",
                    **dict.fromkeys(_SIZES, "i32"),
                },
                constants={"AS_UINT8": as_uint8, "BLOCK_W": entry.pop("BLOCK_W")},
                options=entry,
                unaligned=_SIZES,
            )
