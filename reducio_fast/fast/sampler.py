"""The fast twin of `reference/sampler.py`: guidance and scheduler are one kernel that reads a table of coefficients.

diffusers' scheduler stays the source of truth: its sigmas are read once a schedule, and no number comes back from the
device inside the loop. On a GPU one graph is a step, guidance and update included, and not the loop: a callback may
look at every latent, replace it or end the loop, and the number of steps is the caller's. A graph of the loop would be
captured for each number of steps and hold their multiple of nodes, to save one launch and six small copies a step.

Shortcuts (`reference.sampler.Shortcuts`) keep the kernel: a step with the condition alone is one without guidance, and
one that keeps the last difference d between the halves passes (t - d, t) for (u, t). A block cache asks the device each
step whether the blocks may be left out, so its steps run without graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..compile.graphs import Graphs
from ..reference.data_prediction import DataHook, data_rows
from ..reference.sampler import NO_SHORTCUTS, Callback, Shortcuts, check_finite, end_step
from ..reference.svd.consistency import fresh_noise
from .solver_tables import coefficients, draws_noise, input_scales


@dataclass(slots=True)
class BlockCache:
    """First-block cache: blocks behind the first are left out while its residual hardly changes.

    threshold: mean change of that residual, relative to its mean size in the last step that computed all. `computed`
    and `kept` count steps of either kind.
    """

    threshold: float
    first: Tensor | None = None
    others: Tensor | None = None
    computed: int = 0
    kept: int = 0

    def serves(self, first: Tensor) -> bool:
        """Whether the others' residual may stay; reads a number back from the device."""
        if self.first is None or self.first.shape != first.shape:
            return False
        change = (first - self.first).abs().float().mean() / self.first.abs().float().mean()
        return bool(change < self.threshold)


class Denoiser(Protocol):
    """A fast twin under a condition, as `sample` runs it.

    guidance_scale: a number, or values a frame. graphs: through which a step runs, as `graph_name`; None: eagerly.
    Shortcuts need `conditional(inputs)`, what `predict` reads to predict with the condition alone, and
    `predict_cached(latent, inputs, BlockCache)`.
    """

    guidance_scale: float
    graphs: Graphs | None
    graph_name: str

    def schedule(self, timesteps: Tensor, latent: Tensor) -> Sequence[Any]:
        """What `predict` reads in each step, made once a schedule: tensors, or (named) tuples of them."""

    def predict(self, latent: Tensor, inputs: Any) -> Tensor:
        """[2B, ...], the unconditional half first, or [B, ...] without guidance."""

    def bare(self) -> Denoiser:
        """What `predict` and `update` need, without a clip's condition: a graph may keep it."""

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
    table = torch.cat([table.new_full((len(table), 1), denoise.guidance_scale), table], dim=1)
    table = table.float().to(latent.device)
    times = scheduler.timesteps.to(latent.device)
    scales = input_scales(scheduler)
    if scales is not None:
        latent = latent * float(scheduler.init_noise_sigma)
        scales = scales.to(latent.device, latent.dtype)
    inputs = denoise.schedule(times, latent)
    previous, older, finite = torch.zeros_like(latent), torch.zeros_like(latent), []
    guides = shortcuts != NO_SHORTCUTS and denoise.guidance_scale > 1
    modes = shortcuts.modes(len(table)) if guides else ["guided"] * len(table)
    difference = None
    cache = BlockCache(shortcuts.cache_threshold) if shortcuts.cache_threshold else None

    bare = denoise.bare()

    def advance(
        latent: Tensor,
        previous: Tensor,
        inputs: Any,
        row: Tensor,
        scale: Tensor | None,
        looking_back: tuple[Tensor, Tensor] | None = None,
        difference: Tensor | None = None,
        keeps: bool = False,
    ) -> tuple[Tensor, ...]:
        """One step. looking_back: the data prediction of two steps ago, and the weights of the last and of that one.
        `keeps` returns the difference between the halves of guidance too, `difference` is an earlier step's."""
        scaled = latent if scale is None else latent * scale
        prediction = bare.predict(scaled, inputs) if cache is None else bare.predict_cached(scaled, inputs, cache)
        if difference is not None:
            prediction = torch.cat([prediction - difference, prediction])
        if looking_back is not None:
            older, weight = looking_back  # the kernel adds one earlier data prediction: their weighted sum
            previous = previous * weight[0] + older * weight[1]
        step = bare.update(prediction.contiguous(), latent.contiguous(), previous, row)
        if keeps:
            without, with_condition = prediction.chunk(2)
            return (*step, with_condition - without)
        return step

    run: Callable[..., Any] = advance
    if denoise.graphs is not None and cache is None:
        run = functools.partial(denoise.graphs, denoise.graph_name, advance)
    renews = draws_noise(scheduler) and len(table) > 1
    for step, mode in enumerate(modes):
        previous = fresh_noise(latent, generator) if renews else previous
        scale = None if scales is None else scales[step]
        earlier = None if weights is None else (older, weights[step])
        given = inputs[step] if mode == "guided" else denoise.conditional(inputs[step])
        keeps = mode == "guided" and "reused" in modes[step + 1 : step + 2]
        before, last, older = latent, previous, previous
        arguments = (latent, previous, given, table[step], scale)
        if earlier is None and mode != "reused" and not keeps:
            latent, previous = run(*arguments)
        else:
            latent, previous, *kept = run(*arguments, earlier, difference if mode == "reused" else None, keeps)
            difference = kept[0] if kept else difference
        if data_hook is not None and data_of is not None:
            if earlier is not None:
                last = last * earlier[1][0] + earlier[0] * earlier[1][1]
            row = (*rows[step][:4], 1.0 if weights is not None else rows[step][4])
            latent, previous = _through_data(data_hook, step, data_of[step], row, before, last, latent, previous)
        latent, go_on = end_step(callback, step, times[step], latent)
        finite.append(torch.isfinite(latent).all())
        if not go_on:
            break

    check_finite(finite, len(table))
    return latent


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
    """What the kernel returned from `before` and `earlier`, `latent` and `previous`, with the hook applied: where it
    answers, the step is taken again, a few hundred thousand multiplications outside of the graph."""
    p, q, a, b, c = row
    p_data, q_data = data_row
    is_data = (p, q) == data_row  # of a flow the kernel's "data prediction" is the velocity
    data = previous if is_data else p_data * before + q_data * (previous - p * before) / q
    answer = hook(step, data)
    if answer is None:
        return latent, previous
    new = answer if is_data else p * before + q * (answer - p_data * before) / q_data
    following = a * before + b * new
    return (following + c * earlier if c else following), new
