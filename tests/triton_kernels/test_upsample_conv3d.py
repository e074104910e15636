"""upsample_conv3d against nearest interpolation followed by the full convolution, and against the reference's layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from reducio_fast.compile.targets import TARGETS
from reducio_fast.reference.reducio.config import VAEConfig
from reducio_fast.reference.reducio.vae import Layers, Upsample
from reducio_fast.triton_kernels import conv3d
from reducio_fast.triton_kernels import upsample_conv3d as op

pytestmark = pytest.mark.slow

# N, T, H, W, C, K: each tidy shape with an odd companion.
SHAPES = [(1, 2, 4, 4, 16, 16), (2, 1, 3, 5, 8, 12), (1, 1, 3, 5, 24, 20)]
KINDS = [(False, False), (False, True), (True, False), (True, True)]  # time doubled, causal
KIND_NAMES = ["space", "space causal", "space+time", "space+time causal"]


def inputs(N, T, H, W, C, K, causal):
    """x [N, C, T, H, W], the same in its padded buffer, weight and bias, all float64."""
    x = torch.randn(N, C, T, H, W, dtype=torch.float64)
    padded = F.pad(x, (1, 1, 1, 1, *((2, 0) if causal else (1, 1)))).permute(0, 2, 3, 4, 1).contiguous()
    weight = torch.randn(K, C, 3, 3, 3, dtype=torch.float64) / (27 * C) ** 0.5
    return x, padded, weight, torch.randn(K, dtype=torch.float64) * 3


def combined(function):
    """`function` with the mean and variance of its partials, so that two ways to cut tiles can be compared."""

    def call(*args):
        y, stats = function(*args)
        count, mean, squares = stats.double().unbind(2)
        total = count.sum(1)
        pooled = (count * mean).sum(1) / total
        variance = (squares.sum(1) + (count * (mean - pooled[:, None]) ** 2).sum(1)) / total
        return y, total.float(), pooled.float(), variance.float()

    return call


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 5, 7, 24, 20)], ids=str)
@pytest.mark.parametrize(("time", "causal"), KINDS, ids=KIND_NAMES)
def test_twin_is_nearest_then_convolution(shape, time, causal):
    x, padded, weight, bias = inputs(*shape, causal)
    up = F.interpolate(x, scale_factor=(2.0 if time else 1.0, 2.0, 2.0), mode="nearest")
    want = F.conv3d(F.pad(up, (1, 1, 1, 1, *((2, 0) if causal else (1, 1)))), weight, bias).permute(0, 2, 3, 4, 1)
    y, stats = op.twin(padded, op.fold_weight(weight, time, causal), bias, causal, True, 1, 2, True)
    assert y.is_contiguous()
    torch.testing.assert_close(y, F.pad(want, (0, 0, 1, 1, 1, 1, 1, 2)))
    torch.testing.assert_close(stats[:, 0, 1], want.mean((1, 2, 3)))
    torch.testing.assert_close(stats[:, 0, 2] / stats[:, 0, 0], want.var((1, 2, 3), correction=0))


@pytest.mark.parametrize(("time", "causal"), KINDS, ids=KIND_NAMES)
def test_twin_is_the_references_layer(time, causal):
    x, padded, _, _ = inputs(1, 3, 3, 5, 8, 8, causal)
    layer = Upsample(Layers(VAEConfig(causal=causal), 3), 8, time).double()
    weight, bias = layer.conv.weight.detach(), layer.conv.bias.detach()
    y, stats = op.twin(padded, op.fold_weight(weight, time, causal), bias, causal)
    torch.testing.assert_close(y, layer(x).detach().permute(0, 2, 3, 4, 1))
    assert stats.shape == (0,)


PLAIN = (False, False, 0, 0, False)  # bias, statistics, front, back, halo
CASES = [
    (SHAPES[0], (False, False), PLAIN),
    (SHAPES[1], (False, False), (True, True, 1, 1, True)),
    (SHAPES[2], (False, True), (True, True, 2, 0, True)),
    (SHAPES[0], (True, False), (True, True, 0, 0, False)),
    (SHAPES[1], (True, False), (True, True, 1, 1, True)),
    (SHAPES[2], (True, True), (True, True, 2, 0, True)),
    (SHAPES[2], (True, False), (True, False, 3, 1, False)),
]


@pytest.mark.parametrize(("shape", "kind", "epilogue"), CASES, ids=str)
def test_kernel_equals_twin(shape, kind, epilogue, check_kernel):
    (time, causal), (has_bias, stats, front, back, halo) = kind, epilogue
    _, padded, weight, bias = inputs(*shape, causal)
    launch, twin = (combined(op.launch), combined(op.twin)) if stats else (op.launch, op.twin)
    args = (padded, op.fold_weight(weight, time, causal), bias if has_bias else None, causal, stats, front, back, halo)
    y, *_ = check_kernel(launch, twin, *args)
    inner = y[:, front : y.shape[1] - back, halo : y.shape[2] - halo, halo : y.shape[3] - halo]
    assert y.count_nonzero() == inner.count_nonzero()


def frames(shape):
    """Independent frames: x, a buffer without padding in time, weights with one tap in time, bias, in float64."""
    x, padded, weight, bias = inputs(*shape, False)
    return x, padded[:, 1:-1].contiguous(), weight[:, :, :1], bias


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 5, 7, 24, 20)], ids=str)
def test_one_tap_in_time_is_a_convolution_a_frame(shape):
    x, padded, weight, bias = frames(shape)
    up = F.interpolate(x.transpose(1, 2).flatten(0, 1), scale_factor=2.0, mode="nearest")
    want = F.conv2d(up, weight[:, :, 0], bias, padding=1).unflatten(0, x.shape[:1] + x.shape[2:3]).movedim(2, -1)
    y, stats = op.twin(padded, op.fold_weight(weight, False, False), bias, False, True)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(stats[:, 0, 1], want.mean((1, 2, 3)))


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 5, 3, 4, 16, 16)], ids=str)
def test_kernel_with_one_tap_in_time(shape, descriptors, check_kernel, monkeypatch, device):
    if descriptors and device.type == "cuda":
        pytest.skip("a GPU from sm_90 on takes descriptors by itself, an older one has none")
    monkeypatch.setattr(conv3d, "use_descriptors", lambda device: descriptors)
    _, padded, weight, bias = frames(shape)
    check_kernel(
        combined(op.launch), combined(op.twin), padded, op.fold_weight(weight, False, False), bias, False, True
    )


@pytest.mark.parametrize("room", [8, 5])
def test_room_behind_the_channels(room, check_kernel):
    _, padded, weight, bias = frames(SHAPES[2])
    folded, K = op.fold_weight(weight, False, False), len(bias)

    def written(run):
        return lambda *arguments: run(*arguments, room=room)[0][..., :K]

    y = check_kernel(written(op.launch), written(op.twin), padded, folded, bias)
    assert op.launch(padded.float(), folded.float(), room=room)[0].shape == (*y.shape[:-1], K + room)


def test_blocks_of_a_width():
    """640 channels are five blocks of 128, 512 two of 256, 320 five of 64: no block has idle columns."""
    widths = (64, 128, 192, 320, 512, 640, 1280)
    chosen = {K: conv3d.blocks_for("conv3d", torch.bfloat16, 128, K, "sm_90")["BLOCK_K"] for K in widths}
    assert chosen == {64: 64, 128: 128, 192: 64, 320: 64, 512: 256, 640: 128, 1280: 256}
    for arch in TARGETS:
        for name in (conv3d.OP, op.OP):
            assert not [K for K in widths if K % conv3d.blocks_for(name, torch.float16, K, K, arch)["BLOCK_K"]], arch


@pytest.mark.parametrize(("time", "causal"), KINDS[1:3], ids=KIND_NAMES[1:3])
def test_descriptor_path(time, causal, check_kernel, monkeypatch, device):
    """Bulk copies, which a GPU before sm_90 and the interpreter do not choose by themselves."""
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability() < (9, 0)):
        pytest.skip("no bulk copies on this GPU")
    if device.type == "cpu":
        monkeypatch.setattr(conv3d, "use_descriptors", lambda device: True)
    _, padded, weight, bias = inputs(2, 1, 3, 5, 8, 12, causal)
    args = (padded, op.fold_weight(weight, time, causal), bias, causal, True, 1, 1, True)
    check_kernel(combined(op.launch), combined(op.twin), *args)


@pytest.mark.parametrize(("time", "causal"), KINDS, ids=KIND_NAMES)
def test_folded_weights_hold_every_tap(time, causal):
    """On a constant clip, far from its border, each phase must weigh all 27 taps."""
    weight = torch.randn(4, 3, 3, 3, 3, dtype=torch.float64)
    folded = op.fold_weight(weight, time, causal)
    taps = 8 if time else 12
    assert folded.shape == (8 if time else 4, 4, taps * 3) and folded.is_contiguous()
    total = weight.sum((2, 3, 4)).expand(len(folded), 4, 3)
    torch.testing.assert_close(folded.view(len(folded), 4, taps, 3).sum(2), total)


def test_weights_are_folded_in_float32():
    """1 + 2^-8 + 2^-8 is a bfloat16 step above 1 only if it is not rounded in between."""
    weight = torch.zeros(1, 1, 3, 3, 3, dtype=torch.bfloat16)
    weight[..., 1, 1], weight[..., 1, 2], weight[..., 2, 1] = 1.0, 2**-8, 2**-8
    folded = op.fold_weight(weight, False, False)
    assert folded.dtype == torch.bfloat16 and folded.max() == 1 + 2**-7


def test_op_passes_opcheck(device):
    _, padded, weight, bias = inputs(1, 2, 3, 4, 16, 5, False)
    weight = op.fold_weight(weight, False, False)
    x, w, b = (a.to(device, torch.float32) for a in (padded, weight, bias))
    torch.library.opcheck(op.upsample_conv3d, (x, w, b), {"stats": True, "front": 1, "back": 1, "halo": True})


def test_mistakes_are_named():
    _, padded, weight, bias = inputs(1, 2, 3, 4, 8, 5, False)
    x, w, b = (a.float() for a in (padded, op.fold_weight(weight, False, False), bias))
    call = torch.ops.reducio_fast.upsample_conv3d
    with pytest.raises(ValueError, match=r"weight has 3 phases, it must have 4 \(space\) or 8"):
        call(x, w[:3])
    with pytest.raises(ValueError, match=r"weight has shape \(4, 5, 95\), it must be \(4, 5, 96\)"):
        call(x, w[:, :, 1:].contiguous())
    with pytest.raises(ValueError, match=r"bias has shape \(4,\), it must be \(5\)"):
        call(x, w, b[:4])
    with pytest.raises(ValueError, match="weight has dtype=torch.float16, x_padded has dtype=torch.float32"):
        call(x, w.half())
    with pytest.raises(ValueError, match="must be contiguous"):
        call(x.transpose(2, 3), w)
    with pytest.raises(ValueError, match="x_padded has T=2, H=5, W=6 with halo"):
        call(x[:, :2].contiguous(), w)
    with pytest.raises(ValueError, match="front=0, back=-2, room=0 must not be negative"):
        call(x, w, b, False, False, 0, -2)
    with pytest.raises(ValueError, match="room=-1 must not be negative"):
        call(x, w, b, room=-1)
