"""Python's cycle collector, out of the way of work that makes objects by the million and drops none of them.

Importing torch's compiler, diffusers and transformers, and tracing a block, leaves it nothing to find, but it looks
again and again at everything there is: 0.6 s of the 5 s that a fresh process needs to its first clip of the default
model, and 1.1 s more when the process ends.
"""

from __future__ import annotations

import atexit
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_inside = 0
_was_on = False


@contextmanager
def paused() -> Iterator[None]:
    """No collections inside, in any thread; afterwards as it was before. May nest and overlap."""
    global _inside, _was_on
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)  # what is frozen is not looked at on the way out; the system takes all memory back
    with _lock:
        if _inside == 0:
            _was_on = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _was_on:
                if not gc.get_freeze_count():
                    # All that is new goes to the oldest generation at once: else the next allocation starts with the
                    # very look at everything that was just avoided.
                    gc.freeze()
                    gc.unfreeze()
                gc.enable()
