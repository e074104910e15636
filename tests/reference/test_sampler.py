"""The sampling loop against diffusers' schedulers stepped by hand and against exact solutions of the flow."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from scipy.integrate import solve_ivp

from reducio_fast import reference
from reducio_fast.reference import Condition, DiTConfig, ReducioDiT, denoiser, initial_latent
from reducio_fast.reference.sampler import StopSampling

CONFIG = DiTConfig(
    hidden_size=24,
    depth=2,
    num_heads=2,
    caption_channels=10,
    caption_length=5,
    semantic_channels=12,
    position_base_size=2,
)
SHAPE = (2, 16, 4, 2, 2)


def sample(model, scheduler, latent, cond, uncond=None, guidance_scale=4.5, num_inference_steps=20, **kwargs):
    """A model under a condition, guided, through the loop."""
    denoise = denoiser(model, cond, uncond, guidance_scale)
    return reference.sample(denoise, scheduler, latent, num_inference_steps, **kwargs)


def dpm(**changes) -> DPMSolverMultistepScheduler:
    """PixArt-alpha's settings: linear betas, epsilon prediction, DPM-Solver++ of second order."""
    return DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, **changes)


@pytest.fixture
def model() -> ReducioDiT:
    torch.manual_seed(0)
    model = ReducioDiT(CONFIG).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(torch.randn_like(x) / max(x[0].numel(), 4) ** 0.5)
    return model


@pytest.fixture
def cond() -> Condition:
    g = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    semantic, content = torch.randn(2, 3, 12, generator=g), torch.randn(2, 4, 8, 8, generator=g)
    return Condition(torch.randn(2, 5, 10, generator=g), mask, semantic, content)


def guided_by_hand(model: ReducioDiT, latent, timestep, cond: Condition, scale: float) -> torch.Tensor:
    """Guidance written out, with one call for each half."""
    t = torch.full((len(latent),), float(timestep))
    null = model.null_text.expand_as(cond.text)
    noise = model(latent, t, cond.text, cond.text_mask, cond.semantic, cond.content)[:, :16]
    if scale == 1:
        return noise
    without = model(latent, t, null, cond.text_mask, cond.semantic, cond.content)[:, :16]
    return without + scale * (noise - without)


# --- against the schedulers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize(
    "make",
    [dpm, FlowMatchEulerDiscreteScheduler, lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), EulerDiscreteScheduler],
    ids=["dpm-solver++", "flow-matching", "flow-matching-shift3", "euler"],  # euler scales noise and model input
)
@torch.no_grad()
@pytest.mark.slow
def test_every_step_is_the_schedulers(model, cond, make, scale):
    start = initial_latent(SHAPE, [3, 4])
    seen: list[torch.Tensor] = []
    result = sample(model, make(), start, cond, guidance_scale=scale, callback=lambda i, t, x: seen.append(x.clone()))

    scheduler = make()
    scheduler.set_timesteps(20)
    latent = start * getattr(scheduler, "init_noise_sigma", 1.0)
    for step, timestep in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(latent, timestep) if hasattr(scheduler, "scale_model_input") else latent
        noise = guided_by_hand(model, x, timestep, cond, scale)
        latent = scheduler.step(noise, timestep, latent).prev_sample
        assert (seen[step] - latent).norm() <= 1e-5 * latent.norm(), f"step {step}"
    assert len(seen) == 20
    assert torch.equal(result, seen[-1])


@torch.no_grad()
def test_a_scheduler_can_be_used_again(model, cond):
    scheduler, start = dpm(), initial_latent(SHAPE, [3, 4])
    first = sample(model, scheduler, start, cond, num_inference_steps=5)
    sample(model, scheduler, start, cond, num_inference_steps=7)
    assert torch.equal(sample(model, scheduler, start, cond, num_inference_steps=5), first)


@torch.no_grad()
def test_generator_feeds_stochastic_schedulers(model, cond):
    start = initial_latent(SHAPE, [3, 4])

    def draw(seed: int) -> torch.Tensor:
        scheduler = dpm(algorithm_type="sde-dpmsolver++")
        return sample(
            model, scheduler, start, cond, generator=torch.Generator().manual_seed(seed), num_inference_steps=4
        )

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


# --- against exact solutions ---------------------------------------------------------------------------------------


class ExactNoise(torch.nn.Module):
    """E[noise | x_t] where the data are a mixture of Gaussians: the perfect epsilon model of the linear schedule."""

    def __init__(self, weights: list[float], means: list[float], deviations: list[float]) -> None:
        super().__init__()
        self.alpha_bar = dpm().alphas_cumprod.double()
        self.weights, self.means, self.deviations = (torch.tensor(x).double() for x in (weights, means, deviations))

    def noise(self, x: torch.Tensor, alpha: torch.Tensor | float, sigma: torch.Tensor | float) -> torch.Tensor:
        x = x.double()[..., None]
        variance = (alpha * self.deviations) ** 2 + sigma**2
        offset = x - alpha * self.means
        share = torch.softmax(self.weights.log() - 0.5 * variance.log() - 0.5 * offset**2 / variance, dim=-1)
        return (share * sigma * offset / variance).sum(-1)

    def forward(self, latent, timestep, *condition) -> torch.Tensor:
        alpha_bar = self.alpha_bar[timestep.long()].view(-1, 1, 1, 1, 1, 1)
        return self.noise(latent, alpha_bar.sqrt(), (1 - alpha_bar).sqrt()).float()


NO_CONDITION = Condition(torch.zeros(1, 1, 1))
START = torch.linspace(-2.5, 2.5, 16).view(1, 16, 1, 1, 1)


def test_gaussian_data_match_the_closed_form_at_second_order():
    """For N(m, s^2) the flow maps x_T to m + s (x_T - a_T m) / sqrt(a_T^2 s^2 + sigma_T^2)."""
    mean, deviation = 0.7, 0.4
    exact = ExactNoise([1.0], [mean], [deviation])
    alpha_bar = exact.alpha_bar[-1]
    spread = (alpha_bar * deviation**2 + 1 - alpha_bar).sqrt()
    expected = mean + deviation * (START.double() - alpha_bar.sqrt() * mean) / spread

    def error(steps: int, **changes) -> float:
        latent = sample(exact, dpm(**changes), START, NO_CONDITION, guidance_scale=1.0, num_inference_steps=steps)
        return (latent - expected).abs().max().item()

    assert error(20) < 0.1
    assert error(80) < 1e-3
    # First order: half the step gives half the error. Second order, with steps uniform in log-SNR: a quarter of the
    # step gives a sixteenth of the error.
    assert error(40, solver_order=1) / error(80, solver_order=1) == pytest.approx(2, abs=0.2)
    assert error(20, use_lu_lambdas=True) / error(80, use_lu_lambdas=True) == pytest.approx(16, abs=3)


def test_mixture_data_match_scipys_probability_flow():
    """In x / alpha, with tau = sigma / alpha, the flow is dx/dtau = noise: integrate it from tau_T to 0."""
    exact = ExactNoise([0.3, 0.7], [-1.0, 0.8], [0.2, 0.3])
    alpha_bar = exact.alpha_bar[-1].item()

    def slope(tau: float, x: np.ndarray) -> np.ndarray:
        alpha = 1 / np.sqrt(1 + tau**2)
        return exact.noise(torch.from_numpy(alpha * x), alpha, alpha * tau).numpy()

    start = START.double().flatten().numpy() / np.sqrt(alpha_bar)
    tau = np.sqrt((1 - alpha_bar) / alpha_bar)
    expected = solve_ivp(slope, (tau, 0.0), start, rtol=1e-8, atol=1e-8).y[:, -1]

    def error(steps: int) -> float:
        latent = sample(exact, dpm(), START, NO_CONDITION, guidance_scale=1.0, num_inference_steps=steps)
        return np.abs(latent.double().flatten().numpy() - expected).max()

    assert error(200) < 0.01
    assert error(200) < error(20) < 0.15
    # The flow splits the noise between the two modes, so the bound above is not met by a collapsed sampler.
    assert expected.min() < -1.0 and expected.max() > 1.0


def test_rectified_flow_is_exact_on_straight_lines():
    """With data at one point the velocity, noise minus data, is constant along a path: any number of steps is exact."""
    target = torch.linspace(-1, 1, 16).view(1, 16, 1, 1, 1)

    def velocity(latent, timestep, *condition):
        sigma = (timestep / 1000).view(-1, 1, 1, 1, 1)
        return (latent - target) / sigma

    for steps in (1, 5, 20):
        scheduler = FlowMatchEulerDiscreteScheduler()
        latent = sample(velocity, scheduler, START, NO_CONDITION, guidance_scale=1.0, num_inference_steps=steps)
        assert (latent - target).abs().max() < 1e-5


# --- guidance ------------------------------------------------------------------------------------------------------


class Recorder(torch.nn.Module):
    """Predicts the mean of each item's text and keeps what it was called with."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.channels, self.calls = channels, []
        self.register_buffer("null_text", torch.full((5, 10), 2.0))

    def forward(self, latent, timestep, text, text_mask, semantic, content) -> torch.Tensor:
        self.calls.append((latent, timestep, Condition(text, text_mask, semantic, content)))
        return text.mean((1, 2)).view(-1, 1, 1, 1, 1).expand(-1, self.channels, *latent.shape[2:]) * 1.0


def test_guidance_is_one_batch_with_the_unconditional_half_first(cond):
    model, start = Recorder(), torch.zeros(SHAPE)
    sample(model, dpm(), start, cond, num_inference_steps=2)
    latent, timestep, seen = model.calls[0]
    assert latent.shape == (4, *SHAPE[1:]) and timestep.shape == (4,)
    assert (seen.text[:2] == 2).all() and torch.equal(seen.text[2:], cond.text)
    for name in ("text_mask", "semantic", "content"):  # the prompt's mask and the image serve both halves
        half = getattr(cond, name)
        assert torch.equal(getattr(seen, name), torch.cat([half, half])), name


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_no_second_batch_without_guidance(cond, scale):
    model = Recorder()
    sample(model, dpm(), torch.zeros(SHAPE), cond, guidance_scale=scale, num_inference_steps=3)
    assert [len(latent) for latent, _, _ in model.calls] == [2, 2, 2]
    assert torch.equal(model.calls[0][2].text, cond.text)


@pytest.mark.parametrize("channels", [16, 32], ids=["mean", "mean+variance"])
def test_guidance_extrapolates_from_the_unconditional_prediction(channels):
    """Euler over one step of rectified flow subtracts the guided prediction: u + s (c - u)."""
    model = Recorder(channels)
    cond = Condition(torch.full((2, 5, 10), 3.0))
    uncond = Condition(torch.full((2, 5, 10), -1.0))
    for negative, expected in ((None, 2 + 4.5 * (3 - 2)), (uncond, -1 + 4.5 * (3 + 1))):
        scheduler = FlowMatchEulerDiscreteScheduler()
        latent = sample(model, scheduler, torch.zeros(SHAPE), cond, negative, num_inference_steps=1)
        assert torch.allclose(latent, torch.full(SHAPE, -expected))


def test_the_image_can_be_dropped_from_the_unconditional_half(cond):
    model = Recorder()
    zeros = {name: torch.zeros_like(getattr(cond, name)) for name in ("semantic", "content")}
    uncond = dataclasses.replace(cond.without_text(model.null_text), **zeros)
    sample(model, dpm(), torch.zeros(SHAPE), cond, uncond, num_inference_steps=1)
    seen = model.calls[0][2]
    assert torch.count_nonzero(seen.semantic[:2]) == torch.count_nonzero(seen.content[:2]) == 0
    assert torch.equal(seen.semantic[2:], cond.semantic)


# --- callbacks, noise, refusals ------------------------------------------------------------------------------------


def test_callback_replaces_and_stops(model, cond):
    start = initial_latent(SHAPE, [3, 4])
    steps: list[int] = []

    def stop_at_2(step, timestep, latent):
        steps.append(step)
        return step < 2

    full: list[torch.Tensor] = []
    sample(model, dpm(), start, cond, num_inference_steps=6, callback=lambda i, t, x: full.append(x))
    stopped = sample(model, dpm(), start, cond, num_inference_steps=6, callback=stop_at_2)
    assert steps == [0, 1, 2]
    assert torch.equal(stopped, full[2])

    def interrupt(step, timestep, latent):
        raise StopSampling

    assert torch.equal(sample(model, dpm(), start, cond, num_inference_steps=6, callback=interrupt), full[0])
    zero = sample(model, dpm(), start, cond, num_inference_steps=6, callback=lambda i, t, x: 0 * x)
    assert torch.count_nonzero(zero) == 0


def test_noise_of_an_item_depends_on_its_generator_alone():
    batch = initial_latent((3, 16, 4, 2, 2), [7, 8, 9])
    assert torch.equal(batch[1:2], initial_latent((1, 16, 4, 2, 2), [torch.Generator().manual_seed(8)]))
    assert not torch.equal(batch[0], batch[1])
    generator = torch.Generator().manual_seed(8)
    pair = initial_latent((2, 16, 4, 2, 2), [generator, generator])  # one generator for two items: it moves on
    assert torch.equal(pair[0], batch[1]) and not torch.equal(pair[0], pair[1])
    assert initial_latent((1, 16, 4, 2, 2), [8], dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="1 generators for a batch of 2"):
        initial_latent((2, 16, 4, 2, 2), [0])


def test_an_item_does_not_depend_on_its_batch(model, cond):
    def take(i: slice) -> Condition:
        values = {f.name: getattr(cond, f.name) for f in dataclasses.fields(Condition)}
        return Condition(**{name: value if value is None else value[i] for name, value in values.items()})

    together = sample(model, dpm(), initial_latent(SHAPE, [3, 4]), cond)
    for i in range(2):
        alone = sample(model, dpm(), initial_latent((1, *SHAPE[1:]), [3 + i]), take(slice(i, i + 1)))
        assert (alone[0] - together[i]).norm() <= 1e-4 * together[i].norm()


def test_latents_keep_their_dtype(model, cond):
    latent = sample(model.bfloat16(), dpm(), initial_latent(SHAPE, [3, 4]), cond, num_inference_steps=2)
    assert latent.dtype == torch.float32


@pytest.mark.parametrize("make", [dpm, DDIMScheduler, FlowMatchEulerDiscreteScheduler])
def test_nan_names_its_step(make):
    def broken(latent, timestep, *condition):
        return torch.where(timestep.view(-1, 1, 1, 1, 1) < 600, torch.nan, torch.zeros_like(latent))

    scheduler = make()
    scheduler.set_timesteps(10)
    first = next(i for i, t in enumerate(scheduler.timesteps) if t < 600) + 1
    assert first > 1
    with pytest.raises(ValueError, match=rf"not finite .* from step {first} of 10 on"):
        sample(broken, make(), START, NO_CONDITION, guidance_scale=1.0, num_inference_steps=10)


def test_refusals(cond):
    start = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=r"semantic is None in the unconditional half, \(2, 3, 12\)"):
        sample(Recorder(), dpm(), start, cond, dataclasses.replace(cond, semantic=None))
    with pytest.raises(ValueError, match=r"null_text has shape \(5, 10\), a prompt has \(4, 10\)"):
        sample(Recorder(), dpm(), start, Condition(torch.zeros(2, 4, 10)))
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        sample(Recorder(), dpm(), start, cond, num_inference_steps=0)
