"""`profile`: stages are on the time line only on request, and the table lists for each stage what it launched."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from reducio_fast.measurement import profile
from reducio_fast.pipelines.call.output import ReducioOutput
from reducio_fast.system import stage_clock


def span(category: str, name: str, ts: float, dur: float, **args: object) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "tid": args.pop("tid", 1), "args": args}


# One step and one decode on a GPU. Kernels run after their launch, some of them when the next stage has begun.
GPU_TRACE = [
    span("user_annotation", "dit.step", 0, 100),
    span("user_annotation", "vae.decode", 100, 200),
    span("user_annotation", "somebody else's", 0, 300),
    span("cuda_runtime", "cudaLaunchKernel", 10, 1, correlation=1),
    span("cuda_runtime", "cudaLaunchKernel", 12, 1, correlation=2),
    span("cuda_runtime", "cudaGraphLaunch", 20, 1, correlation=3),
    span("cuda_runtime", "cudaStreamSynchronize", 90, 5),
    span("cuda_driver", "cuLaunchKernelEx", 110, 1, correlation=4),
    span("cuda_runtime", "cudaMemcpyAsync", 150, 1, correlation=5),
    span("cuda_runtime", "cudaLaunchKernel", 400, 1, correlation=6),
    span("kernel", "gemm", 15, 30, correlation=1, tid=7),
    span("kernel", "norm", 40, 15, correlation=2, tid=7),  # overlaps the one before by 5
    span("kernel", "gemm", 95, 20, correlation=3, tid=7),  # runs into vae.decode, yet belongs to dit.step
    span("kernel", "conv3d_kernel", 120, 100, correlation=4, tid=7),
    span("gpu_memcpy", "Memcpy DtoH", 220, 30, correlation=5, tid=7),
    span("kernel", "after the clip", 401, 50, correlation=6, tid=7),
    {"ph": "M", "name": "process_name", "args": {}},
]


def test_kernels_belong_to_the_stage_that_launched_them() -> None:
    stages = profile.by_stage(GPU_TRACE)
    assert list(stages) == ["dit.step", "vae.decode"]
    step, decode = stages["dit.step"], stages["vae.decode"]
    assert dict(step.ops) == {"gemm": [2, 50.0], "norm": [1, 15.0]}
    assert dict(decode.ops) == {"conv3d_kernel": [1, 100.0], "Memcpy DtoH": [1, 30.0]}
    assert (step.wall, step.busy) == (100, 40 + 20)  # 15..55 and 95..115: an overlap counts once
    assert (step.launches, step.synchronisations) == (3, 1)
    assert (decode.launches, decode.synchronisations, decode.busy) == (1, 0, 130)


def test_ops_of_a_cpu_are_listed_without_what_they_call() -> None:
    trace = [
        span("user_annotation", "vae.decode", 0, 100),
        span("cpu_op", "conv3d", 10, 50),
        span("cpu_op", "empty", 12, 8),
        span("cpu_op", "mkldnn", 20, 38),
        span("cpu_op", "silu", 60, 10),
        span("cpu_op", "conv3d", 30, 5, tid=2),  # another thread: not inside the first
        span("cpu_op", "outside", 200, 5),
    ]
    stage = profile.by_stage(trace)["vae.decode"]
    assert dict(stage.ops) == {"conv3d": [2, 9.0], "empty": [1, 8.0], "mkldnn": [1, 38.0], "silu": [1, 10.0]}
    assert stage.busy == 60


def test_stages_are_marked_only_when_marks(tmp_path: Path) -> None:
    assert isinstance(stage_clock.annotate("dit.step"), nullcontext)
    with stage_clock.profile_stages("trace"):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            with stage_clock.annotate("dit.step"):
                torch.ones(64, 64) @ torch.ones(64, 64)
            out = ReducioOutput(np.zeros((2, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8), [0], 16, {})
            out.save(tmp_path / "clip.gif")
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    stages = profile.by_stage(json.loads((tmp_path / "trace.json").read_text())["traceEvents"])
    assert list(stages) == ["dit.step", "video.write"]
    assert stages["dit.step"].ops["aten::mm"][0] == 1
    assert isinstance(stage_clock.annotate("dit.step"), nullcontext)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_markers_need_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="neither NVTX nor roctx"), stage_clock.profile_stages("markers"):
        pass


@pytest.mark.gpu
def test_markers_on_a_gpu() -> None:
    with stage_clock.profile_stages("markers"), stage_clock.annotate("dit.step"):
        torch.ones(8, device="cuda").sum().item()
