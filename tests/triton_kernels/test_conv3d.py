"""conv3d against F.conv3d over explicitly padded clips, and against the reference's VideoConv."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from reducio_fast.reference.reducio.vae import VideoConv
from reducio_fast.triton_kernels import conv3d as op

pytestmark = pytest.mark.slow

# N, T, H, W, C, K, taps in time: each tidy shape with an odd companion.
SHAPES = [
    (1, 2, 4, 6, 16, 16, 3),
    (2, 1, 5, 7, 24, 20, 3),
    (1, 2, 6, 6, 32, 32, 1),
    (2, 1, 3, 5, 3, 3, 1),
]


def inputs(N, T, H, W, C, K, time, causal=False):
    """x [N, C, T, H, W], the same in its padded buffer, weight, bias and residual, all float64."""
    x = torch.randn(N, C, T, H, W, dtype=torch.float64)
    weight = torch.randn(K, C, time, 3, 3, dtype=torch.float64) / (9 * time * C) ** 0.5
    ends = (0, 0) if time == 1 else (2, 0) if causal else (1, 1)
    padded = F.pad(x, (1, 1, 1, 1, *ends)).permute(0, 2, 3, 4, 1).contiguous()
    residual = torch.randn(N, T, H, W, K, dtype=torch.float64)
    return x, padded, weight, torch.randn(K, dtype=torch.float64) * 3, residual


def combine(stats):
    """Mean and variance per item and channel from the partials, by the textbook's pooled sums in float64."""
    count, mean, squares = stats.double().unbind(2)
    total = count.sum(1)
    pooled = (count * mean).sum(1) / total
    return total, pooled, (squares.sum(1) + (count * (mean - pooled[:, None]) ** 2).sum(1)) / total


def combined(function):
    """`function` with its partials combined, so that two ways to cut the positions into tiles can be compared."""

    def call(*args):
        y, stats = function(*args)
        return (y, *(part.float() for part in combine(stats)))

    return call


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["symmetric", "causal"])
def test_twin_is_a_padded_convolution(shape, causal):
    """The reference's own layer, given the clip without padding."""
    x, padded, weight, bias, residual = inputs(*shape, causal)
    C, K, time = shape[4:]
    if time == 3:
        layer = VideoConv(C, K, 3, causal).double()
        layer.weight.data, layer.bias.data = weight, bias
        want = layer(x)
    else:
        frames = F.conv2d(x.transpose(1, 2).flatten(0, 1), weight[:, :, 0], bias, padding=1)
        want = frames.unflatten(0, (len(x), -1)).transpose(1, 2)
    want = want.permute(0, 2, 3, 4, 1) + residual
    y, stats = op.twin(padded, op.pack_weight(weight), bias, residual, True, 2, 1, True)
    assert y.is_contiguous() and stats.shape == (len(x), 1, 3, K)
    torch.testing.assert_close(y, F.pad(want, (0, 0, 1, 1, 1, 1, 2, 1)))
    _, mean, variance = combine(stats)
    torch.testing.assert_close(mean, want.mean((1, 2, 3)))
    torch.testing.assert_close(variance, want.var((1, 2, 3), correction=0))


# bias, residual, statistics, front, back, halo
EPILOGUES = [
    (False, False, False, 0, 0, False),
    (True, True, True, 0, 0, False),
    (True, False, True, 1, 1, True),
    (False, True, True, 2, 0, True),
    (True, True, False, 0, 1, False),
]


@pytest.mark.parametrize(
    ("shape", "epilogue"), [(s, e) for s in SHAPES for e in (EPILOGUES if s == SHAPES[1] else EPILOGUES[1:3])], ids=str
)
def test_kernel_equals_twin(shape, epilogue, check_kernel):
    has_bias, has_residual, stats, front, back, halo = epilogue
    _, padded, weight, bias, residual = inputs(*shape)
    bias, residual = bias if has_bias else None, residual if has_residual else None
    launch, twin = (combined(op.launch), combined(op.twin)) if stats else (op.launch, op.twin)
    y, *_ = check_kernel(launch, twin, padded, op.pack_weight(weight), bias, residual, stats, front, back, halo)
    if halo or front or back:
        inner = y[:, front : y.shape[1] - back, halo : y.shape[2] - halo, halo : y.shape[3] - halo]
        assert y.count_nonzero() == inner.count_nonzero()


def test_several_blocks_along_every_axis(check_kernel):
    """More than one block in C, K and positions, with tails in all three, and tiles that hold nothing but halo."""
    _, padded, weight, bias, residual = inputs(1, 1, 9, 11, 24, 36, 1)
    args = (padded, op.pack_weight(weight), bias, residual, True, 2, 1, True)
    check_kernel(combined(op.launch), combined(op.twin), *args)


@pytest.mark.parametrize("shape", [(1, 2, 4, 6, 16, 16, 3), (2, 2, 3, 5, 24, 20, 3)], ids=str)
def test_descriptor_path(shape, check_kernel, monkeypatch, device):
    """Bulk copies, which a GPU before sm_90 and the interpreter do not choose by themselves."""
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability() < (9, 0)):
        pytest.skip("no bulk copies on this GPU")
    if device.type == "cpu":
        monkeypatch.setattr(op, "use_descriptors", lambda device: True)
    _, padded, weight, bias, residual = inputs(*shape)
    args = (padded, op.pack_weight(weight), bias, residual, True, 1, 1, True)
    check_kernel(combined(op.launch), combined(op.twin), *args)


def test_channels_as_rows(check_kernel, monkeypatch, device):
    """With bulk copies and a residual, narrow layers multiply with channels as rows; a tail along each axis."""
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability() < (9, 0)):
        pytest.skip("no bulk copies on this GPU")
    if device.type == "cpu":
        monkeypatch.setattr(op, "use_descriptors", lambda device: True)
        wide = {"BLOCK_M": 128, "BLOCK_K": 64, "BLOCK_C": 16, "PIECES": 2, "num_warps": 1}
        monkeypatch.setattr(op, "settings", lambda *shape: dict(wide))
    _, padded, weight, bias, residual = inputs(1, 2, 4, 5, 24, 72, 3)
    args = (padded, op.pack_weight(weight), bias, residual, True, 1, 1, True)
    check_kernel(combined(op.launch), combined(op.twin), *args)


def test_statistics_survive_a_large_mean(check_kernel):
    """Deviations are from the tile's own mean: E[y^2] - E[y]^2 would lose the variance here."""
    _, padded, weight, _, _ = inputs(1, 2, 6, 6, 16, 16, 3)
    bias = torch.full((16,), 300.0, dtype=torch.float64)
    check_kernel(combined(op.launch), combined(op.twin), padded, op.pack_weight(weight), bias, None, True)


def test_same_input_same_bytes(device):
    _, padded, weight, bias, residual = inputs(1, 2, 5, 7, 16, 16, 3)
    args = [a.to(device, torch.float32) for a in (padded, op.pack_weight(weight), bias, residual)]
    for a, b in zip(op.launch(*args, True), op.launch(*args, True), strict=True):
        assert torch.equal(a, b)


@triton.jit
def store_row_numbers(out_ptr, item, t, y, x, FRAMES, HEIGHT, WIDTH, channels):
    i = tl.arange(0, 4)
    rows = op.row_number((item + tl.program_id(0)).to(tl.int64), t, y, x + i, FRAMES, HEIGHT, WIDTH)
    tl.store(out_ptr + i, rows * channels)


def test_addresses_beyond_32_bits(device):
    """Nine full tiles of 256 channels are 3.8e9 elements; here a batch far larger, without its memory."""
    out = torch.zeros(4, dtype=torch.int64, device=device)
    store_row_numbers[(1,)](out, 300, 15, 1023, 1020, 16, 1024, 1024, 512)
    last = ((300 * 16 + 15) * 1024 + 1023) * 1024 + 1023
    assert out.tolist() == [(last - 3 + i) * 512 for i in range(4)]


@pytest.mark.parametrize("dims", [2, 3])
def test_packing_round_trips(dims):
    weight = torch.randn(5, 4, *[3] * dims)
    packed = op.pack_weight(weight)
    assert packed.shape == (5, 4 * 3**dims) and packed.is_contiguous()
    assert torch.equal(packed.view(5, *[3] * dims, 4).movedim(-1, 1), weight)
    tap = (1,) * dims
    middle = 3**dims // 2
    assert torch.equal(packed[:, 4 * middle : 4 * middle + 4], weight[(slice(None), slice(None), *tap)])


def test_op_passes_opcheck(device):
    _, padded, weight, bias, residual = inputs(1, 2, 3, 4, 16, 5, 3)
    x, w, b, r = (a.to(device, torch.float32) for a in (padded, op.pack_weight(weight), bias, residual))
    torch.library.opcheck(op.conv3d, (x, w, b, r), {"stats": True, "front": 1, "back": 1, "halo": True})


def test_mistakes_are_named():
    _, padded, weight, bias, residual = inputs(1, 2, 3, 4, 8, 5, 3)
    x, w, b, r = (a.float() for a in (padded, op.pack_weight(weight), bias, residual))
    call = torch.ops.reducio_fast.conv3d
    with pytest.raises(ValueError, match=r"weight.shape\[1\]=215 is not a multiple of 72"):
        call(x, w[:, 1:].contiguous())
    with pytest.raises(ValueError, match="weight has 2 taps in time for C=8, it must have 1 or 3"):
        call(x, w[:, :144].contiguous())
    with pytest.raises(ValueError, match=r"bias has shape \(4,\), it must be \(5\)"):
        call(x, w, b[:4])
    with pytest.raises(ValueError, match=r"residual has shape \(1, 2, 3, 3, 5\), it must be \(1, 2, 3, 4, 5\)"):
        call(x, w, b, r[:, :, :, 1:].contiguous())
    with pytest.raises(ValueError, match="weight has dtype=torch.float16, x_padded has dtype=torch.float32"):
        call(x, w.half())
    with pytest.raises(ValueError, match=r"x_padded has strides .* must be contiguous"):
        call(x.transpose(2, 3), w)
    with pytest.raises(ValueError, match=r"x_padded has T=2, H=5, W=6 with halo, it must have at least 3, 3, 3"):
        call(x[:, :2].contiguous(), w)
    with pytest.raises(ValueError, match="front=-1, back=0 must not be negative"):
        call(x, w, b, None, False, -1)
