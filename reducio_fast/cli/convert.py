"""Published weights -> a safetensors folder, and a vae back to the layout of the release."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.layouts import REDUCIO
from ..system.errors import ReducioError
from . import options
from .printing import Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="a .ckpt, .pth or .safetensors file, a diffusers folder, a hub id (owner/name)"
    )
    options.add_out(
        parser,
        "PATH",
        "the component's or, of a whole SVD, the model's folder; with --to official the file",
        required=False,
    )
    parser.add_argument("--into", metavar="DIR", help="the model folder to put it in, made if there is none")
    parser.add_argument("--to", choices=("ours", "official"), default="ours", help="(default: ours)")
    parser.add_argument(
        "--component", choices=("vae", "transformer", "content_encoder"), help="(default: by its names)"
    )
    parser.add_argument(
        "--preset", help="such as reducio-ft2, reducio-1024, sdxl, svd-xt (default: by its shapes or name)"
    )
    parser.add_argument("--config", metavar="JSON", help="a file with fields to put over the preset's")
    parser.add_argument(
        "--null-text",
        metavar="FROM",
        help="the null caption of a diffusers PixArt: a .pth, a folder or hub id with text_encoder/, or 'fresh' "
        "(default: from beside it)",
    )
    parser.add_argument("--dtype", choices=options.DTYPES, help="(default: as stored)")


def run(arguments: argparse.Namespace) -> Printed:
    from ..checkpoints.convert import convert, export
    from ..checkpoints.strict_files import read_json
    from ..system.devices import DTYPES

    if arguments.to == "official":
        names = ("into", "component", "preset", "config", "dtype", "null_text")
        others = [f"--{n.replace('_', '-')}" for n in names if getattr(arguments, n) is not None]
        if arguments.out is None or others:
            wrong = f"does not take {', '.join(others)}" if others else "needs --out"
            raise ReducioError(f"--to official takes --out FILE and nothing else; it {wrong}")
        result = export(arguments.source, arguments.out)
    else:
        config = read_json(Path(arguments.config)) if arguments.config else None
        result = convert(
            arguments.source,
            arguments.out,
            arguments.into,
            arguments.component,
            arguments.preset,
            config,
            DTYPES.get(arguments.dtype),
            arguments.null_text,
        )
    return result, lines(result)


NAMES_SHOWN = 8  # of each kind, so that the text stays readable when hundreds of names differ


def lines(result: Mapping[str, Any]) -> list[str]:
    """The result of `convert` or `export` for people."""
    text = [f"{result['component']}: {result['tensors']} tensors"]
    for name, label in (("left_out", "left out"), ("fresh", "not in the source, freshly initialised")):
        if names := result.get(name):
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            text.append(f"  {len(names)} {label}: {', '.join(names[:NAMES_SHOWN])}{more}")
    if lacks := result.get("model_lacks"):
        needed = [n for n in lacks if n not in REDUCIO.optional]
        text.append(f"  the model can do without {', '.join(n for n in lacks if n in REDUCIO.optional)}")
        text += [f"  the model still needs {', '.join(needed)}"] if needed else []
    return [*text, f"wrote {result['path']}"]
