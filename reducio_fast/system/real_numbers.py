"""A number that a caller passed, as a float."""

from __future__ import annotations

import math
import numbers
from typing import Any


def to_float(value: Any) -> float:
    """A real number as a float: infinite where a float cannot hold it, NaN for everything else, True and False too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
