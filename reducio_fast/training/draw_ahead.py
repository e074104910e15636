"""Draws the rows of a batch in threads, those of the next batches while the current one is computed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from ..data.clip_files import MOST_READERS
from ..system import cores
from .loop import LoopConfig

_Row = TypeVar("_Row")


class DrawAhead(Generic[_Row]):
    """Called as `drawn(step, micro)`, it returns the results of `draw(step, row)` for the rows of that batch, in order.

    To read 16 frames of 1280x720 and resize them to 256 pixels takes 0.7 s of a core of a Xeon, so that a batch of them
    would take longer than a GPU's step. `draw` runs in threads and must depend on its arguments alone. Its errors are
    raised by the call that needs the row.
    """

    def __init__(self, draw: Callable[[int, int], _Row], batch: int, loop: LoopConfig, world_size: int = 1) -> None:
        self._draw, self._loop, self._world_size = draw, loop, world_size
        self._share = batch // loop.micro_batches
        threads = min(MOST_READERS, max(1, cores.usable() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        self._threads, self._ahead = ThreadPoolExecutor(threads, "draw-ahead"), max(threads, self._share)
        self._begun: dict[tuple[int, int], Future[_Row]] = {}

    def __call__(self, step: int, micro: int) -> list[_Row]:
        now = [self._begun.pop(key, None) or self._begin(key) for key in self._rows(step, micro)]
        later = itertools.islice(self._later_rows(step, micro), self._ahead)
        self._begun = {key: self._begun.get(key) or self._begin(key) for key in later}
        return [row.result() for row in now]

    def _rows(self, step: int, micro: int) -> Iterator[tuple[int, int]]:
        return ((step, micro * self._share + i) for i in range(self._share))

    def _later_rows(self, step: int, micro: int) -> Iterator[tuple[int, int]]:
        while step < self._loop.steps:
            micro += self._world_size  # as `loop.run` shares the batches of a step among processes
            if micro >= self._loop.micro_batches:
                step, micro = step + 1, micro % self._world_size
            if step < self._loop.steps:
                yield from self._rows(step, micro)

    def _begin(self, key: tuple[int, int]) -> Future[_Row]:
        return self._threads.submit(self._draw, *key)
