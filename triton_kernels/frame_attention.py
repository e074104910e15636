"""frame_attention: each position of a clip attends over the clip's frames, read in place.

Twin: the temporal transformer block of `reference/svd/unet.py`, which permutes to [B * L, T, C] and back.

A position has as few keys as the clip has frames, so a program holds all of them: no running softmax, no permutation.
Legend: B items, T frames, L positions, N heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import HIDDEN
from .launch import TYPES, Variant, launcher, on_device, triton_op
from .shape_checks import check_contiguous, check_shape, check_tensors
from .tables import OPTIONS, arch_of, settings

OP = "frame_attention"
MOST_FRAMES = 64  # above, the scores of all frames do not fit into the registers of a program


@triton.jit
def row_number(item, t, position, T, L):
    """Of a frame's position, in int64: 25 frames of 576x1024 latents times 3 * 320 channels pass 2^31 elements."""
    return ((item * T + t) * L + position).to(tl.int64)


@triton.jit
def frame_attention_kernel(
    qkv_ptr,  # [B, T, L, 3, N, D]
    out_ptr,  # [B, T, L, N, D]
    T,  # frames
    L,  # positions of a frame
    scale,  # of the scores
    N: tl.constexpr,  # heads
    D: tl.constexpr,  # channels of a head
    BLOCK_T: tl.constexpr,  # frames, up to a power of two
    BLOCK_D: tl.constexpr,  # channels of a head, up to a power of two
):
    """One program a position and head; heads of a position follow each other, as their channels do."""
    head = tl.program_id(0) % N
    position = tl.program_id(0) // N % L
    item = tl.program_id(0) // N // L
    t, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    rows = row_number(item, t, position, T, L)
    mask = (t < T)[:, None] & (d < D)[None, :]
    ptrs = qkv_ptr + rows[:, None] * (3 * N * D) + head * D + d[None, :]
    q = tl.load(ptrs, mask=mask, other=0.0)
    k = tl.load(ptrs + N * D, mask=mask, other=0.0)
    v = tl.load(ptrs + 2 * N * D, mask=mask, other=0.0)
    score = tl.dot(q, k.T, input_precision="ieee") * scale
    score = tl.where((t < T)[None, :], score, HIDDEN)
    weight = tl.exp(score - tl.max(score, 1)[:, None])
    total = tl.sum(weight, 1)
    y = tl.dot(weight.to(v.dtype), v, input_precision="ieee") / total[:, None]
    out_ptrs = out_ptr + rows[:, None] * (N * D) + head * D + d[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@on_device
def launch(qkv: Tensor, scale: float | None = None) -> Tensor:
    """Runs the kernel: on a GPU, or on CPU tensors in Triton's interpreter. Arguments as `frame_attention`."""
    B, T, L, _, N, D = qkv.shape
    out = qkv.new_empty(B, T, L, N, D)
    launcher(frame_attention_kernel)[(B * L * N,)](
        qkv,
        out,
        T,
        L,
        D**-0.5 if scale is None else scale,
        N=N,
        D=D,
        **_blocks(T, D),
        **settings(OP, "*", arch_of(qkv.device)),
    )
    return out


def _blocks(T: int, D: int) -> dict[str, int]:
    """Powers of two, at least 16: the smallest block that a matrix unit takes."""
    return {"BLOCK_T": max(16, triton.next_power_of_2(T)), "BLOCK_D": max(16, triton.next_power_of_2(D))}


def twin(qkv: Tensor, scale: float | None = None) -> Tensor:
    """The same in plain PyTorch: what runs on a CPU, and the oracle of the tests. Written as separate operations:
    fused attention on a CPU takes 3 times as long for 6 or 25 keys."""
    q, k, v = (part.permute(0, 2, 3, 1, 4) for part in qkv.unbind(3))  # [B, L, N, T, D]
    weights = (q @ k.transpose(-1, -2)).mul_(qkv.shape[-1] ** -0.5 if scale is None else scale).softmax(-1)
    return (weights @ v).permute(0, 3, 1, 2, 4).contiguous()


@triton_op("frame_attention")
def frame_attention(qkv: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v over the frames of each position.

    Args:
        qkv: query, key and value of all heads [B, T, L, 3, N, D], contiguous. Above 64 frames plain torch runs.
        scale: by default 1 / sqrt(D).

    Returns [B, T, L, N, D]. Raises ValueError for another shape or dtype.
    """
    check_tensors(OP, qkv=qkv)
    check_shape(OP, "qkv", qkv, None, None, None, 3, None, None)
    check_contiguous(OP, qkv=qkv)
    return (launch if qkv.is_cuda and qkv.shape[1] <= MOST_FRAMES else twin)(qkv, scale)


def variants(arch: str) -> Iterator[Variant]:
    """What is shipped for `arch`: SVD's heads of 64 channels, clips of 14 and 25 frames."""
    shapes = [(dtype, heads, 25) for dtype in (torch.bfloat16, torch.float16) for heads in (5, 10, 20)]
    for dtype, heads, frames in [*shapes, (torch.float16, 5, 14), (torch.float16, 5, 64), (torch.float32, 5, 25)]:
        chosen = settings(OP, "*", arch)
        yield Variant(
            name=f"{OP} {TYPES[dtype]} {heads} heads {frames} frames",
            kernel=frame_attention_kernel,
            signature={
                "qkv_ptr": f"*{TYPES[dtype]}",
                "out_ptr": f"*{TYPES[dtype]}",
                "T": "i32",
                "L": "i32",
                "scale": "fp32",
            },
            constants={"N": heads, "D": 64, **_blocks(frames, 64)},
            options={name: chosen[name] for name in OPTIONS if name in chosen},
            unaligned=("T", "L"),
            # Hopper's and Blackwell's own matrix instructions take 64 rows; fewer run on mma.sync, as on an A100.
            matrix=dtype != torch.float32 and (frames > 32 or arch not in ("sm_90", "sm_100")),
        )
