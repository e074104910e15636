"""Draws the rows of a batch in threads, those of the next batch while the current one is computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

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
        here = cores.usable() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._threads = ThreadPoolExecutor(max(1, min(self._share, here)), "draw-ahead")
        self._begun: dict[tuple[int, int], Future[_Row]] = {}

    def __call__(self, step: int, micro: int) -> list[_Row]:
        now = [self._begun.pop(key, None) or self._begin(key) for key in self._rows(step, micro)]
        for unused in self._begun.values():  # the calls came in another order
            unused.cancel()
        self._begun = {key: self._begin(key) for key in self._next_rows(step, micro)}
        return [row.result() for row in now]

    def _rows(self, step: int, micro: int) -> Iterator[tuple[int, int]]:
        return ((step, micro * self._share + i) for i in range(self._share))

    def _next_rows(self, step: int, micro: int) -> Iterator[tuple[int, int]]:
        micro += self._world_size  # as `loop.run` shares the batches of a step among processes
        if micro >= self._loop.micro_batches:
            step, micro = step + 1, micro % self._world_size
        return self._rows(step, micro) if step < self._loop.steps else iter(())

    def _begin(self, key: tuple[int, int]) -> Future[_Row]:
        return self._threads.submit(self._draw, *key)
