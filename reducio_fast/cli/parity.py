"""Compare the fast path with the float32 reference on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from . import options
from .printing import Failed, Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--full-size",
        action=argparse.BooleanOptionalAction,
        help="full-width random weights as well (default: on a GPU)",
    )


def run(arguments: argparse.Namespace) -> Printed:
    from ..measurement.parity import compare

    rows = compare(model=arguments.model, dtype=arguments.dtype, device=arguments.device, full_size=arguments.full_size)
    wrong = [row for row in rows if not row["right"]]
    printed = {"rows": rows, "wrong": len(wrong)}, lines(rows)
    if wrong:
        raise Failed(f"{len(wrong)} of {len(rows)} comparisons fail, the first: {wrong[0]['what']}", printed)
    return printed


def lines(rows: list[dict[str, Any]]) -> list[str]:
    head = f"{'':<43}{'error':>10}{'eager':>10}{'limit':>10}"
    body = [f"{r['what']:<34}{r['dtype']:>9}{r['error']:>10.2e}{r['eager']:>10.2e}{r['limit']:>10.2e}" for r in rows]
    return [head, *(line + ("" if r["right"] else "  WRONG") for line, r in zip(body, rows, strict=True))]
