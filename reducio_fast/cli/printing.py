"""What a command prints: one JSON object for machines, or lines for people."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from ..system.errors import ReducioError

Printed = tuple[dict[str, Any], list[str]]  # a result for machines, the same as lines for people

NOTHING: Printed = ({}, [])  # of a process that leaves printing to another


class Failed(ReducioError):
    """A command that has a result to print and still fails: parity on red, for example."""

    def __init__(self, message: str, printed: Printed) -> None:
        super().__init__(message)
        self.printed = printed


def show(printed: Printed, as_json: bool) -> None:
    if printed is NOTHING:
        return
    result, lines = printed
    print(json.dumps(finite(result), indent=2, allow_nan=False) if as_json else "\n".join(lines))
    sys.stdout.flush()  # here a full disk or a closed pipe is seen, and a program that reads the line has it at once


def finite(value: Any) -> Any:
    """JSON has no infinity, which is what the PSNR of an exact copy is, and no NaN: both become null."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
