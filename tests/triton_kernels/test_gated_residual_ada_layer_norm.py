"""gated_residual_ada_layer_norm against the sum, LayerNorm and modulation in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from reducio_fast.reference.reducio.dit import modulate
from reducio_fast.triton_kernels import gated_residual_ada_layer_norm as op
from reducio_fast.triton_kernels.launch import launcher

SHAPES = [(2, 16, 64), (1, 3, 72), (2, 5, 128), (2, 3, 1152), (3, 7, 33)]


def inputs(shape: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    """x, branch, gate, shift, scale; the last three are slices of one table, as in the transformer."""
    B, _, D = shape
    table = torch.randn(B, 6, D, dtype=torch.float64)
    x, branch = torch.randn(2, *shape, dtype=torch.float64).unbind()
    return x * 3 + 1, branch * 2, table[:, 5], table[:, 0], table[:, 1]


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.slow
def test_kernel_equals_twin(shape, gated, check_kernel):
    x, branch, gate, shift, scale = inputs(shape)
    check_kernel(op.launch, op.twin, x, branch, gate if gated else None, shift, scale, 1e-6)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_twin_equals_the_reference_block(gated):
    x, branch, gate, shift, scale = inputs((2, 5, 24))
    residual, y = op.twin(x, branch, gate if gated else None, shift, scale)
    expected = x + (gate[:, None] * branch if gated else branch)
    norm = torch.nn.LayerNorm(24, elementwise_affine=False, eps=1e-6)
    torch.testing.assert_close(residual, expected)
    torch.testing.assert_close(y, modulate(norm(expected), shift[:, None], scale[:, None]))


def test_kernel_survives_a_large_mean(check_kernel):
    x, branch, gate, shift, scale = inputs((1, 4, 256))
    check_kernel(op.launch, op.twin, x + 300, branch, gate, shift, scale, 1e-6)


def test_kernel_norms_the_sum_before_rounding(device):
    """1 + 2^-12 rounds to 1 in half precision, yet the norm still sees the difference."""
    x = torch.ones(1, 1, 16, dtype=torch.float16, device=device)
    branch, zero = torch.zeros_like(x), torch.zeros(1, 16, dtype=torch.float16, device=device)
    branch[..., ::2] = 2**-12
    residual, y = op.launch(x, branch, None, zero, zero, 1e-12)
    assert torch.equal(residual, x)
    assert (y.abs() > 0.9).all()


@triton.jit
def offsets_kernel(out_ptr, first, D: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0), op.row_offset(first + tl.program_id(0), D))


def test_addresses_are_64_bit(device):
    out = torch.empty(2, dtype=torch.int64, device=device)
    launcher(offsets_kernel)[(2,)](out, 2**31 - 2, D=1152)
    assert out.tolist() == [(2**31 - 2) * 1152, (2**31 - 1) * 1152]


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_op_passes_opcheck(gated):
    x, branch, gate, shift, scale = (t.float() for t in inputs((2, 5, 48)))
    torch.library.opcheck(op.gated_residual_ada_layer_norm, (x, branch, gate if gated else None, shift, scale))


def test_mistakes_are_named():
    run = torch.ops.reducio_fast.gated_residual_ada_layer_norm
    x, table = torch.randn(2, 3, 8), torch.randn(2, 6, 8)
    gate, shift, scale = table[:, 0], table[:, 1], table[:, 2]
    with pytest.raises(ValueError, match=r"branch_BLD has shape=\(2, 4, 8\), x_BLD has shape=\(2, 3, 8\)"):
        run(x, torch.randn(2, 4, 8), gate, shift, scale)
    with pytest.raises(ValueError, match="gate_BD has D=4, x_BLD has D=8"):
        run(x, x, gate[:, :4], shift, scale)
    with pytest.raises(ValueError, match="scale_BD has B=1, x_BLD has B=2"):
        run(x, x, gate, shift, scale[:1])
    with pytest.raises(ValueError, match="gate_BD has dtype=torch.float16, x_BLD has dtype=torch.float32"):
        run(x, x, gate.half(), shift, scale)
    with pytest.raises(ValueError, match=r"gate_BD has strides=\(8, 1\), shift_BD has strides=\(48, 1\)"):
        run(x, x, gate.contiguous(), shift, scale)
    with pytest.raises(ValueError, match="branch_BLD has strides .* contiguous"):
        run(x, x.transpose(0, 1).contiguous().transpose(0, 1), gate, shift, scale)
