"""Latents that a failed decode has kept -> a clip on disk."""

from __future__ import annotations

import argparse
import time

from . import options
from .printing import Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the .safetensors file that the error named")
    options.add_out(parser, "PATH", options.CLIP_HELP)
    options.add_model(parser)
    options.add_backend(parser)


def run(arguments: argparse.Namespace) -> Printed:
    from ..checkpoints.saved_latents import load
    from ..media.video_files import check_output_path

    kept = load(arguments.file)
    check_output_path(arguments.out, kept.fps, *kept.content.shape[1:3])
    from ..checkpoints.strict_files import embedded_model
    from ..pipelines.call.output import ReducioOutput
    from ..pipelines.reducio.pipeline import ReducioPipeline

    model = embedded_model() if arguments.model is None else arguments.model
    pipe = ReducioPipeline.from_pretrained(
        model, dtype=arguments.dtype, device=arguments.device, backend=arguments.backend
    )
    started = time.perf_counter()
    frames = pipe.decode(kept.latents, kept.content)
    seconds, is_list = time.perf_counter() - started, len(frames) > 1
    out = ReducioOutput(frames if is_list else frames[0], kept.content, kept.seeds, kept.fps, {}, "np", is_list)
    paths = out.save(arguments.out)
    names = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    result = {"paths": names, "seeds": kept.seeds, "fps": kept.fps, "frames": frames.shape[1], "seconds": seconds}
    return result, [f"wrote {name}: {frames.shape[1]} frames ({seconds:.2f} s)" for name in names]
