"""The exception for errors that a user can fix, and classification of other libraries' errors."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Any


class ReducioError(ValueError):
    """Bad input. The message is one line that names the argument, its value and what is allowed.

    The command line prints the message on stderr without a traceback and exits with status 2. Any other exception is a
    bug of this package and keeps its traceback.
    """

    def __init__(self, message: object) -> None:
        # What the message quotes, such as an array or another library's error, may have several lines.
        super().__init__(" ".join(line.strip() for line in str(message).splitlines()))


def shown(value: Any) -> str:
    """A value for a message: its `repr`, on one line and shortened to 60 characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a foreign object, or of a whole number with more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_word(name: str, value: Any, words: Sequence[str]) -> str:
    """`value`, which must be one of `words`. Raises ReducioError."""
    if not isinstance(value, str) or value not in words:
        raise ReducioError(f"{name}: must be one of {', '.join(words)}, is {shown(value)}")
    return value


def check_switch(name: str, value: Any) -> bool:
    """`value`, which must be True or False. Raises ReducioError."""
    if not isinstance(value, bool):
        raise ReducioError(f"{name}: must be True or False, is {shown(value)}")
    return value


def first_line(error: object) -> str:
    """The first non-empty line of an error's message; the name of its class if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def write_failure(error: BaseException) -> OSError | None:
    """Convert a library's error about a full or broken disk to an OSError; None for any other error."""
    safetensors, line = sys.modules.get("safetensors"), first_line(error)
    if isinstance(error, OSError):
        return error
    if safetensors is not None and isinstance(error, safetensors.SafetensorError) and "I/O" in line:
        return OSError(errno.EIO, line)
    # torch.save reports only that its zip writer failed.
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter failed" in line or "inline_container" in line):
        return OSError(errno.EIO, line)
    return None


def lacks_space(error: BaseException) -> bool:
    """Whether a write failed because the disk or the user's quota is full, or a file may not grow (`ulimit -f`)."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: in Python, on a device, or in torch's CPU allocator. Does not import torch."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
