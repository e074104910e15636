"""`reducio-fast profile`: one clip under torch.profiler: a Chrome trace with our stage names, and a table by stage.

The trace opens in Perfetto (ui.perfetto.dev). `--ranges` runs the clip without torch.profiler, under NVTX or roctx
ranges, for nsys, ncu and rocprofv3: docs/profiling.md has the commands and what to look for.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..system import stage_clock
from ..system.atomic_files import written_whole
from ..system.devices import resolve_device
from ..system.errors import ReducioError
from ..system.paths import check_output_file
from .bench import CONTENDERS
from .contenders import workload
from .instruments import machine
from .quantised_decoder import check_contender

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
SYNCHRONISE = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")


@dataclass(slots=True)
class Stage:
    """Times of one stage in microseconds, and counts. `ops`: {name: [calls, time]}, of kernels if there are any."""

    wall: float = 0.0
    busy: float = 0.0  # the device, overlapping kernels counted once; on a CPU the ops themselves
    launches: int = 0
    synchronisations: int = 0
    ops: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0.0]))


def profile(
    out: str | os.PathLike[str],
    name: str = "default",
    model: str | os.PathLike[str] | None = None,
    contender: str = "fast",
    dtype: str | None = None,
    device: str | torch.device | None = None,
    warm: int = 2,
    shapes: bool = False,
) -> dict[str, Any]:
    """Trace one warm clip of a workload to `out` (.json.gz) and return a JSON-ready summary.

    `warm` clips run first, so that compilation and graph capture are not in the trace. `shapes` records input shapes,
    which makes the host slower. Raises ReducioError for an `out` that is not a .json.gz in a writable folder.
    """
    path = Path(out)
    if not path.name.endswith(".json.gz"):
        raise ReducioError(f"out: {path} must end in .json.gz")
    check_output_file(path, "out")
    run, where, title = _ready(name, model, contender, dtype, device, warm)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if where.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with (
        stage_clock.profile_stages("trace"),
        torch.profiler.profile(activities=activities, record_shapes=shapes) as profiler,
    ):
        frames, _ = run()
        if name == "default":
            _write_clip(frames)
    with written_whole(path) as part:
        profiler.export_chrome_trace(str(part))
        with gzip.open(part, "rt", encoding="utf-8") as file:
            trace = json.load(file)
    return {
        "benchmark": "profile",
        "what": title,
        "trace": str(path),
        "machine": machine(where),
        "stages": {stage: _summary(figures) for stage, figures in by_stage(trace["traceEvents"]).items()},
    }


def marked(name: str, model: Any, contender: str, dtype: str | None, device: Any, warm: int = 2) -> dict[str, Any]:
    """One warm clip under NVTX or roctx ranges, between the profiler API's start and stop, for an external profiler.

    Raises ReducioError if there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ReducioError("ranges: NVTX and roctx mark the time line of a GPU, and there is none here")
    run, where, title = _ready(name, model, contender, dtype, device, warm)
    with stage_clock.profile_stages("markers"), torch.cuda.profiler.profile():
        run()
    return {"benchmark": "profile", "what": title, "trace": None, "machine": machine(where), "stages": {}}


def _write_clip(frames: np.ndarray) -> None:
    """Run the last stage, which the contenders omit."""
    from ..media.video_files import write_video

    with tempfile.TemporaryDirectory() as folder, stage_clock.annotate("video.write"):
        write_video(frames, Path(folder) / "clip.mp4", 16)


def _ready(
    name: str, model: Any, contender: str, dtype: str | None, device: Any, warm: int
) -> tuple[Any, torch.device, str]:
    if contender not in CONTENDERS:
        raise ReducioError(f"contender: {contender!r} is unknown; known: {', '.join(CONTENDERS)}")
    device = resolve_device(device)
    check_contender(contender, name, model, device)
    measured = workload(name, model, dtype, device)
    chosen = measured.contender(contender)
    for _ in range(warm):
        chosen.run()
    return chosen.run, device, f"{measured.what}, {contender}"


def by_stage(events: Iterable[dict[str, Any]]) -> dict[str, Stage]:
    """The times and counts of each stage of a Chrome trace.

    A kernel belongs to the stage that launched it, found through the correlation number it shares with its launch.
    If the trace has no kernels, the CPU ops are listed, each without the time of the ops inside it.
    """
    spans = [e for e in events if e.get("ph") == "X"]
    marks = [
        (e["ts"], e["ts"] + e["dur"], e["name"])
        for e in spans
        if e.get("cat") == "user_annotation" and e["name"] in stage_clock.STAGES
    ]
    stages = {name: Stage() for name in stage_clock.STAGES if any(mark[2] == name for mark in marks)}
    for begin, end, name in marks:
        stages[name].wall += end - begin

    def stage_at(ts: float) -> str | None:
        return next((name for begin, end, name in marks if begin <= ts < end), None)

    launched: dict[int, str | None] = {}
    for e in spans:
        if e.get("cat") in LAUNCHES:
            name = stage_at(e["ts"])
            if "correlation" in e.get("args", {}):
                launched[e["args"]["correlation"]] = name
            if name is not None:
                stages[name].launches += "Launch" in e["name"]
                stages[name].synchronisations += any(word in e["name"] for word in SYNCHRONISE)
    kernels = [e for e in spans if e.get("cat") in ON_DEVICE]
    if kernels:
        owned = [(e, launched.get(e.get("args", {}).get("correlation"))) for e in kernels]
        timed = [(e["name"], e["ts"], e["dur"], e["dur"], stage) for e, stage in owned]
    else:
        timed = [(*op, stage_at(op[1])) for op in _own_time(e for e in spans if e.get("cat") == "cpu_op")]
    intervals: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, ts, duration, own_time, stage in timed:
        if stage is None:
            continue
        entry = stages[stage].ops[name]
        entry[0] += 1
        entry[1] += own_time
        intervals[stage].append((ts, ts + duration))
    for stage, stage_intervals in intervals.items():
        stages[stage].busy = _covered(stage_intervals)
    return stages


def _own_time(ops: Iterable[dict[str, Any]]) -> Iterable[tuple[str, float, float, float]]:
    """(name, start, duration, duration without the ops inside) of nested ops, thread by thread."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for op in ops:
        threads[op.get("tid")].append(op)
    for members in threads.values():
        members.sort(key=lambda e: (e["ts"], -e["dur"]))
        open_ops: list[list[Any]] = []  # [op, its own time so far]
        for op in members:
            while open_ops and open_ops[-1][0]["ts"] + open_ops[-1][0]["dur"] <= op["ts"]:
                done, own_time = open_ops.pop()
                yield done["name"], done["ts"], done["dur"], own_time
            if open_ops:
                open_ops[-1][1] -= op["dur"]
            open_ops.append([op, op["dur"]])
        for done, own_time in reversed(open_ops):
            yield done["name"], done["ts"], done["dur"], own_time


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of the intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _summary(stage: Stage) -> dict[str, Any]:
    ops = sorted(stage.ops.items(), key=lambda item: -item[1][1])
    return {
        "wall_ms": round(stage.wall / 1e3, 3),
        "busy_share": round(stage.busy / stage.wall, 4) if stage.wall else None,
        "launches": stage.launches,
        "synchronisations": stage.synchronisations,
        "ops": [{"name": name, "calls": int(calls), "ms": round(us / 1e3, 3)} for name, (calls, us) in ops],
    }
