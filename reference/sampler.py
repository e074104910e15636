"""From noise to a motion latent: a plain loop around a diffusers scheduler, with classifier-free guidance.

Reducio (arXiv 2411.13552) samples with DPM-Solver++ in 20 steps (`DPMSolverMultistepScheduler`); rectified flow
(`FlowMatchEulerDiscreteScheduler`) is the second choice, for models trained on that target. The guidance convention is
PixArt-alpha's. Nothing here reads a number back from the device inside the loop.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .data_prediction import DataHook, data_rows, family_of, through_data


class StopSampling(Exception):
    """Raised by a callback to end `sample` early with the latent as it is."""


Callback = Callable[[int, Tensor, Tensor], "Tensor | bool | None"]
Denoiser = Callable[[Tensor, Tensor], Tensor]  # (latent [B, ...], timestep) -> prediction [B, ...]


def initial_latent(
    shape: Sequence[int],
    generators: Sequence[torch.Generator | int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of `shape` [B, C, T, H, W], item i drawn from generator (or seed) i alone.

    An item's noise therefore does not depend on its batch nor, with CPU generators or seeds, on the device. Raises
    ValueError unless there is one generator per item.
    """
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for a batch of {shape[0]}: give one an item")
    items = []
    for source in generators:
        generator = source if isinstance(source, torch.Generator) else torch.Generator().manual_seed(source)
        items.append(torch.randn(tuple(shape[1:]), generator=generator, device=generator.device).to(device, dtype))
    return torch.stack(items)


def guided(model: Denoiser, scale: float | Tensor) -> Denoiser:
    """Classifier-free guidance: `without + scale * (with - without)`, both predictions from one batch of 2B.

    `model(x, timestep)` takes the latent twice, [2B, ...] with the unconditional half first. `scale` is a number, or a
    tensor that broadcasts against a prediction, such as one value per frame.
    """

    def denoise(latent: Tensor, timestep: Tensor) -> Tensor:
        without, with_condition = model(torch.cat([latent, latent]), timestep).chunk(2)
        return without + scale * (with_condition - without)

    return denoise


Mode = Literal["guided", "reused", "conditional"]


@dataclasses.dataclass(frozen=True, slots=True)
class Shortcuts:
    """Work that a sampler leaves out.

    guidance_interval: where guidance begins and ends, as shares of the steps, counted from the noisiest
        (arXiv 2404.07724); outside it only the conditional half is computed, half of a guided step's work.
    guidance_reuse: one of this many guided steps computes both halves; the others reuse its difference between them.
    cache_threshold: relative change of the first block's residual up to which the other blocks' residual is reused from
        the last step that computed it ("first-block cache"); 0 computes all. Only the fast twins use it.
    """

    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_reuse: int = 1
    cache_threshold: float = 0.0

    def modes(self, steps: int) -> list[Mode]:
        """How each step predicts."""
        start, stop = self.guidance_interval
        modes: list[Mode] = []
        since = self.guidance_reuse  # steps since both halves were computed
        for step in range(steps):
            if not start * steps <= step < stop * steps:
                modes.append("conditional")
                since = self.guidance_reuse
            elif since >= self.guidance_reuse:
                modes.append("guided")
                since = 1
            else:
                modes.append("reused")
                since += 1
        return modes


NO_SHORTCUTS = Shortcuts()


class Guided:
    """Classifier-free guidance whose steps may be cheaper: called as `guided(...)` is; `predict` also takes the mode.

    both(latent, timestep) -> predictions [2B, ...], the unconditional half first; conditional(latent, timestep) ->
    [B, ...]. `scale` as in `guided`.
    """

    def __init__(self, both: Denoiser, conditional: Denoiser, scale: float | Tensor) -> None:
        self.both, self.conditional, self.scale = both, conditional, scale
        self.difference: Tensor | None = None  # with the condition minus without, of the last step that computed both

    def __call__(self, latent: Tensor, timestep: Tensor) -> Tensor:
        return self.predict(latent, timestep, "guided")

    def predict(self, latent: Tensor, timestep: Tensor, mode: Mode) -> Tensor:
        if mode == "guided":
            without, with_condition = self.both(latent, timestep).chunk(2)
            self.difference = with_condition - without
        else:
            with_condition = self.conditional(latent, timestep)
            if mode == "conditional" or self.difference is None:
                return with_condition
            without = with_condition - self.difference
        return without + self.scale * (with_condition - without)


@torch.no_grad()
def sample(
    denoise: Denoiser,
    scheduler: Any,
    latent: Tensor,
    num_inference_steps: int,
    callback: Callback | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[int] | None = None,
    shortcuts: Shortcuts = NO_SHORTCUTS,
    data_hook: DataHook | None = None,
) -> Tensor:
    """Denoise `latent`, unit noise [B, ...], and return the latent in its dtype and shape.

    `denoise(latent, timestep)` predicts what the scheduler was set up for, in the dtype of the latent.
    `callback(step, timestep, latent)` runs after each step: a tensor replaces the latent; False, or raising
    `StopSampling`, ends the loop. `generator` feeds the schedulers that draw noise at each step. `sigmas`, one more
    than there are steps, or `timesteps`, falling, replace the scheduler's own. `shortcuts` that concern guidance need a
    `Guided` denoiser. `data_hook(step, data)` receives the data prediction of each step before the latent moves, and
    may return another one to move towards.

    Raises ValueError if there is no step to take, for a hook with a scheduler that `data_rows` does not know and, with
    the number of the step, if the latent stops being finite.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps}: must be at least 1")
    set_timesteps(scheduler, num_inference_steps, latent.device, sigmas, timesteps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # spares the scheduler a search, on the device, for the first timestep
    scale_input = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
    noise_source = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latent = latent * getattr(scheduler, "init_noise_sigma", 1.0)
    finite: list[Tensor] = []
    modes = shortcuts.modes(len(scheduler.timesteps)) if isinstance(denoise, Guided) else None
    rows = None if data_hook is None else data_rows(scheduler)

    for step, timestep in enumerate(scheduler.timesteps):
        scaled = scale_input(latent, timestep)
        prediction = denoise(scaled, timestep) if modes is None else denoise.predict(scaled, timestep, modes[step])
        if data_hook is not None and rows is not None:
            prediction = through_data(data_hook, step, rows[step], latent, prediction)
        latent = scheduler.step(prediction, timestep, latent, **noise_source, return_dict=False)[0]
        latent, go_on = end_step(callback, step, timestep, latent)
        finite.append(torch.isfinite(latent).all())
        if not go_on:
            break

    check_finite(finite, len(scheduler.timesteps))
    return latent


def set_timesteps(
    scheduler: Any,
    num_inference_steps: int,
    device: torch.device | str,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[int] | None = None,
) -> None:
    """Sets the scheduler's own schedule, or one along `sigmas`, one more than there are steps, or at `timesteps`."""
    has_contents = torch.device(device).type != "meta"  # a dry run is on meta, but EDM schedules read their sigmas
    place = device if has_contents else "cpu"
    if sigmas is not None and family_of(scheduler) == "EDMDPMSolverMultistepScheduler":
        _follow_sigmas(scheduler, sigmas, place)
    elif sigmas is not None:
        if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"sigmas: a {type(scheduler).__name__} has a schedule of its own and takes none")
        scheduler.set_timesteps(sigmas=list(sigmas), device=place)
    elif timesteps is not None:
        scheduler.set_timesteps(timesteps=list(timesteps), device=place)
    else:
        scheduler.set_timesteps(num_inference_steps, device=place)
    if not has_contents:
        scheduler.timesteps = scheduler.timesteps.to(device)


def _follow_sigmas(scheduler: Any, sigmas: Sequence[float], device: torch.device | str) -> None:
    """Set sigmas on an `EDMDPMSolverMultistepScheduler`, whose `set_timesteps` takes none: its steps read nothing else.

    Raises ValueError for sigmas that do not begin with the level of its initial noise, and where its last step could be
    of second order and so cannot reach 0.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if not math.isclose(sigmas[0], config.sigma_max, rel_tol=1e-6):
        raise ValueError(f"sigmas: begin with {sigmas[0]:g}, those of this {name} with {config.sigma_max:g}")
    if sigmas[-1] == 0 and config.final_sigmas_type != "zero":
        raise ValueError(f"sigmas: end with 0, which a {name} needs final_sigmas_type='zero' for")
    scheduler.set_timesteps(len(sigmas) - 1, device=device)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float32)
    scheduler.timesteps = scheduler.precondition_noise(scheduler.sigmas[:-1].to(device))


def quadratic_timesteps(steps: int, train_timesteps: int = 1000, power: float = 2.0) -> list[int]:
    """Falling timesteps that are denser towards the end, where a schedule of equal distances makes its largest error:
    from t = 50 to 0 in one first-order step. DDIM's "quad" list (arXiv 2010.02502), reversed."""
    last = train_timesteps - 1
    return [round(last * (1 - i / steps) ** power) for i in range(steps)]


def end_step(callback: Callback | None, step: int, timestep: Tensor, latent: Tensor) -> tuple[Tensor, bool]:
    """The latent after a step, as the callback leaves it, and whether the loop goes on."""
    try:
        answer = None if callback is None else callback(step, timestep, latent)
    except StopSampling:
        answer = False
    return answer if isinstance(answer, Tensor) else latent, answer is not False


def check_finite(finite: list[Tensor], steps: int) -> None:
    """Raises ValueError that names the first step whose flag, kept on the device until now, is False."""
    bad = (~torch.stack(finite)).nonzero()
    if len(bad):
        raise ValueError(f"the latent is not finite (NaN or infinite) from step {int(bad[0]) + 1} of {steps} on")
