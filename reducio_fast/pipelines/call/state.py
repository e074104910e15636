"""What a call has come to: one object a call, which its callback, its progress bar and its caller share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from .request import Request


@dataclass(slots=True)
class CallState:
    """The call at work, or the last one."""

    request: Request
    progress: tqdm = field(default_factory=lambda: tqdm(disable=True))
    interrupted: bool = False  # the clip at work is the last one, and ends with the step that it has reached
    timestep: Tensor | None = None  # of the step that a callback is called for
    timings: dict[str, float] = field(default_factory=dict)  # seconds by stage
    # Latents and content frames of the clips so far, small enough to keep: decoding may run out of memory.
    undecoded: list[tuple[Tensor, np.ndarray]] = field(default_factory=list)

    @contextmanager
    def show_progress(self, config: dict[str, Any]) -> Iterator[None]:
        """A progress bar over the steps of all clips, where the request wants one; `config` are arguments for tqdm."""
        silent = not self.request.progress or os.environ.get("RANK", "0") != "0"  # of torchrun's ranks, one prints
        total = len(self.request.clips) * self.request.num_inference_steps
        with tqdm(total=total, **({"desc": "dit.step", "disable": silent} | config)) as self.progress:
            yield

    def end(self) -> None:
        """Let go of what only a running call needs."""
        self.timestep = None
        self.undecoded = []
