"""Scripts in processes of their own, forked from a server that has imported torch once: an import takes 3 to 5 s."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["reducio_fast.training.loop", "torch.distributed.fsdp", "torch.distributed.checkpoint", __name__]
)


class Run:
    """`count` processes of one script, with torchrun's variables if there are several; their output goes to a file."""

    def __init__(self, script: Path, arguments: list[str], count: int) -> None:
        self.output = script.with_name(f"{script.stem}-{time.monotonic_ns()}.out")
        groups: list[dict[str, str]] = [{}]
        if count > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
            shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            groups = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        self.processes: list[BaseProcess] = []
        for group in groups:
            given = (str(script), arguments, group, str(self.output))
            self.processes.append(CONTEXT.Process(target=_run, args=given))
            self.processes[-1].start()

    def finish(self, fails: bool = False, seconds: float = 240) -> str:
        """Wait for the end and return the output. If a process fails, the others have five seconds to end."""
        deadline = time.monotonic() + seconds
        while any(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
            if any(process.exitcode for process in self.processes):
                deadline = min(deadline, time.monotonic() + 5)
            time.sleep(0.02)
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        output = self.output.read_text()
        assert any(process.exitcode for process in self.processes) is fails, output[-30_000:]
        return output


def _run(script: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
