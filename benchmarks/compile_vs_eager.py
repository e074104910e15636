"""Default clip of the fast path with torch.compile and without it, in paired runs of one process, one JSON row.

    python -P benchmarks/compile_vs_eager.py [--pairs 7] [--dtype bfloat16] [--clock cpu] [--out row.json]

Also the seconds from the start of a fresh process to its first clip, which the default leaves uncompiled, and those of
the first compiled clip. `--clock cpu` counts processor seconds of the process instead of the wall's: on a machine that
others use they say more, as long as torch runs on one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints import embedded_model

PROMPT = "a red circle moving right on a black background"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def first_clip_s() -> float:
    """A fresh process from its start to a clip in memory."""
    code = f"import reducio_fast; reducio_fast.generate({PROMPT!r}, progress=False)"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True)
    return round(time.perf_counter() - start, 2)


def paired(pairs: int, dtype: str | None, clock: str) -> dict[str, Any]:
    plain, compiled = (
        ReducioPipeline.from_pretrained(embedded_model(), dtype=dtype, backend="fast", compile=choice)
        for choice in (None, True)
    )
    for pipe in (plain, compiled):
        pipe._clock = CLOCKS[clock]
    plain(PROMPT, progress=False)
    start = time.perf_counter()
    compiled(PROMPT, progress=False)
    first = time.perf_counter() - start
    rows = [tuple(pipe(PROMPT, progress=False).timings for pipe in (plain, compiled)) for _ in range(pairs)]
    ratios = [sum(a.values()) / sum(b.values()) for a, b in rows]
    return {
        "pairs": pairs,
        "clock": clock,
        "first_compiled_clip_s": round(first, 2),
        "plain_s": round(statistics.median(sum(a.values()) for a, _ in rows), 4),
        "compiled_s": round(statistics.median(sum(b.values()) for _, b in rows), 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "ratio_of_stage": {
            name: round(statistics.median(a[name] / b[name] for a, b in rows), 3) for name in rows[0][0]
        },
        "regions": compiled._engine.describe()["regions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--dtype", help="of the clip (default: what the device takes)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    row = {
        "benchmark": "compile_vs_eager",
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "dtype": args.dtype,
        "first_clip_s": first_clip_s(),
        **paired(args.pairs, args.dtype, args.clock),
    }
    print(json.dumps(row, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
