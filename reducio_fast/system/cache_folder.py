"""The user's cache folder, and whether Inductor and Triton keep their files there too."""

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
    """The user's cache folder, which may not exist yet. Without a home folder it is below the temporary folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")  # relative paths are ignored, as the XDG specification demands
    try:
        if (chosen := environment_variables.read(VARIABLE)) is not None:
            return Path(chosen).expanduser().absolute()
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "reducio-fast"
    except RuntimeError as error:  # the user database has no entry for the user id or for the NAME of ~NAME
        return _temporary_root(str(error))


@functools.cache
def _temporary_root(reason: str) -> Path:
    """Cache folder below the temporary folder. `functools.cache` limits the warning to one per reason."""
    folder = Path(tempfile.gettempdir()) / f"reducio-fast-{os.getuid()}"
    LOG.warning("cache: %s; files go to %s", reason, folder)
    return folder


@contextmanager
def for_compilers() -> Iterator[None]:
    """Inside the block, Inductor's and Triton's environment variables may be set to send their files to our folder too.

    Only the command line uses this, because it owns its process; a library must not change its caller's environment.
    """
    global _our_own_process
    before, _our_own_process = _our_own_process, True
    try:
        yield
    finally:
        _our_own_process = before


def is_for_compilers() -> bool:
    """Whether `for_compilers` is active or the user has set `REDUCIO_CACHE_DIR`."""
    return _our_own_process or environment_variables.read(VARIABLE) is not None
