"""`pipe.warmup`: which clips are made so that kernels, compiled code, tables and graphs exist before the first call."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from . import inputs
from .compile import warmup
from .errors import ReducioError

if TYPE_CHECKING:
    from .pipeline import ReducioPipeline

LOG = logging.getLogger("reducio_fast")
PROMPT = "a red circle moving right on a black background"
# The first step compiles or captures, the second replays, and is the first that uses a multistep scheduler's history.
STEPS = 2
GREY = 128

Size = tuple[int, int]


def warm_up(
    pipe: ReducioPipeline,
    sizes: Sequence[int | Size] | None = None,
    deadline: float | None = None,
    progress: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> warmup.Outcome:
    """See `ReducioPipeline.warmup`."""
    wanted = _check_sizes(pipe, sizes)
    if deadline is not None and (isinstance(deadline, bool) or not isinstance(deadline, int | float) or deadline <= 0):
        raise ReducioError(f"deadline: must be a number of seconds above 0, is {deadline!r}")
    if deadline is not None and pipe.offloading:
        raise ReducioError(
            f"deadline: {deadline} given while weights are offloaded, they cannot be in two calls at once; leave it out"
        )
    pipe._told_of.update(wanted)  # who names a size here knows that it compiles
    worker = pipe if deadline is None else _beside(pipe)
    engine = pipe._engine
    jobs = [warmup.Job(f"{h}x{w}", _clip(worker, h, w)) for h, w in wanted]
    with tqdm(total=len(jobs), desc="warm-up", unit="size", disable=not progress) as bar:
        with nullcontext() if engine is None else engine.warming():
            outcome = warmup.run(jobs, deadline, on_done=lambda name: bar.update(), clock=clock)
    if not outcome.complete:
        if engine is not None:
            # The thread may still be compiling for the old engine, and ends with it.
            pipe._engine = engine.uncompiled()
        LOG.warning(
            "warm-up: not done after %g s, %s left; the pipeline runs uncompiled", deadline, ", ".join(outcome.left)
        )
    return outcome


def _check_sizes(pipe: ReducioPipeline, sizes: Sequence[int | Size] | None) -> list[Size]:
    given: Any = [(pipe.sample_height, pipe.sample_width)] if sizes is None else sizes
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise ReducioError(f"sizes: must be a list of (height, width) or of whole numbers, is {sizes!r}")
    pairs = [(size, size) if isinstance(size, int) else size for size in given]
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ReducioError(f"sizes: must be a list of (height, width) or of whole numbers, has {pair!r}")
        height, width = pair
        inputs.check_size(pipe.vae.config, height, width, pipe.vae.config.num_frames)
    return list(dict.fromkeys((int(height), int(width)) for height, width in pairs))


def _clip(pipe: ReducioPipeline, height: int, width: int) -> Callable[[warmup.Check], None]:
    """One clip in as few steps as touch everything, its content frame from the first stage where there is one."""

    def make(check: warmup.Check) -> None:
        frame = np.full((height, width, 3), GREY, np.uint8)
        if pipe.text_to_image is not None:
            generator, words = torch.Generator().manual_seed(0), {"num_inference_steps": STEPS}
            with torch.no_grad(), pipe._lock, pipe._on_device("content.generate"):
                frame = pipe._draw(PROMPT, "", height, width, generator, False, words)
            check()
        pipe(
            PROMPT,
            frame,
            height=height,
            width=width,
            num_frames=pipe.vae.config.num_frames,
            num_inference_steps=STEPS,
            progress=False,
            callback_on_step_end=lambda *_: check(),
        )

    return make


def _beside(pipe: ReducioPipeline) -> ReducioPipeline:
    """The same networks and engine for another thread, with what a call writes to of its own."""
    other = copy.copy(pipe)
    other._lock, other._fits, other._forecasts = threading.RLock(), dict(pipe._fits), dict(pipe._forecasts)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    if pipe.text_to_image is not None:
        other.text_to_image = copy.copy(pipe.text_to_image)
        if hasattr(other.text_to_image, "scheduler"):
            other.text_to_image.scheduler = copy.deepcopy(pipe.text_to_image.scheduler)
    return other


def command(args: Any) -> tuple[dict[str, Any], list[str]]:
    """`reducio-fast warmup`: its result for machines, and the lines for people."""
    from .checkpoints import embedded_model
    from .compile import cache
    from .pipeline import ReducioPipeline
    from .triton_kernels.launch import arch_of

    sizes = [_parse_size(text) for text in args.sizes] or None
    target = None if args.export is None else Path(args.export)
    if target is not None and not target.parent.is_dir():
        raise ReducioError(f"--export: {target.parent} is no folder")
    if (missing := inputs.triton_missing()) is not None:
        raise ReducioError(f"warmup: there is nothing to compile without the fast path: {missing}")
    origin = cache.Origin.here(arch_of(inputs.resolve_device(args.device)))
    result: dict[str, Any] = {"cache": str(cache.root() / origin.key), "imported": None, "exported": None}
    lines = []
    try:
        if args.import_ is not None:
            try:
                result["imported"] = cache.import_archive(Path(args.import_), origin)
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
            result["exported"] = cache.export_archive(target, origin)
            lines.append(f"wrote {target}: {result['exported']} entries, {target.stat().st_size / 1e6:.1f} MB")
    except cache.CacheError as error:
        raise ReducioError(str(error)) from error
    return result, lines


def _parse_size(text: str) -> int | Size:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ReducioError(f"--sizes: must be a number or HEIGHTxWIDTH, is {text!r}")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))
