"""guidance_dpm_step against its twin, and its coefficients against diffusers' schedulers, step by step."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from reducio_fast.fast import solver_tables
from reducio_fast.triton_kernels import guidance_dpm_step as op
from reducio_fast.triton_kernels.launch import launcher

COEFFICIENTS = [4.5, 1.3, -0.7, 0.8, 0.4, -0.2]
SHAPES = [(2, 16, 2, 2, 2), (1, 3, 1, 5, 7), (3, 67)]


def inputs(shape: tuple[int, ...], guided: bool, coefficients: list[float] = COEFFICIENTS) -> list[torch.Tensor]:
    """Prediction, x, previous in float64; coefficients in float32, as always."""
    prediction = torch.randn(2 * shape[0] if guided else shape[0], *shape[1:], dtype=torch.float64)
    x, previous = torch.randn(2, *shape, dtype=torch.float64).unbind()
    return [prediction, x, previous, torch.tensor(coefficients)]


def check(check_kernel, prediction, x, previous, coefficients):
    """`check_kernel` without rounding the coefficients, whose dtype is fixed, to half precision."""

    def bound(function):
        return lambda *tensors: function(*tensors, coefficients.to(tensors[0].device))

    return check_kernel(bound(op.launch), bound(op.twin), prediction, x, previous)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_twin(shape, guided, check_kernel):
    check(check_kernel, *inputs(shape, guided))


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "plain"])
@pytest.mark.parametrize("shape", [(2, 5, 3, 3, 7), (1, 14, 4, 2, 3), (3, 67)], ids=str)
def test_guidance_per_frame(shape, guided, check_kernel):
    scales = torch.linspace(1, 3, shape[1]).tolist()
    check(check_kernel, *inputs(shape, guided, [*scales, *COEFFICIENTS[1:]]))


@pytest.mark.parametrize("run", [op.launch, op.twin], ids=["kernel", "twin"])
def test_each_frame_has_its_own_scale(run, device):
    """As each frame alone, with one scale: every bit."""
    prediction, x, previous, _ = (t.to(device, torch.float32) for t in inputs((2, 5, 3, 7), guided=True))
    scales, row = [1.0, 3.0, 0.0, -2.0, 7.5], COEFFICIENTS[1:]
    together = run(prediction, x, previous, torch.tensor([*scales, *row], device=device))
    for frame, scale in enumerate(scales):
        one = (t[:, frame : frame + 1].contiguous() for t in (prediction, x, previous))
        alone = run(*one, torch.tensor([scale, *row], device=device))
        for got, want in zip(together, alone, strict=True):
            assert torch.equal(got[:, frame : frame + 1], want), frame


def test_latent_may_be_wider_than_the_prediction(dtype, device, assert_right):
    tensors = inputs((2, 3, 5, 7), guided=True)
    prediction = tensors[0].to(device, dtype)
    x, previous, coefficients = (t.to(device, torch.float32) for t in tensors[1:])
    oracle = op.twin(prediction.double(), x.double(), previous.double(), coefficients)
    results = zip(
        op.launch(prediction, x, previous, coefficients), op.twin(prediction, x, previous, coefficients), strict=True
    )
    for (fast, eager), exact in zip(results, oracle, strict=True):
        assert fast.dtype == torch.float32
        assert_right(fast, eager, exact)


@pytest.mark.parametrize("run", [op.launch, op.twin], ids=["kernel", "twin"])
def test_previous_without_weight_is_never_seen(run, device):
    prediction, x, previous, coefficients = (
        t.to(device, torch.float32) for t in inputs((1, 3, 5), True, [2.0, 1.0, -0.5, 0.9, 0.3, 0.0])
    )
    expected = run(prediction, x, previous, coefficients)
    for got, want in zip(run(prediction, x, torch.full_like(x, float("nan")), coefficients), expected, strict=True):
        assert torch.equal(got, want)


def test_twin_is_the_formula():
    prediction, x, previous, coefficients = inputs((2, 4, 3), guided=True)
    w, p, q, a, b, c = coefficients.double().tolist()
    data = p * x + q * ((1 - w) * prediction[:2] + w * prediction[2:])
    following, got = op.twin(prediction, x, previous, coefficients)
    torch.testing.assert_close(got, data)
    torch.testing.assert_close(following, a * x + b * data + c * previous)


# --- coefficients against the schedulers ---------------------------------------------------------------------------


def dpm(**changes) -> DPMSolverMultistepScheduler:
    """PixArt-alpha's settings, with changes."""
    return DPMSolverMultistepScheduler(**{"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02} | changes)


DPM = [
    {},
    {"solver_order": 1},
    {"solver_type": "heun"},
    {"final_sigmas_type": "sigma_min"},
    {"final_sigmas_type": "sigma_min", "solver_type": "heun"},
    {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    {"final_sigmas_type": "sigma_min", "lower_order_final": False, "euler_at_final": True},
    {"lower_order_final": False, "use_karras_sigmas": True},
    {"use_lu_lambdas": True},
    {"prediction_type": "sample"},
    {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "solver_type": "heun"},
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, "solver_type": "heun"},
    {"prediction_type": "epsilon", "use_flow_sigmas": True},
]
FLOW = [{}, {"shift": 3.0}, {"invert_sigmas": True}, {"use_karras_sigmas": True}]


def compare_steps(scheduler, coefficients: torch.Tensor, dtype: torch.dtype, run=op.twin) -> None:
    """Both samplers step their own latent with the same model outputs; every step must agree."""
    assert coefficients.shape == (len(scheduler.timesteps), 5)
    assert coefficients.dtype == torch.float64
    scheduler_x = x = torch.randn(2, 3, 5, dtype=dtype)
    previous = torch.full_like(x, float("nan"))
    for step, timestep in enumerate(scheduler.timesteps):
        prediction = torch.randn(4, 3, 5, dtype=dtype)
        guidance = torch.tensor([4.5], dtype=torch.float64)
        row = torch.cat([guidance, coefficients[step]]).to(dtype if run is op.twin else torch.float32)
        x, previous = run(prediction, x, previous, row)
        g = prediction[:2] + 4.5 * (prediction[2:] - prediction[:2])
        scheduler_x = scheduler.step(g, timestep, scheduler_x).prev_sample
        assert (x - scheduler_x).norm() <= 1e-5 * scheduler_x.norm(), f"step {step}"


@pytest.mark.parametrize("steps", [20, 7, 2, 1])
@pytest.mark.parametrize("changes", DPM, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "default")
@pytest.mark.slow
def test_every_step_is_the_dpm_solvers(changes, steps):
    for dtype in (torch.float64, torch.float32):
        scheduler = dpm(**changes)
        scheduler.set_timesteps(steps)
        compare_steps(scheduler, solver_tables.dpm_coefficients(scheduler), dtype)


@pytest.mark.parametrize("steps", [20, 2, 1])
@pytest.mark.parametrize("changes", FLOW, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "default")
def test_every_step_is_the_flows(changes, steps):
    for dtype in (torch.float64, torch.float32):
        scheduler = FlowMatchEulerDiscreteScheduler(**changes)
        scheduler.set_timesteps(steps)
        compare_steps(scheduler, solver_tables.euler_coefficients(scheduler), dtype)


def test_the_kernel_walks_the_same_path(device):
    def run(*tensors):
        return tuple(t.cpu() for t in op.launch(*(t.to(device) for t in tensors)))

    scheduler = dpm()
    scheduler.set_timesteps(20)
    compare_steps(scheduler, solver_tables.dpm_coefficients(scheduler), torch.float32, run)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dpm(algorithm_type="sde-dpmsolver++"), "algorithm_type='sde-dpmsolver\\+\\+'"),
        (lambda: dpm(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"), "algorithm_type='dpmsolver'"),
        (lambda: dpm(solver_order=3), "solver_order=3"),
        (lambda: dpm(thresholding=True), "thresholding=True"),
        (lambda: dpm(variance_type="learned"), "variance_type='learned'"),
        (EDMDPMSolverMultistepScheduler, "the scheduler is a EDMDPMSolverMultistepScheduler"),  # scales its input
        (DPMSolverSinglestepScheduler, "the scheduler is a DPMSolverSinglestepScheduler"),
        (EulerDiscreteScheduler, "the scheduler is a EulerDiscreteScheduler"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_schedulers_that_are_no_linear_update_are_refused(make, message):
    scheduler = make()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=message):
        solver_tables.dpm_coefficients(scheduler)


def test_other_scheduler_mistakes_are_named():
    stochastic = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    stochastic.set_timesteps(5)
    with pytest.raises(ValueError, match="stochastic_sampling=True"):
        solver_tables.euler_coefficients(stochastic)
    with pytest.raises(ValueError, match="the scheduler is a DPMSolverMultistepScheduler, .* Flow"):
        solver_tables.euler_coefficients(dpm())
    with pytest.raises(ValueError, match="call set_timesteps first"):
        solver_tables.dpm_coefficients(dpm())
    scaled = dpm()
    scaled.set_timesteps(5)
    scaled.init_noise_sigma = 14.6
    with pytest.raises(ValueError, match="init_noise_sigma=14.6"):
        solver_tables.dpm_coefficients(scaled)


# --- the op --------------------------------------------------------------------------------------------------------


@triton.jit
def offsets_kernel(out_ptr, block, BLOCK_N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK_N), op.element_offsets(block + tl.program_id(0), BLOCK_N))


def test_addresses_are_64_bit(device):
    out = torch.empty(16, dtype=torch.int64, device=device)
    launcher(offsets_kernel)[(1,)](out, 2**30, BLOCK_N=16)
    assert out.tolist() == [2**34 + i for i in range(16)]


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "plain"])
def test_op_passes_opcheck(guided):
    prediction, *rest = (t.float() for t in inputs((2, 3, 4), guided))
    torch.library.opcheck(op.guidance_dpm_step, (prediction.half(), *rest))
    per_frame = torch.cat([torch.ones(2), rest[-1]])
    torch.library.opcheck(op.guidance_dpm_step, (prediction.half(), *rest[:-1], per_frame))


def test_mistakes_are_named():
    run = torch.ops.reducio_fast.guidance_dpm_step
    prediction, x, previous, coefficients = (t.float() for t in inputs((2, 3, 4), guided=True))
    with pytest.raises(ValueError, match=r"previous has shape=\(1, 3, 4\), x has shape=\(2, 3, 4\)"):
        run(prediction, x, previous[:1], coefficients)
    with pytest.raises(ValueError, match="prediction has B=3, x has B=2"):
        run(prediction[:3], x, previous, coefficients)
    with pytest.raises(ValueError, match=r"prediction has shape after the batch=\(3, 2\)"):
        run(prediction[..., :2], x, previous, coefficients)
    with pytest.raises(ValueError, match="x has dtype=torch.float16, prediction has dtype=torch.float32"):
        run(prediction, x.half(), previous.half(), coefficients)
    with pytest.raises(ValueError, match="previous has dtype=torch.float16, x has dtype=torch.float32"):
        run(prediction, x, previous.half(), coefficients)
    with pytest.raises(ValueError, match=r"coefficients has shape \(5,\), it must be \(6\)"):
        run(prediction, x, previous, coefficients[:5])
    with pytest.raises(ValueError, match=r"coefficients has shape \(7,\), it must be \(6\)"):
        run(prediction, x, previous, torch.cat([coefficients[:1], coefficients]))
    with pytest.raises(ValueError, match=r"coefficients has shape \(2, 4\)"):
        run(prediction, x, previous, torch.ones(2, 4))
    with pytest.raises(ValueError, match="coefficients has dtype=torch.float64"):
        run(prediction, x, previous, coefficients.double())
    with pytest.raises(ValueError, match="x has strides .* contiguous"):
        run(prediction, x.transpose(1, 2).contiguous().transpose(1, 2), previous, coefficients)
