"""Reproduce the embedded default model."""

from __future__ import annotations

import argparse

from . import options
from .printing import Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", choices=("tiny",))
    options.add_out(parser, "DIR", "components, checkpoints and logs go here")
    parser.add_argument("--stages", metavar="A,B", help="only these stages of the recipe")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies the steps of every stage")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cpu")
    options.add_progress(parser)


def run(arguments: argparse.Namespace) -> Printed:
    from ..training.tiny.recipe import train as train_tiny

    figures = train_tiny(
        arguments.out,
        stages=arguments.stages.split(",") if arguments.stages else None,
        scale=arguments.steps_scale,
        resume=arguments.resume,
        progress=arguments.progress,
        device=arguments.device,
    )
    lines = [f"{stage}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()) for stage, row in figures.items()]
    return {"out": arguments.out, "stages": figures}, [*lines, f"wrote {arguments.out}"]
