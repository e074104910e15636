"""attention against PyTorch's scaled dot product attention and log-sum-exp."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from reducio_fast.triton_kernels import attention as op
from reducio_fast.triton_kernels.launch import launcher

# B, L, S, N, D
SELF = [(1, 64, 64, 1, 72), (2, 17, 17, 1, 64)]
CROSS = [(1, 16, 64, 2, 64), (1, 37, 53, 2, 72), (1, 5, 70, 1, 16), (1, 33, 17, 1, 40), (1, 3, 1, 1, 128)]


def inputs(B: int, L: int, S: int, N: int, D: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(B, L, N, D, dtype=torch.float64)
    return q, *torch.randn(2, B, S, N, D, dtype=torch.float64).unbind()


def by_hand(q, k, v, seen=None, scale=None):
    """(out, lse), softmax written out; `seen` [B or 1, L or 1, S] hides keys."""
    score = torch.einsum("blnd,bsnd->bnls", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if seen is not None:
        score = score.masked_fill(~seen[:, None], -torch.inf)
    lse = torch.logsumexp(score, -1)
    return torch.einsum("bnls,bsnd->blnd", torch.exp(score - lse[..., None]).nan_to_num(), v), lse


@pytest.mark.parametrize("shape", SELF + CROSS, ids=str)
@pytest.mark.slow
def test_kernel_equals_twin(shape, check_kernel):
    check_kernel(op.launch, op.twin, *inputs(*shape))


def test_kernel_equals_twin_with_a_scale(check_kernel):
    check_kernel(op.launch, op.twin, *inputs(1, 20, 40, 1, 24), None, 0.7)


@pytest.mark.parametrize("D", [72, 64])
@pytest.mark.slow
def test_padded_keys_are_never_read(D, check_kernel):
    """Counts of 0, 1, a whole block, an odd number and all; the keys and values behind them are NaN."""
    q, k, v = inputs(5, 9, 53, 1, D)
    count = torch.tensor([0, 1, 32, 21, 53], dtype=torch.int32)
    for x in (k, v):
        for item, n in enumerate(count.tolist()):
            x[item, n:] = float("nan")
    out = check_kernel(op.launch, op.twin, q, k, v, count)
    assert (out[0] == 0).all()


@pytest.mark.parametrize("frame", [1, 9, 16, 60], ids=lambda n: f"frame{n}")
@pytest.mark.slow
def test_frames_see_themselves_and_the_past(frame, check_kernel):
    q, k, v = inputs(1, 60, 60, 1, 64)
    check_kernel(op.launch, op.twin, q, k, v, None, None, frame)


def test_frames_and_counts_together(check_kernel):
    count = torch.tensor([0, 13, 45], dtype=torch.int32)
    check_kernel(op.launch, op.twin, *inputs(3, 45, 45, 1, 72), count, None, 9)


def test_views_of_a_fused_projection_need_no_copy(check_kernel, dtype, device):
    fused = torch.randn(1, 19, 3, 2, 72, dtype=torch.float64)
    out = check_kernel(op.launch, op.twin, *fused.unbind(2))
    fused = fused.to(device, dtype)
    assert out.is_contiguous()
    assert torch.equal(out, op.launch(*(x.contiguous() for x in fused.unbind(2))))


def test_one_frame_of_keys_serves_all_frames(check_kernel):
    """Fusion attention: all items of a batch share the content's keys and values (a batch stride of 0)."""
    q, k, v = inputs(3, 20, 33, 1, 64)
    check_kernel(op.launch, op.twin, q, k[:1].expand_as(k), v[:1].expand_as(v))


def test_large_scores_do_not_overflow(check_kernel):
    """Scores of hundreds: their exponentials overflow float32, their differences do not."""
    q, k, v = inputs(1, 20, 40, 1, 32)
    q, k = q * 8, k * 8
    assert torch.einsum("blnd,bsnd->bnls", q, k).max() / 32**0.5 > 100
    check_kernel(op.launch, op.twin, q, k, v)


@pytest.mark.parametrize("counted", [False, True], ids=["all", "counted"])
@pytest.mark.slow
def test_log_sum_exp(counted, dtype, device):
    q, k, v = (x.to(device, dtype) for x in inputs(3, 19, 53, 1, 72))
    count = torch.tensor([0, 7, 53], dtype=torch.int32, device=device) if counted else None
    out, lse = op.launch(q, k, v, count, with_lse=True)
    seen = None if count is None else (torch.arange(53, device=device) < count[:, None])[:, None]
    expected_out, expected = by_hand(q.double(), k.double(), v.double(), seen)
    assert lse.shape == (3, 1, 19)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)
    assert (out.double() - expected_out).norm() <= 2e-3 * expected_out.norm()


@pytest.mark.parametrize("frame", [0, 7])
@pytest.mark.parametrize("counted", [False, True], ids=["all", "counted"])
def test_twin_is_softmax_written_out(frame, counted):
    q, k, v = inputs(3, 22, 22, 2, 24)
    count = torch.tensor([0, 5, 22], dtype=torch.int32) if counted else None
    token = torch.arange(22)
    seen = torch.ones(3, 22, 22, dtype=torch.bool)
    if counted:
        seen &= (token < count[:, None])[:, None]
    if frame:
        seen &= token // frame <= token[:, None] // frame
    torch.testing.assert_close(op.twin(q, k, v, count, None, frame), by_hand(q, k, v, seen)[0])
    if not counted and not frame:
        expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        torch.testing.assert_close(op.twin(q, k, v), expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("D", "parts"), [(72, (64, 16)), (64, (64, 0)), (40, (32, 16)), (16, (16, 0)), (8, (16, 0)), (80, (64, 16))]
)
def test_head_dim_splits_into_a_power_of_two_and_a_rest(D, parts):
    assert op.split(D) == parts


@triton.jit
def offsets_kernel(out_ptr, item, head, stride_b, stride_n, row, stride, ALIGN: tl.constexpr):
    zero = tl.program_id(0)
    tl.store(out_ptr, op.head_offset(zero + item, zero + head, stride_b, stride_n, ALIGN))
    tl.store(out_ptr + 1, op.row_offset(zero + row, stride, ALIGN))


def test_addresses_are_64_bit(device):
    out = torch.empty(2, dtype=torch.int64, device=device)
    numbers = {"item": 31, "head": 2**20, "stride_b": 102400 * 3456, "stride_n": 2**12, "row": 2**30, "stride": 3456}
    launcher(offsets_kernel)[(1,)](out, *numbers.values(), ALIGN=8)
    assert out.tolist() == [31 * 102400 * 3456 + 2**32, 2**30 * 3456]


@pytest.mark.slow
def test_op_passes_opcheck():
    q, k, v = torch.randn(2, 9, 3, 2, 16).unbind(2)
    torch.library.opcheck(op.attention, (q, k, v, torch.tensor([4, 9], dtype=torch.int32), 0.3))


def test_mistakes_are_named():
    run = torch.ops.reducio_fast.attention
    q, k, v = (x.float() for x in inputs(2, 6, 8, 1, 16))
    with pytest.raises(ValueError, match=r"k has shape \(2, 8, 1, 8\), it must be \(2, any, 1, 16\)"):
        run(q, k[..., :8], v)
    with pytest.raises(ValueError, match=r"v has shape \(2, 5, 1, 16\), it must be \(2, 8, 1, 16\)"):
        run(q, k, v[:, :5])
    with pytest.raises(ValueError, match="k has dtype=torch.float16, q has dtype=torch.float32"):
        run(q, k.half(), v.half())
    with pytest.raises(ValueError, match=r"v has stride\(-1\)=2, contiguous has stride\(-1\)=1"):
        run(q, k, torch.randn(2, 8, 1, 32)[..., ::2])
    with pytest.raises(ValueError, match=r"k has stride\(1\)=0, it must be from 1"):
        run(q, k[:, :1].expand_as(k), v)
    with pytest.raises(ValueError, match="key_count has dtype=torch.int64"):
        run(q, k, v, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"key_count has shape \(3,\), it must be \(2\)"):
        run(q, k, v, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="scale=-1.0, it must be positive"):
        run(q, k, v, None, -1.0)
    with pytest.raises(ValueError, match="frame=3 with L=6, S=8"):
        run(q, k, v, None, None, 3)
