"""Where the steps of a clip lie: a scheduler's own schedule, or another that the same scheduler can follow."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from ...reference.sampler import quadratic_timesteps, sample, set_timesteps
from ...system.errors import ReducioError, first_line

# diffusers' fields that choose another spacing; at most one may be set.
SPACINGS = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")
# Up to this many quadratic steps, second order loses more by extrapolating over long steps than it gains: at 6 steps,
# 0.19 from the solution instead of 0.07 (24 prompts of the default model).
FIRST_ORDER_STEPS = 6
FIELDS = {"lu": "use_lu_lambdas", "exponential": "use_exponential_sigmas"}


def scheduled(scheduler: Any, schedule: str, steps: int) -> tuple[Any, list[int] | None]:
    """A scheduler and, if they are not its own, the timesteps to set on it. schedule: one of `call.quality.SCHEDULES`.

    "quadratic": timesteps that crowd towards the end, of first order if they are few. "lu": equal steps of the
    logarithm of signal to noise (DPM-Solver, arXiv 2206.00927, diffusers' `use_lu_lambdas`). "exponential": equal steps
    of the logarithm of sigma. Raises ReducioError for a schedule that the scheduler cannot follow.
    """
    if schedule == "own":
        return scheduler, None
    config = scheduler.config
    if schedule not in (able := known(scheduler)):
        raise ReducioError(
            f"schedule: a {type(scheduler).__name__} cannot follow {schedule!r}; it can {', '.join(able)}"
        )
    changes: dict[str, Any] = {name: name == FIELDS.get(schedule) for name in SPACINGS if name in config}
    if schedule == "quadratic" and steps <= FIRST_ORDER_STEPS and "solver_order" in config:
        changes["solver_order"] = 1
    if any(config[name] != value for name, value in changes.items()):
        scheduler = type(scheduler).from_config(config, **changes)
    timesteps = quadratic_timesteps(steps, config["num_train_timesteps"]) if schedule == "quadratic" else None
    return scheduler, timesteps


def known(scheduler: Any) -> list[str]:
    """The schedules that the scheduler can follow."""
    config = dict(scheduler.config)
    able = ["own"]
    if config.get("use_flow_sigmas") or "num_train_timesteps" not in config:
        return able
    if "timesteps" in inspect.signature(scheduler.set_timesteps).parameters and "prediction_type" in config:
        able.append("quadratic")
    return [*able, *(name for name, field in FIELDS.items() if field in config)]


def trial_timesteps(scheduler: Any, steps: int, timesteps: list[int] | None) -> Any:
    """The timesteps that the scheduler would have, computed on a copy."""
    trial = copy.deepcopy(scheduler)
    if timesteps is None:
        trial.set_timesteps(steps)
    else:
        trial.set_timesteps(timesteps=timesteps)
    return trial.timesteps


def check_sigmas(scheduler: Any, sigmas: Sequence[float]) -> None:
    """Raise ReducioError for sigmas that the scheduler cannot follow."""
    try:
        set_timesteps(copy.deepcopy(scheduler), len(sigmas) - 1, "cpu", sigmas)
    except ValueError as error:
        raise ReducioError(str(error)) from error
    except Exception as error:  # of values in the scheduler's configuration
        raise ReducioError(f"sigmas: a {type(scheduler).__name__} cannot follow them ({first_line(error)})") from error


def check_scheduler(scheduler: Any, where: Any) -> None:
    """Raise ReducioError for a scheduler, loaded from the folder `where`, that cannot take a few steps. Its class
    checks only some of the values of its configuration before it steps. A copy takes the steps, on four numbers."""
    try:
        steps = min(4, getattr(scheduler.config, "num_train_timesteps", 4))  # PNDM's needs four
        latent = torch.ones(1, 4, 1, 1, 1)
        sample(lambda x, timestep: x, copy.deepcopy(scheduler), latent, steps, generator=torch.Generator())
    except Exception as error:
        name, reason = type(scheduler).__name__, f"{type(error).__name__}: {first_line(error)}"
        raise ReducioError(f"{where}: a {name} of this configuration cannot step ({reason})") from error


def unfollowed_by_twins(
    scheduler: Any, steps: int, sigmas: Sequence[float] | None = None, timesteps: Sequence[int] | None = None
) -> str | None:
    """Why the twins' sampler cannot step this scheduler; None if it can."""
    from ...fast.solver_tables import coefficients

    try:
        coefficients(scheduler, steps, sigmas, timesteps)
    except Exception as error:  # ValueError where the sampler cannot follow it; others for values that no sampler takes
        return first_line(error)
    return None
