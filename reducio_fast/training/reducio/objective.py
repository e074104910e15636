"""Training objectives of the transformer: noise with a learned variance (PixArt-alpha), velocity, or rectified flow.

diffusers' schedulers add the noise. Letters in shapes: B batch, C channels, T frames, H W rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ...system.errors import ReducioError

OBJECTIVES = ("epsilon", "v_prediction", "rectified-flow")
STEPS = 1000
# PixArt-alpha's linear betas. Some signal remains at the last step (no zero terminal SNR).
BETAS = {"num_train_timesteps": STEPS, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}

Predict = Callable[[Tensor, Tensor], Tensor]  # (noisy [B, C, T, H, W], timestep [B]) -> the network's whole output


class Objective:
    """Loss of a batch. `learn_sigma`: the second half of the output channels is the variance; only with "epsilon"."""

    def __init__(self, name: str, learn_sigma: bool) -> None:
        if name not in OBJECTIVES:
            raise ReducioError(f"objective={name!r}: must be one of {', '.join(OBJECTIVES)}")
        if learn_sigma and name != "epsilon":
            raise ReducioError(
                f"objective={name!r} predicts no variance: it needs learn_sigma=false, in the model's config"
            )
        self.name, self.learn_sigma = name, learn_sigma
        self.noiser = DDPMScheduler(**BETAS, prediction_type="epsilon" if name == "rectified-flow" else name)

    def scheduler(self) -> Any:
        """The diffusers scheduler to save with a model that was trained with this objective."""
        if self.name == "rectified-flow":
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS)
        return DPMSolverMultistepScheduler(
            **BETAS, prediction_type=self.name, algorithm_type="dpmsolver++", solver_order=2
        )

    def draw_time(self, rng: np.random.Generator) -> float:
        """Draw a time in 0..1: uniform; for rectified flow logit-normal (Stable Diffusion 3), densest in the middle."""
        if self.name == "rectified-flow":
            return 1 / (1 + math.exp(-rng.normal()))
        return (rng.integers(STEPS) + 0.5) / STEPS

    def loss(self, predict: Predict, clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over a batch of latents [B, C, T, H, W] at times [B] in 0..1, and its parts per clip [B]."""
        if self.name == "rectified-flow":
            t = time.to(clean.dtype)[:, None, None, None, None]
            # diffusers' flow schedulers pass sigma times the number of steps to the network as its timestep.
            output = predict((1 - t) * clean + t * noise, time * STEPS).float()
            error = _per_clip((output - (noise - clean)).square())
            return error.mean(), {"error": error.detach()}
        step = (time * STEPS).long().clamp(max=STEPS - 1)
        noisy = self.noiser.add_noise(clean, noise, step)
        output = predict(noisy, step).float()
        target = noise if self.name == "epsilon" else self.noiser.get_velocity(clean, noise, step)
        if not self.learn_sigma:
            error = _per_clip((output - target).square())
            return error.mean(), {"error": error.detach()}
        predicted, variance = output.chunk(2, dim=1)
        error = _per_clip((predicted - target).square())
        # The bound trains only the variance: the predicted mean is detached.
        bound = self.variational_bound(clean, noisy, predicted.detach(), variance, step)
        return (error + bound).mean(), {"error": error.detach(), "bound": bound.detach()}

    def variational_bound(
        self, clean: Tensor, noisy: Tensor, predicted: Tensor, variance: Tensor, step: Tensor
    ) -> Tensor:
        """KL divergence of p(x[t-1] | x[t]) from the true posterior, in bits per element [B] (Nichol, Dhariwal 2021).

        `variance` in about -1..1 interpolates between the logarithms of the posterior's and the forward process's
        variance. At t = 0 the value is the negative log likelihood of the clean latent, in bins of width 2/255.
        """
        table = _posterior_table(clean.device)
        shape = (-1, 1, 1, 1, 1)
        beta_log, posterior_log, of_clean, of_noisy, signal, noise_level = (row[step].view(shape) for row in table)
        share = (variance.float() + 1) / 2
        log_variance = share * beta_log + (1 - share) * posterior_log
        restored = (noisy - noise_level * predicted) / signal
        mean, true_mean = (of_clean * x + of_noisy * noisy for x in (restored, clean))
        gap = posterior_log - log_variance
        divergence = 0.5 * (-1 - gap + gap.exp() + (true_mean - mean).square() * (-log_variance).exp())
        likelihood = -_log_likelihood(clean, mean, 0.5 * log_variance)
        return _per_clip(torch.where(step.view(shape) == 0, likelihood, divergence)) / math.log(2)


def _posterior_table(device: torch.device) -> tuple[Tensor, ...]:
    """Per step: log of beta and of the posterior's variance, the posterior mean's weights of x[0] and x[t], and the
    scales of signal and noise."""
    betas = np.linspace(BETAS["beta_start"], BETAS["beta_end"], STEPS, dtype=np.float64)
    kept = np.cumprod(1 - betas)
    before = np.append(1.0, kept[:-1])
    variance = betas * (1 - before) / (1 - kept)
    clipped = np.log(np.append(variance[1], variance[1:]))  # the variance of step 0 is zero
    rows = (
        np.log(betas),
        clipped,
        betas * np.sqrt(before) / (1 - kept),
        (1 - before) * np.sqrt(1 - betas) / (1 - kept),
        np.sqrt(kept),
        np.sqrt(1 - kept),
    )
    return tuple(torch.from_numpy(row).float().to(device) for row in rows)


def _log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log of the probability that a normal variable falls into x's bin, [x - 1/255, x + 1/255]."""
    normal = torch.distributions.Normal(0.0, 1.0)
    scale = (-log_scale).exp()
    upper, lower = (normal.cdf(scale * (x - mean + shift)) for shift in (1 / 255, -1 / 255))
    return (upper - lower).clamp(min=1e-12).log()


def _per_clip(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)
