"""Times the stages of a clip and marks them as named ranges on a profiler's time line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

Timings = dict[str, float]


class Stopwatch:
    """Measures seconds per stage, and marks each stage with its name on a profiler's time line."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, Timings()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = clock(self.device)
        with annotate(name):
            yield
            end = clock(self.device)  # synchronise inside the range, so that it covers the kernels, not only launches
        self.seconds[name] = self.seconds.get(name, 0.0) + end - start


def clock(device: torch.device) -> float:
    """Time in seconds after all work launched on `device` has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


STAGES = ("content.generate", "text.encode", "image.encode", "dit.step", "vae.decode", "video.write")

_marks: frozenset[str] = frozenset()


@contextmanager
def profile_stages(*kinds: str) -> Iterator[None]:
    """Inside, stages are marked: "trace" for torch.profiler, "markers" for nsys and ncu (NVTX) or rocprofv3 (roctx).

    Raises RuntimeError for "markers" if torch has no GPU.
    """
    global _marks
    if "markers" in kinds and not torch.cuda.is_available():
        raise RuntimeError("markers: torch has no GPU here, so neither NVTX nor roctx is available")
    before, _marks = _marks, frozenset(kinds)
    try:
        yield
    finally:
        _marks = before


def annotate(name: str) -> AbstractContextManager[None]:
    """A named profiler range around the block. Does nothing outside of `profile_stages`."""
    return _range(name) if _marks else nullcontext()


@contextmanager
def _range(name: str) -> Iterator[None]:
    markers = "markers" in _marks
    with torch.profiler.record_function(name) if "trace" in _marks else nullcontext():
        if markers:
            torch.cuda.nvtx.range_push(name)  # HIP builds of torch call roctx here
        try:
            yield
        finally:
            if markers:
                torch.cuda.nvtx.range_pop()
