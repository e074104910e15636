"""Compile every kernel for every GPU target, with no GPU."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from ..system.errors import ReducioError, shown
from . import options
from .printing import Failed, Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--targets", metavar="A,B", help="only these, such as sm_90,gfx942 (default: all)")
    parser.add_argument("--kernels", metavar="A,B", help="only these, such as conv3d (default: all)")
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="only variants with this in their name, such as bf16"
    )
    parser.add_argument("--jobs", type=options.positive, help="compilers at work at once (default: one a core)")


def run(arguments: argparse.Namespace) -> Printed:
    from ..measurement.kernel_builds import check
    from ..measurement.machine_limits import prediction

    archs, ops = (None if text is None else text.split(",") for text in (arguments.targets, arguments.kernels))
    builds = []
    for build in check(archs=archs, ops=ops, only=arguments.only, jobs=arguments.jobs):
        builds.append(build)
        if build.problems and not arguments.json:
            print(f"{build.variant} on {build.arch}: {'; '.join(build.problems)}", file=sys.stderr)
    if not builds:
        raise ReducioError(
            f"--only {shown(arguments.only)}: no variant of these kernels and targets has it in its name"
        )
    wrong = [build for build in builds if build.problems]
    predictions = [p for p in map(prediction, builds) if p is not None]
    result = {
        "builds": [asdict(b) for b in builds],
        "wrong": len(wrong),
        "predictions": [asdict(p) for p in predictions],
    }
    printed = result, [*lines(builds), *prediction_lines(predictions), *skipped(builds)]
    if wrong:
        first = f"{wrong[0].variant} on {wrong[0].arch}"
        raise Failed(f"{len(wrong)} of {len(builds)} builds are wrong, the first: {first}", printed)
    return printed


def lines(builds: list) -> list[str]:
    """One aligned line per build."""
    head = f"{'variant':<44} {'target':<7} {'registers':>9} {'spilled':>7} {'shared':>7}  matrix, bulk copy"
    out = [head]
    for b in builds:
        extras = ", ".join(x for x in (b.matrix, "bulk copy" if b.bulk_copy else "", *b.problems) if x)
        mark = "  <-- WRONG" if b.problems else ""
        out.append(f"{b.variant:<44} {b.arch:<7} {b.registers:>9} {b.spilled:>7} {b.shared:>7}  {extras}{mark}")
    wrong = sum(bool(b.problems) for b in builds)
    return [*out, f"{len(builds)} builds, {wrong} wrong"]


def prediction_lines(predictions: list) -> list[str]:
    """One aligned line per hot shape: the rate that a model of the chip predicts from the machine code, and the
    measured rate."""
    if not predictions:
        return []
    rows = [f"{'hot shape':<72} {'target':<7} {'predicted':>13} {'measured':>13}"]
    for p in predictions:
        rates = [f"{x / 1e12:.0f} TFLOP/s" if x else "-" for x in (p.predicted, p.measured)]
        rows.append(f"{f'{p.variant}, {p.what}':<72} {p.arch:<7} {rates[0]:>13} {rates[1]:>13}")
    return rows


def skipped(builds: list) -> list[str]:
    """One line for each check of machine code that was not made, and why."""
    from ..compile.aot import VERSION
    from ..measurement.machine_limits import held, limits

    notes = []
    if any(b.code is None and b.registers for b in builds):
        notes.append("no nvdisasm here (pip install nvidia-cuda-nvdisasm): NVIDIA's machine code was not read")
    if not held(VERSION):
        notes.append(f"limits of counts are those of Triton {' and '.join(limits())}, not of {VERSION}: not held")
    return notes
