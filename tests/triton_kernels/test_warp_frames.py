"""warp_frames against torch's bicubic interpolation and grid_sample, at odd shapes, borders, and beyond the frame."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from reducio_fast.triton_kernels import warp_frames as op

pytestmark = pytest.mark.slow

# batch, latent steps, frames per step, H, W, h, w, image rows, image columns, pixels per cell: shapes with odd sides,
# one latent cell, an image larger than the frames (a tile's), a frame smaller than a block and one larger.
SHAPES = [
    (2, 1, 2, 5, 19, 3, 2, 5, 19, 5),
    (1, 2, 2, 6, 37, 2, 5, 8, 40, 8),
    (1, 1, 1, 3, 70, 1, 1, 3, 70, 4),
    (1, 1, 4, 4, 8, 4, 4, 5, 9, 32),
]


def inputs(shape: tuple[int, ...], reach: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    B, t, F, H, W, h, w, image_h, image_w, cell = shape
    mixed = torch.randn(B, t * F, H, W, 5, dtype=torch.float64)
    mixed[..., :2] *= 0.1
    coarse = reach * torch.randn(B, t, h, w, 2 * F, dtype=torch.float64)
    # Smooth: where neighbours differ much, a rounded coordinate alone changes the result by more than its rounding.
    places = [torch.linspace(0, 3, n, dtype=torch.float64) for n in (image_h, image_w)]
    image = (places[0][:, None] + 2 * places[1])[..., None] * torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    return mixed, coarse, image.sin().expand(B, -1, -1, -1).contiguous(), cell


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, check_kernel):
    check_kernel(op.launch, op.twin, *inputs(shape))


def test_far_beyond_the_frame_is_its_border(check_kernel):
    mixed, coarse, image, cell = inputs(SHAPES[1])
    far = torch.where(coarse > 0, 1e4, -1e4)
    frames = check_kernel(op.launch, op.twin, mixed * 0, far, image, cell)
    corners = image[0, :6, :37][[0, 0, -1, -1], [0, -1, 0, -1]].to(frames)
    flat = frames.reshape(-1, 1, 3)
    assert ((flat - corners).abs().amax(-1).amin(-1) < 1e-2).double().mean() > 0.5  # some cells pull both ways


def test_no_flow_gives_the_image_back(dtype, device):
    mixed, coarse, image, cell = (x.to(device, dtype) if torch.is_tensor(x) else x for x in inputs(SHAPES[1]))
    frames = op.launch(mixed.zero_(), coarse.zero_(), image, cell)
    assert torch.equal(frames, image[:, None, :6, :37].expand_as(frames))


def test_whole_pixels_move_whole_pixels(device):
    """Rightwards: the flow says where a pixel comes from, x first."""
    image = torch.rand(1, 6, 9, 3, device=device)
    coarse = torch.tensor([0.5, 0.0], device=device).expand(1, 1, 2, 2, 2).contiguous()  # half a cell of 4 pixels
    for run in (op.launch, op.twin):
        frames = run(torch.zeros(1, 1, 6, 9, 5, device=device), coarse, image, 4)
        torch.testing.assert_close(frames[0, 0, :, :7], image[0, :, 2:], rtol=0, atol=1e-6)


def test_not_a_number_reaches_the_output(device):
    mixed, coarse, image, cell = (x.float().to(device) if torch.is_tensor(x) else x for x in inputs(SHAPES[0]))
    mixed[0, 1, 2, 3] = float("nan")
    for run in (op.launch, op.twin):
        frames = run(mixed, coarse, image, cell)
        assert frames[0, 1, 2, 3].isnan().all()
        assert frames.isnan().sum() == 3


@triton.jit
def pixel_kernel(out_ptr, line, x):
    tl.store(out_ptr, op.pixel(tl.load(line), tl.load(x), 4096))


def test_addresses_pass_two_to_the_31(device):
    out = torch.empty(1, dtype=torch.int64, device=device)
    line, x = (torch.tensor(n, dtype=torch.int32, device=device) for n in (900_000, 77))
    pixel_kernel[(1,)](out, line, x)
    assert out.item() == 900_000 * 4096 + 77 > 2**31


def test_op_passes_opcheck():
    mixed, coarse, image, cell = inputs(SHAPES[0])
    torch.library.opcheck(op.warp_frames, (mixed.float(), coarse.float(), image.float(), cell))


def test_mistakes_are_named():
    run = torch.ops.reducio_fast.warp_frames
    mixed, coarse, image = torch.zeros(1, 4, 8, 8, 5), torch.zeros(1, 1, 2, 2, 8), torch.zeros(1, 8, 8, 3)
    with pytest.raises(ValueError, match=r"mixed has shape \(1, 4, 8, 8, 3\), it must be"):
        run(mixed[..., :3].contiguous(), coarse, image, 4)
    with pytest.raises(ValueError, match="coarse of 1 steps and 4 channels, 4 frames: 2 channels a frame needed"):
        run(mixed, coarse[..., :4].contiguous(), image, 4)
    with pytest.raises(ValueError, match="image of 7x8 is smaller than the frames' 8x8"):
        run(mixed, coarse, image[:, :7].contiguous(), 4)
    with pytest.raises(ValueError, match="cell=0"):
        run(mixed, coarse, image, 0)
