"""Trace one clip: a Chrome trace and a table of what each stage is spent on."""

from __future__ import annotations

import argparse
from typing import Any

from . import options
from .printing import Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..measurement.names import CONTENDERS

    options.add_workload(parser)
    options.add_model(parser)
    parser.add_argument("--contender", choices=CONTENDERS, default="fast")
    parser.add_argument("--out", "-o", metavar="FILE", help="(default: trace.json.gz)")
    parser.add_argument("--shapes", action="store_true", default=None, help="record the shapes of inputs too")
    parser.add_argument(
        "--ranges", action="store_true", help="no trace: NVTX or roctx ranges, for nsys, ncu or rocprofv3"
    )


def run(arguments: argparse.Namespace) -> Printed:
    from ..measurement.profile import marked, profile

    if arguments.ranges:
        options.refuse(arguments, ("shapes", "out"), "is of the trace, and --ranges writes none")
    workload = arguments.workload or "default"
    workload_arguments = (workload, arguments.model, arguments.contender, arguments.dtype, arguments.device)
    row = (
        marked(*workload_arguments)
        if arguments.ranges
        else profile(arguments.out or "trace.json.gz", *workload_arguments, shapes=bool(arguments.shapes))
    )
    return row, lines(row)


def lines(row: dict[str, Any], top: int = 12) -> list[str]:
    """The summary as lines for people: the `top` ops of each stage."""
    out = [row["what"]]
    for name, stage in row["stages"].items():
        share = f", device busy {stage['busy_share']:.0%}" if stage["launches"] else ""
        counts = f", {stage['launches']} launches, {stage['synchronisations']} waits" if stage["launches"] else ""
        out.append(f"{name}: {stage['wall_ms']:.1f} ms{share}{counts}")
        total = sum(op["ms"] for op in stage["ops"]) or 1.0
        for op in stage["ops"][:top]:
            out.append(f"  {op['ms']:>10.2f} ms {op['ms'] / total:>6.1%} {op['calls']:>6}x  {op['name'][:90]}")
        if len(stage["ops"]) > top:
            others = sum(op["ms"] for op in stage["ops"][top:])
            out.append(f"  {others:>10.2f} ms {others / total:>6.1%}         {len(stage['ops']) - top} others")
    return [*out, f"wrote {row['trace']}"] if row["trace"] else out
