"""A file of prompts -> a folder of clips and a manifest."""

from __future__ import annotations

import argparse

from . import options
from .printing import Failed, Printed

WORKER = ("model", "dtype", "device", "backend", "compile", "quantise", "encoding")  # arguments of `clips.Clips`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", metavar="PROMPTS", help=".txt, .jsonl, .csv or .parquet, one clip a line or row")
    options.add_out(parser, "DIR", "clips by number, and manifest.jsonl; a second run goes on")
    options.add_size(parser, options.SIZE_OF_A_CALL)
    parser.add_argument("--num-inference-steps", type=options.positive, help="(default: the model's)")
    parser.add_argument("--guidance-scale", type=float, help="(default: the model's)")
    parser.add_argument("--seed", type=options.not_negative, default=0, help="of the first clip; the next count up")
    parser.add_argument("--suffix", choices=(".mp4", ".gif", ".webp"), default=".mp4", help="of the clips")
    options.add_model(parser, ", hub id, or another model: svd, svd:DIR, ltx, wan")
    options.add_backend(parser)
    options.add_compile(parser)
    options.add_quantise(parser)
    options.add_encoding(parser)
    parser.add_argument("--ray", metavar="ADDRESS", help='make clips on this Ray cluster; "local" starts one here')
    options.add_replicas(parser)
    options.add_progress(parser)


def run(arguments: argparse.Namespace) -> Printed:
    from ..server import batch

    rows = batch.read_prompts(arguments.prompts)
    call = {n: getattr(arguments, n) for n in ("height", "width", "num_inference_steps", "guidance_scale")}
    settings = batch.Settings(
        out=arguments.out,
        worker={n: getattr(arguments, n) for n in WORKER},
        call={name: value for name, value in call.items() if value is not None},
        seed=arguments.seed,
        suffix=arguments.suffix,
        ray=arguments.ray,
        replicas=options.replicas(arguments),
        gpus=arguments.gpus_per_replica,
    )
    from tqdm import tqdm

    # The bar begins with the first clip, so that an error before it is one line alone.
    with tqdm(total=len(rows), desc="clips", disable=not arguments.progress, delay=1e-3) as bar:
        done = batch.make_clips(rows, settings, lambda: bar.update() and None)
    result = {"path": arguments.out, "made": done.made, "kept": done.kept, "failed": len(done.errors)}
    lines = [f"wrote {done.made} clips to {arguments.out}, {done.kept} were there before"]
    if done.errors:
        number, line = done.errors[0]
        raise Failed(f"{len(done.errors)} of {len(rows)} prompts made no clip, the first is number {number}: {line}",
                     (result, lines))  # fmt: skip
    return result, lines
