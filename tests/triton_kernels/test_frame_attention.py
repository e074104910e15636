"""frame_attention against torch's attention on permuted tensors, and the kernel against its twin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from reducio_fast.triton_kernels import frame_attention as op

pytestmark = pytest.mark.slow

# B, T, L, N, D: each tidy shape with an odd companion.
SHAPES = [(1, 16, 4, 1, 16), (2, 5, 3, 2, 24), (1, 25, 2, 1, 64), (1, 1, 3, 2, 8)]


def qkv_of(B, T, L, N, D):
    return torch.randn(B, T, L, 3, N, D, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_twin_is_torchs_attention(shape, scale):
    B, T, L, N, D = shape
    qkv = qkv_of(*shape)
    q, k, v = (part.permute(0, 2, 3, 1, 4).reshape(B * L, N, T, D) for part in qkv.unbind(3))
    want = F.scaled_dot_product_attention(q, k, v, scale=scale).view(B, L, N, T, D).permute(0, 3, 1, 2, 4)
    y = op.twin(qkv, scale)
    assert y.is_contiguous()
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_twin(shape, check_kernel):
    check_kernel(op.launch, op.twin, qkv_of(*shape), 0.3)


def test_scores_far_apart(check_kernel):
    """The largest score is subtracted before the exponential, which would overflow."""
    check_kernel(op.launch, op.twin, 8 * qkv_of(1, 7, 2, 1, 16), None)


def test_many_frames_run_on_torch(device):
    qkv = qkv_of(1, op.MOST_FRAMES + 1, 2, 1, 8).float().to(device)
    torch.testing.assert_close(torch.ops.reducio_fast.frame_attention(qkv), op.twin(qkv))


def test_op_passes_opcheck(device):
    torch.library.opcheck(op.frame_attention, (qkv_of(2, 5, 3, 2, 24).float().to(device),))


def test_mistakes_are_named():
    qkv = qkv_of(1, 2, 3, 2, 8).float()
    run = torch.ops.reducio_fast.frame_attention
    for argument, message in (
        (qkv[:, :, :, :2].contiguous(), r"qkv has shape \(1, 2, 3, 2, 2, 8\)"),
        (qkv[0], "qkv has shape"),
        (qkv.transpose(1, 2), "must be contiguous"),
        (qkv.double(), "kernels take"),
    ):
        with pytest.raises(ValueError, match=message):
            run(argument)
