"""ada_layer_norm against LayerNorm and modulation in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from reducio_fast.triton_kernels import ada_layer_norm as op

SHAPES = [(2, 16, 64), (1, 3, 72), (3, 5, 1152), (2, 7, 33)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.slow
def test_kernel_equals_layer_norm_and_modulation(shape, check_kernel):
    B, L, D = shape
    table = torch.randn(B, 6, D, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    check_kernel(op.launch, op.twin, x, table[:, 0], table[:, 1], 1e-6)


def test_kernel_survives_a_large_mean(check_kernel):
    """Statistics in two passes over registers: E[x^2] - E[x]^2 would lose everything here."""
    x = torch.randn(1, 4, 256, dtype=torch.float64) + 300
    check_kernel(op.launch, op.twin, x, torch.zeros(1, 256).double(), torch.zeros(1, 256).double(), 1e-6)


def test_op_passes_opcheck():
    x, table = torch.randn(2, 5, 48), torch.randn(2, 6, 48)
    torch.library.opcheck(op.ada_layer_norm, (x, table[:, 0], table[:, 1]))


def test_mistakes_are_named():
    x, y = torch.randn(2, 3, 8), torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"scale_BD has D=4, x_BLD has D=8|shift_BD has D=4, x_BLD has D=8"):
        torch.ops.reducio_fast.ada_layer_norm(x, torch.randn(2, 4), y)
    with pytest.raises(ValueError, match="shift_BD has B=1, x_BLD has B=2"):
        torch.ops.reducio_fast.ada_layer_norm(x, y[:1], y)
    with pytest.raises(ValueError, match="shift_BD has dtype=torch.float16, x_BLD has dtype=torch.float32"):
        torch.ops.reducio_fast.ada_layer_norm(x, y.half(), y.half())
    with pytest.raises(ValueError, match=r"x_BLD has shape \(2, 8\)"):
        torch.ops.reducio_fast.ada_layer_norm(y, y, y)
    with pytest.raises(ValueError, match=r"shift_BD has shape \(2, 1, 8\), it must be \(2, 8\)"):
        torch.ops.reducio_fast.ada_layer_norm(x, y[:, None], y[:, None])
    with pytest.raises(ValueError, match="contiguous"):
        torch.ops.reducio_fast.ada_layer_norm(x.transpose(0, 1), torch.randn(3, 8), torch.randn(3, 8))
