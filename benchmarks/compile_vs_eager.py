"""Default clip of the fast path with compiled blocks and without, in paired runs of one process, one JSON row.

    python -P benchmarks/compile_vs_eager.py [--pairs 15] [--dtype bfloat16] [--clock cpu] [--out row.json]

Also the seconds from the start of a fresh process to its end, with a clip in memory: uncompiled, compiled with empty
caches, compiled with what that left. `--clock cpu` counts processor seconds of the process instead of the wall's: on a
machine that others use they say more, as long as torch runs on one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints.strict_files import embedded_model
from reducio_fast.measurement import instruments
from reducio_fast.measurement.bench import CACHES

PROMPT = "a red circle moving right on a black background"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def process_s(dtype: str | None, compile: bool | None, caches: str) -> float:
    """A fresh process from its start to its end, which has a clip in memory."""
    words = f"{PROMPT!r}, dtype={dtype!r}, compile={compile}, progress=False"
    environment = os.environ | {variable: os.path.join(caches, variable) for variable in CACHES}
    code = f"import reducio_fast; reducio_fast.generate({words})"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, env=environment)
    return round(time.perf_counter() - start, 2)


def processes(dtype: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as caches:
        process_s(dtype, None, caches)  # files are in memory from here on
        return {
            "uncompiled": [process_s(dtype, None, caches) for _ in range(3)],
            "compiled, caches empty": process_s(dtype, True, caches),
            "compiled, caches warm": [process_s(dtype, True, caches) for _ in range(3)],
        }


def paired(pairs: int, dtype: str | None, clock: str) -> dict[str, Any]:
    pipes = [
        ReducioPipeline.from_pretrained(embedded_model(), dtype=dtype, backend="fast", compile=choice)
        for choice in (None, True)
    ]
    for pipe in pipes:
        pipe._clock = CLOCKS[clock]
        for _ in range(2):
            pipe(PROMPT, progress=False)
    rows = [[pipe(PROMPT, progress=False).timings for pipe in pipes] for _ in range(pairs)]
    totals = [[sum(timings.values()) for timings in row] for row in rows]
    return {
        "pairs": pairs,
        "clock": clock,
        "plain_s": instruments.spread([plain for plain, _ in totals]),
        "compiled_s": instruments.spread([compiled for _, compiled in totals]),
        "ratio": instruments.spread([plain / compiled for plain, compiled in totals], 3),
        "ratio_of_stage": {name: instruments.spread([a[name] / b[name] for a, b in rows], 3) for name in rows[0][0]},
        "regions": pipes[1].describe()["regions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--dtype", help="of the clip (default: what the device takes)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    row = {
        "benchmark": "compile_vs_eager",
        "machine": instruments.machine(torch.device("cpu")),
        "dtype": args.dtype,
        "process_s": processes(args.dtype),
        **paired(args.pairs, args.dtype, args.clock),
    }
    print(json.dumps(row, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
