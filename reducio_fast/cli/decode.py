"""Latents that `encode` wrote, or a failed decode has kept, -> a clip on disk."""

from __future__ import annotations

import argparse
import time

from . import options
from .printing import Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the .safetensors file that `encode` wrote or an error named")
    options.add_out(parser, "PATH", options.CLIP_HELP)
    options.add_model(parser, "; its VAE, a .ckpt of the release or a hub id will do")
    options.add_backend(parser)


def run(arguments: argparse.Namespace) -> Printed:
    from ..checkpoints.saved_latents import load
    from ..media.video_files import check_output_path

    kept = load(arguments.file)
    height, width = kept.content.shape[1:3]
    check_output_path(arguments.out, kept.fps, height, width)

    import numpy as np

    from ..checkpoints.strict_files import embedded_model
    from ..pipelines.call.output import ReducioOutput
    from ..pipelines.call.validation import check_latents
    from ..pipelines.reducio.autoencoder import VideoAutoencoder

    model = embedded_model() if arguments.model is None else arguments.model
    autoencoder = VideoAutoencoder.load(model, arguments.dtype, arguments.device, arguments.backend)
    latents = check_latents(kept.latents, autoencoder.config.latent_shape(height, width), len(kept.content), True)
    started = time.perf_counter()
    frames = np.stack([autoencoder.decode(z, frame) for z, frame in zip(latents, kept.content, strict=True)])
    seconds, is_list = time.perf_counter() - started, len(frames) > 1
    out = ReducioOutput(frames if is_list else frames[0], kept.content, kept.seeds, kept.fps, {}, "np", is_list)
    paths = out.save(arguments.out)
    names = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    result = {"paths": names, "seeds": kept.seeds, "fps": kept.fps, "frames": frames.shape[1], "seconds": seconds}
    return result, [f"wrote {name}: {frames.shape[1]} frames ({seconds:.2f} s)" for name in names]
