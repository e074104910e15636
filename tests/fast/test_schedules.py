"""Tables of steps against diffusers' schedulers stepped by hand, and shortcuts against the reference's sampler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from reducio_fast.fast import sampler as fast_sampler
from reducio_fast.fast.reducio.dit import FastReducioDiT
from reducio_fast.fast.solver_tables import coefficients
from reducio_fast.measurement.accuracy_rule import relative_error
from reducio_fast.reference import Condition, DiTConfig, ReducioDiT, sample
from reducio_fast.reference.sampler import Shortcuts, quadratic_timesteps
from tiny_networks import DIT, assert_right, lively, plan

UNIPC: list[dict[str, Any]] = [
    {},
    {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    {"solver_order": 1},
    {"use_exponential_sigmas": True, "prediction_type": "v_prediction"},
    {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    {"disable_corrector": [0, 3]},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
]


def network(latent: Tensor, timestep: Tensor) -> Tensor:
    return torch.tanh(0.7 * latent + float(timestep) / 1000) + 0.1 * latent


def by_table(scheduler: Any, steps: int, latent: Tensor, timesteps: list[int] | None = None) -> Tensor:
    table = coefficients(scheduler, steps, timesteps=timesteps)
    last = older = torch.zeros_like(latent)
    for timestep, (p, q, a, b, c, *d) in zip(scheduler.timesteps, table.tolist(), strict=True):
        data = p * latent + q * network(latent, timestep)
        latent = a * latent + b * data + c * last + (d[0] * older if d else 0)
        last, older = data, last
    return latent


def by_diffusers(scheduler: Any, steps: int, latent: Tensor, timesteps: list[int] | None = None) -> Tensor:
    if timesteps is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=timesteps)
    scheduler.sigmas = scheduler.sigmas.double()  # else diffusers computes a step's coefficients in float32
    for timestep in scheduler.timesteps:
        latent = scheduler.step(network(latent, timestep), timestep, latent, return_dict=False)[0]
    return latent


def noise() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("config", UNIPC, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_unipc(config: dict[str, Any], steps: int) -> None:
    make: Callable[[], Any] = lambda: UniPCMultistepScheduler(**config)  # noqa: E731
    ours, theirs = by_table(make(), steps, noise()), by_diffusers(make(), steps, noise())
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "config", [{"use_lu_lambdas": True}, {"use_exponential_sigmas": True}, {}], ids=["lu", "exponential", "quadratic"]
)
@pytest.mark.parametrize("steps", [4, 10, 20])
def test_spacings(config: dict[str, Any], steps: int) -> None:
    timesteps = None if config else quadratic_timesteps(steps)
    make: Callable[[], Any] = lambda: DPMSolverMultistepScheduler(prediction_type="v_prediction", **config)  # noqa: E731
    given = (steps, noise(), timesteps)  # diffusers steps these in float32
    torch.testing.assert_close(by_table(make(), *given), by_diffusers(make(), *given), rtol=1e-5, atol=1e-6)


def test_what_unipc_cannot_do_linearly_is_refused() -> None:
    for config, line in (
        ({"solver_order": 3}, "solver_order=3 is not one of"),
        ({"thresholding": True}, "thresholding=True"),
        ({"predict_x0": False}, "predict_x0=False"),
        ({"lower_order_final": False}, "divides by zero"),
    ):
        with pytest.raises(ValueError, match=line):
            coefficients(UniPCMultistepScheduler(**config), 4)


def test_quadratic_steps() -> None:
    assert quadratic_timesteps(4) == [999, 562, 250, 62]
    assert quadratic_timesteps(3, 101, 1.0) == [100, 67, 33]


def test_modes() -> None:
    assert Shortcuts().modes(3) == ["guided"] * 3
    assert Shortcuts((0.25, 0.75), 2).modes(8) == [
        *["conditional"] * 2,
        *["guided", "reused"] * 2,
        *["conditional"] * 2,
    ]
    assert Shortcuts((1.0, 1.0)).modes(2) == ["conditional"] * 2


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any, Condition]:
    network, g = lively(ReducioDiT(DiTConfig(**DIT))), torch.Generator().manual_seed(1)
    text = torch.randn(1, 7, 20, generator=g)
    condition = Condition(text, torch.tensor([[1, 1, 1, 1, 0, 0, 0]]), torch.randn(1, 6, 24, generator=g), None)
    return network, FastReducioDiT(network, plan()), condition


def run(
    sampler: Any, network: Any, cond: Condition, scheduler: Any, dtype: torch.dtype = torch.float32, steps: int = 6,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    latent = torch.randn(1, 16, 4, 2, 2, generator=torch.Generator().manual_seed(2)).to(dtype)
    return sampler(network.denoiser(cond, None, 3.0), scheduler, latent, steps, **kwargs)


@pytest.mark.parametrize(
    "shortcuts", [Shortcuts((0.4, 1.0)), Shortcuts(guidance_reuse=2), Shortcuts((0.0, 0.5), 3)], ids=str
)
@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.slow
def test_shortcuts_are_the_references(model: tuple[Any, Any, Condition], shortcuts: Shortcuts, scheduler: Any) -> None:
    reference, twin, cond = model
    eager = run(sample, reference, cond, scheduler(), shortcuts=shortcuts)
    wide = Condition(cond.text.double(), cond.text_mask, cond.semantic.double(), None)
    oracle = run(sample, copy.deepcopy(reference).double(), wide, scheduler(), torch.float64, shortcuts=shortcuts)
    assert_right(run(fast_sampler.sample, twin, cond, scheduler(), shortcuts=shortcuts), eager, oracle)
    assert relative_error(eager, run(sample, reference, cond, scheduler())) > 0.01


def test_a_block_cache_leaves_blocks_out(model: tuple[Any, Any, Condition]) -> None:
    _, twin, cond = model
    calls: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, block in enumerate(twin.transformer_blocks)
    ]

    def cached(threshold: float, **others: Any) -> Tensor:
        calls.clear()
        shortcuts = Shortcuts(**others, cache_threshold=threshold)
        return run(fast_sampler.sample, twin, cond, DPMSolverMultistepScheduler(), steps=12, shortcuts=shortcuts)

    try:
        full = run(fast_sampler.sample, twin, cond, DPMSolverMultistepScheduler(), steps=12)
        assert len(calls) == 12 * len(handles)
        tight = cached(1e-9)
        assert torch.equal(tight, full) and len(calls) == 12 * len(handles), "nothing changes so little"
        loose = cached(1e9)
        assert calls.count(0) == 12 and calls.count(1) == 1, "all but the first step keep the other blocks' residual"
        assert float((loose - full).norm() / full.norm()) > 0 and torch.isfinite(loose).all()
        for others in ({"guidance_reuse": 2}, {"guidance_interval": (0.25, 0.75)}):
            cached(1e9, **others)
            assert calls.count(0) == 12 and calls.count(1) == 2, "one computed step with both halves and one with one"
    finally:
        for handle in handles:
            handle.remove()


def test_a_kept_residual_is_exact_where_the_step_is_the_same(model: tuple[Any, Any, Condition]) -> None:
    """A second prediction of the same latent at the same timestep reuses the other blocks' residual from the first."""
    _, twin, cond = model
    denoise = twin.denoiser(cond, None, 3.0)
    latent = torch.randn(1, 16, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    inputs, cache = denoise.schedule(torch.tensor([500]), latent)[0], fast_sampler.BlockCache(0.01)
    first, second = (denoise.predict_cached(latent, inputs, cache) for _ in range(2))
    assert (cache.computed, cache.kept) == (1, 1)
    torch.testing.assert_close(first, denoise.predict(latent, inputs), rtol=0, atol=0)
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)
