"""group_norm_silu against torch's GroupNorm, SiLU and padding, and the reference's norm of causal models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from reducio_fast.reference.reducio.vae import PerFrameGroupNorm
from reducio_fast.triton_kernels import conv3d
from reducio_fast.triton_kernels import group_norm_silu as op

pytestmark = pytest.mark.slow

SHAPES = [((2, 4, 8, 8, 32), 2), ((1, 3, 5, 7, 24), 4), ((2, 1, 6, 5, 20), 5)]
PADDINGS = {"dense": (0, 0, False), "symmetric": (1, 1, True), "causal": (2, 0, True), "image": (0, 0, True)}


def affine(C: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(C, dtype=torch.float64), torch.randn(C, dtype=torch.float64)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_kernel(shape, groups, padding, check_kernel):
    x = torch.randn(shape, dtype=torch.float64) * 2 + 1
    out = check_kernel(op.launch, op.twin, x, *affine(shape[-1]), groups, 1e-6, True, False, None, *PADDINGS[padding])
    front, back, halo = PADDINGS[padding]
    ring = int(halo)
    inside = out[:, front : front + shape[1], ring : ring + shape[2], ring : ring + shape[3]]
    assert (out != 0).sum() == (inside != 0).sum()  # the border is exactly zero, and nothing is left unwritten


@pytest.mark.parametrize("silu", [True, False])
def test_kernel_with_statistics_of_one_frame(silu, check_kernel):
    x = torch.randn(2, 3, 5, 7, 24, dtype=torch.float64) + torch.arange(3).view(1, 3, 1, 1, 1)
    check_kernel(op.launch, op.twin, x, *affine(24), 4, 1e-6, silu, True, None, 2, 0, True)


def test_twin_is_torch_and_the_reference():
    x, (weight, bias) = torch.randn(2, 3, 5, 7, 24).double(), affine(24)
    first = x.permute(0, 4, 1, 2, 3)
    expected = F.pad(F.silu(F.group_norm(first, 4, weight, bias, 1e-6)), (1, 1, 1, 1, 2, 0)).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(op.twin(x, weight, bias, 4, front=2, halo=True), expected)
    norm = PerFrameGroupNorm(4, 24, eps=1e-6).double()
    norm.weight.data, norm.bias.data = weight, bias
    expected = norm(first).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(op.twin(x, weight, bias, 4, silu=False, per_frame=True), expected)


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 4, 4, 64), (2, 2, 40, 40, 64), (2, 2, 4, 4, 512)], ids=str)
def test_both_layouts_of_the_twin_are_right(shape, per_frame):
    """Few positions with narrow groups take another layout than many positions, or wide groups."""
    x, (weight, bias) = torch.randn(shape).bfloat16(), (v.bfloat16() for v in affine(shape[-1]))
    want = op.twin(x.double(), weight.double(), bias.double(), 32, per_frame=per_frame)
    out = op.twin(x, weight, bias, 32, per_frame=per_frame)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)


def test_kernel_survives_a_large_mean(check_kernel):
    """Means merge by their differences: sums of squares would lose the variance."""
    x = torch.randn(1, 2, 9, 9, 16, dtype=torch.float64) + 300
    check_kernel(op.launch, op.twin, x, *affine(16), 2, 1e-6, False)


def test_statistics_from_a_convolution(check_kernel, device, dtype):
    """Several tiles, some of them empty, merge to what a pass over the tensor finds."""
    x = torch.randn(2, 4, 6, 6, 16, dtype=dtype, device=device)
    wide = x.float().flatten(1, 3)
    parts = [(conv3d.statistics(p[:, :, None, None]), p) for p in wide.split([100, 40, 4], 1)]
    empty = torch.full_like(parts[0][0], float("nan"))
    empty[:, :, 0] = 0
    partials = torch.cat([parts[0][0], empty, parts[1][0], parts[2][0]], 1)
    weight, bias = (v.to(device, dtype) for v in affine(16))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for run in (op.launch, op.twin):
        merged = run(x, weight, bias, 2, partials=partials)
        torch.testing.assert_close(merged, op.launch(x, weight, bias, 2), **tolerance)


def test_same_bytes_twice(device):
    x = torch.randn(1, 3, 17, 13, 24, device=device)
    weight, bias = (v.to(device, torch.float32) for v in affine(24))
    assert torch.equal(op.launch(x, weight, bias, 4), op.launch(x, weight, bias, 4))


@triton.jit
def offsets_kernel(out_ptr, item, rows, row, C: tl.constexpr):
    at = op.row_offset(tl.load(item), rows, tl.load(row) + tl.arange(0, 2), C)
    tl.store(out_ptr + tl.arange(0, 2), at)


def test_addresses_pass_two_to_the_31(device):
    out = torch.empty(2, dtype=torch.int64, device=device)
    item, row = (torch.tensor(n, dtype=torch.int32, device=device) for n in (8, 1_600_000))
    offsets_kernel[(1,)](out, item, 1_638_400, row, C=256)
    assert out.tolist() == [(8 * 1_638_400 + 1_600_000 + i) * 256 for i in range(2)] and out[0] > 2**31


def test_op_passes_opcheck():
    x, (weight, bias) = torch.randn(1, 2, 3, 4, 8), (v.float() for v in affine(8))
    for kwargs in ({}, {"front": 1, "back": 1, "halo": True}, {"per_frame": True, "silu": False}):
        torch.library.opcheck(op.group_norm_silu, (x, weight, bias, 2), kwargs)


def test_mistakes_are_named():
    x, v = torch.randn(1, 2, 3, 4, 8), torch.ones(8)
    run = torch.ops.reducio_fast.group_norm_silu
    with pytest.raises(ValueError, match="C=8 is not a multiple of 3"):
        run(x, v, v, 3)
    with pytest.raises(ValueError, match=r"weight has shape \(4,\), it must be \(8\)"):
        run(x, v[:4], v, 2)
    with pytest.raises(ValueError, match=r"partials has shape \(1, 5, 3, 4\)"):
        run(x, v, v, 2, partials=torch.zeros(1, 5, 3, 4))
    with pytest.raises(ValueError, match="contiguous"):
        run(x.transpose(1, 2), v, v, 2)
