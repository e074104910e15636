"""The user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from . import environment_variables


def root() -> Path:
    """The user's cache folder, whether or not it exists yet."""
    chosen = environment_variables.read("REDUCIO_CACHE_DIR")
    if chosen is not None:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")  # the XDG specification: relative paths are to be ignored
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "reducio-fast"
