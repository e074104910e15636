"""How to make a clip in the memory that is free: the first of several ways whose forecast fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..system.errors import ReducioError
from .forecast import Forecast

HEADROOM = 0.9  # share of the free memory that is used: forecasts leave out workspaces and an allocator's rounding
SMALLER = (3 / 4, 1 / 2, 1 / 4)  # of the sides, tried for "what would fit"


@dataclass(frozen=True, slots=True)
class Fit:
    """What was chosen for a call: the way in which the last stage works, and whether weights are offloaded."""

    decoding: Any
    offload: bool = False


def room(free: int, resident: int) -> int:
    """Bytes that a clip may use: weights that are on the device already are part of its forecast."""
    return int(free * HEADROOM) + resident


def fit(ways: Iterable[Any], forecast: Callable[[Any], Forecast], room: int, offloads: Sequence[bool]) -> Fit | None:
    """The first way whose forecast is within `room` bytes; None where none is. `offloads`: tried in this order."""
    ways = list(ways)
    for offload in offloads:
        for way in ways:
            if forecast(way).peak(offload) <= room:
                return Fit(way, offload)
    return None


def refuse(
    needed: Forecast, forecast: Callable[[int, int], Forecast], factor: int, room: int, offload: bool, device: str
) -> ReducioError:
    """The error that says how much is missing and which smaller size would fit. `factor`: sizes are multiples of it."""
    worst = max(needed.stages, key=lambda s: (s.weights if offload else needed.weights) + (s.activations or 0))
    weights = worst.weights if offload else needed.weights
    peak = needed.peak(offload)
    line = (
        f"memory: a clip of {needed.height}x{needed.width} needs {_size(peak)} on {device} ({_size(weights)} of "
        f"weights, {_size(worst.activations or 0)} for {worst.stage}), {_size(peak - room)} more than there is"
    )
    for share in SMALLER:
        height, width = (max(factor, int(n * share) // factor * factor) for n in (needed.height, needed.width))
        if forecast(height, width).peak(offload) <= room:
            return ReducioError(f"{line}; {height}x{width} would fit")
    return ReducioError(f"{line}; no smaller size fits either, the weights alone need {_size(weights)}")


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 / 4 else f"{n / 2**20:.0f} MiB"
