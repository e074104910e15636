"""The `reducio-fast` command: reads the command line, runs one sub-command, sets the exit status.

Results go to stdout (one JSON object with --json), progress and errors to stderr. An error that the user can fix is one
line with exit status 2; Ctrl-C gives status 130. Sub-commands import torch and the models when they run, so that --help
and the error for a mistyped option appear at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from ..system import cache_folder, cores, deadline
from ..system.errors import ReducioError, is_out_of_memory, lacks_space
from ..system.paths import one_line
from . import (
    batch,
    bench,
    calibrate,
    compile_check,
    convert,
    curate,
    decode,
    demo,
    encode,
    env,
    evaluate,
    extract,
    generate,
    parity,
    profile,
    reconstruct,
    serve,
    train,
    transfer,
    warmup,
)
from .printing import Failed, redirect_to_null, show, writable_streams

# Each module has `add_arguments(parser)` and `run(arguments)`, which returns what to print; its docstring is the help.
COMMANDS = {
    "generate": generate,
    "transfer": transfer,
    "reconstruct": reconstruct,
    "encode": encode,
    "decode": decode,
    "warmup": warmup,
    "env": env,
    "curate": curate,
    "extract": extract,
    "train": train,
    "evaluate": evaluate,
    "demo": demo,
    "serve": serve,
    "batch": batch,
    "compile-check": compile_check,
    "convert": convert,
    "calibrate": calibrate,
    "parity": parity,
    "bench": bench,
    "profile": profile,
}


class _Parser(argparse.ArgumentParser):
    """Prints each error as one line; argparse would print its usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Raises OSError where the text cannot be written; argparse's own method ignores that."""
        stream = sys.stderr if file is None else file
        stream.write(message)
        stream.flush()


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; its result names the module in `command_module`."""
    parser = _Parser(prog="reducio-fast", description="Text and an image in, a short clip out.")
    parser.add_argument("--version", action="version", version=f"reducio-fast {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        help = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(command_module=module, afterwards=None)
        command.add_argument("--json", action="store_true", help="print one JSON object for machines")
        module.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` by default); returns the exit status.

    If a thread still runs after its deadline, the process ends here with that status: it aborts where Python ends while
    another thread is inside torch.
    """
    before = set(threading.enumerate())
    with writable_streams():
        status = _main(argv)
        if any(thread.name == deadline.THREAD for thread in set(threading.enumerate()) - before):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return status


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parsed(argv)
    try:
        with _terminated_as_an_exception(), cache_folder.for_compilers(), cores.sleeping_threads():
            return _run(arguments)
    except BrokenPipeError:
        # The reader of our output is gone, as in `reducio-fast env | head -1`. Python flushes once more when it ends.
        redirect_to_null(sys.stdout)
        return 128 + signal.SIGPIPE
    except _Terminated:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print(f"reducio-fast {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises SystemExit after a help or an error, as argparse does, and where the help cannot be written."""
    try:
        return parser().parse_args(argv)
    except OSError as error:
        redirect_to_null(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise SystemExit(128 + signal.SIGPIPE) from None
        print(f"reducio-fast: error: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None


def _run(arguments: argparse.Namespace) -> int:
    try:
        try:
            show(arguments.command_module.run(arguments), arguments.json)
        except Failed as error:
            show(error.printed, arguments.json)
            raise
        if arguments.afterwards is not None:  # a command that runs on after it has printed, such as the demo
            arguments.afterwards()
    except ReducioError as error:
        return _fail(arguments.command, str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        if (lacks_space(error) or error.errno == errno.EIO) and error.filename is None:
            redirect_to_null(sys.stdout)  # what cannot be printed now cannot be printed at the end
        where = f"{error.filename}: " if error.filename is not None else ""
        return _fail(arguments.command, f"{where}{error.strerror}")
    except Exception as error:
        if not is_out_of_memory(error):
            raise  # a defect of this package: the traceback is wanted
        return _fail(arguments.command, f"out of memory: {str(error) or 'choose a smaller size'}")
    return 0


class _Terminated(SystemExit):
    """Raised when SIGTERM arrives. Libraries that run code of ours, such as uvicorn, let a SystemExit pass."""


@contextmanager
def _terminated_as_an_exception() -> Iterator[None]:
    """Turn SIGTERM into an exception. By default it ends Python at once and leaves half-written files and a running
    ffmpeg."""

    def terminate(number: int, frame: Any) -> NoReturn:
        raise _Terminated(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(command: str, message: str) -> int:
    print(f"reducio-fast {command}: error: {one_line(message)}", file=sys.stderr)
    return 2


def _version() -> str:
    try:
        return version("reducio-fast")
    except PackageNotFoundError:
        return "(not installed)"
