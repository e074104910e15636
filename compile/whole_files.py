"""The one way in which this package writes a file: whole or not at all.

`system.atomic_files` does more of the same, and is on this floor too: neither may import the other.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`, in a folder that exists. What the block writes there takes the name `path` when it
    ends well, and vanishes when it fails. Another process sees the whole file or none. Raises OSError."""
    temporary = path.with_name(f".{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
