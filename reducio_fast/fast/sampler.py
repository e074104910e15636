"""The fast twin of `reference/sampler.py`: guidance and scheduler are one kernel that reads a table of coefficients.

diffusers' scheduler stays the source of truth: its sigmas are read once per schedule, and no number comes back from the
device inside the loop. On a GPU a graph holds one step, guidance and update included, and not the loop: a callback may
look at every latent, replace it or end the loop, and the caller chooses the number of steps. A graph of the loop would
be captured for each number of steps and hold as many times the nodes, to save one launch and six small copies per step.

Shortcuts (`reference.sampler.Shortcuts`) use the same kernel: a step with the condition alone is one without guidance,
and a step that reuses the last difference d between the halves passes (t - d, t) for (u, t). A block cache reads from
the device, at each step, whether the blocks may be skipped, so its steps run without graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..compile.graphs import Graphs
from ..reference.data_prediction import DataHook, data_rows
from ..reference.sampler import NO_SHORTCUTS, Callback, Shortcuts, check_finite, end_step
from ..reference.svd.consistency import fresh_noise
from ..reference.svd.sampler import needs_guidance
from .solver_tables import coefficients, draws_noise, input_scales


@dataclass(slots=True)
class BlockCache:
    """First-block cache: the blocks after the first are skipped while the first block's residual hardly changes.

    threshold: mean change of that residual, relative to its mean magnitude in the last step that computed all blocks.
    `first` and `others`: residuals by their shape, because steps with both halves of guidance alternate with steps of
    one half. `computed` counts the steps that computed all blocks, `kept` those that reused the other blocks' residual.
    """

    threshold: float
    first: dict[torch.Size, Tensor] = field(default_factory=dict)
    others: dict[torch.Size, Tensor] = field(default_factory=dict)
    computed: int = 0
    kept: int = 0

    def serves(self, first: Tensor) -> bool:
        """Whether the other blocks' residual may be reused; reads a number back from the device."""
        last = self.first.get(first.shape)
        if last is None:
            return False
        change = (first - last).abs().float().mean() / last.abs().float().mean()
        return bool(change < self.threshold)


class Denoiser(Protocol):
    """A fast twin with its condition, as `sample` runs it.

    guidance_scale: a number, or values per frame [T] of a latent [B, T, ...]. graphs: a step runs through them, as
    `graph_name`; None: eagerly.
    Shortcuts need `conditional(inputs)`, the inputs to predict with the condition alone, and
    `predict_cached(latent, inputs, BlockCache)`.
    """

    @property
    def guidance_scale(self) -> float | Tensor: ...

    @property
    def graphs(self) -> Graphs | None: ...

    @property
    def graph_name(self) -> str: ...

    def schedule(self, timesteps: Tensor, latent: Tensor) -> Sequence[Any]:
        """The inputs of `predict` in each step, computed once per schedule: tensors, or (named) tuples of them."""

    def predict(self, latent: Tensor, inputs: Any) -> Tensor:
        """[2B, ...], the unconditional half first, or [B, ...] without guidance."""

    def bare(self) -> Denoiser:
        """The denoiser without a clip's condition, as far as `predict` and `update` need it: a graph may keep it."""

    def plain(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The same for `reference.sample`."""

    def update(self, prediction: Tensor, latent: Tensor, previous: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Guidance and one solver step: the next latent and the data prediction (op `guidance_dpm_step`)."""


@torch.no_grad()
def sample(
    denoise: Denoiser,
    scheduler: Any,
    latent: Tensor,
    num_inference_steps: int,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[int] | None = None,
    shortcuts: Shortcuts = NO_SHORTCUTS,
    data_hook: DataHook | None = None,
) -> Tensor:
    """Denoise unit noise [B, ...]; arguments, results and errors as in the reference's `sample`.

    Raises ValueError for a scheduler that `solver_tables` does not follow.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps}: must be at least 1")
    table = coefficients(scheduler, num_inference_steps, sigmas, timesteps)
    rows, data_of = table.tolist(), None if data_hook is None else data_rows(scheduler)
    weights = None  # of the last two data predictions, where a solver looks back that far
    if table.shape[1] > 5:
        weights, table = table[:, 4:6].float().to(latent.device), table[:, :5].clone()
        table[:, 4] = 1.0
    guidance = torch.as_tensor(denoise.guidance_scale).to(table).reshape(1, -1)
    table = torch.cat([guidance.expand(len(table), -1), table], dim=1).float().to(latent.device)
    times = scheduler.timesteps.to(latent.device)
    latent = latent.contiguous()  # the caller's may be permuted, which the step's kernel does not take
    scales = input_scales(scheduler)
    if scales is not None:
        latent = latent * float(scheduler.init_noise_sigma)
        scales = scales.to(latent.device, latent.dtype)
    inputs = denoise.schedule(times, latent)
    previous, older, finite = torch.zeros_like(latent), torch.zeros_like(latent), []
    guides = shortcuts != NO_SHORTCUTS and needs_guidance(denoise.guidance_scale)
    modes = shortcuts.modes(len(table)) if guides else ["guided"] * len(table)
    difference = None
    cache = BlockCache(shortcuts.cache_threshold) if shortcuts.cache_threshold else None

    run: Callable[..., Any] = functools.partial(advance, denoise.bare(), cache)
    if denoise.graphs is not None and cache is None:
        run = functools.partial(denoise.graphs, denoise.graph_name, run)
    adds_noise = draws_noise(scheduler) and len(table) > 1
    for step, mode in enumerate(modes):
        previous = fresh_noise(latent, generator) if adds_noise else previous
        scale = None if scales is None else scales[step]
        two_back = None if weights is None else (older, weights[step])
        step_inputs = inputs[step] if mode == "guided" else denoise.conditional(inputs[step])
        keep_difference = mode == "guided" and "reused" in modes[step + 1 : step + 2]
        before, last, older = latent, previous, previous
        arguments = (latent, previous, step_inputs, table[step], scale)
        if two_back is None and mode != "reused" and not keep_difference:
            latent, previous = run(*arguments)
        else:
            reused = difference if mode == "reused" else None
            latent, previous, *kept = run(*arguments, two_back, reused, keep_difference)
            difference = kept[0] if kept else difference
        if data_hook is not None and data_of is not None:
            if two_back is not None:
                last = last * two_back[1][0] + two_back[0] * two_back[1][1]
            row = (*rows[step][:4], 1.0 if weights is not None else rows[step][4])
            latent, previous = _through_data(data_hook, step, data_of[step], row, before, last, latent, previous)
        latent, go_on = end_step(callback, step, times[step], latent)
        finite.append(torch.isfinite(latent).all())
        if not go_on:
            break

    check_finite(finite, len(table))
    return latent


def advance(
    denoise: Denoiser,
    cache: BlockCache | None,
    latent: Tensor,
    previous: Tensor,
    inputs: Any,
    row: Tensor,
    scale: Tensor | None,
    two_back: tuple[Tensor, Tensor] | None = None,
    difference: Tensor | None = None,
    keep_difference: bool = False,
) -> tuple[Tensor, ...]:
    """One step of a bare denoiser. two_back: the data prediction of two steps ago, and the weights of the last and of
    that one. difference: between the halves of guidance, of an earlier step. keep_difference: also return this step's.

    The network's input is scaled here and not by the kernel of the step before: a callback may change the latent."""
    scaled = latent if scale is None else latent * scale
    prediction = denoise.predict(scaled, inputs) if cache is None else denoise.predict_cached(scaled, inputs, cache)
    if difference is not None:
        prediction = torch.cat([prediction - difference, prediction])
    if two_back is not None:
        older, weight = two_back  # the kernel adds one earlier data prediction: their weighted sum
        previous = previous * weight[0] + older * weight[1]
    step = denoise.update(prediction.contiguous(), latent.contiguous(), previous, row)
    if keep_difference:
        without, with_condition = prediction.chunk(2)
        return (*step, with_condition - without)
    return step


def _through_data(
    hook: DataHook,
    step: int,
    data_row: tuple[float, float],
    row: Sequence[float],
    before: Tensor,
    earlier: Tensor,
    latent: Tensor,
    previous: Tensor,
) -> tuple[Tensor, Tensor]:
    """`latent` and `previous`, which the kernel computed from `before` and `earlier`, with the hook applied: if it
    returns a tensor, the step is taken again, a few hundred thousand multiplications outside of the graph."""
    p, q, a, b, c = row
    p_data, q_data = data_row
    is_data = (p, q) == data_row  # for a flow the kernel's "data prediction" is the velocity
    data = previous if is_data else p_data * before + q_data * (previous - p * before) / q
    answer = hook(step, data)
    if answer is None:
        return latent, previous
    new = answer if is_data else p * before + q * (answer - p_data * before) / q_data
    following = a * before + b * new
    return (following + c * earlier if c else following), new
