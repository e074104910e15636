"""Instruments for any model: the machine's peak rates, and the time, memory and energy of code that runs on it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..system import machine_report
from ..system.stage_clock import clock

SAMPLE_S = 0.005  # between two samples of memory or power
L2_BYTES = 256 << 20  # more than any GPU's last-level cache: 50 MB on H100, 256 MB on MI300X


def spread(values: list[float], digits: int = 5) -> dict[str, float]:
    """Median and extremes: for a few runs on a busy machine a standard deviation would say less."""
    values_by_name = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in values_by_name.items()}


# ---- memory and energy -----------------------------------------------------------------------------------------------


class Peak:
    """Peak memory in bytes while it is active: the allocator's on a GPU, elsewhere the process's, sampled.

    On a GPU a replayed graph allocates nothing, so the peak includes the pools of all graphs (`idle_pool_bytes`); what
    a graph needs is counted twice if it is captured meanwhile.
    `above` is the peak minus the memory at the start; `idle_before`: the pools that do not belong to the measured code.
    The peak includes every loaded model, so compare `above`.
    """

    def __init__(self, device: torch.device, idle_before: int = 0) -> None:
        self.device, self.bytes, self.above, self._stop = device, 0, 0, threading.Event()
        self.idle_before = idle_before

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device) + self.idle_before
        else:
            with contextlib.suppress(AttributeError, OSError):  # glibc keeps freed memory unless told to return it
                ctypes.CDLL(None).malloc_trim(0)
            self._start = self.bytes = _resident()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.bytes = max(self.bytes, _resident())

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) + idle_pool_bytes(self.device)
        else:
            self._stop.set()
            self._thread.join()
            self.bytes = max(self.bytes, _resident())
        self.above = self.bytes - self._start


def idle_pool_bytes(device: torch.device) -> int:
    """Bytes that graphs' private pools have reserved on a GPU and no tensor holds: what replays use for intermediates.
    0 on a CPU."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == index and tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
    )


def live_peak(call: Callable[[], Any]) -> int:
    """Peak bytes of the CPU tensors that `call` allocates, from every allocation and release that torch's profiler
    records. Two runs give the same number. A process's resident memory does not: the allocator keeps a tenth more or
    less of what was freed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no /proc: the peak since the process started, in kilobytes except on macOS
        import resource
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Energy:
    """Joules that a GPU uses while this is active: its own counter (Volta and later), or the integral of sampled power.

    `joules` is None if neither can be read. `nvml` is the module pynvml, initialised; `handle` its device.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle
        self.joules: float | None = None
        self.source: str | None = None

    def __enter__(self) -> Energy:
        self._before, self._thread = self._counter(), None
        if self._before is None:
            self._samples: list[tuple[float, float]] = []
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            after = self._counter()
            if after is not None and self._before is not None:
                self.joules, self.source = (after - self._before) / 1e3, "counter"
            return
        self._stop.set()
        self._thread.join()
        if len(self._samples) > 1:
            pairs = zip(self._samples, self._samples[1:], strict=False)
            self.joules = sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairs)
            self.source = "sampled power"

    def _counter(self) -> int | None:
        try:
            return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)  # millijoules
        except Exception:  # NVMLError has a subclass for each reason why a card gives no value
            return None

    def _watch(self) -> None:
        last = False
        while True:
            try:
                self._samples.append((time.perf_counter(), self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1e3))
            except Exception:  # as above; the samples so far are used
                return
            if last:
                return
            last = self._stop.wait(SAMPLE_S)


@contextmanager
def nvml(device: torch.device) -> Iterator[tuple[Any, Any] | None]:
    """(pynvml, handle of `device`); None without an NVIDIA GPU, nvidia-ml-py or a working driver."""
    module: Any = None
    handle: Any = None
    if device.type == "cuda" and not torch.version.hip:
        try:
            module = importlib.import_module("pynvml")
            module.nvmlInit()
            # By UUID: CUDA_VISIBLE_DEVICES renumbers, NVML does not.
            handle = module.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        except Exception:  # the measurement goes on without it: the row has null
            handle = None
    try:
        yield None if handle is None else (module, handle)
    finally:
        if handle is not None:
            module.nvmlShutdown()


# ---- peak rates of the machine ---------------------------------------------------------------------------------------


def roof(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Measure a matrix product (TFLOP/s), the clocks right after it, and a copy (GB/s, read plus written).

    The data is random: a product of zeros runs a tenth faster, because it draws less power.
    """
    n, copied = (8192, 1 << 30) if device.type == "cuda" else (1536, 1 << 27)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    matmul = 2 * n**3 / min(timed(lambda: a @ b, device)) / 1e12
    clocks = _clocks(device)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * copied / min(timed(lambda: target.copy_(source), device)) / 1e9
    name = str(dtype).removeprefix("torch.")
    return {"matmul_tflops": round(matmul, 3), "dtype": name, "copy_gbs": round(copy, 1), "clocks_mhz": clocks}


def timed(run: Callable[[], Any], device: torch.device, repeats: int = 9, warm: int = 1) -> list[float]:
    """Seconds of each of `repeats` runs, launches included, after `warm` runs that do not count."""
    for _ in range(warm):
        run()
    seconds = []
    for _ in range(repeats):
        start = clock(device)
        run()
        seconds.append(clock(device) - start)
    return seconds


def _clocks(device: torch.device) -> dict[str, int] | None:
    with nvml(device) as gpu:
        if gpu is None:
            return None
        module, handle = gpu
        kinds = {"sm": module.NVML_CLOCK_SM, "memory": module.NVML_CLOCK_MEM}
        now = {name: module.nvmlDeviceGetClockInfo(handle, clock_domain) for name, clock_domain in kinds.items()}
        return now | {"sm_max": module.nvmlDeviceGetMaxClockInfo(handle, module.NVML_CLOCK_SM)}


def kernel_seconds(run: Callable[[], Any], device: torch.device, repeats: int = 11) -> float:
    """Median seconds of what `run` launches on a GPU, replayed as a graph, so that no Python is timed, on a cold cache.

    Timing by eager launches ranks short kernels wrongly (pytorch #179246), and so does data left in the cache.
    """
    with torch.cuda.device(device):  # graphs and events are made on the current one
        run()  # compiles
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        cache = torch.empty(L2_BYTES, dtype=torch.int8, device=device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            cache.zero_()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


# ---- which machine ---------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what a row was measured: device, driver, versions, load, commit, date."""
    report = machine_report.describe()
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        description = report["devices"][index]
    else:
        description = {"name": report["cpu"]["cpu_model"], "arch": "cpu"} | report["cpu"]
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": description,
        "python": report["python"],
        "packages": {name: version for name, version in report["packages"].items() if version},
        "torch_build": report["torch_build"],
        "load_average": load,  # above 1 before the run: other processes were at work
    }


def commit() -> str | None:
    """The commit of the checkout that this package runs from, with "+" if files are changed; None outside one."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")


def broken_libraries(torch_version: str, cudnn: int | None) -> str | None:
    """Why a pair of libraries must not be measured, in one line; None for a sound pair.

    For 3-D convolutions in half precision, torch 2.9.0 does not use cuDNN 9.8 to 9.14 (some of them are wrong), but a
    path that is 4 to 20 times slower (pytorch #163539, #166122, #174051): every speed-up over it would be too high.
    """
    if torch_version.split("+")[0] == "2.9.0" and cudnn is not None and 90800 <= cudnn < 91500:
        return (
            f"torch {torch_version} with cuDNN {cudnn // 10000}.{cudnn // 100 % 100}: 3-D convolutions bypass cuDNN "
            "there (pytorch #163539), so the reference would be several times too slow; use torch 2.10 or later"
        )
    return None
