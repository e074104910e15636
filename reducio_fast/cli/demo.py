"""A page in the browser that makes clips."""

from __future__ import annotations

import argparse

from . import options
from .printing import Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens it to the network (default: this machine)")
    parser.add_argument("--port", type=options.port, default=7860)


def run(arguments: argparse.Namespace) -> Printed:
    from ..server.demo_page import serve

    url, arguments.afterwards = serve(
        arguments.model, arguments.dtype, arguments.device, arguments.host, arguments.port
    )
    return {"url": url}, [f"{url} (Ctrl-C ends it)"]
