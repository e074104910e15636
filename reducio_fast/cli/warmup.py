"""`reducio-fast warmup`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..pipelines.execution.warmup import Size
from ..system import devices
from ..system.errors import ReducioError

LOG = logging.getLogger("reducio_fast")


def command(args: Any) -> tuple[dict[str, Any], list[str]]:
    """`reducio-fast warmup`: its result for machines, and the lines for people."""
    from ..checkpoints.strict_files import embedded_model
    from ..compile import cache
    from ..pipelines.reducio.pipeline import ReducioPipeline
    from ..system import cache_folder
    from ..triton_kernels.tables import arch_of

    sizes = [_parse_size(text) for text in args.sizes] or None
    target = None if args.export is None else Path(args.export)
    if target is not None and not target.parent.is_dir():
        raise ReducioError(f"--export: {target.parent} is no folder")
    if (missing := devices.triton_missing()) is not None:
        raise ReducioError(f"warmup: there is nothing to compile without the fast path: {missing}")
    origin = cache.Origin.here(arch_of(devices.resolve_device(args.device)))
    result: dict[str, Any] = {"cache": str(cache_folder.root() / origin.key), "imported": None, "exported": None}
    lines = []
    try:
        if args.import_ is not None:
            try:
                result["imported"] = cache.import_archive(Path(args.import_), origin, cache_folder.root())
                lines.append(f"imported {result['imported']} entries of {args.import_}")
            except cache.ForeignCache as error:  # no mistake: it costs the time that it would have saved
                LOG.warning("%s", error)
                result["ignored"] = str(error)
        model = embedded_model() if args.model is None else args.model
        pipe = ReducioPipeline.from_pretrained(model, dtype=args.dtype, device=args.device, compile=args.compile)
        outcome = pipe.warmup(sizes, args.deadline, args.progress)
        result |= {"seconds": outcome.seconds, "left": list(outcome.left)}
        lines += [f"{name:<12} {seconds:.2f} s" for name, seconds in outcome.seconds.items()]
        lines += [f"{name:<12} not done" for name in outcome.left]
        if target is not None:
            result["exported"] = cache.export_archive(target, origin, cache_folder.root())
            lines.append(f"wrote {target}: {result['exported']} entries, {target.stat().st_size / 1e6:.1f} MB")
    except cache.CacheError as error:
        raise ReducioError(str(error)) from error
    return result, lines


def _parse_size(text: str) -> int | Size:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ReducioError(f"--sizes: must be a number or HEIGHTxWIDTH, is {text!r}")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))
