"""A capture that records functions instead of capturing them, so that `Graphs` is tested with no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from reducio_fast.compile.graphs import Pool


class Recorder:
    """Stands in for a GPU: a replay computes the captured function again, from the static inputs into the outputs."""

    def __init__(self) -> None:
        self.captures, self.replays, self.pools = 0, 0, []
        self.error: Exception | None = None

    def __call__(self, fn: Callable[..., Any], inputs: list[Tensor], pool: Pool) -> tuple[Callable[[], None], Any]:
        if self.error is not None:
            raise self.error
        self.captures += 1
        self.pools.append(pool)
        outputs = fn(*inputs)

        def replay() -> None:
            self.replays += 1
            for old, new in zip(flat(outputs), flat(fn(*inputs)), strict=True):
                old.copy_(new)

        return replay, outputs


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [x for item in value for x in flat(item)]
    return [value] if isinstance(value, Tensor) else []
