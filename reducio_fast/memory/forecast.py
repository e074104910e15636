"""Forecasts the memory of a clip, stage by stage, before its first step.

A forecast is a dry run (`dry_run`) of the stages' code, in the reference or in the fast twins, on the meta device. On a
GPU one of our kernels counts as its result. Forecasts count tensors only. The allocator's rounding and workspaces of
vendor libraries come on top, so `fit` uses only a share of the free memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .dry_run import weight_bytes


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage to run on the meta device: `run()` returns its peak in bytes, or None if it cannot run there."""

    name: str
    networks: Sequence[nn.Module]
    run: Callable[[], int | None]


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of a stage: `weights` of the networks that it runs, and its peak of `activations`.

    `activations` is None if a foreign component does not run on the meta device.
    """

    stage: str
    weights: int
    activations: int | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """The forecast of one clip, decoded in the way `decoding`. `weights` are the bytes of all networks, including the
    packed copies of the fast twins."""

    height: int
    width: int
    decoding: Any
    weights: int
    stages: tuple[StageMemory, ...]

    def peak(self, offload: bool = False) -> int:
        """Peak in bytes; with `offload`, only the networks of the running stage are on the device."""
        return max((s.weights if offload else self.weights) + (s.activations or 0) for s in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """The forecast as plain data for JSON, with both peaks."""
        return dataclasses.asdict(self) | {"peak": self.peak(), "peak_with_offload": self.peak(offload=True)}


def forecast(
    stages: Sequence[Stage], networks: Sequence[nn.Module], height: int, width: int, way: Hashable
) -> Forecast:
    """Run the stages in order, inside an active `DryRun`. `networks` are all networks of the model."""
    rows = tuple(StageMemory(s.name, weight_bytes(*s.networks), s.run()) for s in stages)
    everything = weight_bytes(*networks, *(n for s in stages for n in s.networks))
    return Forecast(height, width, way, everything, rows)


def in_another_way(earlier: Forecast, last: Stage, way: Hashable) -> Forecast:
    """The forecast of the same clip with another way of decoding: only the `last` stage is run again."""
    peak = last.run()
    rows = tuple(s if s.stage != last.name else dataclasses.replace(s, activations=peak) for s in earlier.stages)
    return dataclasses.replace(earlier, decoding=way, stages=rows)
