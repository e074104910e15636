"""The fast twin of `reference/sampler.py`: guidance and scheduler are one kernel that reads a table of coefficients.

diffusers' scheduler stays the source of truth: its sigmas are read once a schedule, and no number comes back from the
device inside the loop. On a GPU one graph is a step, guidance and update included, and not the loop: a callback may
look at every latent, replace it or end the loop, and the number of steps is the caller's. A graph of the loop would be
captured for each number of steps and hold their multiple of nodes, to save one launch and six small copies a step.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..reference.reducio.condition import Condition, join
from ..reference.sampler import Callback, check_finite, end_step
from .reducio.dit import FastReducioDiT, Modulation, Prepared
from .solver_tables import coefficients


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
        cond = join(cond.without_text(model.null_text) if uncond is None else uncond, cond)
    table = coefficients(scheduler, num_inference_steps)
    guidance = table.new_full((len(table), 1), guidance_scale)
    table = torch.cat([guidance, table], dim=1).float().to(latent.device)
    timesteps = scheduler.timesteps.to(latent.device)
    modulation = model.modulations(timesteps, latent.shape[-2:])
    prepared = model.prepare(cond.text, cond.text_mask, cond.semantic, cond.content)
    previous, finite = torch.zeros_like(latent), []

    def advance(
        latent: Tensor, previous: Tensor, modulation: Modulation, prepared: Prepared, row: Tensor
    ) -> tuple[Tensor, Tensor]:
        prediction = model.denoise(latent, modulation, prepared)
        return model.step_update(prediction.contiguous(), latent.contiguous(), previous, row)

    run = advance if model.graphs is None else functools.partial(model.graphs, "dit.step", advance)
    for step in range(len(table)):
        latent, previous = run(latent, previous, modulation.step(step), prepared, table[step])
        latent, go_on = end_step(callback, step, timesteps[step], latent)
        finite.append(torch.isfinite(latent).all())
        if not go_on:
            break

    check_finite(finite, len(table))
    return latent
