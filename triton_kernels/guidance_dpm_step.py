"""guidance_dpm_step: g = u + guidance * (t - u); data = p x + q g; next = a x + b data + c previous.

u and t are the unconditional and conditional halves of a model's output, `previous` is the data prediction of the step
before. With the right (p, q, a, b, c) per step this is DPM-Solver++ of first or second order, or Euler on a flow; with
fresh noise as `previous`, a step of a consistency model. p and q also hold EDM's preconditioning of the output.
Twin: guidance in `reference/sampler.py` and diffusers' `scheduler.step`. Legend: B batch, N elements of all items,
G values of guidance, one or one per frame.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import TYPES, Variant, launcher, on_device, triton_op
from .shape_checks import check_contiguous, check_same, check_shape, check_tensors
from .tables import arch_of
from .tables import settings as table_settings

OP = "guidance_dpm_step"


@triton.jit
def element_offsets(block, BLOCK_N: tl.constexpr):
    """Elements of one program, in int64: a batch of long latents may pass 2^31."""
    return block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)


# A step's coefficients are a row of a table, aligned or not: one build serves both, and all numbers of frames.
@triton.jit(do_not_specialize=["FRAMES", "SIZE"], do_not_specialize_on_alignment=["coefficients_ptr"])
def guidance_dpm_step_kernel(
    prediction_ptr,
    x_ptr,
    previous_ptr,
    coefficients_ptr,  # [FRAMES + 5]: guidance, then p, q, a, b, c
    next_ptr,
    data_ptr,
    N,
    FRAMES,  # values of guidance
    SIZE,  # elements per frame
    GUIDED: tl.constexpr,
    PER_FRAME: tl.constexpr,  # whether FRAMES may be more than 1
    BLOCK_N: tl.constexpr,
):
    n = element_offsets(tl.program_id(0), BLOCK_N)
    inside = n < N
    row_ptr = coefficients_ptr + FRAMES
    p, q = tl.load(row_ptr), tl.load(row_ptr + 1)
    a, b, c = tl.load(row_ptr + 2), tl.load(row_ptr + 3), tl.load(row_ptr + 4)
    g = tl.load(prediction_ptr + n, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        conditional = tl.load(prediction_ptr + N + n, mask=inside, other=0.0).to(tl.float32)
        guidance_ptrs = coefficients_ptr
        if PER_FRAME:
            guidance_ptrs += n // SIZE % FRAMES
        g += tl.load(guidance_ptrs) * (conditional - g)
    x = tl.load(x_ptr + n, mask=inside, other=0.0).to(tl.float32)
    # Not read where it has no weight: before the first step it may hold anything, NaN included.
    previous = tl.load(previous_ptr + n, mask=n < tl.where(c == 0.0, 0, N), other=0.0).to(tl.float32)
    data = p * x + q * g
    tl.store(data_ptr + n, data.to(data_ptr.dtype.element_ty), mask=inside)
    tl.store(next_ptr + n, (a * x + b * data + c * previous).to(next_ptr.dtype.element_ty), mask=inside)


@on_device
def launch(prediction: Tensor, x: Tensor, previous: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the kernel: on a GPU, or on CPU tensors in Triton's interpreter. Arguments as `guidance_dpm_step`."""
    following, data = torch.empty_like(x), torch.empty_like(x)
    settings = table_settings(OP, "*", arch_of(x.device))
    launcher(guidance_dpm_step_kernel)[(triton.cdiv(x.numel(), settings["BLOCK_N"]),)](
        prediction,
        x,
        previous,
        coefficients,
        following,
        data,
        x.numel(),
        len(coefficients) - 5,
        x[0, 0].numel() if x.ndim > 1 else 1,
        GUIDED=len(prediction) != len(x),
        PER_FRAME=len(coefficients) > 6,
        **settings,
    )
    return following, data


def twin(prediction: Tensor, x: Tensor, previous: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch: what runs on a CPU, and the oracle of the tests."""
    precise = torch.promote_types(x.dtype, torch.float32)  # float64 inputs stay float64, for the tests
    guidance = coefficients[:-5].to(precise)
    p, q, a, b, c = coefficients[-5:].to(precise).unbind()
    wide = x.to(precise)
    g = prediction.to(precise)
    if len(prediction) != len(x):
        unconditional, conditional = g.chunk(2)
        guidance = guidance[0] if len(guidance) == 1 else guidance.view(-1, *[1] * (x.ndim - 2))
        g = unconditional + guidance * (conditional - unconditional)
    data = p * wide + q * g
    following = a * wide + b * data + torch.where(c == 0, 0.0, c * previous.to(precise))
    return following.to(x.dtype), data.to(x.dtype)


@triton_op("guidance_dpm_step")
def guidance_dpm_step(prediction: Tensor, x: Tensor, previous: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Classifier-free guidance and one sampler step: (next latent, data prediction), in the dtype of `x`.

    Args:
        prediction: the model's output [2B, ...], unconditional half first, or [B, ...] where there is no guidance.
        x: the latent [B, ...], in float32 or the prediction's dtype.
        previous: the data prediction that the step before returned, like `x`; not read where c is 0.
        coefficients: float32 [G + 5] on the device: guidance, then a row of `dpm_coefficients` or `euler_coefficients`.
            G is 1, or the number of frames T of a latent [B, T, ...].

    Raises ValueError for arguments that differ in device, dtype or size.
    """
    check_tensors(OP, x=x, previous=previous)
    check_tensors(OP, prediction=prediction)
    if x.dtype != torch.float32:
        check_same(OP, "dtype", prediction=prediction.dtype, x=x.dtype)
    check_same(OP, "shape", x=tuple(x.shape), previous=tuple(previous.shape))
    check_same(OP, "shape after the batch", x=tuple(x.shape[1:]), prediction=tuple(prediction.shape[1:]))
    if len(prediction) not in (len(x), 2 * len(x)):
        raise ValueError(f"{OP}: prediction has B={len(prediction)}, x has B={len(x)}: it must be as many, or twice")
    check_contiguous(OP, prediction=prediction, x=x, previous=previous, coefficients=coefficients)
    if x.ndim == 1 or coefficients.numel() != x.shape[1] + 5:
        check_shape(OP, "coefficients", coefficients, 6)
    check_shape(OP, "coefficients", coefficients, None)
    check_same(OP, "device", x=x.device, prediction=prediction.device, coefficients=coefficients.device)
    check_same(OP, "dtype", expected=torch.float32, coefficients=coefficients.dtype)
    return (launch if x.is_cuda else twin)(prediction, x, previous, coefficients)


def variants(arch: str) -> Iterator[Variant]:
    """What is shipped for `arch`: latents in float32 or in the model's dtype, without guidance, with one scale, and
    with a scale per frame."""
    for prediction in (torch.bfloat16, torch.float16, torch.float32):
        for latent in dict.fromkeys((torch.float32, prediction)):
            for guidance in (" guided", " guided per frame", ""):
                yield Variant(
                    name=f"{OP} {TYPES[prediction]} on {TYPES[latent]}{guidance}",
                    kernel=guidance_dpm_step_kernel,
                    signature={
                        "prediction_ptr": f"*{TYPES[prediction]}",
                        **dict.fromkeys(("x_ptr", "previous_ptr", "next_ptr", "data_ptr"), f"*{TYPES[latent]}"),
                        "coefficients_ptr": "*fp32",
                        **dict.fromkeys(("N", "FRAMES", "SIZE"), "i32"),
                    },
                    constants={
                        "GUIDED": guidance != "",
                        "PER_FRAME": guidance == " guided per frame",
                        "BLOCK_N": table_settings(OP, "*", arch)["BLOCK_N"],
                    },
                    options={k: v for k, v in table_settings(OP, "*", arch).items() if k != "BLOCK_N"},
                    unaligned=("coefficients_ptr", "FRAMES", "SIZE"),
                )
