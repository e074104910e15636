"""The exception for mistakes that a user can mend."""

from __future__ import annotations

import sys


class ReducioError(ValueError):
    """Bad input: one clear line that names the argument, what was given and what would be right.

    The command line prints it on stderr and exits with status 2; no traceback is shown, because the message is meant
    to be enough. Everything else that is raised is a defect of ours and keeps its traceback.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the C++ side on a CPU, could not allocate. Does not import torch."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
