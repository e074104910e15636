"""Compare the fast path with the float32 reference on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from . import options
from .printing import Failed, Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, dtype="that of the fast path on this machine")
    parser.add_argument(
        "--full-size",
        action=argparse.BooleanOptionalAction,
        help="full-width random weights as well (default: on a GPU)",
    )
    options.add_out(parser, "FILE", "JSON rows to write, after each comparison", required=False)


def run(arguments: argparse.Namespace) -> Printed:
    from ..measurement.bench import write
    from ..measurement.parity import compare
    from ..system.paths import check_output_file

    def keep(rows: list[dict[str, Any]], whole: bool = False) -> None:
        if arguments.out:
            write(as_json(rows) | {"whole": whole}, arguments.out)

    if arguments.out:
        check_output_file(arguments.out, "out")
    rows = compare(arguments.model, arguments.dtype, arguments.device, arguments.full_size, keep)
    keep(rows, whole=True)
    wrong = [row for row in rows if not row["right"]]
    printed = as_json(rows), lines(rows)
    if wrong:
        raise Failed(f"{len(wrong)} of {len(rows)} comparisons fail, the first: {wrong[0]['what']}", printed)
    return printed


def as_json(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"rows": rows, "wrong": sum(not row["right"] for row in rows)}


def lines(rows: list[dict[str, Any]]) -> list[str]:
    head = f"{'':<43}{'error':>10}{'eager':>10}{'limit':>10}"
    body = [f"{r['what']:<34}{r['dtype']:>9}{r['error']:>10.2e}{r['eager']:>10.2e}{r['limit']:>10.2e}" for r in rows]
    return [head, *(line + ("" if r["right"] else "  WRONG") for line, r in zip(body, rows, strict=True))]
