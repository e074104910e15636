"""Chooses how to generate a clip in the free memory: the first of several ways whose forecast fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..system.errors import ReducioError
from .forecast import Forecast

HEADROOM = 0.9  # usable share of the free memory: forecasts exclude workspaces and the allocator's rounding
SMALLER = (3 / 4, 1 / 2, 1 / 4, 1 / 8)  # factors on both sides, tried to suggest a size that fits


@dataclass(frozen=True, slots=True)
class Fit:
    """The choice for a call: how the last stage decodes, and whether weights are offloaded."""

    decoding: Any
    offload: bool = False


def room(free: int, resident: int) -> int:
    """Bytes that a clip may use. `resident` weights are added, because the forecast includes them."""
    return int(free * HEADROOM) + resident


def fit(ways: Iterable[Any], forecast: Callable[[Any], Forecast], room: int, offloads: Sequence[bool]) -> Fit | None:
    """The first way whose forecast is within `room` bytes, or None. The values of `offloads` are tried in order."""
    ways = list(ways)
    for offload in offloads:
        for way in ways:
            if forecast(way).peak(offload) <= room:
                return Fit(way, offload)
    return None


def refuse(
    height: int,
    width: int,
    forecasts: Callable[[int, int], Iterable[Forecast]],
    factor: int,
    room: int,
    offload: bool,
    device: str,
) -> ReducioError:
    """The error about missing memory, with a smaller size that would fit. Sizes are multiples of `factor`; `forecasts`
    are those of all ways to make a clip of a size."""

    def least(height: int, width: int) -> Forecast:
        return min(forecasts(height, width), key=lambda forecast: forecast.peak(offload))

    needed = least(height, width)
    worst = max(needed.stages, key=lambda s: (s.weights if offload else needed.weights) + (s.activations or 0))
    weights = worst.weights if offload else needed.weights
    peak = needed.peak(offload)
    line = (
        f"memory: a clip of {needed.height}x{needed.width} needs {_size(peak)} on {device} ({_size(weights)} of "
        f"weights, {_size(worst.activations or 0)} for {worst.stage}), {_size(peak - room)} more than there is"
    )
    for share in SMALLER:
        height, width = (max(factor, int(n * share) // factor * factor) for n in (needed.height, needed.width))
        if least(height, width).peak(offload) <= room:
            return ReducioError(f"{line}; {height}x{width} would fit")
    return ReducioError(f"{line}; {height}x{width} does not fit either, the weights alone need {_size(weights)}")


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 / 4 else f"{n / 2**20:.0f} MiB"
