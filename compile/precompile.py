"""Compiles kernels into Triton's disk cache with many processes, instead of one by one at the first launch.

A first clip at 1024x1024 needs about forty kernels, and each takes a second or more of one core. Every process runs the
just-in-time compiler itself for a given target GPU, so its cache entries are those that the launch looks up. No process
opens the GPU. They are plain child processes: those of `multiprocessing` would run the caller's main script again.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

POLL = 0.1  # seconds between two checks


@dataclass(frozen=True, slots=True)
class Call:
    """A launch without its data: kernel, and arguments by name, where a dtype stands for a tensor, aligned to 16."""

    module: str
    kernel: str
    arguments: tuple[tuple[str, Any], ...]


def precompile(
    calls: Iterable[Call], target: GPUTarget, jobs: int | None = None, check: Callable[[], None] = lambda: None
) -> list[str]:
    """Compile each call for `target`; returns one line for each that failed, with its error.

    jobs: number of processes, by default one per core. Each imports torch and Triton, which takes two seconds and
    0.5 GB. check: called every `POLL` seconds; what it raises ends the processes and is raised here.
    """
    calls = list(calls)
    left, children = iter(calls), list[subprocess.Popen[bytes]]()  # `left` is shared by the threads
    workers = min(jobs or os.cpu_count() or 1, len(calls)) or 1
    with ThreadPoolExecutor(workers) as pool:
        tasks = [pool.submit(_in_child, left, target, children) for _ in range(workers)]
        try:
            while wait(tasks, POLL).not_done:
                check()
        except BaseException:
            for _ in left:  # no process gets another call
                pass
            for child in children:
                child.kill()
            raise
    failures = [line for task in tasks for line in task.result()]
    return sorted(failures + [f"{call.kernel}: not compiled, the processes ended early" for call in left])


def _in_child(left: Iterator[Call], target: GPUTarget, children: list[subprocess.Popen[bytes]]) -> list[str]:
    """Let a child process compile calls, as long as there are any left; returns one line for each that failed.

    It gets one call at a time, so it ends after the one that it compiles if this process is killed.
    """
    code = f"import sys; sys.path[:] = {list(map(str, sys.path))!r}; from {__name__} import work; work()"
    failures: list[str] = []
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(
            [sys.executable, "-c", code], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        ) as child,
    ):
        assert child.stdin is not None and child.stdout is not None
        children.append(child)
        for call in left:
            arguments = [[name, _written(value)] for name, value in call.arguments]
            question = [call.module, call.kernel, arguments, [target.backend, target.arch, target.warp_size]]
            with contextlib.suppress(BrokenPipeError):  # it has ended: there is no answer
                child.stdin.write(f"{json.dumps(question)}\n".encode())
            if not (answer := child.stdout.readline()):
                status = child.wait()
                log.seek(0)
                lines = log.read().strip().splitlines() or [f"its process ended with status {status}"]
                failures.append(f"{call.kernel}: {lines[-1]}")
                break
            failures += json.loads(answer)
    return failures


def _written(value: Any) -> Any:
    """An argument in JSON: a dtype as ["bfloat16"]."""
    return [str(value).removeprefix("torch.")] if isinstance(value, torch.dtype) else value


def _read(value: Any) -> Any:
    return getattr(torch, value[0]) if isinstance(value, list) else value


def work() -> None:
    """A child process: compile the call on each line of stdin, and answer on stdout by a list of its error, or []."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a compiler prints would damage the answers
    for line in sys.stdin:
        module, kernel, arguments, target = json.loads(line)
        call, failures = Call(module, kernel, tuple((name, _read(value)) for name, value in arguments)), []
        try:
            _compile(call, GPUTarget(*target))
        except Exception as error:
            failures.append(f"{kernel}: {type(error).__name__}: {error}".splitlines()[0])
        print(json.dumps(failures), file=out)


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
