"""The user's cache folder, and whether the compilers of this process keep their files there too."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import environment_variables

LOG = logging.getLogger("reducio_fast")
VARIABLE = "REDUCIO_CACHE_DIR"

_our_own_process = False


def root() -> Path:
    """The user's cache folder, whether or not it exists yet. Without a home it is in the folder for temporary files."""
    base = os.environ.get("XDG_CACHE_HOME", "")  # the XDG specification: relative paths are to be ignored
    try:
        if (chosen := environment_variables.read(VARIABLE)) is not None:
            return Path(chosen).expanduser().absolute()
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "reducio-fast"
    except RuntimeError as error:  # the user id, or the NAME of ~NAME, is in no user database
        return _elsewhere(str(error))


@functools.cache
def _elsewhere(reason: str) -> Path:
    """Called once a reason, so there is one warning."""
    folder = Path(tempfile.gettempdir()) / f"reducio-fast-{os.getuid()}"
    LOG.warning("cache: %s; files go to %s", reason, folder)
    return folder


@contextmanager
def for_compilers() -> Iterator[None]:
    """Inside, Inductor and Triton may be told to keep their files in our folder too, by their environment variables.
    For the command line, whose process is its own: a library must not change that of its caller."""
    global _our_own_process
    before, _our_own_process = _our_own_process, True
    try:
        yield
    finally:
        _our_own_process = before


def is_for_compilers() -> bool:
    """Whether this is within `for_compilers`, or the user has named the folder by our variable."""
    return _our_own_process or environment_variables.read(VARIABLE) is not None
