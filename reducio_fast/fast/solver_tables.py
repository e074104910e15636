"""A scheduler's steps as rows of coefficients for the guidance and solver kernel.

`register` adds a scheduler: a function that says whether it knows an instance, and one that returns the rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.data_prediction import alpha_sigma, data_rows
from ..reference.multistep_schedule import MultistepSchedule
from ..reference.sampler import set_timesteps
from ..reference.svd.consistency import ConsistencyScheduler
from ..triton_kernels.guidance_dpm_step import OP
from .replaced_methods import replaced_methods


def dpm_coefficients(scheduler: Any) -> Tensor:
    """(p, q, a, b, c) of every step of a `DPMSolverMultistepScheduler` after `set_timesteps`: float64 [steps, 5].

    The scheduler's sigmas are used as they are, so all its schedules are covered. Raises ValueError if a step is not a
    linear update of two data predictions: other schedulers, solvers that draw noise or predict it, third order,
    thresholding.
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

    noise = _Noise(config.get("use_flow_sigmas", False))
    steps = zip(data_rows(scheduler), _solver_rows(config, sigmas, noise), strict=True)
    return torch.tensor([(*data, *step) for data, step in steps], dtype=torch.float64)


def _solver_rows(config: dict[str, Any], sigmas: list[float], noise: _Noise) -> Iterator[tuple[float, float, float]]:
    """(a, b, c) of the steps of DPM-Solver++ (arXiv 2211.01095), of first or second order."""
    steps = len(sigmas) - 1
    lower_at_end = (
        config["euler_at_final"]
        or (config["lower_order_final"] and steps < 15)
        or config["final_sigmas_type"] == "zero"
    )

    alpha_sigma, log_snr = noise.alpha_sigma, noise.log_snr
    for i in range(steps):
        sigma = alpha_sigma(sigmas[i])[1]
        alpha_next, sigma_next = alpha_sigma(sigmas[i + 1])
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
        yield a, b, c


def unipc_coefficients(scheduler: Any) -> Tensor:
    """(p, q, a, b, c, d) of every step of a `UniPCMultistepScheduler` (arXiv 2302.04867) after `set_timesteps`: float64
    [steps, 6], where d weighs the data prediction of two steps ago.

    A step corrects the latent that the previous step predicted, then predicts the next one. Both are linear in that
    latent and in the last three data predictions, so they are one update. Raises ValueError where that does not hold:
    third order, thresholding, a separate solver for the prediction, noise instead of data, a last step of second order.
    """
    config, sigmas = _checked(scheduler, "UniPCMultistepScheduler")
    known_values = (
        ("solver_order", (1, 2)),
        ("solver_type", ("bh1", "bh2")),
        ("prediction_type", ("epsilon", "sample", "v_prediction", "flow_prediction")),
        ("thresholding", (False,)),
        ("predict_x0", (True,)),
        ("solver_p", (None,)),
    )
    for name, known in known_values:
        if config[name] not in known:
            raise ValueError(f"unipc_coefficients: {name}={config[name]!r} is not one of {known}")
    order, steps = config["solver_order"], len(sigmas) - 1
    if order > 1 and not config["lower_order_final"] and not sigmas[-1]:
        raise ValueError("unipc_coefficients: lower_order_final=False divides by zero at a last sigma of zero")
    noise = _Noise(config.get("use_flow_sigmas", False))
    bh1 = config["solver_type"] == "bh1"

    def orders(step: int) -> int:
        return min(order, steps - step if config["lower_order_final"] else order, step + 1)

    def parts(step: int) -> tuple[float, float, float, float]:
        """From sigma `step` to the next: h, the factor of the latent, that of the last data prediction, and B(h)."""
        h = noise.log_snr(sigmas[step + 1]) - noise.log_snr(sigmas[step])
        (alpha_next, sigma_next), (_, sigma) = noise.alpha_sigma(sigmas[step + 1]), noise.alpha_sigma(sigmas[step])
        shrink = math.expm1(-h)
        return h, sigma_next / sigma, -alpha_next * shrink, alpha_next * (-h if bh1 else shrink)

    def ratio(step: int, h: float) -> float:
        return (noise.log_snr(sigmas[step - 1]) - noise.log_snr(sigmas[step])) / h

    def predicted(step: int) -> tuple[float, float, float]:
        """Factors of the corrected latent and of the last two data predictions."""
        h, a, b, growth = parts(step)
        if orders(step) == 1:
            return a, b, 0.0
        slope = growth * 0.5 / ratio(step, h)
        return a, b + slope, -slope

    def corrected(step: int) -> tuple[float, float, float]:
        """Factors of the data predictions of this step and of the last two, added to the latent predicted for it."""
        before = step - 1
        if before < 0 or before in config["disable_corrector"]:
            return 0.0, 0.0, 0.0
        h, _, b, growth = parts(before)
        _, b_before, c_before = predicted(before)
        if orders(before) == 1:
            return -growth * 0.5, b + growth * 0.5 - b_before, -c_before
        # The two weights fit the first two moments of exp(-h): rows [1, 1] and [ratio, 1] of a linear system.
        hh, r = -h, ratio(before, h)
        scale = growth / noise.alpha_sigma(sigmas[step])[0]
        first = math.expm1(hh) / hh - 1
        second = (first / hh - 0.5) * 2 / scale
        first = first / scale
        older = (second - first) / (r - 1)
        newest = first - older
        slope = growth * older / r
        return -growth * newest, b + slope + growth * newest - b_before, -slope - c_before

    rows = []
    for step, (p, q) in enumerate(data_rows(scheduler)):
        a, b, c = predicted(step)
        now, last, older = corrected(step)
        rows.append((p, q, a, b + a * now, c + a * last, a * older))
    return torch.tensor(rows, dtype=torch.float64)


class _Noise:
    """The weights of data and noise in a latent at a sigma: of a flow, or of preserved or exploding variance."""

    def __init__(self, flow: bool = False, exploding: bool = False) -> None:
        self.flow, self.exploding = flow, exploding

    def alpha_sigma(self, sigma: float) -> tuple[float, float]:
        if self.exploding:
            return 1.0, sigma
        return alpha_sigma(sigma, self.flow)

    def log_snr(self, sigma: float) -> float:
        alpha, sigma = self.alpha_sigma(sigma)
        return (math.log(alpha) if alpha else -math.inf) - (math.log(sigma) if sigma else -math.inf)


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
    for timesteps that repeat, as those above its table do: diffusers finds a step by its timestep and would skip one.
    """
    sigmas = _sigmas_of(scheduler, "EulerDiscreteScheduler")[1]
    if len(scheduler.timesteps.unique()) < len(scheduler.timesteps):
        raise ValueError(f"edm_coefficients: timesteps repeat ({scheduler.timesteps.tolist()}); is sigma_max too high?")
    rows = []
    for (p, q), (sigma, following) in zip(data_rows(scheduler), itertools.pairwise(sigmas), strict=True):
        rows.append((p, q, following / sigma, 1 - following / sigma, 0.0))
    return torch.tensor(rows, dtype=torch.float64)


def edm_dpm_coefficients(scheduler: Any) -> Tensor:
    """(p, q, a, b, c) of every step of an `EDMDPMSolverMultistepScheduler` after `set_timesteps`: float64 [steps, 5].

    The latent is data plus noise of sigma, so alpha is 1 throughout. Its model input and initial noise are scaled too:
    see `input_scales`. Raises ValueError if a step is not a linear update of two data predictions.
    """
    config, sigmas = _sigmas_of(scheduler, "EDMDPMSolverMultistepScheduler")
    for name, known in (
        ("algorithm_type", ("dpmsolver++",)),
        ("solver_order", (1, 2)),
        ("solver_type", ("midpoint", "heun")),
        ("prediction_type", ("epsilon", "v_prediction")),
        ("thresholding", (False,)),
    ):
        if config[name] not in known:
            raise ValueError(f"edm_dpm_coefficients: {name}={config[name]!r} is not one of {known}")
    steps = zip(data_rows(scheduler), _solver_rows(config, sigmas, _Noise(exploding=True)), strict=True)
    return torch.tensor([(*data, *step) for data, step in steps], dtype=torch.float64)


def consistency_coefficients(scheduler: ConsistencyScheduler) -> Tensor:
    """(p, q, a, b, c) of every step of a `ConsistencyScheduler` after `set_timesteps`: float64 [steps, 5].

    A step reads fresh noise in place of the previous data prediction: see `draws_noise`.
    """
    noises = [following * scheduler.config.s_noise for following in scheduler.sigmas.tolist()[1:]]
    rows = [(p, q, 0.0, 1.0, noise) for (p, q), noise in zip(data_rows(scheduler), noises, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def draws_noise(scheduler: Any) -> bool:
    """Whether a step reads fresh noise as `previous`."""
    return isinstance(scheduler, ConsistencyScheduler)


# Schedulers whose latent is data plus noise of sigma; it is scaled to unit variance for the network.
_SCALES_INPUT = ("EulerDiscreteScheduler", "EDMDPMSolverMultistepScheduler", "ConsistencyScheduler")


def input_scales(scheduler: Any) -> Tensor | None:
    """Factors of the latent before each step's prediction, float64 [steps]; None if the latent is not scaled."""
    if not any(base.__name__ in _SCALES_INPUT for base in type(scheduler).__mro__):
        return None
    sigmas = scheduler.sigmas.double()[:-1]
    return (sigmas**2 + getattr(scheduler.config, "sigma_data", 1.0) ** 2).rsqrt()


def euler_rows(sigmas: list[float]) -> Tensor:
    """(p, q, a, b, c) of Euler steps along `sigmas`, one more than there are steps: float64 [steps, 5]."""
    rows = [(0.0, 1.0, 1.0, after - before, 0.0) for before, after in zip(sigmas[:-1], sigmas[1:], strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def _sigmas_of(scheduler: Any, wanted: str) -> tuple[dict[str, Any], list[float]]:
    """Config and sigmas, one more than there are steps, of a scheduler of the wanted class, ready to step.

    The class is found by its name or that of a base, because kernels import without diffusers. Related classes with the
    same config (single-step and EDM solvers) scale the noise or the model's input, or step differently.
    """
    name = type(scheduler).__name__
    ours = isinstance(scheduler, MultistepSchedule) and wanted == scheduler.config["_class_name"]
    if not ours and wanted not in (base.__name__ for base in type(scheduler).__mro__):
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


def coefficients(
    scheduler: Any, steps: int, sigmas: Sequence[float] | None = None, timesteps: Sequence[int] | None = None
) -> Tensor:
    """Rows [steps, 5] of a schedule, or [steps, 6] if the solver looks two steps back. The schedule is the scheduler's
    own, or along `sigmas` or `timesteps`, which are then set. Raises ValueError if the kernel cannot follow it, and for
    a scheduler with a method of its own other than `set_timesteps`, which is called here."""
    own = [name for name in replaced_methods(scheduler) if name != "set_timesteps"]
    if own or "step" in vars(scheduler):  # a `MultistepSchedule` has no step that could be replaced
        raise ValueError(f"the {type(scheduler).__name__} has a {own[0] if own else 'step'} of its own")
    for knows, rows in _tables:
        if knows(scheduler):
            set_timesteps(scheduler, steps, "cpu", sigmas, timesteps)
            return rows(scheduler)
    raise ValueError(
        f"{type(scheduler).__name__} has no table of coefficients; the fast sampler follows "
        "DPMSolverMultistepScheduler, UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler, "
        "EulerDiscreteScheduler, EDMDPMSolverMultistepScheduler and ConsistencyScheduler"
    )


def _of_diffusers(class_name: str) -> Callable[[Any], bool]:
    """Whether a scheduler is of exactly this class of diffusers, which this module does not import. A subclass may step
    differently."""

    def knows(scheduler: Any) -> bool:
        cls = type(scheduler)
        return cls.__name__ == class_name and cls.__module__.partition(".")[0] == "diffusers"

    return knows


register(lambda scheduler: isinstance(scheduler, MultistepSchedule), dpm_coefficients)
register(_of_diffusers("DPMSolverMultistepScheduler"), dpm_coefficients)
register(_of_diffusers("UniPCMultistepScheduler"), unipc_coefficients)
register(_of_diffusers("FlowMatchEulerDiscreteScheduler"), euler_coefficients)
register(_of_diffusers("EulerDiscreteScheduler"), edm_coefficients)
register(_of_diffusers("EDMDPMSolverMultistepScheduler"), edm_dpm_coefficients)
register(lambda scheduler: type(scheduler) is ConsistencyScheduler, consistency_coefficients)
