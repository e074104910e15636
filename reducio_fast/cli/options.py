"""Option groups and types that commands share."""

from __future__ import annotations

import argparse

from ..system.errors import ReducioError

DTYPES = ("float32", "bfloat16", "float16")
BACKENDS = ("auto", "reference", "fast")
WHERE = "PATH"
ENCODINGS = ("quality", "fast", "hardware", "auto")
CLIP_HELP = ".mp4, .gif, .webp or a new folder for PNGs"


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


def add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--height", type=positive, help="multiple of 32 (default: the model's)")
    parser.add_argument("--width", type=positive, help="multiple of 32 (default: the model's)")


def add_model(parser: argparse.ArgumentParser, also: str = "") -> None:
    parser.add_argument("--model", metavar="DIR", help=f"model folder{also} (default: the embedded toy model)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, default="auto")


def add_compile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compile", action="store_true", default=None, help="compile the fast path's blocks, once on this machine"
    )


def add_steering(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--motion-strength", type=float, metavar="X", help="0 still, 1 as generated, up to 4 (default: 1)"
    )
    parser.add_argument(
        "--keep-content", action="store_true", default=None, help="the picture's own pixels where nothing moves"
    )


def add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")


def add_workload(parser: argparse.ArgumentParser) -> None:
    from ..measurement.names import WORKLOADS

    help = "a clip of the default model, or full-size random weights at so many pixels (default: default)"
    parser.add_argument("workload", nargs="?", choices=WORKLOADS, default="default", help=help)


def add_encoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoding", choices=ENCODINGS, default="quality", help="of .mp4 (default: quality)")


def add_replicas(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--min-replicas", type=positive, default=1, help="on Ray (default: 1)")
    parser.add_argument("--max-replicas", type=positive, help="on Ray (default: as --min-replicas)")
    parser.add_argument("--gpus-per-replica", type=float, help="on Ray (default: 1 where the cluster has any)")


def replicas(arguments: argparse.Namespace) -> tuple[int, int]:
    """The smallest and the largest number of replicas."""
    least, most = arguments.min_replicas, arguments.max_replicas or arguments.min_replicas
    if most < least:
        raise ReducioError(f"--max-replicas: must be at least --min-replicas; they are {least} and {most}")
    if arguments.gpus_per_replica is not None and arguments.gpus_per_replica < 0:
        raise ReducioError(f"--gpus-per-replica: must be at least 0, is {arguments.gpus_per_replica:g}")
    return least, most
