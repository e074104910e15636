"""A number that a caller passed, as a float."""

from __future__ import annotations

import math
import numbers
from typing import Any

LARGEST = (2 - 2**-23) * 2.0**127  # of float32, in which torch computes


def to_float(value: Any) -> float:
    """A real number as a float: infinite where float32 cannot hold it, NaN for everything else, True and False too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.inf
    except TypeError:  # np.timedelta64 says that it is a number
        return math.nan
    return number if abs(number) <= LARGEST or math.isnan(number) else math.copysign(math.inf, number)


def finite(value: Any) -> Any:
    """Replace infinity (the PSNR of an exact copy) and NaN by None, because JSON has neither."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
