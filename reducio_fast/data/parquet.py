"""What manifests and indices share: the import of pyarrow, an optional dependency, and checks of a table's values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..system.errors import ReducioError, shown
from ..system.real_numbers import LARGEST


def pyarrow_modules() -> tuple[Any, Any]:
    """The modules `pyarrow` and `pyarrow.parquet`. Raises `ReducioError` if pyarrow is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ReducioError('manifests and indices need pyarrow; pip install "reducio-fast[train]"') from error
    return pyarrow, pyarrow.parquet


def first_fault(table: Any, schema: Any, rules: Callable[[Any], Mapping[str, tuple[Any, str]]]) -> str | None:
    """The first column of another type than in `schema`, or value that breaks a rule; None if all are right.

    `rules` maps a column's name to the mask of its right values, in which null is wrong, and to what is right.
    """
    for field in schema:
        if (kind := table.schema.field(field.name).type) != field.type:
            return f"{field.name} is of type {kind}, it must be of type {field.type}"
    for name, (mask, right) in rules(table).items():
        wrong = np.flatnonzero(~mask.fill_null(False).to_numpy())
        if len(wrong):
            return f"row {wrong[0]}: {name} is {shown(table[name][int(wrong[0])].as_py())}, it must be {right}"
    return None


def between(column: Any, low: float, high: float) -> Any:
    """The mask of a column's values from `low` to `high`. NaN is outside."""
    import pyarrow.compute as pc

    return pc.and_(pc.greater_equal(column, low), pc.less_equal(column, high))


def above_zero(column: Any) -> Any:
    """The mask of a column's values above 0 that float32, in which torch computes, can hold."""
    return between(column, math.ulp(0.0), LARGEST)
