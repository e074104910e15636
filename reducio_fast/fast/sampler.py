"""The fast twin of `reference/sampler.py`: guidance and scheduler are one kernel that reads a table of coefficients.

diffusers' scheduler stays the source of truth: its sigmas are read once a schedule, and no number comes back from the
device inside the loop. On a GPU one graph is a step, guidance and update included, and not the loop: a callback may
look at every latent, replace it or end the loop, and the number of steps is the caller's. A graph of the loop would be
captured for each number of steps and hold their multiple of nodes, to save one launch and six small copies a step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..compile.graphs import Graphs
from ..reference.data_prediction import DataHook, data_rows
from ..reference.sampler import Callback, check_finite, end_step
from .solver_tables import coefficients, input_scales


class Denoiser(Protocol):
    """A fast twin under a condition, as `sample` runs it.

    guidance_scale: a number, or values a frame. graphs: through which a step runs; None: eagerly.
    """

    guidance_scale: float
    graphs: Graphs | None

    def schedule(self, timesteps: Tensor, latent: Tensor) -> Sequence[Any]:
        """What `predict` reads in each step, made once a schedule: tensors, or (named) tuples of them."""

    def predict(self, latent: Tensor, inputs: Any) -> Tensor:
        """[2B, ...], the unconditional half first, or [B, ...] without guidance."""

    def update(self, prediction: Tensor, latent: Tensor, previous: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Guidance and one solver step: the next latent and the data prediction (op `guidance_dpm_step`)."""


@torch.no_grad()
def sample(
    denoise: Denoiser,
    scheduler: Any,
    latent: Tensor,
    num_inference_steps: int,
    callback: Callback | None = None,
    sigmas: Sequence[float] | None = None,
    data_hook: DataHook | None = None,
) -> Tensor:
    """Denoise unit noise [B, ...]; arguments, results and errors as in the reference's `sample`.

    Raises ValueError for a scheduler that `solver_tables` does not follow.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps}: must be at least 1")
    table = coefficients(scheduler, num_inference_steps, sigmas)
    rows, data_of = table.tolist(), None if data_hook is None else data_rows(scheduler)
    guidance = table.new_full((len(table), 1), denoise.guidance_scale)
    table = torch.cat([guidance, table], dim=1).float().to(latent.device)
    timesteps = scheduler.timesteps.to(latent.device)
    scales = input_scales(scheduler)
    if scales is not None:
        latent = latent * float(scheduler.init_noise_sigma)
        scales = scales.to(latent.device, latent.dtype)
    inputs = denoise.schedule(timesteps, latent)
    previous, finite = torch.zeros_like(latent), []

    def advance(
        latent: Tensor, previous: Tensor, inputs: Any, row: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        prediction = denoise.predict(latent if scale is None else latent * scale, inputs)
        return denoise.update(prediction.contiguous(), latent.contiguous(), previous, row)

    run = advance if denoise.graphs is None else functools.partial(denoise.graphs, "dit.step", advance)
    for step in range(len(table)):
        scale = None if scales is None else scales[step]
        before, earlier = latent, previous
        latent, previous = run(latent, previous, inputs[step], table[step], scale)
        if data_hook is not None and data_of is not None:
            latent, previous = _through_data(
                data_hook, step, data_of[step], rows[step], before, earlier, latent, previous
            )
        latent, go_on = end_step(callback, step, timesteps[step], latent)
        finite.append(torch.isfinite(latent).all())
        if not go_on:
            break

    check_finite(finite, len(table))
    return latent


def _through_data(
    hook: DataHook,
    step: int,
    data_row: tuple[float, float],
    row: list[float],
    before: Tensor,
    earlier: Tensor,
    latent: Tensor,
    previous: Tensor,
) -> tuple[Tensor, Tensor]:
    """What the kernel returned from `before` and `earlier`, `latent` and `previous`, with the hook applied: where it
    answers, the step is taken again, a few hundred thousand multiplications outside of the graph."""
    p, q, a, b, c = row
    p_data, q_data = data_row
    is_data = (p, q) == data_row  # of a flow the kernel's "data prediction" is the velocity
    data = previous if is_data else p_data * before + q_data * (previous - p * before) / q
    answer = hook(step, data)
    if answer is None:
        return latent, previous
    new = answer if is_data else p * before + q * (answer - p_data * before) / q_data
    following = a * before + b * new
    return (following + c * earlier if c else following), new
