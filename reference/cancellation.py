"""A way to end a long decode: decoders call `check` between tiles, frames and blocks; the caller decides what it does.

It is a context variable instead of an argument, because between the caller that wants to stop and the loop over tiles
there are several functions that do not use it. Other threads see their own value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_between: ContextVar[Callable[[], None] | None] = ContextVar("between_pieces", default=None)


@contextmanager
def cancellable(between: Callable[[], None]) -> Iterator[None]:
    """Inside, `between()` runs before each piece of a decode; what it raises ends the decode."""
    token = _between.set(between)
    try:
        yield
    finally:
        _between.reset(token)


def check() -> None:
    """Called by decoders before a tile, a frame or a block."""
    between = _between.get()
    if between is not None:
        between()
