"""temporal_conv against torch's Conv3d, and the kernel against its twin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from reducio_fast.triton_kernels import temporal_conv as op

pytestmark = pytest.mark.slow

# B, T, H, W, C, K: each tidy shape with an odd companion.
SHAPES = [(1, 2, 4, 4, 16, 16), (2, 3, 3, 5, 24, 20), (1, 1, 5, 7, 40, 17)]


def inputs(B, T, H, W, C, K):
    """A buffer [B, T + 2, H, W, C] with zero frames at its ends, its three views [B, M, C], weight, bias, residual."""
    x = torch.randn(B, T, H, W, C, dtype=torch.float64)
    rows = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1)).view(B, -1, C)
    cells = T * H * W
    views = [rows[:, at : at + cells] for at in (0, H * W, 2 * H * W)]
    weight = torch.randn(3, C, K, dtype=torch.float64) / (3 * C) ** 0.5
    return x, views, weight, 3 * torch.randn(K, dtype=torch.float64), torch.randn(B, cells, K, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twin_is_a_convolution_over_frames(shape):
    x, views, weight, bias, residual = inputs(*shape)
    B, T, H, W, _, K = shape
    kernel = weight.permute(2, 1, 0)[..., None, None]  # [K, C, 3, 1, 1]
    want = F.conv3d(x.permute(0, 4, 1, 2, 3), kernel, bias, padding=(1, 0, 0)).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(op.twin(*views, weight, bias).view(B, T, H, W, K), want)
    torch.testing.assert_close(op.twin(*views, weight, bias, residual), want.reshape(B, -1, K) + residual)


@pytest.mark.parametrize("neighbours", [True, False])
@pytest.mark.parametrize("wide", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_way_of_the_twin_is_the_same_sum(wide, neighbours, monkeypatch):
    """One product for all taps, one per tap, and one per tap and item, which large tensors take."""
    _, (before, *others), weight, bias, residual = inputs(2, 3, 4, 5, 24, 20)
    rounded = [x.to(wide) for x in (before, *others, weight, bias, residual)]
    rounded = rounded if neighbours else [None, *rounded[1:]]
    want = op.twin(*(None if x is None else x.double() for x in rounded))
    tolerance = 4 * torch.finfo(wide).eps
    for limit in (0, op.SMALL):
        monkeypatch.setattr(op, "SMALL", limit)
        torch.testing.assert_close(op.twin(*rounded).double(), want, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_twin(shape, residual, check_kernel):
    _, views, weight, bias, added = inputs(*shape)
    check_kernel(op.launch, op.twin, *views, weight, bias, added if residual else None)


@pytest.mark.parametrize("room", [8, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_room_behind_the_channels(shape, room, check_kernel):
    _, views, weight, bias, residual = inputs(*shape)
    K = len(bias)

    def written(run):
        return lambda *arguments: run(*arguments, residual.to(arguments[0].dtype).to(arguments[0].device), room)[
            ..., :K
        ]

    y = check_kernel(written(op.launch), written(op.twin), *views, weight, bias)
    assert op.launch(*(x.float() for x in (*views, weight, bias)), room=room).shape == (*y.shape[:-1], K + room)


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False), (False, False)])
def test_a_missing_neighbour_is_zero(before, after, check_kernel):
    _, (first, frame, last), weight, bias, residual = inputs(*SHAPES[1])
    first, last = first if before else None, last if after else None
    y = check_kernel(op.launch, op.twin, first, frame, last, weight, bias, residual)
    zeros = torch.zeros_like(frame)
    ends = zeros if first is None else first, zeros if last is None else last
    want = op.twin(ends[0], frame, ends[1], weight, bias, residual)
    torch.testing.assert_close(y.double().cpu(), want, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alone_it_is_a_linear_layer(shape, check_kernel):
    _, (_, frame, _), weight, bias, residual = inputs(*shape)
    tap = weight[1:2].contiguous()
    want = F.linear(frame, tap[0].T, bias) + residual
    torch.testing.assert_close(op.twin(None, frame, None, tap, bias, residual), want)
    check_kernel(op.launch, op.twin, None, frame, None, tap, bias, residual)


def test_a_frame_may_be_its_own_neighbour():
    """At both ends of a clip that is continued by its first and last frame; above `SMALL`, items are done singly."""
    frame, weight, bias = torch.randn(1, op.SMALL // 64 + 64, 64), torch.randn(3, 64, 32), torch.randn(32)
    want = frame @ weight.sum(0) + bias
    y = torch.ops.reducio_fast.temporal_conv(frame, frame, frame, weight, bias)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-4)


def test_320_channels_are_five_blocks():
    chosen = op.product_blocks(op.OP, torch.float16, 320, 320, "sm_90")
    assert chosen["BLOCK_K"] == 64 and op.product_blocks(op.OP, torch.float16, 512, 512, "sm_90")["BLOCK_K"] == 128


def test_op_passes_opcheck(device):
    _, views, weight, bias, residual = inputs(*SHAPES[1])
    arguments = [x.to(device, torch.float32) for x in (*views, weight, bias, residual)]
    torch.library.opcheck(op.temporal_conv, tuple(arguments))
    torch.library.opcheck(op.temporal_conv, (None, *arguments[1:5]))
    torch.library.opcheck(op.temporal_conv, (*arguments, 4))


def test_mistakes_are_named():
    _, views, weight, bias, residual = inputs(*SHAPES[1])
    before, frame, after, weight, bias, residual = (x.float() for x in (*views, weight, bias, residual))
    run = torch.ops.reducio_fast.temporal_conv
    for arguments, message in (
        ((before, frame, after, weight[:2], bias), r"weight has shape \(2, 24, 20\)"),
        ((before, frame, None, weight[:1], bias), r"weight has shape \(1, 24, 20\)"),
        ((before, frame, after, weight, bias[:-1]), r"bias has shape \(19,\)"),
        ((before[:, :-1], frame, after, weight, bias), "before has shape="),
        ((None, frame.transpose(1, 2).contiguous().transpose(1, 2), None, weight, bias), "must be contiguous"),
        ((before, frame, after, weight, bias, residual[..., :-1]), "residual"),
        ((before, frame, after, weight.half(), bias), "dtype"),
        ((before, frame, after, weight, bias, None, -1), "room=-1 must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*arguments)
