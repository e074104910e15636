"""The fast path against the reference, in one process: `python -P benchmarks/fast_vs_reference.py [--tile] --out FILE`.

Two workloads: a clip of the default model, and one full-width tile of 256 pixels decoded by the published
architecture with random weights (`--tile`; latency does not depend on them, a CPU takes minutes). The two backends take
turns, so that a slow minute of the machine hits both; a ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PROMPT = "a red circle moving right on a black background"


class Peak:
    """Highest memory of this process while it runs, sampled every 5 ms; on a GPU the allocator's own figure."""

    def __enter__(self) -> Peak:
        self.bytes, self._stop = 0, threading.Event()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        page = resource.getpagesize()
        while not self._stop.is_set():
            self.bytes = max(self.bytes, int(Path("/proc/self/statm").read_text().split()[1]) * page)
            self._stop.wait(0.005)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, out


def paired(reference: Callable[[], Any], fast: Callable[[], Any], pairs: int) -> dict[str, Any]:
    """Medians of both, and of the ratio within each pair; the first run of each is a warm-up and not counted."""
    peaks = {}
    for name, run in (("reference", reference), ("fast", fast)):
        with Peak() as peak:
            run()
        peaks[name] = round(peak.bytes / 1e9, 3)
    rows = [(timed(reference)[0], timed(fast)[0]) for _ in range(pairs)]
    ratios = [slow / quick for slow, quick in rows]
    return {
        "pairs": pairs,
        "reference_s": round(statistics.median(r for r, _ in rows), 4),
        "fast_s": round(statistics.median(f for _, f in rows), 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "peak_gb": peaks,
    }


def default_clip(pairs: int, dtype: str) -> dict[str, Any]:
    from reducio_fast import ReducioPipeline
    from reducio_fast.checkpoints import embedded_model

    pipes = [
        ReducioPipeline.from_pretrained(embedded_model(), dtype=d, backend=b)
        for b, d in (("reference", "float32"), ("fast", dtype))
    ]
    stages: list[list[dict[str, float]]] = [[], []]

    def run(i: int) -> Callable[[], None]:
        return lambda: stages[i].append(pipes[i](PROMPT, progress=False).timings)

    row = paired(run(0), run(1), pairs)
    row["stages_s"] = {
        name: {
            b: round(statistics.median(s[name] for s in stages[i][1:]), 4) for i, b in enumerate(("reference", "fast"))
        }
        for name in stages[0][0]
    }
    return row


def full_width_tile(pairs: int, dtype: torch.dtype) -> dict[str, Any]:
    from reducio_fast.fast.plan import Plan
    from reducio_fast.fast.vae import FastReducioVAE
    from reducio_fast.reference import ReducioVAE, VAEConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    vae = ReducioVAE(VAEConfig()).to(device, dtype).eval().requires_grad_(False)
    fast = FastReducioVAE(vae, Plan(device, dtype))
    image, latent = torch.rand(1, 3, 256, 256).to(device, dtype), torch.randn(1, 16, 4, 8, 8).to(device, dtype)

    @torch.no_grad()
    def run(model: Any) -> Any:
        return model.decode(latent, model.encode_content(image))

    return paired(lambda: run(vae), lambda: run(fast), pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tile", action="store_true", help="also the full-width tile, one pair and a warm-up")
    parser.add_argument("--dtype", default="float32", help="of the fast path's clip")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    row = {
        "benchmark": "fast_vs_reference",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in ("torch", "triton", "diffusers")},
        "dtype": args.dtype,
        "default_clip": default_clip(args.pairs, args.dtype),
    }
    if args.tile:
        row["full_width_tile_256"] = full_width_tile(1, torch.float32)
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
