"""The schedule of a clip that nobody sees: for benchmarks and parity, which also run where there is no diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FlowMatchEulerDiscreteScheduler:
    """Rectified flow by Euler steps, where diffusers is not installed: as long a schedule, the same work a step.

    Named as its original in diffusers, by which name the fast sampler knows whose coefficients to read.
    """

    init_noise_sigma = 1.0

    def __init__(self) -> None:
        self.config = {"stochastic_sampling": False}
        self.num_inference_steps: int | None = None

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.num_inference_steps = num_inference_steps
        self.sigmas = torch.linspace(1, 0, num_inference_steps + 1)
        self.timesteps = (self.sigmas[:-1] * 1000).to(device)
        self._index = 0

    def step(self, velocity: Tensor, timestep: Tensor, latent: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        before, after = self.sigmas[self._index : self._index + 2].tolist()
        self._index += 1
        return (latent + (after - before) * velocity,)


def scheduler() -> Any:
    """DPM-Solver++ as the model is sampled, by diffusers; without diffusers an Euler schedule."""
    try:
        from diffusers import DPMSolverMultistepScheduler
    except ImportError:
        return FlowMatchEulerDiscreteScheduler()
    return DPMSolverMultistepScheduler()
