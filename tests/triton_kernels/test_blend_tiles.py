"""blend_tiles against the reference's raster-order blending, at the borders and where three tiles meet."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from reducio_fast.reference.reducio.tiling import stitch, tile_grid
from reducio_fast.triton_kernels import blend_tiles as op

pytestmark = pytest.mark.slow

# height, width, stride, overlap: full tiles, short last tiles, a last tile shorter than the overlap, a single tile.
GRIDS = [(16, 24, 8, 4), (13, 19, 8, 4), (18, 10, 8, 4), (6, 7, 8, 4), (12, 12, 6, 0)]


def tiles_of(height: int, width: int, stride: int, overlap: int, batch: int = 1) -> tuple[list[torch.Tensor], int]:
    clip = torch.randn(batch, 2, 3, height, width, dtype=torch.float64)
    grid = tile_grid(clip, stride, stride + overlap)
    # Other noise in every tile: in a real clip neighbours nearly agree, which would hide a wrong weight.
    tiles = [(tile + 0.3 * torch.randn_like(tile)).movedim(2, -1).contiguous() for row in grid for tile in row]
    return tiles, len(grid[0])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_kernel(grid, dtype, device, assert_right):
    tiles, columns = tiles_of(*grid, batch=2)
    low = [tile.to(device, dtype) for tile in tiles]
    oracle = op.twin([tile.double() for tile in low], columns, *grid[2:], False)
    fast, eager = (f(low, columns, *grid[2:], False) for f in (op.launch, op.twin))
    assert oracle.shape == (2, 2, *grid[:2], 3)
    assert_right(fast, eager, oracle)


@pytest.mark.parametrize("grid", GRIDS[1:3], ids=str)
def test_bytes(grid, dtype, device):
    """Equal to the rounded exact value, except where that value lies on the edge between two bytes."""
    tiles, columns = tiles_of(*grid)
    low = [tile.to(device, dtype) for tile in tiles]
    frames = op.launch(low, columns, *grid[2:])
    exact = ((op.twin([tile.double() for tile in low], columns, *grid[2:], False) + 1) * 127.5).clamp(0, 255)
    assert frames.dtype == torch.uint8
    differs = frames.double() != exact.round()
    assert (frames.double() - exact).abs().max() < 0.501
    assert ((exact % 1 - 0.5).abs()[differs] < 1e-3).all()


def test_halves_round_to_even_and_the_range_is_clamped(device):
    levels = torch.tensor([0.5, 1.5, 2.5, 254.5, 300.0, -7.0])
    tile = (levels / 127.5 - 1).repeat(3).reshape(1, 1, 1, 6, 3).to(device)
    for run in (op.launch, op.twin):
        assert torch.equal(run([tile], 1, 8, 0).cpu(), ((tile + 1) * 127.5).round().clamp(0, 255).byte().cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", [(13, 19, 8, 4), (1, 1, 8, 2), (9, 17, 8, 3), (16, 8, 8, 0), (7, 23, 5, 1)], ids=str)
def test_twin_is_the_reference_to_the_bit(shape, dtype):
    *_, stride, overlap = shape
    tiles, columns = tiles_of(*shape)
    tiles = [tile.to(dtype) for tile in tiles]
    grid = [[tile.movedim(-1, 2) for tile in tiles[i : i + columns]] for i in range(0, len(tiles), columns)]
    assert torch.equal(op.twin(tiles, columns, stride, overlap, False), stitch(grid, overlap, stride).movedim(2, -1))


@triton.jit
def element_kernel(out_ptr, frame, y, x):
    tl.store(out_ptr, op.element(tl.load(frame).to(tl.int64), tl.load(y), tl.load(x), 1024, 1024, 3))


def test_addresses_pass_two_to_the_31(device):
    out = torch.empty(1, dtype=torch.int64, device=device)
    frame, y, x = (torch.tensor(n, dtype=torch.int32, device=device) for n in (900, 1000, 77))
    element_kernel[(1,)](out, frame, y, x)
    assert out.item() == ((900 * 1024 + 1000) * 1024 + 77) * 3 > 2**31


def test_op_passes_opcheck():
    tiles, columns = tiles_of(13, 19, 8, 4)
    for kwargs in ({}, {"as_uint8": False}):
        torch.library.opcheck(op.blend_tiles, ([t.float() for t in tiles], columns, 8, 4), kwargs)


def test_mistakes_are_named():
    run = torch.ops.reducio_fast.blend_tiles
    tiles = [torch.zeros(1, 1, 8, 8, 3) for _ in range(4)]
    with pytest.raises(ValueError, match="4 tiles do not fill rows of columns=3"):
        run(tiles, 3, 4, 4)
    with pytest.raises(ValueError, match=r"tiles\[3\] has shape \(1, 1, 8, 7, 3\), its row and column ask for"):
        run([*tiles[:3], torch.zeros(1, 1, 8, 7, 3)], 2, 4, 4)
    with pytest.raises(ValueError, match="tile 1 has w=8, blended over 5 and 5"):
        run(tiles, 4, 3, 5)
