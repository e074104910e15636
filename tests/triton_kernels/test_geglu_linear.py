"""geglu_linear against diffusers' GEGLU, and the kernel against its twin."""

from __future__ import annotations

import pytest
import torch

from reducio_fast.triton_kernels import geglu_linear as op

pytestmark = pytest.mark.slow

SHAPES = [((32, 16), 32), ((2, 13, 24), 20), ((1, 40), 9)]  # shape of x, output channels


def inputs(shape, K):
    C = shape[-1]
    weight = torch.randn(2 * K, C, dtype=torch.float64) / C**0.5
    return torch.randn(shape, dtype=torch.float64), weight, torch.randn(2 * K, dtype=torch.float64)


@pytest.mark.parametrize(("shape", "K"), SHAPES, ids=str)
def test_twin_is_diffusers(shape, K):
    activations = pytest.importorskip("diffusers.models.activations")
    x, weight, bias = inputs(shape, K)
    layer = activations.GEGLU(shape[-1], K).double()
    layer.proj.weight.data, layer.proj.bias.data = weight, bias
    torch.testing.assert_close(op.twin(x, weight, bias), layer(x).detach())


@pytest.mark.parametrize(("shape", "K"), SHAPES, ids=str)
def test_kernel_equals_twin(shape, K, check_kernel):
    check_kernel(op.launch, op.twin, *inputs(shape, K))


def test_gates_far_from_zero(check_kernel):
    """gelu is its argument on one side and zero on the other, also where the tanh form is not exact."""
    x, weight, bias = inputs((32, 16), 16)
    check_kernel(op.launch, op.twin, 20 * x, weight, bias)


def test_op_passes_opcheck(device):
    arguments = tuple(x.to(device, torch.float32) for x in inputs((2, 13, 24), 20))
    torch.library.opcheck(op.geglu_linear, arguments)


def test_mistakes_are_named():
    x, weight, bias = (t.float() for t in inputs((4, 24), 20))
    run = torch.ops.reducio_fast.geglu_linear
    for arguments, message in (
        ((x, weight[:, :-1].contiguous(), bias), r"weight has shape \(40, 23\)"),
        ((x, weight, bias[:-1]), r"bias has shape \(39,\)"),
        ((x, weight[:-1], bias[:-1]), "weight has 39 rows"),
        ((x.t().contiguous().t(), weight, bias), "must be contiguous"),
        ((x.double(), weight.double(), bias.double()), "kernels take"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*arguments)
