"""Option groups and types that commands share."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..system.errors import ReducioError, shown
from ..system.paths import is_unicode

DTYPES = ("float32", "bfloat16", "float16")
BACKENDS = ("auto", "reference", "fast")
WHERE = "PATH"
ENCODINGS = ("quality", "fast", "hardware", "auto")
CLIP_HELP = ".mp4, .gif, .webp or a new folder for PNGs"
SIZE_OF_A_CALL = "multiple of 32, for SVD of 8 (default: the model's; for Reducio with an image its aspect bucket)"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, is {value}")
    return value


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, is {value}")
    return value


positive.__name__ = not_negative.__name__ = "whole number"  # what argparse calls the type in "invalid ... value"


def add_out(parser: argparse.ArgumentParser, metavar: str, help: str, required: bool = True) -> None:
    parser.add_argument("--out", "-o", required=required, metavar=metavar, help=help)


def add_size(parser: argparse.ArgumentParser, help: str = "multiple of 32 (default: the model's)") -> None:
    parser.add_argument("--height", type=positive, help=help)
    parser.add_argument("--width", type=positive, help=help)


def add_model(
    parser: argparse.ArgumentParser, also: str = "", dtype: str = "float32 on a CPU, bfloat16 on a GPU"
) -> None:
    parser.add_argument("--model", metavar="DIR", help=f"model folder{also} (default: the embedded toy model)")
    parser.add_argument("--dtype", choices=DTYPES, help=f"(default: {dtype})")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, default="auto")


def add_compile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compile", action="store_true", default=None, help="compile the fast path's blocks, once on this machine"
    )


def add_quantise(parser: argparse.ArgumentParser) -> None:
    help = "fp8, or int8 on an A100: Reducio's decoder in 8-bit numbers, of a model that `calibrate` has measured"
    parser.add_argument("--quantise", metavar="WORD", help=help)


def add_steering(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--motion-strength", type=float, metavar="X", help="0 still, 1 as generated, up to 4 (default: 1)"
    )
    parser.add_argument(
        "--keep-content", action="store_true", default=None, help="the picture's own pixels where nothing moves"
    )


def add_refine(parser: argparse.ArgumentParser, of: str = "", default: int | None = 0) -> None:
    parser.add_argument(
        "--refine", type=not_negative, metavar="STEPS", default=default,
        help=f"{of}steps that fit the encoder's latent to the clip; 20 are enough (default: 0)",
    )  # fmt: skip


def add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")


def add_workload(parser: argparse.ArgumentParser) -> None:
    from ..measurement.names import WORKLOADS

    help = "a clip of the default model, or full-size random weights at so many pixels (default: default)"
    parser.add_argument("workload", nargs="?", choices=WORKLOADS, help=help)


def add_encoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoding", choices=ENCODINGS, default="quality", help="of .mp4 (default: quality)")


def add_replicas(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--min-replicas", type=positive, help="on Ray (default: 1)")
    parser.add_argument("--max-replicas", type=positive, help="on Ray (default: as --min-replicas)")
    parser.add_argument("--gpus-per-replica", type=float, help="on Ray (default: 1 where the cluster has any)")


def replicas(arguments: argparse.Namespace) -> tuple[int, int]:
    """The smallest and the largest number of replicas."""
    least = arguments.min_replicas or 1
    most = arguments.max_replicas or least
    if most < least:
        raise ReducioError(f"--max-replicas: must be at least --min-replicas; they are {least} and {most}")
    if (gpus := arguments.gpus_per_replica) is not None and not 0 <= gpus < math.inf:
        raise ReducioError(f"--gpus-per-replica: must be finite and at least 0, is {gpus:g}")
    if arguments.ray is None:
        refuse(arguments, ("min_replicas", "max_replicas", "gpus_per_replica"), "is of clips on Ray, which needs --ray")
    return least, most


def port(text: str) -> int:
    number = positive(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is above 65535")
    return number


def captions(path: str | None) -> dict[str, str]:
    """The file of `--captions`: one JSON object of file names, or paths, and captions; empty without a file."""
    if path is None:
        return {}
    values = read_json("captions", path)
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise ReducioError(f"--captions {path}: must be one JSON object of file names and captions")
    for name, caption in values.items():
        if not is_unicode(name + caption):
            raise ReducioError(f"--captions {path}: {shown(name)} or its caption has half of a surrogate pair")
    return values


def read_json(option: str, path: str) -> object:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ReducioError(f"--{option} {path}: {error}") from error


def needs(arguments: argparse.Namespace, *names: str) -> None:
    """Raise `ReducioError` for an option that a kind of run, such as `train dit`, needs and the user left out."""
    for name in names:
        if getattr(arguments, name) is None:
            raise ReducioError(f"{arguments.command} {arguments.what} needs --{name}")


def refuse(arguments: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raise `ReducioError` for an option that this run does not use."""
    for name in names:
        if getattr(arguments, name) is not None:
            raise ReducioError(f"--{name.replace('_', '-')}: {why}")


def refuse_others(arguments: argparse.Namespace, options: Mapping[str, Sequence[str]]) -> None:
    """Raise `ReducioError` for an option of another kind of run. `options`: kind -> names that it takes."""
    for kind, names in options.items():
        for name in names:
            if name not in options[arguments.what] and getattr(arguments, name) is not None:
                option, command = name.replace("_", "-"), arguments.command
                raise ReducioError(f"{command} {arguments.what} takes no --{option}, which is of {command} {kind}")
