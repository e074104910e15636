"""The stages of a clip as named ranges on a profiler's time line; nothing at all unless somebody asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

STAGES = ("content.generate", "text.encode", "image.encode", "dit.step", "vae.decode", "video.write")

_asked: frozenset[str] = frozenset()


@contextmanager
def asked(*kinds: str) -> Iterator[None]:
    """Within it stages are marked: "trace" for torch.profiler, "markers" for nsys and ncu (NVTX) or rocprofv3 (roctx).

    Raises RuntimeError for markers where torch was built without a GPU's libraries.
    """
    global _asked
    if "markers" in kinds and not torch.cuda.is_available():
        raise RuntimeError("markers: this build of torch has no GPU, hence neither NVTX nor roctx")
    before, _asked = _asked, frozenset(kinds)
    try:
        yield
    finally:
        _asked = before


def annotate(name: str) -> AbstractContextManager[None]:
    """A range of this name around the work inside."""
    return _range(name) if _asked else nullcontext()


@contextmanager
def _range(name: str) -> Iterator[None]:
    markers = "markers" in _asked
    with torch.profiler.record_function(name) if "trace" in _asked else nullcontext():
        if markers:
            torch.cuda.nvtx.range_push(name)  # HIP builds of torch put roctx under this name
        try:
            yield
        finally:
            if markers:
                torch.cuda.nvtx.range_pop()
