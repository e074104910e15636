"""How much longer a clip takes while a second model is loaded on the same machine.

    python benchmarks/serving/second_model.py --out benchmarks/results/serving_second_model.json

One thread makes clips of the default model on one core. Beside every second clip another process starts and loads a
model, as a second server does. Then the same with a second thread instead, which shares Python's lock with the first.

Quiet clips scatter too, on a virtual machine by 0.2 to 0.4 s. So the delay is taken between clips of the same rank:
the slowest beside a load against the slowest quiet one, the second slowest against the second slowest, and so on. The
status is 1 where one of these is above 0.2 s. The row also has both distances from the quiet median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from percentiles import system

from reducio_fast import ReducioPipeline, SVDPipeline
from reducio_fast.checkpoints.strict_files import embedded_model
from reducio_fast.pipelines import registry

LIMIT = 0.2  # seconds
PROMPT = "a red circle moving right on a black background"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--out")
    parser.add_argument("--load", metavar="MODEL", help="only load it")
    arguments = parser.parse_args()
    if arguments.load is not None:
        load(None if arguments.load == "None" else arguments.load)
        return 0
    torch.set_num_threads(1)
    pipe = ReducioPipeline.from_pretrained(embedded_model(), device="cpu")
    names, loaded = (None, "svd:random-tiny"), dict[str, list[float]](process=[], thread=[])

    def by_process(name: str | None) -> None:
        begun = time.perf_counter()
        command = [sys.executable, __file__, "--load", str(name)]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        loaded["process"].append(time.perf_counter() - begun)

    def by_thread(name: str | None) -> None:
        begun = time.perf_counter()
        load(name)
        loaded["thread"].append(time.perf_counter() - begun)

    def clip() -> float:
        begun = time.perf_counter()
        pipe(PROMPT, seed=7, progress=False)
        return time.perf_counter() - begun

    for name in names:  # imports and caches, once a process
        load(name)
    clip()
    result: dict[str, Any] = {"clips": arguments.clips}
    for way, loads in (("process", by_process), ("thread", by_thread)):
        quiet, beside = measure(clip, loads, names, arguments.clips)
        ranked = [slow - usual for slow, usual in zip(sorted(beside), sorted(quiet), strict=True)]
        middle = statistics.median(quiet)
        result[way] = {
            "quiet": {"median": round(middle, 3), "max": round(max(quiet), 3)},
            "while_loading": {"median": round(statistics.median(beside), 3), "max": round(max(beside), 3)},
            "delay": {"median": round(statistics.median(ranked), 3), "max": round(max(ranked), 3)},
            "above_quiet_median": {"quiet": round(max(quiet) - middle, 3), "loading": round(max(beside) - middle, 3)},
            "seconds_a_load": round(statistics.median(loaded[way]), 3),
        }
    result |= system()
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n")
    return 0 if max(result[way]["delay"]["max"] for way in loaded) <= LIMIT else 1


def load(name: str | None) -> None:
    pipe = registry.find(name).load(torch.float32, torch.device("cpu"), "auto")
    assert isinstance(pipe, ReducioPipeline | SVDPipeline)


def measure(
    clip: Callable[[], float], loads: Callable[[str | None], None], names: tuple[str | None, ...], count: int
) -> tuple[list[float], list[float]]:
    """Seconds of quiet clips, and of clips 0.2 s into which a model begins to load; in turns."""
    quiet, beside = list[float](), list[float]()
    for number in range(count):
        quiet.append(clip())
        loading = threading.Timer(0.2, loads, [names[number % len(names)]])
        loading.start()
        beside.append(clip())
        loading.join()
    return quiet, beside


if __name__ == "__main__":
    raise SystemExit(main())
