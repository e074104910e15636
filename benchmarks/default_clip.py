"""Time and memory of the embedded default model: `python benchmarks/default_clip.py [--runs 3] [--warm 5]`.

Each run is a fresh process that imports the package, makes one clip (cold) and then more of them (warm). The row is
printed and, with `--out`, written as JSON with device, versions and commit. Run it on an otherwise idle machine.
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
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

PROMPT = "a red circle moving right on a black background"

# Runs in the fresh process. Cold counts from before the first import of ours to the frames in hand.
CHILD = """
import json, resource, sys, time
start = time.perf_counter()
import reducio_fast
out = reducio_fast.generate({prompt!r}, seed=0, progress=False)
cold = time.perf_counter() - start
warm, stages = [], []
for seed in range(1, {warm} + 1):
    start = time.perf_counter()
    out = reducio_fast.generate({prompt!r}, seed=seed, progress=False)
    warm.append(time.perf_counter() - start)
    stages.append(out.timings)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
shape = list(out.frames.shape)
print(json.dumps({{"cold_s": cold, "warm_s": warm, "stages": stages, "peak_bytes": peak, "shape": shape}}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="fresh processes")
    parser.add_argument("--warm", type=int, default=5, help="warm clips in each")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    runs = []
    for _ in range(args.runs):
        # -P keeps the current folder off the path: from the repository root its folders would shadow other packages.
        child = [sys.executable, "-P", "-c", CHILD.format(prompt=PROMPT, warm=args.warm)]
        began = time.perf_counter()
        done = subprocess.run(child, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"the measured process failed:\n{done.stderr}")
        runs.append(json.loads(done.stdout.splitlines()[-1]) | {"process_s": time.perf_counter() - began})

    warm = [seconds for run in runs for seconds in run["warm_s"]]
    stages = [stage for run in runs for stage in run["stages"]]
    row = {
        "benchmark": "default_clip",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "device": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "diffusers", "transformers", "open_clip_torch")},
        "shape": runs[0]["shape"],
        "cold_s": _spread([run["cold_s"] for run in runs]),
        "warm_s": _spread(warm),
        "warm_stages_s": {name: round(statistics.median(s[name] for s in stages), 4) for name in stages[0]},
        "peak_gb": round(max(run["peak_bytes"] for run in runs) / 1e9, 3),
    }
    print(json.dumps(row, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(row, indent=2) + "\n")


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
