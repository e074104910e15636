"""Model offload: weights live on the CPU, and on the device only while the stage that needs them runs.

What a stage reads is copied to the device before it and dropped after it: nothing is copied back, since nothing here
writes weights. A write that a callback makes to a network in the middle of its own stage is therefore lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Offload:
    """`device` is where stages run. Tests use a CPU, with copies of the weights."""

    device: torch.device

    @contextmanager
    def placed(self, *networks: nn.Module) -> Iterator[None]:
        """Inside, weights and buffers of the networks are on the device; shared ones are copied once."""
        owners: dict[int, Tensor] = {}
        for network in networks:
            for x in (*network.parameters(), *network.buffers()):
                owners[id(x)] = x
        home = [(x, x.data) for x in owners.values()]
        try:
            for x, data in home:
                x.data = data.to(self.device, copy=True, non_blocking=True)
            yield
        finally:
            for x, data in home:
                x.data = data  # the same memory as before: the engine sees that nothing has changed
