"""The decoder in 8-bit numbers, measured without a calibration file: its ranges, its limit, what is refused.

Latency does not depend on ranges. Those of random weights are measured on one small clip of noise.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import VAE_PRESETS, ReducioVAE, VAEConfig
from ..system.errors import ReducioError
from .accuracy_rule import EIGHT_BIT_TIMES, Verdict, judge, relative_error
from .names import QUANTISED

PIXELS = 256  # side of the clip that ranges are measured on: one tile


def check_contender(contender: str, name: str, model: str | os.PathLike[str] | None, device: torch.device) -> None:
    """Raise ReducioError if the workload `name`, its model or `device` cannot run a contender of 8-bit numbers."""
    if contender not in QUANTISED:
        return
    from ..checkpoints import calibration_file
    from ..checkpoints.hub import find_model
    from ..checkpoints.strict_files import embedded_model
    from ..pipelines.call.validation import check_quantise

    if name.startswith("svd"):
        raise ReducioError(f"contender: {contender} needs a decoder of Reducio, the workload {name} has none")
    if name == "tile" and contender.endswith("balanced"):
        raise ReducioError(f"contender: {contender} needs steps, the workload tile has none; fast-fp8 runs")
    check_quantise("fp8", "fast", device)
    if name == "default":
        calibration_file.read(embedded_model() if model is None else find_model(model))


def balanced_steps(steps: int) -> int:
    """The steps that quality="balanced" takes in place of `steps`."""
    from ..pipelines.call.quality import PRESETS

    return min(steps, PRESETS["balanced"].num_inference_steps)


def inputs(vae: ReducioVAE, pixels: int, seed: int) -> tuple[Tensor, Tensor]:
    """A latent of noise, and a smooth content frame, on the device and in the dtype of `vae`."""
    generator, weight = torch.Generator().manual_seed(seed), next(vae.parameters())
    image = F.avg_pool2d(torch.randn(1, 3, pixels, pixels, generator=generator), 9, 1, 4).mul(4).clamp(-1, 1)
    latent = torch.randn(1, *vae.config.latent_shape(pixels, pixels), generator=generator)
    return latent.to(weight), image.to(weight)


def unmeasured_quantisation(word: str, config: VAEConfig = VAE_PRESETS["reducio-ft4"]) -> Any:
    """The mode `word` with ranges of one, for `launches.clip_launches`: launches do not depend on ranges."""
    from ..fast.quantisation import Quantisation, quantisable

    with torch.device("meta"):
        vae = ReducioVAE(config)
    return Quantisation(word, {path: torch.ones(conv.in_channels) for path, conv in quantisable(vae)})


@torch.no_grad()
def own_quantisation(vae: ReducioVAE, word: str, pixels: int = PIXELS) -> Any:
    """The mode `word` with ranges of `vae` itself, measured on a clip of noise."""
    from ..fast.quantisation import Quantisation, measure_largest

    latent, image = inputs(vae, pixels, 1)

    def decode() -> None:
        vae.decode(latent, vae.encode_content(image))

    return Quantisation(word, measure_largest(vae, decode))


@torch.no_grad()
def decode_rows(name: str, vae: ReducioVAE, dtype: torch.dtype, pixels: int) -> Iterator[dict[str, Any]]:
    """A row of `parity` for each mode of 8-bit numbers that the device offers: the twin in `dtype` on a clip that its
    ranges were not measured on, against the reference in float32. Its limit is EIGHT_BIT_TIMES the error of the
    reference in bfloat16, whatever `dtype` is."""
    from ..fast.plan import Plan
    from ..fast.reducio.vae import FastReducioVAE
    from ..triton_kernels.eight_bits import WORDS
    from ..triton_kernels.tables import arch_of

    vae = vae.float()
    device = next(vae.parameters()).device

    def decode(network: Any, of: torch.dtype) -> Tensor:
        return network.decode(latent.to(of), network.encode_content(image.to(of))).float()

    for word in [word for word, types in WORDS.items() if arch_of(device) in types]:
        quantisation = own_quantisation(vae, word, pixels)
        latent, image = inputs(vae, pixels, 2)
        oracle = decode(vae, torch.float32)
        eager = decode(copy.deepcopy(vae).bfloat16(), torch.bfloat16)
        plan = Plan(device, dtype, quantisation=quantisation)
        fast = decode(FastReducioVAE(copy.deepcopy(vae).to(dtype), plan).eval(), dtype)
        verdict, error = judge(fast, eager, oracle), relative_error(eager, oracle)
        verdict = Verdict(verdict.fast, error, EIGHT_BIT_TIMES * error, verdict.worst)
        yield verdict.row(f"{name}: vae.decode, {word}", dtype, device)
