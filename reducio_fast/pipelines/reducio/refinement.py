"""Refine the motion latent of a clip: move it until its decoded frames are nearest to the clip's.

An encoder is one network for all clips, so its latent is not the best one for a given clip. Descent on the error of the
decoded pixels finds a better one for the same decoder. On the embedded model 20 steps of L-BFGS raised three real
videos of 128 pixels from 1.1 to 1.8 dB over their repeated content frames to 3.0 to 4.5 dB. Of a clip that was tried
with both, 40 decodings of Adam came 0.1 dB further than 14 of L-BFGS; 12 of Adam stayed 0.6 to 2.6 dB below those 14.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...media.pixels import to_unit
from ...media.similarity import psnr_of_error
from ...reference import ReducioVAE
from ...system.errors import ReducioError
from ...triton_kernels.cpu_convolution import convolve

MAX_STEPS = 1000
DECODINGS_PER_STEP = 4  # at most, on average; one or two are usual
# Mean absolute change of a latent's numbers in the first step, before L-BFGS has an estimate of the curvature. Torch's
# own first step has a sum of 1 over all numbers: too short, its line search spent two more decodings on every clip.
FIRST_CHANGE = 0.02


def refine(
    vae: ReducioVAE, latent: Tensor, clip: np.ndarray, steps: int, tiled: bool, progress: bool = False
) -> Tensor:
    """Refine a normalised latent [1, 16, T/f, H/32, W/32] of a clip, uint8 [T, H, W, 3], by `steps` steps of L-BFGS.

    A step decodes once or twice, forward and backward, with the reference in float32 whatever the dtype of the weights:
    in bfloat16 the changes of the error near its minimum are below the rounding. Returns the float32 latent with the
    smallest squared error among those that were decoded, so it is never worse than the one given; it is normalised.
    Raises ReducioError if the decoder's output is not finite.
    """
    network = copy.deepcopy(vae).float().requires_grad_(False)
    convolve_by_onednn(network)
    start = latent.detach().float()
    best, smallest = start, math.inf
    video = to_unit(clip, start.device, torch.float32).transpose(0, 1)[None]
    with torch.no_grad():
        features = network.encode_content(video[:, :, network.config.content_frame], tiled=tiled)
    change = torch.zeros_like(start).requires_grad_()
    scale = FIRST_CHANGE * start.numel()
    optimizer = torch.optim.LBFGS(
        [change],
        max_iter=steps,
        max_eval=DECODINGS_PER_STEP * steps,
        history_size=steps,
        tolerance_grad=0.0,  # the limits are the numbers of steps and decodings
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    bar = tqdm(desc="refine", unit=" decodings", disable=not progress)

    def error_and_gradient() -> Tensor:
        nonlocal best, smallest
        moved = network.normalize_latent(start + scale * change)
        error = (network.decode(moved, features, tiled=tiled) - video).square().sum()
        value = float(error.detach())
        if not math.isfinite(value):
            raise ReducioError("refine: the decoder's output has values that are not finite (NaN or infinite)")
        (change.grad,) = torch.autograd.grad(error, change)  # NaN in a flow ends the process in torch's grid_sample
        if value < smallest:
            best, smallest = moved.detach(), value
        bar.set_postfix_str(f"{psnr_of_error(torch.tensor(smallest / video.numel()), 2.0):.2f} dB", refresh=False)
        bar.update()
        return error

    with bar, torch.enable_grad():
        optimizer.step(error_and_gradient)
    return best


def convolve_by_onednn(network: nn.Module) -> None:
    """Make float32 convolutions of step 1 on a CPU run by oneDNN forward and backward, with gradients of their inputs
    alone. Torch unfolds small ones of a single clip, see `triton_kernels.cpu_convolution`: a decoding of the embedded
    model and its gradient took 2.0 s so, and take 0.8 (two cores of an EPYC with AVX2)."""
    for module in network.modules():
        if not isinstance(module, nn.Conv3d) or isinstance(module.padding, str) or module.padding_mode != "zeros":
            continue
        if {*module.stride, *module.dilation, module.groups} == {1}:
            # Not `forward`, which VideoConv has its own of: torch's `forward` calls this. mypy refuses methods set so.
            module._conv_forward = partial(_convolve, module.padding)  # type: ignore[method-assign]


def _convolve(padding: tuple[int, ...], x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    return _InputGradient.apply(x, kernel, bias, padding)


class _InputGradient(torch.autograd.Function):
    """The gradient of a convolution's input is a convolution too: with the kernel turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(kernel)
        ctx.padding = [size - 1 - each for size, each in zip(kernel.shape[2:], padding, strict=True)]
        return convolve(x, kernel, bias, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (kernel,) = ctx.saved_tensors
        return convolve(gradient, kernel.transpose(0, 1).flip(2, 3, 4), None, ctx.padding), None, None, None
