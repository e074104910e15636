"""Clips of a manifest -> latents and conditions to train a transformer on."""

from __future__ import annotations

import argparse

from . import options
from .printing import Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("clips", metavar="FILE", help="clips.parquet of reducio-fast curate, or its folder")
    options.add_out(parser, "DIR", "shards and their index; a second run goes on")
    options.add_model(parser)
    parser.add_argument(
        "--size",
        type=options.positive,
        default=256,
        help="256, 512 or 1024 with aspect buckets; else squares (default: 256)",
    )
    parser.add_argument(
        "--shard-size", type=options.positive, default=256, metavar="N", help="clips a file (default: 256)"
    )
    parser.add_argument("--seed", type=options.not_negative, default=0, help="of the draws from the posteriors")
    parser.add_argument("--ray", metavar="ADDRESS", help='run on this Ray cluster; "local" starts one here')
    options.add_progress(parser)


def run(arguments: argparse.Namespace) -> Printed:
    from ..training.reducio.extract import extract

    done = extract(
        arguments.clips,
        arguments.out,
        arguments.model,
        arguments.ray,
        arguments.progress,
        size=arguments.size,
        shard_size=arguments.shard_size,
        seed=arguments.seed,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    counts = f"{done['clips']} clips, {done['errors']} of them unreadable, {done['shards']} shards made"
    line = f"wrote {arguments.out}: {counts}"
    return {"out": arguments.out, **done}, [line]
