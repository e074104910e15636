"""The exception for mistakes that a user can mend."""

from __future__ import annotations

import errno
import sys


class ReducioError(ValueError):
    """Bad input: one clear line that names the argument, what was given and what would be right.

    The command line prints it on stderr and exits with status 2; no traceback is shown, because the message is meant
    to be enough. Everything else that is raised is a defect of ours and keeps its traceback.
    """


def first_line(error: object) -> str:
    """The first line with text of a library's message, which may have a page of them; its class where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def write_failure(error: BaseException) -> OSError | None:
    """What a full or broken disk makes of a library's write, as the OSError that it was; None for any other error."""
    safetensors, line = sys.modules.get("safetensors"), first_line(error)
    if isinstance(error, OSError):
        return error
    if safetensors is not None and isinstance(error, safetensors.SafetensorError) and "I/O" in line:
        return OSError(errno.EIO, line)
    # torch.save says nothing but that its zip writer could not go on.
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter failed" in line or "inline_container" in line):
        return OSError(errno.EIO, line)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the C++ side on a CPU, could not allocate. Does not import torch."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
