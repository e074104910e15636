"""Imports pyarrow, an optional dependency, when a manifest or an index is read or written."""

from __future__ import annotations

from typing import Any

from ..system.errors import ReducioError


def pyarrow_modules() -> tuple[Any, Any]:
    """The modules `pyarrow` and `pyarrow.parquet`. Raises `ReducioError` if pyarrow is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ReducioError('manifests and indices need pyarrow; pip install "reducio-fast[train]"') from error
    return pyarrow, pyarrow.parquet
