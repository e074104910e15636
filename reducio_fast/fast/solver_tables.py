"""What a scheduler would do in each step, as rows of coefficients for the guidance and solver kernel.

`register` adds a scheduler: a function that says whether it knows an instance, and one that gives the rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.data_prediction import alpha_sigma, data_rows
from ..reference.sampler import set_timesteps
from ..triton_kernels.guidance_dpm_step import OP


def dpm_coefficients(scheduler: Any) -> Tensor:
    """(p, q, a, b, c) of every step of a `DPMSolverMultistepScheduler` after `set_timesteps`: float64 [steps, 5].

    Its sigmas are taken as they are, so every schedule it knows is covered. Raises ValueError for what is not a linear
    update of two data predictions: other schedulers, solvers that draw noise or predict it, third order, thresholding.
    """
    config, sigmas = _checked(scheduler, "DPMSolverMultistepScheduler")
    for name, known in (
        ("algorithm_type", ("dpmsolver++",)),
        ("solver_order", (1, 2)),
        ("solver_type", ("midpoint", "heun")),
        ("prediction_type", ("epsilon", "sample", "v_prediction", "flow_prediction")),
        ("thresholding", (False,)),
        ("variance_type", (None,)),  # the scheduler would cut the prediction to three channels
    ):
        if config[name] not in known:
            raise ValueError(f"dpm_coefficients: {name}={config[name]!r} is not one of {known}")

    def log_snr(sigma: float) -> float:
        alpha, sigma = alpha_sigma(config, sigma)
        return (math.log(alpha) if alpha else -math.inf) - (math.log(sigma) if sigma else -math.inf)

    steps = len(sigmas) - 1
    lower_at_end = (
        config["euler_at_final"]
        or (config["lower_order_final"] and steps < 15)
        or config["final_sigmas_type"] == "zero"
    )
    rows = []
    for i, (p, q) in enumerate(data_rows(scheduler)):
        sigma = alpha_sigma(config, sigmas[i])[1]
        alpha_next, sigma_next = alpha_sigma(config, sigmas[i + 1])
        h = log_snr(sigmas[i + 1]) - log_snr(sigmas[i])
        a, b, c = sigma_next / sigma, -alpha_next * math.expm1(-h), 0.0
        if config["solver_order"] == 2 and i > 0 and not (i == steps - 1 and lower_at_end):
            # The slope of the data prediction, from its last two values, extends the step to second order.
            if config["solver_type"] == "midpoint":
                weight = 0.5 * b
            else:
                weight = alpha_next * (math.expm1(-h) / h + 1) if h else 0.0
            slope = weight * h / (log_snr(sigmas[i]) - log_snr(sigmas[i - 1]))
            b, c = b + slope, -slope
        rows.append((p, q, a, b, c))
    return torch.tensor(rows, dtype=torch.float64)


def euler_coefficients(scheduler: Any) -> Tensor:
    """(p, q, a, b, c) of every step of a `FlowMatchEulerDiscreteScheduler` after `set_timesteps`: float64 [steps, 5].

    The "data prediction" is then the velocity itself. Raises ValueError for other schedulers and for one that draws
    noise as it goes.
    """
    config, sigmas = _checked(scheduler, "FlowMatchEulerDiscreteScheduler")
    if config.get("stochastic_sampling", False):
        raise ValueError("euler_coefficients: stochastic_sampling=True draws noise, a step here is a linear update")
    return euler_rows(sigmas)


def edm_coefficients(scheduler: Any) -> Tensor:
    """(p, q, a, b, c) of every step of an `EulerDiscreteScheduler` after `set_timesteps`: float64 [steps, 5].

    Its model input and initial noise are scaled too: see `input_scales`. Raises ValueError for other schedulers, and
    for timesteps that repeat, as those above its table do: diffusers finds a step by its timestep, and skips one then.
    """
    sigmas = _sigmas_of(scheduler, "EulerDiscreteScheduler")[1]
    if len(scheduler.timesteps.unique()) < len(scheduler.timesteps):
        raise ValueError(f"edm_coefficients: timesteps repeat ({scheduler.timesteps.tolist()}); is sigma_max too high?")
    rows = []
    for (p, q), (sigma, following) in zip(data_rows(scheduler), itertools.pairwise(sigmas), strict=True):
        rows.append((p, q, following / sigma, 1 - following / sigma, 0.0))
    return torch.tensor(rows, dtype=torch.float64)


def input_scales(scheduler: Any) -> Tensor | None:
    """What the latent is multiplied by before each step's prediction, float64 [steps]; None where nothing is."""
    if "EulerDiscreteScheduler" not in (base.__name__ for base in type(scheduler).__mro__):
        return None
    sigmas = scheduler.sigmas.double()[:-1]
    return (sigmas**2 + 1).rsqrt()


def euler_rows(sigmas: list[float]) -> Tensor:
    """(p, q, a, b, c) of Euler steps along `sigmas`, one more than there are steps: float64 [steps, 5]."""
    rows = [(0.0, 1.0, 1.0, after - before, 0.0) for before, after in zip(sigmas[:-1], sigmas[1:], strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def _sigmas_of(scheduler: Any, wanted: str) -> tuple[dict[str, Any], list[float]]:
    """Config and sigmas, one more than there are steps, of a scheduler of the wanted class, ready to step.

    By the name of the class or of a base: kernels import without diffusers. Relatives with the same config (single-step
    and EDM solvers) scale the noise or the model's input, or step otherwise.
    """
    name = type(scheduler).__name__
    if wanted not in (base.__name__ for base in type(scheduler).__mro__):
        raise ValueError(f"{OP}: the scheduler is a {name}, coefficients are known for {wanted}")
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError(f"{OP}: {name} has no steps yet, call set_timesteps first")
    return dict(scheduler.config), scheduler.sigmas.double().tolist()


def _checked(scheduler: Any, wanted: str) -> tuple[dict[str, Any], list[float]]:
    """`_sigmas_of` a scheduler that starts from unit noise."""
    config, sigmas = _sigmas_of(scheduler, wanted)
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        name = type(scheduler).__name__
        raise ValueError(f"{OP}: {name} has init_noise_sigma={scheduler.init_noise_sigma}, it must be 1")
    return config, sigmas


_tables: list[tuple[Callable[[Any], bool], Callable[[Any], Tensor]]] = []


def register(knows: Callable[[Any], bool], rows: Callable[[Any], Tensor]) -> None:
    """Follow schedulers for which `knows(scheduler)` is true: `rows(scheduler)` are (p, q, a, b, c) of their steps."""
    _tables.append((knows, rows))


def coefficients(scheduler: Any, steps: int, sigmas: Sequence[float] | None = None) -> Tensor:
    """[steps, 5] of a schedule, the scheduler's own or along `sigmas`, whose timesteps are then set. Raises ValueError
    where the kernel cannot follow it."""
    for knows, rows in _tables:
        if knows(scheduler):
            set_timesteps(scheduler, steps, "cpu", sigmas)
            return rows(scheduler)
    raise ValueError(
        f"{type(scheduler).__name__} has no table of coefficients; the fast sampler follows "
        "DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler and EulerDiscreteScheduler"
    )


def _of_diffusers(class_name: str) -> Callable[[Any], bool]:
    """Whether a scheduler is of this very class of diffusers, which this room does not import. A subclass may step
    otherwise."""

    def knows(scheduler: Any) -> bool:
        cls = type(scheduler)
        return cls.__name__ == class_name and cls.__module__.partition(".")[0] == "diffusers"

    return knows


register(_of_diffusers("DPMSolverMultistepScheduler"), dpm_coefficients)
register(_of_diffusers("FlowMatchEulerDiscreteScheduler"), euler_coefficients)
register(_of_diffusers("EulerDiscreteScheduler"), edm_coefficients)
