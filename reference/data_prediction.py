"""The data prediction of a step: the clean latent that a network's output stands for, data = p x + q prediction.

Each type of prediction (noise, velocity, flow, the data itself) is linear in the latent and in the data prediction, the
point at which the trajectory is expected to end. Formulas: DDIM (arXiv 2010.02502), progressive distillation
(arXiv 2202.00512) for v, EDM (arXiv 2206.00364) for the scaling of `EulerDiscreteScheduler` and those after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .multistep_schedule import MultistepSchedule

DataHook = Callable[[int, Tensor], "Tensor | None"]  # (step, data prediction) -> another one, or None to leave it
KNOWN = (
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EDMDPMSolverMultistepScheduler",
    "ConsistencyScheduler",
)


def family_of(scheduler: Any) -> str | None:
    """Which of KNOWN the scheduler is, or derives from; None for another one."""
    if isinstance(scheduler, MultistepSchedule):
        return scheduler.config["_class_name"]
    names = [base.__name__ for base in type(scheduler).__mro__]
    return next((known for known in KNOWN if known in names), None)


def alpha_sigma(sigma: float, flow: bool = False) -> tuple[float, float]:
    """Weights of data and noise, from the noise-to-data ratio that diffusers keeps, or from a flow's time."""
    if flow:
        return 1 - sigma, sigma
    return 1 / math.sqrt(sigma**2 + 1), sigma / math.sqrt(sigma**2 + 1)


def edm_weights(sigma: float, sigma_data: float = 1.0) -> tuple[float, float]:
    """c_skip and c_out of EDM for v: the clean latent is c_skip * latent + c_out * v."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, -sigma * sigma_data / math.sqrt(total)


def data_rows(scheduler: Any) -> list[tuple[float, float]]:
    """(p, q) of every step, after `set_timesteps`. Raises ValueError for schedulers and predictions not known here."""
    family = family_of(scheduler)
    if family is None:
        raise ValueError(f"the data prediction of a {type(scheduler).__name__} is not known; known are {KNOWN}")
    sigmas = scheduler.sigmas.double().tolist()[:-1]
    if family == "ConsistencyScheduler":
        return [edm_weights(sigma, scheduler.config.sigma_data) for sigma in sigmas]
    config = dict(scheduler.config)
    if family == "FlowMatchEulerDiscreteScheduler":
        return [(1.0, -sigma) for sigma in sigmas]
    prediction = config["prediction_type"]
    if prediction == "sample":
        return [(0.0, 1.0)] * len(sigmas)
    if family == "EulerDiscreteScheduler":  # its latent is not scaled: x = data + sigma noise
        if prediction == "v_prediction":
            return [(1 / (sigma**2 + 1), -sigma / math.sqrt(sigma**2 + 1)) for sigma in sigmas]
        if prediction == "epsilon":
            return [(1.0, -sigma) for sigma in sigmas]
        raise ValueError(f"prediction_type={prediction!r} is not known for {family}")
    if family == "EDMDPMSolverMultistepScheduler":
        sign = {"v_prediction": 1, "epsilon": -1}[prediction]
        rows = [edm_weights(sigma, config["sigma_data"]) for sigma in sigmas]
        return [(p, sign * q) for p, q in rows]
    weights = [alpha_sigma(sigma, config.get("use_flow_sigmas", False)) for sigma in sigmas]
    if prediction == "epsilon":
        return [(1 / alpha, -sigma / alpha) for alpha, sigma in weights]
    if prediction == "v_prediction":
        return [(alpha, -sigma) for alpha, sigma in weights]
    if prediction == "flow_prediction":
        return [(1.0, -sigma) for sigma in sigmas]
    raise ValueError(f"prediction_type={prediction!r} is not known for {family}")


def through_data(hook: DataHook, step: int, row: tuple[float, float], latent: Tensor, prediction: Tensor) -> Tensor:
    """The prediction with `hook` applied to the data that it stands for."""
    p, q = row
    data = hook(step, p * latent + q * prediction)
    return prediction if data is None else (data - p * latent) / q
