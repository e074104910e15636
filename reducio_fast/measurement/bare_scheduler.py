"""Minimal flow-matching scheduler for benchmarks and parity on machines without diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..fast import solver_tables


class EulerScheduler:
    """Rectified flow by Euler steps, with the number of steps and the work per step of diffusers'
    FlowMatchEulerDiscreteScheduler."""

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


solver_tables.register(
    lambda scheduler: isinstance(scheduler, EulerScheduler),
    lambda scheduler: solver_tables.euler_rows(scheduler.sigmas.double().tolist()),
)


def scheduler() -> Any:
    """diffusers' DPM-Solver++, which samples the model; without diffusers an Euler schedule."""
    try:
        from diffusers import DPMSolverMultistepScheduler
    except ImportError:
        return EulerScheduler()
    return DPMSolverMultistepScheduler()
