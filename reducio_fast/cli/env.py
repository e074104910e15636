"""Versions, devices and CPU features, for a bug report."""

from __future__ import annotations

import argparse
from typing import Any

from .printing import Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> Printed:
    from ..system.machine_report import describe

    result = describe()
    return result, format_lines(result)


def format_lines(report: dict[str, Any]) -> list[str]:
    """`describe()` as aligned lines for people; absent packages are left out."""
    lines = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                add(key, item)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                lines.append(f"{f'{name} {index}':<18} " + ", ".join(f"{k} {v}" for k, v in item.items()))
            if not value:
                lines.append(f"{name:<18} none")
        elif value is not None:
            lines.append(f"{name:<18} {value}")

    for name, value in report.items():
        add({"devices": "device"}.get(name, name), value)
    return lines
