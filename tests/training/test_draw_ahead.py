"""Rows of a batch drawn in threads: the order, the next batch, the end of the run and errors."""

from __future__ import annotations

import threading

import pytest

from reducio_fast.training.draw_ahead import DrawAhead
from reducio_fast.training.loop import LoopConfig

STEPS, BATCH = 3, 8


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (1, 4), (2, 4), (4, 4)])
def test_each_row_is_drawn_once_and_in_order(world_size: int, micro_batches: int) -> None:
    loop = LoopConfig(steps=STEPS, learning_rate=1.0, micro_batches=micro_batches)
    got, drawn, share = [], [], BATCH // micro_batches

    def draw(step: int, row: int) -> tuple[int, int]:
        drawn.append((step, row))
        return step, row

    for rank in range(world_size):
        ahead = DrawAhead(draw, BATCH, loop, world_size)
        for step in range(STEPS):
            for micro in range(rank, micro_batches, world_size):
                rows = ahead(step, micro)
                assert rows == [(step, micro * share + i) for i in range(share)]
                got += rows
    assert sorted(got) == sorted(drawn) == [(step, row) for step in range(STEPS) for row in range(BATCH)]


def test_the_next_batch_is_drawn_while_this_one_is_computed() -> None:
    begun = threading.Event()

    def draw(step: int, row: int) -> int:
        if step == 1:
            begun.set()
        return row

    ahead = DrawAhead(draw, 2, LoopConfig(steps=2, learning_rate=1.0))
    assert ahead(0, 0) == [0, 1]
    assert begun.wait(10), "nothing of step 1 was drawn before it was asked for"


def test_an_error_is_raised_by_the_call_that_needs_the_row() -> None:
    def draw(step: int, row: int) -> int:
        if (step, row) == (1, 1):
            raise ValueError("cannot be read")
        return row

    ahead = DrawAhead(draw, 2, LoopConfig(steps=2, learning_rate=1.0))
    assert ahead(0, 0) == [0, 1]
    with pytest.raises(ValueError, match="cannot be read"):
        ahead(1, 0)
