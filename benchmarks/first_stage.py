"""Stage one and presets, in turns within one process: `python benchmarks/first_stage.py [--out row.json]`.

1. `content.generate` of a prompt: by this package's twins and by diffusers' own call, and with `--compile` by diffusers
   with its transformer under torch.compile and by the twins with `compile=True`; all in float32, then this package in
   the dtype it takes by default against diffusers in bfloat16.
2. Whole clips at each preset of `quality`, by the median of what each turn took against "exact" in the same turn.

A row says how busy the machine was before: figures of a crowded machine are none.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints.strict_files import embedded_model
from reducio_fast.measurement import instruments
from reducio_fast.measurement.bench import write
from reducio_fast.pipelines.call.quality import PRESETS
from reducio_fast.pipelines.execution.drawing import draw_image
from reducio_fast.system import torch_state

PROMPT = "a red circle moving right on a black background"


def in_turns(ways: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of each way; the first round, which packs and compiles, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def rows(what: str, first: str, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Medians, and the median over turns of how many times faster each way is than `first`."""
    found = []
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[first], own, strict=True))
        row = {"what": what, "way": name, "seconds": statistics.median(own), f"times_faster_than_{first}": ratio}
        found.append(row)
        print(f"{what:<32} {name:<22} {row['seconds']:8.3f} s, {ratio:5.2f}x {first}", flush=True)
    return found


def drawing(precision: str, compiles: bool, turns: int) -> list[dict[str, Any]]:
    dtypes = {"float32": ("float32", "float32"), "default": (None, "bfloat16")}[precision]
    folder, given = embedded_model(), {"device": "cpu", "dtype": dtypes[0], "backend": "fast"}
    reference = ReducioPipeline.from_pretrained(folder, **given | {"dtype": dtypes[1], "backend": "reference"})

    def diffusers() -> Any:
        with torch_state.inference():
            return draw_image(reference.text_to_image, PROMPT, "", 128, 128, torch.Generator().manual_seed(0), False)

    def twins(**kwargs: Any) -> Callable[[], Any]:
        fast = ReducioPipeline.from_pretrained(folder, **given, **kwargs)

        def draw() -> Any:
            with torch_state.inference():
                return fast.content.draw(PROMPT, "", 128, 128, torch.Generator().manual_seed(0), False)

        return draw

    ways: dict[str, Callable[[], Any]] = {"diffusers": diffusers, "twins": twins()}
    if compiles:
        eager, compiled = reference.text_to_image.transformer, torch.compile(reference.text_to_image.transformer)

        def under_compile() -> Any:
            reference.text_to_image.transformer = compiled
            try:
                return diffusers()
            finally:
                reference.text_to_image.transformer = eager

        ways |= {"diffusers, compiled": under_compile, "twins, compiled": twins(compile=True)}
    what, seconds = f"content.generate, {precision}", in_turns(ways, turns)
    found = rows(what, "diffusers", seconds)
    if compiles:
        both = ("diffusers, compiled", "twins, compiled")
        found += rows(what, both[0], {name: seconds[name] for name in both})
    return found


def clips(turns: int) -> list[dict[str, Any]]:
    pipe = ReducioPipeline.from_pretrained(embedded_model(), device="cpu", backend="fast")

    def clip(quality: str) -> Callable[[], Any]:
        return lambda: pipe(PROMPT, quality=quality, progress=False)

    return rows("clip, default dtype", "exact", in_turns({name: clip(name) for name in PRESETS}, turns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="both under torch.compile too")
    parser.add_argument("--out", help="a JSON row")
    arguments = parser.parse_args()
    row: dict[str, Any] = {
        "benchmark": "first_stage",
        "machine": instruments.machine(torch.device("cpu")),
        "load_before": list(os.getloadavg()),
        "turns": arguments.turns,
        "rows": [],
    }
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for precision in ("float32", "default"):
        row["rows"] += drawing(precision, arguments.compile, arguments.turns)
    row["rows"] += clips(arguments.turns)
    if arguments.out:
        write(row, arguments.out)


if __name__ == "__main__":
    main()
