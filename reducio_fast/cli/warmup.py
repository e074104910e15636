"""Compile for this machine ahead of the first call; take what is compiled from or to another machine."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from ..system.errors import ReducioError
from ..system.paths import check_output_file
from . import options
from .printing import Printed

LOG = logging.getLogger("reducio_fast")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=[],
        metavar="SIZE",
        help="256, or HEIGHTxWIDTH (default: the model's own)",
    )
    parser.add_argument(
        "--deadline", type=float, metavar="SECONDS", help="give up after so long; status 0, with --export 2"
    )
    parser.add_argument("--export", metavar="FILE", help="afterwards, pack all that is compiled into one archive")
    parser.add_argument(
        "--import",
        dest="import_",
        metavar="FILE",
        help="before, unpack the archive of an equal machine; it holds code: take those of people you trust",
    )
    options.add_model(parser, ", hub id, svd, svd-tiny or svd:DIR")
    options.add_compile(parser)
    options.add_quantise(parser)
    options.add_progress(parser)


def run(arguments: argparse.Namespace) -> Printed:
    from ..compile import cache
    from ..pipelines import registry
    from ..pipelines.call.validation import check_quantise
    from ..pipelines.execution.warmup import check_deadline
    from ..system import cache_folder, devices
    from ..triton_kernels.tables import arch_of

    sizes = [_parse_size(text) for text in arguments.sizes] or None
    check_deadline(arguments.deadline)
    target = None if arguments.export is None else Path(arguments.export)
    if target is not None:
        check_output_file(target, "--export")
    if (missing := devices.triton_missing()) is not None:
        raise ReducioError(f"warmup: there is nothing to compile without the fast path: {missing}")
    device = devices.resolve_device(arguments.device)
    if arguments.quantise is not None:
        check_quantise(arguments.quantise, "auto", device)
    origin = cache.Origin.here(arch_of(device))
    result: dict[str, Any] = {"cache": str(cache_folder.root() / origin.key), "imported": None, "exported": None}
    lines = []
    try:
        if arguments.import_ is not None:
            try:
                result["imported"] = cache.import_archive(Path(arguments.import_), origin, cache_folder.root())
                lines.append(f"imported {result['imported']} entries of {arguments.import_}")
            except cache.ForeignCache as error:  # not an error: the only loss is the time that it would have saved
                LOG.warning("%s", error)
                result["ignored"] = str(error)
        model, named = registry.find(arguments.model), ("compile", "quantise")
        loading = {name: value for name in named if (value := getattr(arguments, name)) is not None}
        if arguments.quantise is not None and "quantise" not in model.load_arguments:
            raise ReducioError(
                f"--quantise: only the decoder of a Reducio model is quantised, --model {arguments.model} has none"
            )
        model.check_call("auto", loading)
        if not model.load_arguments:
            raise ReducioError(f"--model {arguments.model}: is a peer, whose networks this package does not compile")
        pipe = model.load(arguments.dtype, device, "auto", **loading)
        outcome = pipe.warmup(sizes, arguments.deadline, arguments.progress)
        result |= {"seconds": outcome.seconds, "left": list(outcome.left)}
        lines += [f"{name:<12} {seconds:.2f} s" for name, seconds in outcome.seconds.items()]
        lines += [f"{name:<12} not done" for name in outcome.left]
        if target is not None:
            if outcome.left:
                left = ", ".join(outcome.left)
                raise ReducioError(f"--export: {left} not done in {arguments.deadline:g} s; no archive is written")
            result["exported"] = cache.export_archive(target, origin, cache_folder.root())
            lines.append(f"wrote {target}: {result['exported']} entries, {target.stat().st_size / 1e6:.1f} MB")
    except cache.CacheError as error:
        raise ReducioError(str(error)) from error
    return result, lines


def _parse_size(text: str) -> int | tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and len(part) < 6 for part in parts):
        raise ReducioError(f"--sizes: must be a number or HEIGHTxWIDTH, is {text[:60]!r}")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))
