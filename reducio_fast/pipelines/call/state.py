"""What a call has come to: one object a call, which its callback, its progress bar and its caller share."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from .request import Request


@dataclass(slots=True)
class CallState:
    """The call at work, or the last one."""

    request: Request
    progress: tqdm
    interrupted: bool = False  # the clip at work is the last one, and ends with the step that it has reached
    timestep: Tensor | None = None  # of the step that a callback is called for
    timings: dict[str, float] = field(default_factory=dict)  # seconds by stage
    # Latents and content frames of the clips so far, small enough to keep: decoding may run out of memory.
    undecoded: list[tuple[Tensor, np.ndarray]] = field(default_factory=list)

    def end(self) -> None:
        """Let go of what only a running call needs."""
        self.timestep = None
        self.undecoded = []
