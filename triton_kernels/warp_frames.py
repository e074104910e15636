"""warp_frames: a content image moved by a flow, plus a residual, in one pass over the frames.

Twin: `Warp` of `reference/reducio/vae.py`, reimplemented here on channels-last tensors. Legend: B batch, T frames, F
frames per latent step, H W rows and columns of the frames, t h w the latent's grid, C = 3 colours.

    flow  = bicubic(coarse) + fine                    in latent cells of `cell` pixels; torch's bicubic, a = -0.75
    frame = bilinear(image at (y, x) + cell * flow)   the border repeated
            + residual

In plain PyTorch this is ten passes over [B, T, H, W, 2 or 3] and one copy of the image per frame. Here the 16 coarse
flows that a pixel mixes, and the 12 colours, are read in place: neighbours share them, so they come from the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import TYPES, Variant, launcher, on_device, triton_op
from .shape_checks import check_contiguous, check_shape, check_tensors
from .tables import arch_of
from .tables import settings as table_settings

OP = "warp_frames"
COLOURS, MIXED = 3, 5  # MIXED: refinement of the flow (x, y), then the residual's colours
_SIZES = ("T", "H", "W", "image_h", "image_w", "h", "w", "scale_y", "scale_x")


@triton.jit
def cubic(d):
    """Weight of a sample at distance `d` below 2 from where one interpolates: Keys' cubic with a = -0.75."""
    d = tl.abs(d)
    near = (1.25 * d - 2.25) * d * d + 1.0
    far = ((-0.75 * d + 3.75) * d - 6.0) * d + 3.0
    return tl.where(d <= 1.0, near, tl.where(d < 2.0, far, 0.0))


@triton.jit
def clamp(i, n):
    """Index `i` inside an axis of n."""
    return tl.minimum(tl.maximum(i, 0), n - 1)


@triton.jit
def pixel(line, x, W):
    """Number of column x of a line of W pixels, in int64."""
    return line.to(tl.int64) * W + x


@triton.jit(do_not_specialize=_SIZES)
def warp_frames_kernel(
    mixed_ptr,  # [B, T, H, W, 5], refinement and residual
    coarse_ptr,  # [B, T/F, h, w, 2 F], x of each frame of the step, then y
    image_ptr,  # [B, image_h, image_w, 3]; beyond H and W it is not read
    out_ptr,  # [B, T, H, W, 3]
    T,  # frames
    H,  # rows
    W,  # columns
    image_h,  # rows of the image, at least H
    image_w,  # columns of the image, at least W
    h,  # rows of latent cells
    w,  # columns of latent cells
    scale_y,  # h / H
    scale_x,  # w / W
    FRAMES: tl.constexpr,  # frames a latent step
    CELL: tl.constexpr,  # pixels a latent cell
    BLOCK_W: tl.constexpr,  # columns a program
):
    """One program BLOCK_W columns of a line of a frame."""
    blocks = (W + BLOCK_W - 1) // BLOCK_W
    line, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    frame, y = line // H, line % H
    item, t = frame // T, frame % T
    x = block * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = x < W

    # The coarse flow, between cells: sample k of an axis lies at (k + 0.5) * pixels.
    place_y, place_x = (y + 0.5) * scale_y - 0.5, (x + 0.5) * scale_x - 0.5
    first_y, first_x = tl.floor(place_y).to(tl.int32) - 1, tl.floor(place_x).to(tl.int32) - 1
    step_ptr = coarse_ptr + (item * (T // FRAMES) + t // FRAMES).to(tl.int64) * h * w * 2 * FRAMES + t % FRAMES
    flow_x, flow_y = tl.zeros([BLOCK_W], tl.float32), tl.zeros([BLOCK_W], tl.float32)
    for i in tl.static_range(4):
        weight_y, row = cubic(place_y - (first_y + i)), clamp(first_y + i, h)
        for j in tl.static_range(4):
            weight = weight_y * cubic(place_x - (first_x + j))
            at = step_ptr + (row * w + clamp(first_x + j, w)) * 2 * FRAMES
            flow_x += weight * tl.load(at, mask=inside, other=0.0).to(tl.float32)
            flow_y += weight * tl.load(at + FRAMES, mask=inside, other=0.0).to(tl.float32)

    own = pixel(line, x, W)
    mixed_ptr += own * 5
    flow_x += tl.load(mixed_ptr, mask=inside, other=0.0).to(tl.float32)
    flow_y += tl.load(mixed_ptr + 1, mask=inside, other=0.0).to(tl.float32)
    # A flow that is not a number must not become an address; the residual carries it to the output.
    source_x = tl.minimum(tl.maximum(x + flow_x * CELL, 0.0), (W - 1).to(tl.float32))
    source_y = tl.minimum(tl.maximum(y + flow_y * CELL, 0.0), (H - 1).to(tl.float32))
    left, top = tl.floor(source_x).to(tl.int32), tl.floor(source_y).to(tl.int32)
    share_x, share_y = source_x - left, source_y - top
    right, bottom = clamp(left + 1, W), clamp(top + 1, H)
    left, top = clamp(left, W), clamp(top, H)
    image_ptr += item.to(tl.int64) * image_h * image_w * 3
    upper, lower = top * image_w, bottom * image_w
    out_ptr += own * 3
    for c in tl.static_range(3):
        a = tl.load(image_ptr + (upper + left) * 3 + c, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(image_ptr + (upper + right) * 3 + c, mask=inside, other=0.0).to(tl.float32)
        above = a + share_x * (b - a)
        a = tl.load(image_ptr + (lower + left) * 3 + c, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(image_ptr + (lower + right) * 3 + c, mask=inside, other=0.0).to(tl.float32)
        value = above + share_y * (a + share_x * (b - a) - above)
        value += tl.load(mixed_ptr + 2 + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + c, value.to(out_ptr.dtype.element_ty), mask=inside)


@on_device
def launch(mixed: Tensor, coarse: Tensor, image: Tensor, cell: int) -> Tensor:
    """Runs the kernel: on a GPU, or on CPU tensors in Triton's interpreter. Arguments as `warp_frames`."""
    B, T, H, W = mixed.shape[:4]
    t, h, w = coarse.shape[1:4]
    out = mixed.new_empty((B, T, H, W, COLOURS))
    entry = table_settings(OP, "*", arch_of(out.device))
    launcher(warp_frames_kernel)[(B * T * H * triton.cdiv(W, entry["BLOCK_W"]),)](
        mixed, coarse, image, out, T, H, W, *image.shape[1:3], h, w, h / H, w / W, FRAMES=T // t, CELL=cell, **entry
    )
    return out


def twin(mixed: Tensor, coarse: Tensor, image: Tensor, cell: int) -> Tensor:
    """The same in plain PyTorch: what runs on a CPU, and the oracle of the tests."""
    B, T, H, W = mixed.shape[:4]
    exact = torch.promote_types(mixed.dtype, torch.float32)
    flow = coarse.unflatten(-1, (2, -1)).permute(0, 1, 5, 4, 2, 3).flatten(0, 2)  # [B T, 2, h, w]
    flow = F.interpolate(flow.to(exact), (H, W), mode="bicubic", align_corners=False).movedim(1, -1)
    flow = flow + mixed[..., :2].flatten(0, 1)
    rows, columns = (torch.arange(n, dtype=exact, device=mixed.device) for n in (H, W))
    x, y = columns + flow[..., 0] * cell, rows[:, None] + flow[..., 1] * cell
    grid = torch.stack([(2 * x + 1) / W - 1, (2 * y + 1) / H - 1], dim=-1)
    frames = image[:, :H, :W].movedim(-1, 1).to(exact).repeat_interleave(T, dim=0)
    moved = F.grid_sample(frames, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return (moved.movedim(1, -1).unflatten(0, (B, T)) + mixed[..., 2:]).to(mixed.dtype).contiguous()


@triton_op("warp_frames")
def warp_frames(mixed: Tensor, coarse: Tensor, image: Tensor, cell: int) -> Tensor:
    """Frames [B, T, H, W, 3]: the image moved by the flow, plus the residual.

    Args:
        mixed: [B, T, H, W, 5], the output of the decoder's last convolution: refinement of the flow (x, y), residual.
        coarse: [B, T/F, h, w, 2 F], the flow of each cell, x of the F frames of a latent step and then their y.
        image: [B, H', W', 3] with H' >= H and W' >= W; pixels beyond H and W are not read.
        cell: length of a flow of 1 in pixels; positive.

    All contiguous, of one dtype on one device. Raises ValueError where shapes do not fit.
    """
    check_tensors(OP, mixed=mixed, coarse=coarse, image=image)
    check_contiguous(OP, mixed=mixed, coarse=coarse, image=image)
    check_shape(OP, "mixed", mixed, None, None, None, None, MIXED)
    B, T, H, W = mixed.shape[:4]
    check_shape(OP, "image", image, B, None, None, COLOURS)
    check_shape(OP, "coarse", coarse, B, None, None, None, None)
    steps, channels = coarse.shape[1], coarse.shape[-1]
    if not mixed.numel() or not coarse.numel() or steps * channels != 2 * T:
        raise ValueError(
            f"{OP}: coarse of {steps} steps and {channels} channels, {T} frames: 2 channels a frame needed"
        )
    if image.shape[1] < H or image.shape[2] < W:
        raise ValueError(f"{OP}: image of {image.shape[1]}x{image.shape[2]} is smaller than the frames' {H}x{W}")
    if cell < 1:
        raise ValueError(f"{OP}: cell={cell} must be at least 1")
    return (launch if mixed.is_cuda else twin)(mixed, coarse, image, cell)


def variants(arch: str) -> Iterator[Variant]:
    """What is shipped for `arch`: four frames and 32 pixels per latent cell (ft4), two frames (ft2)."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for frames in (4, 2):
            entry = table_settings(OP, "*", arch)
            pointers = dict.fromkeys(("mixed_ptr", "coarse_ptr", "image_ptr", "out_ptr"), f"*{TYPES[dtype]}")
            sizes = {name: "fp32" if name.startswith("scale") else "i32" for name in _SIZES}
            yield Variant(
                name=f"{OP} {TYPES[dtype]} {frames} frames",
                kernel=warp_frames_kernel,
                signature={**pointers, **sizes},
                constants={"FRAMES": frames, "CELL": 32, "BLOCK_W": entry.pop("BLOCK_W")},
                options=entry,
                unaligned=_SIZES,
            )
