"""quantised_conv3d against torch's convolution of the same numbers; the norm that writes them against torch's cast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from reducio_fast.triton_kernels import conv3d, eight_bits, group_norm_silu
from reducio_fast.triton_kernels import quantised_conv3d as op
from reducio_fast.triton_kernels.tables import INTERPRETER, arch_of

pytestmark = pytest.mark.slow


def types_of(arch):
    """The types that kernels of `arch` compute in. A GPU's compiler refuses the others; the interpreter runs all."""
    own = (eight_bits.FP8.get(arch), eight_bits.INT8.get(arch))
    return [t for t in eight_bits.EIGHT_BIT if arch == INTERPRETER or t in own]


def name_of(eight_bit):
    return str(eight_bit).removeprefix("torch.")


HERE = types_of(arch_of(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
# Triton 3.6's interpreter knows e4m3fnuz of AMD's GPUs by name only; its compiler takes it, see `compile-check`.
UNKNOWN = (torch.float8_e4m3fnuz,) if triton.__version__.startswith("3.6.") and not torch.cuda.is_available() else ()
TYPES = pytest.mark.parametrize("eight_bit", [t for t in HERE if t not in UNKNOWN], ids=name_of)
SHAPES = [((1, 3, 5, 7, 20), 24, 3), ((2, 2, 4, 4, 32), 16, 3), ((1, 1, 6, 5, 40), 9, 1)]  # x, K, taps in time
EPILOGUES = {
    "plain": (False, False, 0, 0, False),
    "residual, statistics": (True, True, 0, 0, False),
    "padded result": (True, False, 1, 1, True),
}


def arguments(shape, K, time, eight_bit):
    """x with quiet and loud channels, in a buffer with a border of zeros, and a packed weight."""
    C = shape[-1]
    x = torch.randn(shape) * torch.logspace(-1, 1, C)
    weight = torch.randn(K, C, time, 3, 3) / (9 * time * C) ** 0.5
    multiplier, packed, scale = op.pack(weight, x.abs().amax((0, 1, 2, 3)), eight_bit)
    x8 = eight_bits.to_eight_bits(x * multiplier, eight_bit)
    ring = time // 2
    padded = F.pad(x8.float(), (0, 0, 1, 1, 1, 1, ring, ring)).to(eight_bit)
    return x, weight, multiplier, padded, packed, scale


def test_a_gpu_gets_its_own_types():
    assert types_of("sm_90") == types_of("gfx950") == [torch.float8_e4m3fn]
    assert types_of("gfx942") == [torch.float8_e4m3fnuz]
    assert types_of("sm_80") == [torch.int8] and types_of("sm_75") == []
    assert types_of(INTERPRETER) == list(eight_bits.EIGHT_BIT)


@triton.jit
def quantise_kernel(x_ptr, out_ptr, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, eight_bits.quantise(tl.load(x_ptr + i), LIMIT, out_ptr.dtype.element_ty))


@TYPES
def test_rounding_is_torchs(eight_bit, device):
    """Every power of two and what lies around it, ties, subnormals, numbers beyond the largest."""
    powers = torch.exp2(torch.arange(-13, 11).float())
    near = powers[:, None] * (1 + torch.linspace(-0.3, 0.3, 121))  # steps of 1/200: across every rounding boundary
    ties = powers[:, None] * (1 + (torch.arange(8) + 0.5) / 8)
    x = torch.cat([near.flatten(), ties.flatten(), torch.tensor([0.0, 1e9, 127.9, 239.0, 447.0, 0.5, 1.5])])
    x = torch.cat([x, -x])
    x = F.pad(x, (0, -len(x) % 256)).to(device)
    out = torch.zeros(len(x), dtype=eight_bit, device=device)
    quantise_kernel[(len(x) // 256,)](x, out, eight_bits.limit_of(eight_bit), 256)
    assert torch.equal(out.float(), eight_bits.to_eight_bits(x, eight_bit).float())
    assert out.float().abs().max() == eight_bits.limit_of(eight_bit)


@TYPES
def test_norm_writes_what_torch_would(eight_bit, device):
    """Norm, activation, multiplier and rounding, inside a border of zeros. After a sum in another order, a value near a
    tie may round to the neighbouring number, but seldom."""
    x, weight, bias = torch.randn(2, 3, 5, 7, 20).to(device), torch.randn(20).to(device), torch.randn(20).to(device)
    multiplier = torch.logspace(1, 2.5, 20).to(device)
    out = group_norm_silu.launch(
        x, weight, bias, 4, front=1, back=1, halo=True, multiplier=multiplier, eight_bit=eight_bit
    )
    y = F.silu(F.group_norm(x.permute(0, 4, 1, 2, 3).double(), 4, weight.double(), bias.double(), 1e-6))
    y = (y.permute(0, 2, 3, 4, 1) * multiplier).clamp(-eight_bits.EIGHT_BIT[eight_bit], eight_bits.EIGHT_BIT[eight_bit])
    expected = y.round() if eight_bit == torch.int8 else y.float().to(eight_bit).double()
    inside = out.double()[:, 1:-1, 1:-1, 1:-1]
    different = inside != expected
    assert different.float().mean() < 1e-3
    assert (inside - expected).abs().le(expected.abs() / 8 + 1).all()
    assert out.dtype == eight_bit and out.double().abs().sum() == inside.abs().sum()  # the border is zero


@TYPES
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("shape", "K", "time"), SHAPES, ids=str)
def test_kernel(shape, K, time, epilogue, eight_bit, dtype, device, assert_right):
    """The oracle is torch's convolution, in float64, of the numbers that the 8-bit ones stand for."""
    with_residual, stats, front, back, halo = EPILOGUES[epilogue]
    *_, padded, packed, scale = (t.to(device) for t in arguments(shape, K, time, eight_bit))
    bias = torch.randn(K).to(device, dtype)
    residual = torch.randn(*shape[:-1], K).to(device, dtype) if with_residual else None
    given = (padded, packed, scale, bias, residual, stats, front, back, halo)
    (fast, fast_stats), (eager, eager_stats) = op.launch(*given), op.twin(*given)
    kernel = packed.double().view(K, time, 3, 3, shape[-1]).movedim(-1, 1)
    oracle = F.conv3d(padded.double().permute(0, 4, 1, 2, 3), kernel).permute(0, 2, 3, 4, 1) * scale.double() + bias
    oracle = oracle if residual is None else oracle + residual
    statistics = conv3d.statistics(oracle)
    oracle = F.pad(oracle, (0, 0, *[int(halo)] * 4, front, back))
    assert fast.dtype == eager.dtype == dtype
    assert_right(fast, eager, oracle)
    if stats:
        # Mean and 1 / deviation are judged together: a mean close to zero has no scale of its own.
        merged = [torch.cat(group_norm_silu._merged(s, 1, 1e-6)) for s in (fast_stats, eager_stats, statistics)]
        assert_right(*merged)


@pytest.mark.parametrize("eight_bit", eight_bits.EIGHT_BIT, ids=name_of)
def test_scales_lose_what_the_type_loses(eight_bit):
    """Against the convolution of the unrounded numbers there is an error, but no larger than the type's. Loud channels
    are 100 times the quiet ones, so one scale for all of x would lose far more in integers."""
    x, weight, _, padded, packed, scale = arguments((2, 3, 9, 8, 32), 24, 3, eight_bit)
    exact = F.conv3d(x.double().permute(0, 4, 1, 2, 3), weight.double(), padding=1).permute(0, 2, 3, 4, 1)
    out, _ = op.twin(padded, packed, scale, torch.zeros(24, dtype=torch.float64))
    error = float((out - exact).norm() / exact.norm())
    assert 0.003 < error < (0.02 if eight_bit == torch.int8 else 0.05)


def test_channels_that_are_never_seen_stay_finite():
    """Zero ranges and zero weights make no infinite scale."""
    weight, largest = torch.randn(8, 16, 3, 3, 3), torch.rand(16)
    largest[3], weight[:, 5], weight[2] = 0, 0, 0
    for tensor in op.pack(weight, largest, torch.float8_e4m3fn):
        assert torch.isfinite(tensor.float()).all()


def test_descriptor_path(monkeypatch, device):
    """Bulk copies, as on sm_90, give the same bytes."""
    if device.type == "cuda":
        pytest.skip("a GPU from sm_90 on takes descriptors by itself, an older one has none")
    *_, padded, packed, scale = arguments((1, 3, 5, 7, 32), 24, 3, torch.float8_e4m3fn)
    given = [t.to(device) for t in (padded, packed, scale, torch.randn(24))]
    plain, _ = op.launch(*given)
    monkeypatch.setattr(op, "descriptors_fit", lambda x, weight: True)
    assert torch.equal(op.launch(*given)[0], plain)


def test_ops_pass_opcheck(device):
    """In integers, since opcheck compares tensors and torch cannot compare FP8 tensors."""
    if torch.int8 not in HERE:
        pytest.skip("no kernels of integers on this GPU")
    *_, padded, packed, scale = arguments((1, 2, 4, 5, 16), 12, 3, torch.int8)
    given = [t.to(device) for t in (padded, packed, scale, torch.randn(12))]
    torch.library.opcheck(op.quantised_conv3d, (*given, None, True, 1, 1, True))
    x, row = torch.randn(1, 2, 4, 5, 16, device=device), torch.ones(16, device=device)
    torch.library.opcheck(
        group_norm_silu.group_norm_silu, (x, row, row, 4), {"multiplier": row, "eight_bit": torch.int8, "halo": True}
    )


def test_mistakes_are_named():
    *_, padded, packed, scale = arguments((1, 2, 4, 5, 16), 12, 3, torch.int8)
    bias, run = torch.randn(12), torch.ops.reducio_fast.quantised_conv3d
    for given, message in (
        ((padded.float(), packed.float(), scale, bias), "x_padded has dtype=torch.float32"),
        ((padded, packed.to(torch.float8_e4m3fn), scale, bias), "weight has dtype=torch.float8_e4m3fn"),
        ((padded, packed, scale[:-1], bias), r"scale has shape \(11,\)"),
        ((padded, packed, scale.half(), bias), "scale has dtype=torch.float16"),
        ((padded, packed, scale, bias[:-1]), r"bias has shape \(11,\)"),
        ((padded, packed[:, :-1].contiguous(), scale, bias), "not a multiple"),
        ((padded, packed, scale, bias, torch.randn(1, 2, 4, 5, 11)), "residual has shape"),
        ((padded, packed, scale, bias, None, False, -1), "must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*given)
    x, norm = torch.randn(1, 2, 4, 5, 16), torch.ops.reducio_fast.group_norm_silu
    for kwargs, message in (
        ({"multiplier": torch.ones(16)}, "both or neither"),
        ({"multiplier": torch.ones(16), "eight_bit": torch.float16}, "one of"),
        ({"multiplier": torch.ones(15), "eight_bit": torch.int8}, r"multiplier has shape \(15,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            norm(x, torch.ones(16), torch.ones(16), 4, **kwargs)
