"""Compiles kernels into Triton's disk cache with many processes, instead of one by one at the first launch.

A first clip at 1024x1024 needs about forty kernels, and each takes a second or more of one core. Every process runs the
just-in-time compiler itself for a given target GPU, so its cache entries are those that the launch looks up. No process
opens the GPU. They are plain child processes: those of `multiprocessing` would run the caller's main script again.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True, slots=True)
class Call:
    """A launch without its data: kernel, and arguments by name, where a dtype stands for a tensor, aligned to 16."""

    module: str
    kernel: str
    arguments: tuple[tuple[str, Any], ...]


def precompile(calls: Iterable[Call], target: GPUTarget, jobs: int | None = None) -> list[str]:
    """Compile each call for `target`; returns one line for each that failed, with its error.

    jobs: number of processes, by default one per core. Each imports torch and Triton, which takes two seconds and
    0.5 GB.
    """
    calls = list(calls)
    workers = min(jobs or os.cpu_count() or 1, len(calls)) or 1
    with ThreadPoolExecutor(workers) as pool:
        answers = pool.map(functools.partial(_in_child, target=target), [calls[i::workers] for i in range(workers)])
        return sorted(itertools.chain.from_iterable(answers))


def _in_child(share: list[Call], target: GPUTarget) -> list[str]:
    """Let a child process compile the calls; returns one line for each that failed, or one line if it ended early."""
    command = [sys.executable, "-c", f"from {__name__} import work; work()"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    calls = [[call.module, call.kernel, [[name, _written(value)] for name, value in call.arguments]] for call in share]
    question = json.dumps([calls, [target.backend, target.arch, target.warp_size]])
    done = subprocess.run(command, input=question, capture_output=True, env=env, text=True, errors="replace")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return [f"{share[0].kernel} and {len(share) - 1} others: {lines[-1]}"]
    failures: list[str] = json.loads(done.stdout)
    return failures


def _written(value: Any) -> Any:
    """An argument in JSON: a dtype as ["bfloat16"]."""
    return [str(value).removeprefix("torch.")] if isinstance(value, torch.dtype) else value


def _read(value: Any) -> Any:
    return getattr(torch, value[0]) if isinstance(value, list) else value


def work() -> None:
    """A child process: compile the calls on stdin, and write one line for each that failed to stdout."""
    calls, goal = json.load(sys.stdin)
    target, failures = GPUTarget(*goal), []
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints would damage the answer
    for module, kernel, arguments in calls:
        call = Call(module, kernel, tuple((name, _read(value)) for name, value in arguments))
        try:
            _compile(call, target)
        except Exception as error:
            failures.append(f"{call.kernel}: {type(error).__name__}: {error}".splitlines()[0])
    with out:
        json.dump(failures, out)


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
    from triton.runtime.jit import MockTensor

    kernel = getattr(importlib.import_module(call.module), call.kernel)
    arguments = {name: MockTensor(value) if isinstance(value, torch.dtype) else value for name, value in call.arguments}
    triton.runtime.driver.set_active(_Driver(target))
    kernel.warmup(grid=(1,), **arguments)
