"""What a clip will need, stage by stage, before its first step.

A forecast is a dry run of the stages' own code on tensors without contents (`dry_run`), for whatever runs them: the
reference, or the fast twins. On a GPU a kernel of ours counts as what it returns. Forecasts count tensors: an
allocator's rounding and a vendor library's workspaces come on top, so `fit` uses only a share of what is free.
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
    """A stage to be tried without contents: `run()` returns its peak in bytes, None where it does not run so."""

    name: str
    networks: Sequence[nn.Module]
    run: Callable[[], int | None]


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes: of the networks that the stage runs, and the most that is alive beside all weights while it runs.

    `activations` is None where a foreign component does not run on tensors without contents.
    """

    stage: str
    weights: int
    activations: int | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one clip, decoded in the way `decoding`. `weights` are all networks' together, packed copies of the fast
    twins included."""

    height: int
    width: int
    decoding: Any
    weights: int
    stages: tuple[StageMemory, ...]

    def peak(self, offload: bool = False) -> int:
        """The most bytes at once; with `offload`, only the networks of the stage at work are on the device."""
        return max((s.weights if offload else self.weights) + (s.activations or 0) for s in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"peak": self.peak(), "peak_with_offload": self.peak(offload=True)}


def forecast(
    stages: Sequence[Stage], networks: Sequence[nn.Module], height: int, width: int, way: Hashable
) -> Forecast:
    """Run the stages in order, within an entered `DryRun`. `networks` are all of the model's."""
    rows = tuple(StageMemory(s.name, weight_bytes(*s.networks), s.run()) for s in stages)
    everything = weight_bytes(*networks, *(n for s in stages for n in s.networks))
    return Forecast(height, width, way, everything, rows)


def in_another_way(earlier: Forecast, last: Stage, way: Hashable) -> Forecast:
    """The forecast of the same clip, whose `last` stage works in another way: that stage alone is run."""
    peak = last.run()
    rows = tuple(s if s.stage != last.name else dataclasses.replace(s, activations=peak) for s in earlier.stages)
    return dataclasses.replace(earlier, decoding=way, stages=rows)
