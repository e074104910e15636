"""attention: out = softmax(scale q k^T + mask) v, in one pass over the keys, nothing of size L x S in memory.

Twin: `F.scaled_dot_product_attention`. Legend: B batch, L queries, S keys, N heads, D head dim. D splits into D0, a
power of two, and D1 columns of a second block: 72 costs 64 + 16 columns and not 128.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import TYPES, Variant, launcher, on_device, triton_op, use_descriptors
from .shape_checks import check_same, check_shape, check_tensors
from .tables import OPTIONS, arch_of, settings

OP = "attention"
HIDDEN = tl.constexpr(-1.0e30)  # the score of a masked key: finite, since inf - inf would be NaN
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def head_offset(item, head, stride_b, stride_n, ALIGN: tl.constexpr):
    """Where a head of an item begins, in int64: the tokens of a batch of clips, all heads, pass 2^31 elements."""
    return tl.multiple_of(item.to(tl.int64) * stride_b + head.to(tl.int64) * stride_n, ALIGN)


@triton.jit
def row_offset(row, stride, ALIGN: tl.constexpr):
    """Where a block of rows begins within its head, in int64. ALIGN: a stride of 72 says 8, hence 16-byte loads."""
    return tl.multiple_of(tl.cast(row, tl.int64) * stride, ALIGN)


@triton.jit
def load_block(
    source,  # the head's first element, or its descriptor
    start,  # first row
    end,  # rows that exist
    stride,  # elements between rows
    FIRST: tl.constexpr,  # first column
    WIDTH: tl.constexpr,  # columns of the block, a power of two
    D: tl.constexpr,  # columns that exist
    ROWS: tl.constexpr,  # rows of the block
    ALIGN: tl.constexpr,  # elements that every stride is a multiple of, at most 16
    MASK: tl.constexpr,  # whether rows may lie beyond `end`
    DESCRIPTORS: tl.constexpr,  # whether blocks come by bulk copy (sm_90 on)
):
    """Rows [start, start + ROWS), columns [FIRST, FIRST + WIDTH) of a head; zero outside of `end` rows, D columns."""
    if DESCRIPTORS:
        x = source.load([start, FIRST])
    else:
        row, column = tl.arange(0, ROWS), FIRST + tl.arange(0, WIDTH)
        offsets = tl.multiple_of(row * stride, ALIGN)[:, None] + column[None, :]
        pointers = source + row_offset(start, stride, ALIGN) + offsets
        if MASK and FIRST + WIDTH > D:
            x = tl.load(pointers, mask=(start + row < end)[:, None] & (column < D)[None, :], other=0.0)
        elif MASK:
            x = tl.load(pointers, mask=(start + row < end)[:, None], other=0.0)
        elif FIRST + WIDTH > D:
            x = tl.load(pointers, mask=(column < D)[None, :], other=0.0)
        else:
            x = tl.load(pointers)
    return x


@triton.jit
def attend(
    q_0,  # [BLOCK_L, D0] queries
    q_1,  # [BLOCK_L, D1], their last columns
    k_0,  # keys of the head, columns below D0
    k_1,  # keys, the other columns
    v_0,  # values, columns below D0
    v_1,  # values, the other columns
    start,  # first key of the block
    end,  # keys that exist
    limit,  # int32 [BLOCK_L]: keys that each query sees
    scale,  # of the scores, times log2(e)
    best,  # float32 [BLOCK_L]: largest scaled score so far
    total,  # float32 [BLOCK_L]: sum of weights so far
    acc_0,  # float32 [BLOCK_L, D0]: weighted sum of values so far
    acc_1,  # float32 [BLOCK_L, D1]
    k_stride_s,  # elements from key to key
    v_stride_s,  # elements from value to value
    D: tl.constexpr,  # head dim
    D0: tl.constexpr,  # its largest power of two
    D1: tl.constexpr,  # columns of a second block for the rest, 0 for none
    BLOCK_S: tl.constexpr,  # keys of the block
    ALIGN: tl.constexpr,  # elements that every stride is a multiple of, at most 16
    MASK: tl.constexpr,  # whether some queries do not see some of these keys
    DESCRIPTORS: tl.constexpr,  # whether blocks come by bulk copy (sm_90 on)
    PRECISION: tl.constexpr,  # of products of float32: "ieee", no TF32
):
    """Takes one block of keys into the running softmax: best score, sum of weights, weighted sum of values."""
    k = load_block(k_0, start, end, k_stride_s, 0, D0, D, BLOCK_S, ALIGN, MASK, DESCRIPTORS)
    score = tl.dot(q_0, k.T, input_precision=PRECISION)
    if D1:
        k = load_block(k_1, start, end, k_stride_s, D0, D1, D, BLOCK_S, ALIGN, MASK, DESCRIPTORS)
        score = tl.dot(q_1, k.T, score, input_precision=PRECISION)
    if MASK:
        key = start + tl.arange(0, BLOCK_S)
        score = tl.where(key[None, :] < limit[:, None], score, HIDDEN)
    new_best = tl.maximum(best, tl.max(score, 1) * scale)
    # Fused by name: with a rounding between, scores of hundreds would lose the digits that their difference needs.
    weight = tl.exp2(tl.fma(score, scale, -new_best[:, None]))
    shrink = tl.exp2(best - new_best)
    total = total * shrink + tl.sum(weight, 1)
    v = load_block(v_0, start, end, v_stride_s, 0, D0, D, BLOCK_S, ALIGN, MASK, DESCRIPTORS)
    weight = weight.to(v.dtype)
    acc_0 = tl.dot(weight, v, acc_0 * shrink[:, None], input_precision=PRECISION)
    if D1:
        v = load_block(v_1, start, end, v_stride_s, D0, D1, D, BLOCK_S, ALIGN, MASK, DESCRIPTORS)
        acc_1 = tl.dot(weight, v, acc_1 * shrink[:, None], input_precision=PRECISION)
    return new_best, total, acc_0, acc_1


@triton.jit
def attention_kernel(
    q_ptr,  # [B, L, N, D]
    k_ptr,  # [B, S, N, D]
    v_ptr,  # [B, S, N, D]
    key_count_ptr,  # int32 [B], read if COUNTED
    out_ptr,  # [B, L, N, D], contiguous
    lse_ptr,  # float32 [B, N, L], written if WITH_LSE
    L,  # queries
    S,  # keys
    N,  # heads
    frame,  # tokens a frame, read if FRAME
    scale,  # of the scores, times log2(e)
    q_stride_b,  # elements from item to item
    q_stride_l,  # elements from query to query
    q_stride_n,  # elements from head to head
    k_stride_b,
    k_stride_s,
    k_stride_n,
    v_stride_b,
    v_stride_s,
    v_stride_n,
    D: tl.constexpr,  # head dim
    D0: tl.constexpr,  # its largest power of two
    D1: tl.constexpr,  # columns of a second block for the rest, 0 for none
    ALIGN: tl.constexpr,  # elements that every stride is a multiple of, at most 16
    COUNTED: tl.constexpr,  # whether items have counts of keys
    FRAME: tl.constexpr,  # whether a query sees no later frame
    WITH_LSE: tl.constexpr,  # whether the logarithm of the sums is kept
    DESCRIPTORS: tl.constexpr,  # whether blocks come by bulk copy (sm_90 on)
    PRECISION: tl.constexpr,  # of products of float32: "ieee", no TF32
    BLOCK_L: tl.constexpr,  # queries a program
    BLOCK_S: tl.constexpr,  # keys a step of the loop
):
    """One program a block of queries of a head. Neighbours share a head, so its keys and values stay in the cache.

    `scale` comes times log2(e): exponentials are powers of two. DESCRIPTORS: keys and values come by bulk copy.
    """
    # Offsets are then provably not negative, which AMD's buffer loads need.
    tl.assume(q_stride_l > 0)
    tl.assume(k_stride_s > 0)
    tl.assume(v_stride_s > 0)
    blocks = tl.cdiv(L, BLOCK_L)
    pid = tl.program_id(0)
    first = pid % blocks * BLOCK_L
    head, item = pid // blocks % N, pid // blocks // N
    query = first + tl.arange(0, BLOCK_L)

    end = S
    if COUNTED:
        end = tl.minimum(tl.load(key_count_ptr + item), S)
    whole = end  # keys that every query of the block sees: no mask for their blocks
    limit = tl.full((BLOCK_L,), 0, tl.int32) + end  # of each query
    if FRAME:
        limit = tl.minimum(limit, (query // frame + 1) * frame)
        whole = tl.minimum(end, (first // frame + 1) * frame)
        end = tl.minimum(end, ((tl.minimum(first + BLOCK_L, L) - 1) // frame + 1) * frame)
    whole = whole // BLOCK_S * BLOCK_S

    q_ptr += head_offset(item, head, q_stride_b, q_stride_n, ALIGN)
    k_ptr += head_offset(item, head, k_stride_b, k_stride_n, ALIGN)
    v_ptr += head_offset(item, head, v_stride_b, v_stride_n, ALIGN)
    q_0 = load_block(q_ptr, first, L, q_stride_l, 0, D0, D, BLOCK_L, ALIGN, True, False)
    q_1 = q_0
    k_0, k_1, v_0, v_1 = k_ptr, k_ptr, v_ptr, v_ptr
    if DESCRIPTORS:
        # Rows from `end` and columns from D on read as zero: what lies there may be NaN, and 0 * NaN would count.
        rows = tl.maximum(end, 1)  # a descriptor of none is illegal, even if nothing is read by it
        k_0 = tl.make_tensor_descriptor(k_ptr, [rows, D], [k_stride_s, 1], [BLOCK_S, D0])
        v_0 = tl.make_tensor_descriptor(v_ptr, [rows, D], [v_stride_s, 1], [BLOCK_S, D0])
    acc_0 = tl.zeros((BLOCK_L, D0), tl.float32)
    acc_1 = tl.zeros((BLOCK_L, 16), tl.float32)
    if D1:
        q_1 = load_block(q_ptr, first, L, q_stride_l, D0, D1, D, BLOCK_L, ALIGN, True, False)
        acc_1 = tl.zeros((BLOCK_L, D1), tl.float32)
        if DESCRIPTORS:
            k_1 = tl.make_tensor_descriptor(k_ptr, [rows, D], [k_stride_s, 1], [BLOCK_S, D1])
            v_1 = tl.make_tensor_descriptor(v_ptr, [rows, D], [v_stride_s, 1], [BLOCK_S, D1])
    best = tl.full((BLOCK_L,), HIDDEN, tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    for start in tl.range(0, whole, BLOCK_S):
        best, total, acc_0, acc_1 = attend(
            q_0,
            q_1,
            k_0,
            k_1,
            v_0,
            v_1,
            start,
            end,
            limit,
            scale,
            best,
            total,
            acc_0,
            acc_1,
            k_stride_s,
            v_stride_s,
            D,
            D0,
            D1,
            BLOCK_S,
            ALIGN,
            False,
            DESCRIPTORS,
            PRECISION,
        )
    for start in tl.range(whole, end, BLOCK_S):
        best, total, acc_0, acc_1 = attend(
            q_0,
            q_1,
            k_0,
            k_1,
            v_0,
            v_1,
            start,
            end,
            limit,
            scale,
            best,
            total,
            acc_0,
            acc_1,
            k_stride_s,
            v_stride_s,
            D,
            D0,
            D1,
            BLOCK_S,
            ALIGN,
            True,
            DESCRIPTORS,
            PRECISION,
        )

    share = (1.0 / tl.where(total > 0, total, 1.0))[:, None]  # no key at all leaves zeros
    out_ptr += (item.to(tl.int64) * L + first) * N * D + head * D
    offsets = (query - first)[:, None] * (N * D)
    d = tl.arange(0, D0)[None, :]
    inside = (query < L)[:, None]
    tl.store(out_ptr + offsets + d, (acc_0 * share).to(out_ptr.dtype.element_ty), mask=inside & (d < D))
    if D1:
        d = D0 + tl.arange(0, D1)[None, :]
        tl.store(out_ptr + offsets + d, (acc_1 * share).to(out_ptr.dtype.element_ty), mask=inside & (d < D))
    if WITH_LSE:
        lse = tl.where(total > 0, (best + tl.log2(tl.where(total > 0, total, 1.0))) * LN_2, float("-inf"))
        tl.store(lse_ptr + (item.to(tl.int64) * N + head) * L + query, lse, mask=query < L)


def split(D: int) -> tuple[int, int]:
    """(D0, D1): the widest power of two in D, at least 16, and a block for the rest: 72 -> (64, 16), 64 -> (64, 0)."""
    D0 = max(16, 1 << (D.bit_length() - 1))
    return D0, 0 if D <= D0 else max(16, triton.next_power_of_2(D - D0))


def shape_class(D: int, dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else str(D)


@on_device
def launch(
    q_BLND: Tensor,
    k_BSND: Tensor,
    v_BSND: Tensor,
    key_count_B: Tensor | None = None,
    scale: float | None = None,
    frame: int = 0,
    with_lse: bool = False,
) -> Any:
    """Runs the kernel: on a GPU, or on CPU tensors in Triton's interpreter. Arguments as `attention`.

    `with_lse` returns (out, lse): the logarithm of the sum of exponentials of each query's scores, float32 [B, N, L].
    """
    B, L, N, D = q_BLND.shape
    out = torch.empty((B, L, N, D), dtype=q_BLND.dtype, device=q_BLND.device)
    lse = torch.empty((B, N, L), dtype=torch.float32, device=q_BLND.device) if with_lse else None
    D0, D1 = split(D)
    strides = [x.stride()[:3] for x in (q_BLND, k_BSND, v_BSND)]
    align = math.gcd(*(n for three in strides for n in three), 16)
    # The copy engine needs 16-byte aligned addresses. We test the offset, not data_ptr: torch.compile traces this code
    # without memory.
    aligned = q_BLND.element_size() == 2 and all(x.storage_offset() % 8 == 0 for x in (k_BSND, v_BSND))
    chosen = settings(OP, shape_class(D, q_BLND.dtype), arch_of(q_BLND.device))
    launcher(attention_kernel)[(triton.cdiv(L, chosen["BLOCK_L"]) * B * N,)](
        q_BLND,
        k_BSND,
        v_BSND,
        q_BLND if key_count_B is None else key_count_B,  # never read without a count
        out,
        out if lse is None else lse,
        L,
        k_BSND.shape[1],
        N,
        frame,
        (D**-0.5 if scale is None else scale) / math.log(2),
        *(n for three in strides for n in three),
        D=D,
        D0=D0,
        D1=D1,
        ALIGN=align,
        COUNTED=key_count_B is not None,
        FRAME=frame > 0,
        WITH_LSE=with_lse,
        DESCRIPTORS=aligned and align % 8 == 0 and use_descriptors(q_BLND.device),
        PRECISION="ieee",  # matters for float32 only
        **chosen,
    )
    return out if lse is None else (out, lse)


def twin(
    q_BLND: Tensor,
    k_BSND: Tensor,
    v_BSND: Tensor,
    key_count_B: Tensor | None = None,
    scale: float | None = None,
    frame: int = 0,
) -> Tensor:
    """The same in plain PyTorch: what runs on a CPU, and the oracle of the tests."""
    mask_B11S = None
    if key_count_B is not None:
        seen_BS = torch.arange(k_BSND.shape[1], device=k_BSND.device) < key_count_B[:, None]
        # Padding may hold anything, and NaN would pass through a mask.
        k_BSND, v_BSND = (torch.where(seen_BS[:, :, None, None], x, 0.0) for x in (k_BSND, v_BSND))
        mask_B11S = seen_BS[:, None, None]
    q_BNLD, k_BNSD, v_BNSD = (x.transpose(1, 2) for x in (q_BLND, k_BSND, v_BSND))
    if not frame or not q_BNLD.shape[2]:
        out = F.scaled_dot_product_attention(q_BNLD, k_BNSD, v_BNSD, attn_mask=mask_B11S, scale=scale)
        return out.transpose(1, 2).contiguous()
    # Each frame attends to all keys up to its own end: no mask of size L x S, and no work on masked keys.
    L, parts = q_BNLD.shape[2], []
    for start in range(0, L, frame):
        end = min(start + frame, L)
        mask = None if mask_B11S is None else mask_B11S[..., :end]
        q, k, v = q_BNLD[:, :, start:end], k_BNSD[:, :, :end], v_BNSD[:, :, :end]
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2))
    return torch.cat(parts, dim=1)


@triton_op("attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_count: Tensor | None = None,
    scale: float | None = None,
    frame: int = 0,
) -> Tensor:
    """Scaled dot product attention, heads before channels as projections write them. Returns [B, L, N, D], contiguous.

    Args:
        q, k, v: [B, L, N, D], [B, S, N, D], [B, S, N, D]; the last stride is 1, and none is 0 over tokens. Views of a
            fused projection will do.
        key_count: int32 [B], number of keys that an item attends to; the other keys are padding and may hold anything.
            0 gives an output of zeros.
        scale: factor of the scores, at least 1e-20; None means 1 / sqrt(D).
        frame: tokens per frame, or 0. If positive, query l sees key s only if s // frame <= l // frame: all of its own
            frame and of earlier ones. This needs self-attention, L = S, and finite values: those of later frames are
            multiplied by 0.

    Raises ValueError for arguments that differ in device, dtype or size.
    """
    check_tensors(OP, q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_shape(OP, name, x, None, None, None, None)
    B, L, N, D = q.shape
    S = k.shape[1]
    check_shape(OP, "k", k, B, None, N, D)
    check_shape(OP, "v", v, B, S, N, D)
    check_same(OP, "stride(-1)", contiguous=1, q=q.stride(-1), k=k.stride(-1), v=v.stride(-1))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not 0 < x.stride(1) < 1 << 23:  # a block's rows are addressed in 32 bits
            raise ValueError(f"{OP}: {name} has stride(1)={x.stride(1)}, it must be from 1 to {(1 << 23) - 1}")
    if key_count is not None:
        check_shape(OP, "key_count", key_count, B)
        check_same(OP, "dtype", expected=torch.int32, key_count=key_count.dtype)
        check_same(OP, "device", q=q.device, key_count=key_count.device)
    if scale is not None and not 1e-20 <= scale < math.inf:
        raise ValueError(f"{OP}: scale={scale}, it must be positive, from 1e-20 on, and finite")
    if frame < 0 or (frame and L != S):
        raise ValueError(f"{OP}: frame={frame} with L={L}, S={S}: frames order self-attention, and are at least 1 long")
    return (launch if q.is_cuda else twin)(q, k, v, key_count, scale, frame)


def variants(arch: str) -> Iterator[Variant]:
    """What is shipped for `arch`: D=72 of the transformer, D=64 of the VAE; other widths share the settings of 128."""
    shapes = [(72, ""), (72, " counted"), (64, ""), (64, " counted"), (64, " frames"), (128, "")]
    cases = [(dtype, *shape) for dtype in (torch.bfloat16, torch.float16) for shape in shapes]
    cases += [(torch.float32, 72, " counted"), (torch.float32, 64, " frames")]
    heads = ("q_stride_n", "k_stride_n", "v_stride_n")
    strides = [f"{x}_stride_{n}" for x, names in (("q", "bl"), ("k", "bs"), ("v", "bs")) for n in names]
    for dtype, D, features in cases:
        D0, D1 = split(D)
        chosen = settings(OP, shape_class(D, dtype), arch)
        half = dtype != torch.float32
        yield Variant(
            name=f"{OP} {TYPES[dtype]} {D}{features}",
            kernel=attention_kernel,
            signature={
                # `launch` fills unused pointers: lse_ptr with the output, key_count_ptr with the queries.
                **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr"), f"*{TYPES[dtype]}"),
                "key_count_ptr": "*i32" if features == " counted" else f"*{TYPES[dtype]}",
                **dict.fromkeys(("L", "S", "N", "frame", *strides, *heads), "i32"),
                "scale": "fp32",
            },
            constants={
                "D": D,
                "D0": D0,
                "D1": D1,
                "ALIGN": math.gcd(D, 16),
                "COUNTED": features == " counted",
                "FRAME": features == " frames",
                "WITH_LSE": False,
                "PRECISION": "ieee",
                "DESCRIPTORS": half and arch in ("sm_90", "sm_100"),
                "BLOCK_L": chosen["BLOCK_L"],
                "BLOCK_S": chosen["BLOCK_S"],
            },
            options={name: chosen[name] for name in OPTIONS if name in chosen},
            unaligned=("L", "S", "N", "frame", *(heads if D % 16 else ())),
            matrix=half,
            bulk_copy=half,
        )
