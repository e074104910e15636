"""The `reducio-fast` command: reads the command line, runs one sub-command, sets the exit status.

Results go to stdout (one JSON object with --json), progress and errors to stderr. A mistake the user can mend is one
line and exit status 2; Ctrl-C is 130. Sub-commands import torch and the models when they run, so that --help and a
mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from ..system.errors import ReducioError, is_out_of_memory
from . import (
    bench,
    compile_check,
    convert,
    decode,
    demo,
    env,
    evaluate,
    generate,
    parity,
    profile,
    reconstruct,
    train,
    warmup,
)
from .printing import Failed, show

# Each module has `add_arguments(parser)` and `run(arguments)`, which returns what to print; its docstring is the help.
COMMANDS = {
    "generate": generate,
    "reconstruct": reconstruct,
    "decode": decode,
    "warmup": warmup,
    "env": env,
    "train": train,
    "evaluate": evaluate,
    "demo": demo,
    "compile-check": compile_check,
    "convert": convert,
    "parity": parity,
    "bench": bench,
    "profile": profile,
}


class _Parser(argparse.ArgumentParser):
    """argparse prints its usage above each error; one line is the rule here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


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
    """Run one command line (`sys.argv` by default); returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        show(arguments.command_module.run(arguments), arguments.json)
        if arguments.afterwards is not None:  # a command that goes on after it has printed, such as the demo
            sys.stdout.flush()  # a program that started this one may wait for the line
            arguments.afterwards()
    except Failed as error:
        show(error.printed, arguments.json)
        return _fail(arguments.command, str(error))
    except ReducioError as error:
        return _fail(arguments.command, str(error))
    except KeyboardInterrupt:
        print(f"reducio-fast {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_out_of_memory(error):
            raise  # a defect of this package: the traceback is wanted
        return _fail(arguments.command, f"out of memory: {str(error) or 'choose a smaller size'}")
    return 0


def _fail(command: str, message: str) -> int:
    print(f"reducio-fast {command}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _version() -> str:
    try:
        return version("reducio-fast")
    except PackageNotFoundError:
        return "(not installed)"
