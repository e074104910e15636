"""Compares two installations of this package, such as a base commit's and this one's, in turns: one JSON row.

    python benchmarks/compare_commits.py BASE_PYTHON HEAD_PYTHON [--turns 5] [--clips 5] [--out row.json]

Each turn starts a new process of either Python, which imports the package, loads the default model, generates a first
clip and then warm clips. Ratios are base over head within a turn; above 1 the head is faster. Use an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

CODE = """
import json, subprocess, time
start = time.perf_counter()
import reducio_fast
imported = time.perf_counter()
run = lambda: reducio_fast.generate({prompt!r}, backend={backend!r}, progress=False)
run()
first = time.perf_counter()
warm = []
for _ in range({clips}):
    begun = time.perf_counter()
    run()
    warm.append(time.perf_counter() - begun)
import statistics, torch
print(json.dumps({{
    "import_s": imported - start, "first_clip_s": first - imported, "warm_clip_s": statistics.median(warm),
    "version": torch.__version__, "file": reducio_fast.__file__,
}}))
"""
PROMPT = "a red circle moving right on a black background"
FIGURES = ("import_s", "first_clip_s", "warm_clip_s")


def measure(python: str, backend: str, clips: int) -> dict[str, Any]:
    code = CODE.format(prompt=PROMPT, backend=backend, clips=clips)
    command = [os.path.abspath(shutil.which(python) or python), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    figures = json.loads(done.stdout.splitlines()[-1])
    folder = Path(figures.pop("file")).parent
    git = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    figures["commit"] = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    return figures


def spread(values: list[float]) -> dict[str, float]:
    return {
        name: round(value, 4)
        for name, value in (("median", statistics.median(values)), ("min", min(values)), ("max", max(values)))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", metavar="BASE_PYTHON", help="interpreter of the base's environment")
    parser.add_argument("head", metavar="HEAD_PYTHON", help="interpreter of the environment to compare with it")
    parser.add_argument("--turns", type=int, default=5, help="processes of each Python (default: 5)")
    parser.add_argument("--clips", type=int, default=5, help="warm clips per process (default: 5)")
    parser.add_argument("--backend", choices=("auto", "reference", "fast"), default="fast")
    parser.add_argument("--out", type=Path, help="JSON row to write")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    for python in (arguments.base, arguments.head):
        measure(python, arguments.backend, 1)  # fills the system's file cache
    turns = [
        {name: measure(getattr(arguments, name), arguments.backend, arguments.clips) for name in ("base", "head")}
        for _ in range(arguments.turns)
    ]
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "unknown")
    row: dict[str, Any] = {
        "benchmark": "compare_commits",
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu.partition(":")[2].strip() or cpu,
        "cores": os.cpu_count(),
        "load_average": round(load, 2),
        "torch": turns[0]["head"]["version"],
        "backend": arguments.backend,
        "turns": arguments.turns,
        "clips": arguments.clips,
        "commits": {name: turns[0][name]["commit"] for name in ("base", "head")},
    }
    for name in ("base", "head"):
        row[name] = {figure: spread([turn[name][figure] for turn in turns]) for figure in FIGURES}
    row["base_over_head"] = {
        figure: spread([turn["base"][figure] / turn["head"][figure] for turn in turns]) for figure in FIGURES
    }
    text = json.dumps(row, indent=2) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
