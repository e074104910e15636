"""Pauses Python's cycle collector during work that makes millions of objects and drops none of them.

Importing torch's compiler, diffusers and transformers, and tracing a block, creates no garbage cycles. But the
collector scans all objects again and again, which takes 0.6 s of the 5 s that a fresh process needs for its first clip
of the default model, and 1.1 s more when the process ends.
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
    """Inside, no thread collects cycles. Afterwards the setting is as before. Calls may nest and overlap."""
    global _inside, _was_on
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)  # frozen objects are not scanned at exit, where the system takes all memory back
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
                    # Move new objects to the oldest generation at once. Otherwise the next allocation starts the full
                    # scan that was just avoided.
                    gc.freeze()
                    gc.unfreeze()
                gc.enable()
