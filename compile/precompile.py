"""Compiles kernels into Triton's disk cache with many processes, instead of one by one at the first launch.

A first clip at 1024x1024 needs about forty kernels, and each takes a second or more of one core. Every process runs the
just-in-time compiler itself for a given target GPU, so its cache entries are those that the launch looks up. No process
opens the GPU.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "i32": "int32", "u8": "uint8"}  # torch's names


@dataclass(frozen=True, slots=True)
class Call:
    """A launch without its data: kernel, and arguments by name, where "*bf16" stands for a tensor, aligned to 16."""

    module: str
    kernel: str
    arguments: tuple[tuple[str, Any], ...]


def precompile(calls: Iterable[Call], target: GPUTarget, jobs: int | None = None) -> list[str]:
    """Compile each call for `target`; returns one line for each that failed, with its error.

    jobs: number of processes, by default one per core. Each imports torch and Triton, which takes two seconds and
    0.5 GB.
    """
    calls = list(calls)
    failures = []
    workers = min(jobs or os.cpu_count() or 1, len(calls)) or 1
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        tasks = {pool.submit(_compile, call, target): call for call in calls}
        for task in as_completed(tasks):
            if error := task.exception():
                failures.append(f"{tasks[task].kernel}: {type(error).__name__}: {error}".splitlines()[0])
    return sorted(failures)


class _Driver:
    """A driver for the compiler that opens no GPU and only reports its architecture."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(call: Call, target: GPUTarget) -> None:
    import torch
    from triton.runtime.jit import MockTensor

    kernel = getattr(importlib.import_module(call.module), call.kernel)
    arguments = {
        name: MockTensor(getattr(torch, DTYPES[value[1:]])) if isinstance(value, str) and value[0] == "*" else value
        for name, value in call.arguments
    }
    triton.runtime.driver.set_active(_Driver(target))
    kernel.warmup(grid=(1,), **arguments)
