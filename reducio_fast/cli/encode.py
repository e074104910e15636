"""A clip -> motion latents and content frames, in a file that `decode` reads."""

from __future__ import annotations

import argparse
import time

from ..system.errors import ReducioError
from . import clip_input, options
from .printing import Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    clip_input.add_arguments(parser)
    parser.add_argument(
        "--clips", type=options.positive, default=1, metavar="N", help="clips to take, in sequence (default: 1)"
    )
    options.add_out(parser, "FILE", "a new .safetensors file")


def run(arguments: argparse.Namespace) -> Printed:
    clip_input.rate(arguments)  # raises for a missing or broken input

    import torch

    from ..checkpoints import hub
    from ..checkpoints.saved_latents import Latents, check_path, marks, save
    from ..checkpoints.strict_files import embedded_model

    path = check_path(arguments.out)
    autoencoder = clip_input.load_autoencoder(arguments)
    frames, fps, step = clip_input.read(arguments, autoencoder, arguments.clips)
    clips = frames.reshape(arguments.clips, -1, *frames.shape[1:])
    started = time.perf_counter()
    latents = torch.cat([autoencoder.encode(clip, arguments.refine, arguments.progress) for clip in clips])
    seconds = time.perf_counter() - started
    vae, source = autoencoder.components["vae"], hub.lasting_name(arguments.model or embedded_model())
    content = clips[:, autoencoder.config.content_frame]
    kept = Latents(latents, content, fps, [], source=source, vae=marks(vae))
    try:
        save(path, kept)
    except OSError as error:
        raise ReducioError(f"cannot write {path} ({error.strerror or error})") from error
    shape = "x".join(map(str, latents.shape))
    result = {"path": str(path), "shape": list(latents.shape), "fps": fps, "step": step, "seconds": seconds}
    return result, [f"wrote {path}: latents {shape} of frames {step} apart, and their content frames ({seconds:.2f} s)"]
