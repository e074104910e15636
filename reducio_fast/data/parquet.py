"""pyarrow, which reads and writes manifests and indices: imported where one is, since not every user has it."""

from __future__ import annotations

from typing import Any

from ..system.errors import ReducioError


def pyarrow_modules() -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`. Raises `ReducioError` where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ReducioError('manifests and indices need pyarrow; pip install "reducio-fast[train]"') from error
    return pyarrow, pyarrow.parquet
