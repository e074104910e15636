"""Isolates the package's computations from torch settings that the caller has changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from . import cores


@contextmanager
def inference() -> Iterator[None]:
    """Inside, torch has its initial settings, but no gradients: new tensors are float32 on the CPU, autocast is off,
    and tensors are not inference tensors, which could not be written to later. Also usable as a decorator.

    The default dtype is the only one of these settings that is global to the process instead of local to the thread, so
    it is set only if the caller has changed it. If torch has more threads than this process may use cores, and no
    environment variable sets their number, it uses as many as there are cores. The caller's precision of float32
    products, deterministic algorithms and backend flags stay in effect.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if (default := torch.get_default_device()).type != "cpu":
            # Unset: with a default device torch's MultiheadAttention does not use its fused path (last bits differ).
            stack.callback(torch.set_default_device, default)
            torch.set_default_device(None)
        if torch.get_default_device().type != "cpu":  # the caller is inside a `with torch.device(...)`
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        threads = torch.get_num_threads()
        if (limit := cores.too_many(threads)) is not None:
            stack.callback(torch.set_num_threads, threads)
            torch.set_num_threads(limit)
        yield
