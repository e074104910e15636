"""The fast twin of `reference/sampler.py`: guidance and scheduler are one kernel that reads a table of coefficients.

diffusers' scheduler stays the source of truth: its sigmas are read once a schedule, and no number comes back from the
device inside the loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.sampler import Callback, Condition, StopSampling, _join
from ..triton_kernels.guidance_dpm_step import dpm_coefficients, euler_coefficients
from .dit import FastReducioDiT


def coefficients(scheduler: Any, steps: int) -> Tensor:
    """[steps, 5] of a schedule, whose timesteps are set. Raises ValueError for one that the kernel cannot follow."""
    name = type(scheduler).__name__
    tables = {"DPMSolverMultistepScheduler": dpm_coefficients, "FlowMatchEulerDiscreteScheduler": euler_coefficients}
    if name not in tables:
        raise ValueError(f"{name} has no table of coefficients; the fast sampler follows {' and '.join(tables)}")
    scheduler.set_timesteps(steps, device="cpu")
    return tables[name](scheduler)


@torch.no_grad()
def sample(
    model: FastReducioDiT,
    scheduler: Any,
    latent: Tensor,
    cond: Condition,
    uncond: Condition | None = None,
    guidance_scale: float = 4.5,
    num_inference_steps: int = 20,
    callback: Callback | None = None,
) -> Tensor:
    """Denoise unit noise [B, C, T, H, W]; words, results and errors as in the reference's `sample`.

    Raises ValueError for a scheduler that is neither DPM-Solver++ of order 1 or 2 nor flow-matching Euler.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps}: must be at least 1")
    guided = guidance_scale > 1
    if guided:
        cond = _join(cond.without_text(model.null_text) if uncond is None else uncond, cond)
    table = coefficients(scheduler, num_inference_steps)
    guidance = table.new_full((len(table), 1), guidance_scale)
    table = torch.cat([guidance, table], dim=1).float().to(latent.device)
    timesteps = scheduler.timesteps.to(latent.device)
    modulation = model.modulations(timesteps, latent.shape[-2:])
    prepared = model.prepare(cond.text, cond.text_mask, cond.semantic, cond.content)
    previous, finite = torch.zeros_like(latent), []

    for step in range(len(table)):
        prediction = model.denoise(latent, modulation.step(step), prepared)
        latent, previous = model.step_update(prediction.contiguous(), latent.contiguous(), previous, table[step])
        try:
            answer = None if callback is None else callback(step, timesteps[step], latent)
        except StopSampling:
            answer = False
        if isinstance(answer, Tensor):
            latent = answer
        finite.append(torch.isfinite(latent).all())
        if answer is False:
            break

    bad = (~torch.stack(finite)).nonzero()
    if len(bad):
        raise ValueError(f"the latent is not finite (NaN or infinite) from step {int(bad[0]) + 1} of {len(table)} on")
    return latent
