"""What a command prints: one JSON object for machines, or lines for people."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..system.errors import ReducioError
from ..system.real_numbers import finite

Printed = tuple[dict[str, Any], list[str]]  # a result for machines, the same as lines for people

NOTHING: Printed = ({}, [])  # the result of a process that leaves printing to another one


class Failed(ReducioError):
    """Raised by a command that has a result to print and still fails, for example a parity check with errors."""

    def __init__(self, message: str, printed: Printed) -> None:
        super().__init__(message)
        self.printed = printed


class _Lenient:
    """A stream whose writes never fail: after the first one that does (a full disk, a reader that has gone), all the
    rest is dropped."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError:
            redirect_to_null(self.stream)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            redirect_to_null(self.stream)


@contextmanager
def writable_streams() -> Iterator[None]:
    """Within it stdout and stderr exist and writing to stderr never fails, so that a progress bar or the line of an
    error does not change how a command ends.

    Python has no stream where the starter closed it (`>&-`). Its descriptor is taken here: a file that is opened later
    would get it, and with it what C libraries print.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a prompt shows question marks
    with contextlib.ExitStack() as streams:
        nowhere = streams.enter_context(open(os.devnull, "w"))
        if sys.stdout is None:
            streams.enter_context(contextlib.redirect_stdout(nowhere))
        lenient: Any = _Lenient(nowhere if sys.stderr is None else sys.stderr)
        streams.enter_context(contextlib.redirect_stderr(lenient))
        yield


def redirect_to_null(stream: Any) -> None:
    """Drop what the stream holds and all that is written to it later. Python writes once more when it ends, and exits
    with status 120 if that fails."""
    if isinstance(stream, io.TextIOWrapper):
        with contextlib.suppress(OSError):  # a stream in memory has no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def show(printed: Printed, as_json: bool) -> None:
    if printed is NOTHING:
        return
    result, lines = printed
    print(json.dumps(finite(result), indent=2, allow_nan=False) if as_json else "\n".join(lines))
    sys.stdout.flush()  # a full disk or a closed pipe raises here, and a program that reads the line gets it at once
