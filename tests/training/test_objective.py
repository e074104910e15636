"""Noised latents, targets and the variational bound, compared with diffusers' schedulers and torch.distributions."""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from reducio_fast.training.reducio.objective import BETAS, Objective


def test_noised_latents_and_targets_are_those_of_diffusers() -> None:
    clean, noise = torch.randn(2, 16, 4, 2, 2), torch.randn(2, 16, 4, 2, 2)
    step = torch.tensor([10, 700])
    seen = {}

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen["x"], seen["t"] = x, t
        return torch.zeros_like(x)

    for name in ("epsilon", "v_prediction"):
        noiser = DDPMScheduler(**BETAS, prediction_type=name)
        loss, _ = Objective(name, False).loss(predict, clean, noise, (step + 0.5) / 1000)
        torch.testing.assert_close(seen["x"], noiser.add_noise(clean, noise, step))
        assert seen["t"].tolist() == step.tolist()
        target = noise if name == "epsilon" else noiser.get_velocity(clean, noise, step)
        torch.testing.assert_close(loss, target.square().mean())
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(10)
    sigma = flow.sigmas[3:5]
    loss, _ = Objective("rectified-flow", False).loss(predict, clean, noise, sigma)
    torch.testing.assert_close(seen["x"], flow.scale_noise(clean, flow.timesteps[3:5], noise))
    torch.testing.assert_close(seen["t"], flow.timesteps[3:5])
    torch.testing.assert_close(loss, (noise - clean).square().mean())


def test_the_variational_bound_is_a_divergence_of_normals() -> None:
    """Compared with torch.distributions and a posterior computed from the betas; step 0 uses the bin's probability."""
    objective = Objective("epsilon", True)
    betas = np.linspace(1e-4, 0.02, 1000)
    kept = np.cumprod(1 - betas)
    clean, noise = torch.randn(3, 16, 4, 2, 2), torch.randn(3, 16, 4, 2, 2)
    step = torch.tensor([1, 400, 999])
    predicted, variance = torch.randn_like(clean), torch.rand_like(clean) * 2 - 1
    noisy = DDPMScheduler(**BETAS).add_noise(clean, noise, step)
    bound = objective.variational_bound(clean, noisy, predicted, variance, step)
    for i, t in enumerate(step.tolist()):
        posterior = betas[t] * (1 - kept[t - 1]) / (1 - kept[t])
        restored = (noisy[i] - math.sqrt(1 - kept[t]) * predicted[i]) / math.sqrt(kept[t])
        means = [
            (math.sqrt(kept[t - 1]) * betas[t] * x + math.sqrt(1 - betas[t]) * (1 - kept[t - 1]) * noisy[i])
            / (1 - kept[t])
            for x in (clean[i], restored)
        ]
        share = (variance[i] + 1) / 2
        deviation = (share * math.log(betas[t]) + (1 - share) * math.log(posterior)).div(2).exp()
        normals = (
            torch.distributions.Normal(means[0], math.sqrt(posterior)),
            torch.distributions.Normal(means[1], deviation),
        )
        expected = torch.distributions.kl_divergence(*normals).mean() / math.log(2)
        torch.testing.assert_close(bound[i], expected, rtol=2e-3, atol=1e-6)
    exact = objective.variational_bound(
        clean[:1], clean[:1], torch.zeros(1), torch.zeros_like(clean[:1]), torch.tensor([0])
    )
    assert exact > 0
    # The variance gets its gradient only from the bound, the mean only from the error.
    output = torch.randn(3, 32, 4, 2, 2, requires_grad=True)
    objective.loss(lambda x, t: output, clean, noise, (step + 0.5) / 1000)[0].backward()
    mean_only = torch.autograd.grad((output[:, :16] - noise).square().flatten(1).mean(1).mean(), output)[0]
    torch.testing.assert_close(output.grad[:, :16], mean_only[:, :16])
    assert output.grad[:, 16:].abs().sum() > 0
