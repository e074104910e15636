"""Few steps: other solvers on SVD's noise levels, distilled weights, and what a call without guidance costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import reducio_fast
from reducio_fast import ReducioError
from reducio_fast.fast.solver_tables import coefficients, input_scales
from reducio_fast.pipelines import registry
from reducio_fast.pipelines.svd.component_table import dpm_scheduler, euler_scheduler
from reducio_fast.pipelines.svd.pipeline import SVDPipeline
from reducio_fast.reference.sampler import set_timesteps
from reducio_fast.reference.svd.consistency import ConsistencyConfig, ConsistencyScheduler
from reducio_fast.reference.svd.sampler import align_your_steps
from tiny_svd import CALL as USUAL_CALL
from tiny_svd import QUIET, seeded

pytestmark = pytest.mark.slow

CALL = USUAL_CALL | {"height": 16, "width": 16}


def stepped(scheduler: Any, table: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The latents after all steps of the table and of diffusers' scheduler, with the same stand-in for a network."""
    scales = input_scales(scheduler)
    assert scales is not None and len(table) == len(scales) == steps
    theirs = ours = torch.randn(3, 4, generator=seeded(0)).double() * scheduler.init_noise_sigma
    previous = torch.zeros_like(ours)
    for index, (timestep, (p, q, a, b, c)) in enumerate(zip(scheduler.timesteps, table.tolist(), strict=True)):
        scaled = scheduler.scale_model_input(theirs, timestep)
        torch.testing.assert_close(ours * scales[index], scaled, rtol=1e-4, atol=1e-4)
        theirs = scheduler.step(torch.sin(scaled), timestep, theirs).prev_sample
        clean = p * ours + q * torch.sin(ours * scales[index])
        ours, previous = a * ours + b * clean + c * previous, clean
    return ours, theirs


@pytest.mark.parametrize("steps", [1, 2, 5, 16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"solver_type": "heun", "final_sigmas_type": "sigma_min"},
        {"solver_order": 1},
        {"prediction_type": "epsilon", "sigma_data": 0.5, "sigma_schedule": "exponential"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    ],
    ids=["ours", "heun", "first-order", "epsilon", "second-order-to-the-end"],
)
def test_dpm_solver_on_edm_sigmas_is_diffusers(changes: dict, steps: int):
    scheduler = type(dpm_scheduler()).from_config(dict(dpm_scheduler().config) | changes)
    table = coefficients(scheduler, steps)
    ours, theirs = stepped(scheduler, table, steps)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # the scheduler's sigmas are float32


@pytest.mark.parametrize("steps", [3, 10, 16])
def test_dpm_solver_along_align_your_steps(steps: int):
    """diffusers' own steps, of the same solver with these sigmas in place of Karras'."""
    scheduler, sigmas = dpm_scheduler(), align_your_steps(steps)
    table = coefficients(scheduler, steps, sigmas)
    torch.testing.assert_close(scheduler.sigmas.double(), torch.tensor(sigmas, dtype=torch.float64), rtol=1e-6, atol=0)
    euler = euler_scheduler()
    euler.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(scheduler.timesteps, euler.timesteps)
    ours, theirs = stepped(scheduler, table, steps)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    set_timesteps(scheduler, steps, "cpu")
    assert float(scheduler.sigmas[1]) != pytest.approx(sigmas[1], rel=0.01), "its own schedule again"


def test_align_your_steps_needs_no_other_solver(folder: Path, picture: Image.Image):
    clips = []
    for backend in ("reference", "fast"):
        pipe = SVDPipeline.from_pretrained(
            folder, device="cpu", dtype="float32", backend=backend, scheduler="dpm-solver++"
        )
        call = CALL | {"num_inference_steps": 3, "sigmas": "align-your-steps", "output_type": "latent"}
        clips.append(pipe(picture, **call, **QUIET, seed=1).frames)
    torch.testing.assert_close(clips[0], clips[1], rtol=1e-4, atol=1e-4)


def test_dpm_solver_gets_further_in_the_same_steps():
    """For Gaussian data the best prediction of v is linear, and 1000 Euler steps give the solution: with ten steps the
    second-order solver is nearer to it than Euler's."""

    def clip(scheduler: Any, steps: int) -> Tensor:
        scheduler.set_timesteps(steps)
        latent = torch.linspace(-2, 2, 9).double() * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            sigma = float((4 * timestep).exp())
            scaled = scheduler.scale_model_input(latent, timestep)
            data = 0.3 + 0.25 / (0.25 + sigma**2) * (latent - 0.3)  # of mean 0.3 and variance 0.25
            v = (latent / (sigma**2 + 1) - data) * math.sqrt(sigma**2 + 1) / sigma
            assert scaled.shape == v.shape
            latent = scheduler.step(v, timestep, latent).prev_sample
        return latent

    exact = clip(euler_scheduler(), 1000)
    errors = {
        name: (clip(make(), 10) - exact).norm() for name, make in (("euler", euler_scheduler), ("dpm", dpm_scheduler))
    }
    assert errors["dpm"] < 0.5 * errors["euler"], errors


# ---- consistency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_the_consistency_schedule_is_as_published(steps: int):
    """Recomputed in float64 from the formulas of AnimateLCM-SVD's scheduler: Karras' sigmas at every (40 / steps)-th
    place, v to data, noise of the next level."""
    scheduler = ConsistencyScheduler()
    table = coefficients(scheduler, steps).numpy()
    ramp = np.arange(steps) * (40 // steps) / 39
    sigmas = (700 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 700 ** (1 / 7))) ** 7
    following = np.append(sigmas[1:], 0)
    expected = [1 / (sigmas**2 + 1), -sigmas / np.sqrt(sigmas**2 + 1), 0 * sigmas, 0 * sigmas + 1, following]
    np.testing.assert_allclose(table, np.stack(expected, 1), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(scheduler.timesteps, 0.25 * np.log(sigmas), rtol=1e-6)
    np.testing.assert_allclose(input_scales(scheduler), 1 / np.sqrt(sigmas**2 + 1), rtol=1e-12)
    assert scheduler.init_noise_sigma == pytest.approx((700**2 + 1) ** 0.5)


def test_a_consistency_step_is_the_one_of_diffusers_at_no_boundary():
    """diffusers' consistency scheduler differs in its boundary condition alone, which vanishes as sigma_min does."""
    from diffusers import CMStochasticIterativeScheduler

    smallest = 1e-9
    theirs = CMStochasticIterativeScheduler(
        num_train_timesteps=40, sigma_min=smallest, sigma_max=80.0, sigma_data=0.5, clip_denoised=False
    )
    ours = ConsistencyScheduler(ConsistencyConfig(sigma_min=smallest, sigma_max=80.0, sigma_data=0.5))
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(4)
    ours.sigmas = theirs.sigmas.double()  # theirs run from the other end of the ramp
    latent, output = torch.randn(2, 1, 3, 4, generator=seeded(1)).double()
    theirs.scale_model_input(latent, theirs.timesteps[0])
    expected = theirs.step(-output, theirs.timesteps[0], latent, generator=seeded(2)).prev_sample
    result = ours.step(output, ours.timesteps[0], latent, generator=seeded(2))[0]
    # Both draw the noise in the latent's dtype.
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_fast_and_reference_draw_the_same_noise(folder: Path, picture: Image.Image, steps: int):
    clips = []
    for backend in ("reference", "fast"):
        pipe = SVDPipeline.from_pretrained(
            folder, device="cpu", dtype="float32", backend=backend, scheduler="consistency"
        )
        assert backend == "reference" or pipe.report["unet"].startswith("fast"), pipe.report
        call = CALL | {"num_inference_steps": steps, "max_guidance_scale": 1.0}
        clips.append([pipe(picture, **call, **QUIET, seed=seed, output_type="latent").frames for seed in (1, 1, 2)])
    for ours, again, other in clips:
        assert torch.equal(ours, again) and not torch.equal(ours, other)
    torch.testing.assert_close(clips[0][0], clips[1][0], rtol=1e-4, atol=1e-4)


def test_distilled_weights_from_a_file_and_back_from_a_folder(
    folder: Path, pipe: SVDPipeline, picture: Image.Image, tmp_path: Path
):
    """A U-Net published as one file takes the folder's configuration, and the scheduler is saved with it."""
    state = {n: 0.5 * t for n, t in pipe.unet.state_dict().items()}
    save_file(state, tmp_path / "distilled.safetensors")
    parts = {"unet": tmp_path / "distilled.safetensors", "scheduler": "consistency"}
    call = CALL | QUIET | {"num_inference_steps": 2, "seed": 3}
    setup = {"device": "cpu", "dtype": "float32", "backend": "reference"}
    ours = SVDPipeline.from_pretrained(folder, **setup, **parts)
    assert torch.equal(ours.unet.conv_in.weight, state["conv_in.weight"])
    expected = ours(picture, **call).frames
    assert np.array_equal(reducio_fast.generate(model=folder, image=picture, **setup, **parts, **call).frames, expected)
    ours.save_pretrained(tmp_path / "kept")
    again = SVDPipeline.from_pretrained(tmp_path / "kept", **setup)
    assert again.scheduler.config == ours.scheduler.config
    checker = registry.find(tmp_path / "kept").checker()  # of a server, which loads no weights
    assert checker.scheduler.config == ours.scheduler.config
    assert np.array_equal(again(picture, **call).frames, expected)
    other = SVDPipeline.from_pretrained(folder, **setup, unet=tmp_path / "kept")
    assert torch.equal(other.unet.conv_in.weight, state["conv_in.weight"])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"scheduler": "lcm"}, r"scheduler: 'lcm' given; known are euler, dpm-solver\+\+, consistency"),
        ({"unet": "/no/such.safetensors"}, "no such file or folder"),
        ({"vae": "there"}, "only unet, scheduler and text_to_image can be named"),
    ],
    ids=["scheduler", "unet", "vae"],
)
def test_parts_that_are_not_known(folder: Path, parts: dict, message: str):
    with pytest.raises(ReducioError, match=message):
        SVDPipeline.from_pretrained(folder, device="cpu", **parts)


def test_schedules_that_do_not_fit(pipe: SVDPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch):
    ours = SVDPipeline(**pipe.components | {"scheduler": ConsistencyScheduler()}, backend="reference")
    assert ours.forecast(16, 16).peak() > 0
    with pytest.raises(ReducioError, match="num_inference_steps: must be a whole number from 1 to 40"):
        ours(picture, **CALL | {"num_inference_steps": 41}, **QUIET)
    monkeypatch.setattr(ours, "run", lambda *_: pytest.fail("work began"))
    to_sigma_min = type(dpm_scheduler()).from_config(dpm_scheduler().config, final_sigmas_type="sigma_min")
    for scheduler, sigmas, message in (
        (ConsistencyScheduler(), "align-your-steps", "has a schedule of its own and takes none"),
        (dpm_scheduler(), [80.0, 1.0, 0.0], "sigmas: begin with 80, those of this EDMDPMSolver.* with 700"),
        (to_sigma_min, "align-your-steps", "sigmas: end with 0, which .* needs final_sigmas_type='zero' for"),
    ):
        ours.scheduler = scheduler
        with pytest.raises(ReducioError, match=message):
            ours(picture, **CALL, **QUIET, sigmas=sigmas)


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_without_guidance_a_step_is_half_the_batch(
    pipe: SVDPipeline, fast: SVDPipeline, picture: Image.Image, backend: str, monkeypatch: pytest.MonkeyPatch
):
    """Counted at the first convolution: 4 frames per step, 8 with guidance."""
    ours, seen = {"reference": pipe, "fast": fast}[backend], []
    convolve = torch.conv2d

    def watch(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
        if weight.shape[:2] == (32, 8) and x.shape[1] == 8:
            seen.append(len(x))
        return convolve(x, weight, *arguments)

    monkeypatch.setattr(torch.nn.functional, "conv2d", watch)
    for scale, frames in ((1.0, 4), (3.0, 8)):
        seen.clear()
        ours(picture, **CALL, **QUIET, seed=0, max_guidance_scale=scale, output_type="latent")
        assert seen == [frames] * CALL["num_inference_steps"]
