"""The fast path against the reference, in one process: `python -P benchmarks/fast_vs_reference.py [--tile] --out FILE`.

Two workloads: a clip of the default model, and one full-width tile of 256 pixels decoded by the published architecture
with random weights (`--tile`; latency does not depend on them, a CPU takes minutes). Three contestants: the reference
in float32 (on a GPU in bfloat16), the fast path at the precision that it takes by default on this machine, and the fast
path at the reference's. They take turns, so that a slow minute of the machine hits all; a ratio is the median of those
within a round.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from reducio_fast.measurement import instruments
from reducio_fast.system import stage_clock

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SAME = "bfloat16" if CUDA else "float32"  # the reference's precision
PROMPT = "a red circle moving right on a black background"


def turns(
    runs: dict[str, Callable[[], Any]], rounds: int, warm: bool = True, budget: float = math.inf
) -> dict[str, Any]:
    """Median seconds of each, its ratio to the first one's within a round, and its peak.

    `warm`: the first run of each is a warm-up and not counted. A contestant whose turn comes after `budget` seconds is
    skipped, and the row says so.
    """
    began, peaks = time.perf_counter(), {name: 0 for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + warm):
        for name, run in runs.items():
            if time.perf_counter() - began > budget:
                continue
            with instruments.Peak(DEVICE) as peak:
                start = stage_clock.clock(DEVICE)
                run()
                spent = stage_clock.clock(DEVICE) - start
            peaks[name] = max(peaks[name], peak.bytes)
            if turn or not warm:
                seconds[name].append(spent)
    first = next(iter(seconds.values()))
    row: dict[str, Any] = {"rounds": rounds, "warm": warm}
    for name, spent in seconds.items():
        if not spent:
            row[name] = {"skipped": f"{time.perf_counter() - began:.0f} s had passed, the budget is {budget:.0f} s"}
            continue
        ratios = [slow / quick for slow, quick in zip(first, spent, strict=False)]
        row[name] = {"s": round(statistics.median(spent), 4), "peak_gb": round(peaks[name] / 1e9, 3)}
        if spent is not first:
            row[name] |= {
                "ratio": round(statistics.median(ratios), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
            }
    return row


def default_clip(rounds: int) -> dict[str, Any]:
    from reducio_fast.checkpoints.strict_files import embedded_model
    from reducio_fast.pipelines.reducio.pipeline import ReducioPipeline

    words: dict[str, dict[str, Any]] = {
        "reference": {"backend": "reference", "dtype": SAME},
        "fast": {"backend": "fast"},
    }
    if not CUDA:  # there the default is the reference's precision
        words[f"fast {SAME}"] = {"backend": "fast", "dtype": SAME}
    pipes = {name: ReducioPipeline.from_pretrained(embedded_model(), **each) for name, each in words.items()}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in pipes}

    def run(name: str) -> Callable[[], None]:
        return lambda: stages[name].append(pipes[name](PROMPT, progress=False).timings)

    row = turns({name: run(name) for name in pipes}, rounds)
    for name, pipe in pipes.items():
        row[name]["runs"] = pipe.report["transformer"]
        row[name]["stages_s"] = {
            k: round(statistics.median(s[k] for s in stages[name][1:]), 4) for k in stages[name][0]
        }
    return row


def full_width_tile(rounds: int, budget: float) -> dict[str, Any]:
    from reducio_fast.fast.plan import Plan, default_dtype
    from reducio_fast.fast.reducio.vae import FastReducioVAE
    from reducio_fast.reference import ReducioVAE, VAEConfig

    device, same = torch.device("cuda" if CUDA else "cpu"), getattr(torch, SAME)
    torch.manual_seed(0)
    vae = ReducioVAE(VAEConfig()).to(device, same).eval().requires_grad_(False)
    dtype = default_dtype(device, same)[0]
    models: dict[str, Any] = {
        "reference": vae,
        "fast": FastReducioVAE(copy.deepcopy(vae).to(dtype), Plan(device, dtype)),
    }
    if dtype != same:
        models[f"fast {SAME}"] = FastReducioVAE(vae, Plan(device, same))
    image, latent = torch.rand(1, 3, 256, 256).to(device, same), torch.randn(1, 16, 4, 8, 8).to(device, same)

    @torch.no_grad()
    def run(model: Any, dtype: torch.dtype) -> Any:
        return model.decode(latent.to(dtype), model.encode_content(image.to(dtype)))

    dtypes = {"reference": same, "fast": dtype, f"fast {SAME}": same}
    # Without a warm-up where a run takes minutes: first calls cost seconds.
    row = turns({name: partial(run, model, dtypes[name]) for name, model in models.items()}, rounds, CUDA, budget)
    for name in models:
        row[name]["dtype"] = str(dtypes[name]).removeprefix("torch.")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tile", action="store_true", help="also the full-width tile, on a CPU one cold round")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds after which the tile skips contestants")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    row = {
        "benchmark": "fast_vs_reference",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "device": torch.cuda.get_device_name() if CUDA else _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in os.getloadavg()],  # of other processes, when this one began
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in ("torch", "triton", "diffusers")},
        "default_clip": default_clip(args.rounds),
    }
    if args.tile:
        row["full_width_tile_256"] = full_width_tile(args.rounds if CUDA else 1, args.budget)
    print(json.dumps(row, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(row, indent=2) + "\n")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
