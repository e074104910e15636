"""What a command prints: one JSON object for machines, or lines for people."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from ..system.errors import ReducioError

Printed = tuple[dict[str, Any], list[str]]  # a result for machines, the same as lines for people

NOTHING: Printed = ({}, [])  # the result of a process that leaves printing to another one


class Failed(ReducioError):
    """Raised by a command that has a result to print and still fails, for example a parity check with errors."""

    def __init__(self, message: str, printed: Printed) -> None:
        super().__init__(message)
        self.printed = printed


def show(printed: Printed, as_json: bool) -> None:
    if printed is NOTHING:
        return
    result, lines = printed
    print(json.dumps(finite(result), indent=2, allow_nan=False) if as_json else "\n".join(lines))
    sys.stdout.flush()  # a full disk or a closed pipe raises here, and a program that reads the line gets it at once


def finite(value: Any) -> Any:
    """Replace infinity (the PSNR of an exact copy) and NaN by None, because JSON has neither."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
