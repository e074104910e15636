"""A warm clip on a quiet and on a busy machine: `python benchmarks/under_load.py [--out row.json]`.

Each figure is from a fresh process, once with this package's way of waiting (threads that soon sleep) and once with
OpenMP's own (threads that spin), both quiet and beside as many busy processes as there are cores. Processor seconds
say how much of the machine a clip takes from others; they hold where other work disturbs the wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

import torch

from reducio_fast.measurement import instruments
from reducio_fast.measurement.bench import write
from reducio_fast.system import cores

CODE = """
import json, time
import reducio_fast
prompt, found = "a red circle moving right on a black background", []
for turn in range({clips} + 1):
    wall, own = time.perf_counter(), time.process_time()
    reducio_fast.generate(prompt, seed=turn, progress=False)
    if turn:
        found.append((time.perf_counter() - wall, time.process_time() - own))
print(json.dumps(found))
"""
BUSY = "while True: pass"
SPINNING = {"OMP_WAIT_POLICY": "active"}


def clip(environment: dict[str, str], clips: int) -> dict[str, float]:
    """Medians of the warm clips of a fresh process."""
    clean = {name: value for name, value in os.environ.items() if name not in (*cores.WAITING, *cores.COUNTS)}
    command = [sys.executable, "-c", CODE.format(clips=clips)]
    done = subprocess.run(command, cwd="/", env=clean | environment, check=True, capture_output=True, text=True)
    wall_times, processor_times = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
    return {"seconds": statistics.median(wall_times), "processor_seconds": statistics.median(processor_times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=5, help="warm ones a process")
    parser.add_argument("--busy", type=int, default=cores.usable(), help="processes beside it (default: one a core)")
    parser.add_argument("--out", help="a JSON row")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    load_before = list(os.getloadavg())
    print(f"load before: {load_before[0]:.1f} on {cores.usable()} cores")
    for busy in (0, arguments.busy):
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
        try:
            for waiting, environment in (("sleeping", {}), ("spinning", SPINNING)):
                row = {"busy_processes": busy, "waiting": waiting} | clip(environment, arguments.clips)
                found.append(row)
                figures = f"{row['seconds']:.2f} s, {row['processor_seconds']:.2f} processor seconds a clip"
                print(f"{busy} busy beside it, threads {waiting}: {figures}", flush=True)
        finally:
            for other in others:
                other.kill()
                other.wait()
    if arguments.out:
        machine = instruments.machine(torch.device("cpu"))
        head = {"benchmark": "under_load", "machine": machine, "load_before": load_before, "clips": arguments.clips}
        write(head | {"rows": found}, arguments.out)


if __name__ == "__main__":
    main()
