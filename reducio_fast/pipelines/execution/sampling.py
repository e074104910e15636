"""dit.step: from noise to the motion latent, by the denoiser of the family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...reference.data_prediction import DataHook
from ...reference.sampler import NO_SHORTCUTS, Callback, Shortcuts
from ...system.errors import ReducioError
from .components import Components
from .executor import Executor
from .schedules import scheduled


class Sampler:
    """Samples with the denoiser network, under a condition of the class that this network takes."""

    def __init__(self, components: Components, executor: Executor) -> None:
        self.components, self.executor = components, executor

    def __call__(
        self,
        noise: Tensor,
        cond: Any,
        uncond: Any,
        guidance_scale: float | Tensor,
        num_inference_steps: int,
        generator: torch.Generator,
        callback: Callback | None,
        sigmas: Sequence[float] | None = None,
        schedule: str = "own",
        shortcuts: Shortcuts = NO_SHORTCUTS,
        data_hook: DataHook | None = None,
    ) -> Tensor:
        """Unit noise [1, ...] on any device -> the latent, float32, of the last step taken.

        guidance_scale: a number, or a tensor of one per frame if the family's denoiser takes that. schedule: see
        `schedules.scheduled`. data_hook: sees, and may replace, the data prediction of each step: see
        `reference.sample`.
        """
        # The latent is float32 whatever dtype the networks run in: in bfloat16, twenty updates lose what they add.
        noise = noise.to(self.executor.device)
        network = self.executor.network(self.components.layout.denoiser)
        scheduler, timesteps = scheduled(self.components.scheduler, schedule, num_inference_steps)
        try:
            denoise = network.denoiser(cond, uncond, guidance_scale)
            given = (denoise, scheduler, noise, num_inference_steps, callback, generator)
            latent = self.executor.sample(*given, sigmas, timesteps, shortcuts, data_hook)
            return latent if self.executor.ranks is None else self.executor.ranks.broadcast_tensor(latent)
        except ReducioError:
            raise
        except (ValueError, ZeroDivisionError) as error:
            if error is getattr(callback, "error", None):
                raise
            raise ReducioError(f"sampling: {error}") from error
