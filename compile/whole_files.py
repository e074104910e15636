"""Writes a file whole or not at all: the way in which all of `compile` writes files.

`system.atomic_files` does the same and more. It is on the same floor, so neither may import the other.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, in a folder that exists. The file that the block writes there is renamed to
    `path` if the block succeeds, and removed if it fails. Other processes see the whole file or none. Raises
    OSError."""
    temporary = path.with_name(f".{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
