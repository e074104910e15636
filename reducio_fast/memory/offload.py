"""Model offload: weights stay on the CPU, and are on the device only while the stage that needs them runs.

The weights of a stage are copied to the device before it and freed after it. They are not copied back, because stages
do not write weights; so a callback's write to a network during that network's stage is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Offload:
    """Offloading to the CPU for stages that run on `device`. Tests use a CPU as the device, with copied weights."""

    device: torch.device

    @contextmanager
    def placed(self, *networks: nn.Module) -> Iterator[None]:
        """Inside, weights and buffers of the networks are on the device; shared ones are copied once."""
        owners: dict[int, Tensor] = {}
        for network in networks:
            for x in (*network.parameters(), *network.buffers()):
                owners[id(x)] = x
        originals = [(x, x.data) for x in owners.values()]
        try:
            for x, data in originals:
                x.data = data.to(self.device, copy=True, non_blocking=True)
            yield
        finally:
            for x, data in originals:
                x.data = data  # the same memory as before, so that the engine detects no change
