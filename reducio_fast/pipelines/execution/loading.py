"""What every loader of our pipelines does around its work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...compile import gc_pause
from .executor import clips_in_progress


@contextmanager
def loading() -> Iterator[None]:
    """A context for the construction of a pipeline. Networks draw fresh weights, before those of a file replace them,
    but not from the caller's random numbers. The cycle collector is paused. Clips that other threads are making at its
    start continue."""
    with gc_pause.paused(), torch.random.fork_rng(devices=[]), Yielding() if clips_in_progress() else nullcontext():
        yield


class Yielding(TorchFunctionMode):
    """Leaves Python's global lock (GIL) to clips in progress: beside them this thread works a tenth of the time.

    A clip calls thousands of short torch functions. Each releases the lock and waits up to 5 ms for it while another
    thread runs Python code, so a clip stood still while a model was loaded (0.3 to 0.4 s, two cores of a Xeon). With
    this a clip of 1.0 s takes 0.07 s longer (0.17 at most), and the load 1.3 s. The mode itself costs a load 0.1 s, so
    it is used only beside clips in progress.
    """

    # Seconds of work between two pauses, the longest work that counts, and seconds of pause per second that counts.
    SLICE, LONGEST, REST = 0.001, 0.01, 9

    def __init__(self) -> None:
        super().__init__()
        self._since = time.perf_counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        worked = time.perf_counter() - self._since
        if worked > self.SLICE:
            if clips_in_progress():
                # A longer time was inside torch, without the lock: reading a file or changing a dtype.
                time.sleep(self.REST * min(worked, self.LONGEST))
            self._since = time.perf_counter()
        return func(*args, **(kwargs or {}))
