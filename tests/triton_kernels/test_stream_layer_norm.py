"""stream_layer_norm against the additions, the norm and the blend that it joins, in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from reducio_fast.triton_kernels import stream_layer_norm as op
from reducio_fast.triton_kernels.launch import launcher

pytestmark = pytest.mark.slow

# A program takes four tokens; most of these counts are not multiples of four.
SHAPES = [(2, 16, 64), (1, 3, 72), (3, 5, 128), (2, 9, 320), (3, 7, 33)]
KINDS = ("norm", "branch", "blend", "both")


def arguments(shape: tuple[int, int, int], kind: str, row: bool = True) -> tuple[torch.Tensor | float | None, ...]:
    """Arguments of the op, in float64."""
    B, _, D = shape
    x, branch, other = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    rows, affine = torch.randn(2, B, D, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64)
    blends = kind in ("blend", "both")
    return (
        *(x * 3 + 1, rows[0] if row else None, affine[0], affine[1], 1e-5),
        branch * 2 if kind in ("branch", "both") else None,
        *((other, rows[1], torch.tensor(0.3, dtype=torch.float64)) if blends else (None, None, None)),
    )


@pytest.mark.parametrize("row", [True, False], ids=["row", "no row"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_twin(shape, kind, row, check_kernel):
    out, stream = check_kernel(op.launch, op.twin, *arguments(shape, kind, row))
    assert out.shape == shape and stream.shape == ((0,) if kind == "norm" else shape)


@pytest.mark.parametrize("row", [True, False], ids=["row", "no row"])
@pytest.mark.parametrize("kind", KINDS)
def test_twin_is_the_chain_of_operators(kind, row):
    x, added, weight, bias, eps, branch, other, other_row, share = given = arguments((2, 5, 24), kind, row)
    kept = [None if not isinstance(each, torch.Tensor) else each.clone() for each in given]
    out, stream = op.twin(*given)
    total = x + (added[:, None] if row else 0) + (0 if branch is None else branch)
    torch.testing.assert_close(out, F.layer_norm(total, (24,), weight, bias, eps))
    if other is not None:
        total = share * (other + other_row[:, None]) + (1 - share) * total
    if kind != "norm":
        torch.testing.assert_close(stream, total)
    for each, before in zip(given, kept, strict=True):
        assert before is None or torch.equal(each, before), "arguments stay as they are"


def test_kernel_survives_a_large_mean(check_kernel):
    x, *rest = arguments((1, 4, 256), "branch")
    check_kernel(op.launch, op.twin, x + 300, *rest)


def test_kernel_norms_the_sum_before_rounding(device):
    """1 + 2^-12 rounds to 1 in half precision, yet the norm still sees the difference."""
    x, zero = torch.ones(1, 1, 16, dtype=torch.float16, device=device), torch.zeros(16, device=device).half()
    branch = torch.zeros_like(x)
    branch[..., ::2] = 2**-12
    out, stream = op.launch(x, None, zero + 1, zero, 1e-12, branch)
    assert torch.equal(stream, x) and (out.abs() > 0.9).all()


@triton.jit
def offsets_kernel(out_ptr, first, D: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, 2), op.token_offsets(first, 2, D))


def test_addresses_are_64_bit(device):
    out = torch.empty(2, dtype=torch.int64, device=device)
    launcher(offsets_kernel)[(1,)](out, 2**31 - 2, D=1280)
    assert out.tolist() == [(2**31 - 2) * 1280, (2**31 - 1) * 1280]


@pytest.mark.parametrize("kind", KINDS)
def test_op_passes_opcheck(kind):
    given = [each.float() if isinstance(each, torch.Tensor) else each for each in arguments((2, 5, 48), kind)]
    torch.library.opcheck(op.stream_layer_norm, tuple(given))


def test_mistakes_are_named():
    run = torch.ops.reducio_fast.stream_layer_norm
    x, row, weight = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(8)
    with pytest.raises(ValueError, match=r"branch_BLD has shape=\(2, 4, 8\), x_BLD has shape=\(2, 3, 8\)"):
        run(x, row, weight, weight, 1e-5, torch.randn(2, 4, 8))
    with pytest.raises(ValueError, match=r"row_BD has shape \(1, 8\), it must be \(2, 8\)"):
        run(x, row[:1], weight, weight)
    with pytest.raises(ValueError, match=r"weight_D has shape \(4,\), it must be \(8\)"):
        run(x, row, weight[:4], weight)
    with pytest.raises(ValueError, match="row_BD has dtype=torch.float16, x_BLD has dtype=torch.float32"):
        run(x, row.half(), weight, weight)
    with pytest.raises(ValueError, match="other_row_BD has presence=False, other_BLD has presence=True"):
        run(x, row, weight, weight, 1e-5, None, x, None, weight[:1])
    with pytest.raises(ValueError, match=r"share has shape \(8,\), it must be one number"):
        run(x, row, weight, weight, 1e-5, None, x, row, weight)
    with pytest.raises(ValueError, match="x_BLD has strides .* contiguous"):
        run(x.transpose(0, 1).contiguous().transpose(0, 1), row, weight, weight)
