"""Settings of torch that a caller may have changed for its own work, and that would change ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from . import cores


@contextmanager
def inference() -> Iterator[None]:
    """Inside, torch is as it is after its import, but without gradients: new tensors are float32 on the CPU, there is
    no autocast, and tensors are no inference tensors, which cannot be written to later. Also a decorator.

    The default dtype is the one of these that torch keeps for the whole process and not for a thread: it is touched
    only where the caller has changed it. Where torch has more threads than this process may use cores, and no variable
    of the environment says how many, it keeps to the cores. What stays as the caller has it: the precision of float32
    products, deterministic algorithms and the backends' switches.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if (default := torch.get_default_device()).type != "cpu":
            # Under a default device torch's MultiheadAttention leaves its fused path (last bits differ), so it goes.
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
