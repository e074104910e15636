"""Checkpoints of a run: folders `step-N` in torch's distributed format, and `latest`, which names the one to resume.

A folder is written under a temporary name, flushed to disk and renamed; only then is `latest` updated and the oldest
folder removed. So a killed process or a full disk leaves the last checkpoint intact at any moment. A checkpoint can be
loaded by another number of processes than wrote it. The format contains a pickle: load only checkpoints of your own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ..system.atomic_files import written_whole
from ..system.errors import ReducioError, first_line, lacks_space
from ..system.paths import missing_room
from .processes import Processes

LATEST, RUN = "latest", "run.json"
# A damaged file raises many types of error in pickle, zip or torch; `CheckpointException` is not an `Exception`.
_FAILURES = (Exception, CheckpointException)
_SPARE = 1.1  # size of a checkpoint relative to its tensors: it also holds the optimizer's counters and the index


class CheckpointFolder:
    """The checkpoints of one run, in the folder `path`; the `keep` newest are kept.

    With `in_background`, `save` returns as soon as the tensors are copied; the next call or `finish` publishes it.
    """

    def __init__(self, name: str, path: Path, processes: Processes, keep: int = 2, in_background: bool = False) -> None:
        self.name, self.path, self.processes, self.keep = name, path, processes, keep
        self.in_background = in_background
        self._pending: tuple[Future[Any], Callable[[], None]] | None = None
        if processes.first:
            path.mkdir(parents=True, exist_ok=True)
            for left in path.glob("step-*.tmp"):  # left by a run that was killed during a save
                shutil.rmtree(left, ignore_errors=True)
        processes.barrier()

    def latest(self) -> Path | None:
        """The checkpoint that `latest` names; None if there is none yet. Raises `ReducioError` if it is incomplete."""
        pointer = self.path / LATEST
        if not pointer.is_file():
            return None
        folder = self.path / pointer.read_text(encoding="utf-8", errors="replace").strip()
        if not (folder / RUN).is_file() or not (folder / ".metadata").is_file():
            raise ReducioError(f"train {self.name}: {pointer} names {folder.name}, which is not whole; {self.others()}")
        return folder

    def run_of(self, folder: Path, state: Callable[..., object]) -> dict[str, Any]:
        """The `run` that `save` wrote: objects `config`, `conditions` and, perhaps, `recorded`, and `state`, the
        keyword arguments of `state`. Raises `ReducioError` if it is damaged or of another version."""
        try:
            run = dict(json.loads((folder / RUN).read_text(encoding="utf-8")))
            for name in ("config", "conditions", "recorded"):
                dict(run.setdefault(name, {}))
            state(**run["state"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = first_line(error)
            raise ReducioError(f"train {self.name}: cannot read {folder / RUN}: {reason}; {self.others()}") from error
        return run

    def clear(self) -> None:
        """Delete all checkpoints."""
        if self.processes.first:
            (self.path / LATEST).unlink(missing_ok=True)
            for folder in self.path.glob("step-*"):
                shutil.rmtree(folder)
        self.processes.barrier()

    def save(self, step: int, tensors: dict[str, Any], run: dict[str, Any]) -> None:
        """Write `tensors`, a nested state dict, and `run`, data for JSON.

        Raises `ReducioError` if the disk has too little space.
        """
        self.finish()
        folder = self.path / f"step-{step:08d}"
        temporary = folder.with_name(folder.name + ".tmp")
        self._check_room(tensors)

        def publish() -> None:
            self.processes.barrier()
            if self.processes.first:
                _write_durably(temporary / RUN, json.dumps(run, indent=2) + "\n")
                shutil.rmtree(folder, ignore_errors=True)  # left by an earlier run that had passed this step
                temporary.rename(folder)
                _write_durably(self.path / LATEST, folder.name + "\n")
                for old in sorted(self.path.glob("step-*[0-9]"))[: -self.keep]:
                    shutil.rmtree(old)
            self.processes.barrier()

        writer = dcp.FileSystemWriter(temporary)
        group = self.processes.checkpoints
        with self._room_needed(temporary), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns that a single process saves without a group
            if self.in_background:
                future = dcp.async_save(tensors, storage_writer=writer, process_group=group)
                assert isinstance(future, Future)
                self._pending = future, publish
                return
            dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=self.processes.world_size == 1)
            publish()

    def finish(self) -> None:
        """Wait for a save in the background and publish it."""
        if self._pending is not None:
            (future, publish), self._pending = self._pending, None
            with self._room_needed():
                future.result()
                publish()

    def load(self, folder: Path, tensors: dict[str, Any]) -> None:
        """Load a checkpoint into `tensors`, a nested state dict with the saved names and shapes.

        Raises `ReducioError` if the checkpoint belongs to another model or is damaged.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                dcp.load(
                    tensors,
                    checkpoint_id=folder,
                    process_group=self.processes.checkpoints,
                    no_dist=self.processes.world_size == 1,
                )
        except _FAILURES as error:
            reason = first_line(next(_causes(error)))
            if "Missing key" in reason or "Size mismatch" in reason:
                raise ReducioError(
                    f"train {self.name}: checkpoint {folder} belongs to another model: {reason}"
                ) from error
            raise ReducioError(
                f"train {self.name}: cannot read checkpoint {folder}: {reason}; {self.others()}"
            ) from error

    def others(self) -> str:
        """Advice for the error about a damaged checkpoint: which other checkpoint to resume from."""
        whole = [
            p.name for p in sorted(self.path.glob("step-*[0-9]")) if (p / RUN).is_file() and (p / ".metadata").is_file()
        ]
        if whole:
            return f"write one of {', '.join(whole)} into {self.path / LATEST}, or start anew (--no-resume)"
        return "start anew (--no-resume)"

    def _check_room(self, tensors: dict[str, Any]) -> None:
        if reason := missing_room(self.path, round(_SPARE * _bytes(tensors))):
            raise ReducioError(f"train {self.name}: {self._no_room()}: {reason}")

    def _no_room(self) -> str:
        kept = self.latest()
        return f"no space left in {self.path} for a checkpoint (the last one is {kept.name if kept else 'none'})"

    @contextlib.contextmanager
    def _room_needed(self, temporary: Path | None = None) -> Iterator[None]:
        """Turn an error about missing disk space into a one-line `ReducioError` and delete the partial checkpoint."""
        try:
            yield
        except _FAILURES as error:
            reason = _no_room_reason(error)
            if not reason:
                raise
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            raise ReducioError(f"train {self.name}: {self._no_room()}: {reason}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes. torch's `CheckpointException` holds the errors of each process in `failures`."""
    while error is not None:
        for inner, *_ in getattr(error, "failures", {}).values():
            yield from _causes(inner)
        yield error
        error = error.__cause__ or error.__context__


def _no_room_reason(error: BaseException) -> str:
    """The operating system's message if the error is about missing disk space, else an empty string."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and lacks_space(cause):
            return str(cause.strerror)
        if "PytorchStreamWriter failed" in str(cause):  # torch's zip writer drops the errno
            return first_line(cause)
    return ""


def _bytes(tensors: Any) -> int:
    """Bytes of this process's share of a nested state dict."""
    if isinstance(tensors, dict):
        return sum(map(_bytes, tensors.values()))
    if isinstance(tensors, Tensor):
        local = tensors.to_local() if hasattr(tensors, "to_local") else tensors
        return local.numel() * local.element_size()
    return 0


def _write_durably(file: Path, text: str) -> None:
    """Write a file and flush it and its folder's entries to disk. Torch has flushed the files of tensors."""
    with written_whole(file) as path, path.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
