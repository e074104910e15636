"""Latents that `encode` wrote, or a failed decode has kept, -> a clip on disk."""

from __future__ import annotations

import argparse
import functools
import time
from typing import TYPE_CHECKING

from . import options
from .printing import Printed

if TYPE_CHECKING:
    import numpy as np

    from ..checkpoints.saved_latents import Latents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the .safetensors file that `encode` wrote or an error named")
    options.add_out(parser, "PATH", options.CLIP_HELP)
    options.add_model(parser, "; its VAE, a .ckpt of the release or a hub id will do")
    options.add_backend(parser)


def run(arguments: argparse.Namespace) -> Printed:
    from ..checkpoints.saved_latents import load
    from ..media.video_files import check_format, check_output_path, numbered

    saved = load(arguments.file)
    height, width = saved.content.shape[1:3]
    count = len(saved.content)
    for path in numbered(arguments.out, count) if count > 1 else [arguments.out]:
        check_output_path(path, trial=False)
    check_format(path, saved.fps, height, width)

    import numpy as np

    from ..checkpoints.layouts import SV3D, SVD
    from ..pipelines.call.output import ReducioOutput, there_and_back

    decode = decode_svd if saved.pipeline in (SVD.pipeline, SV3D.pipeline) else decode_reducio
    started = time.perf_counter()
    frames = decode(saved, arguments)
    if saved.pipeline == SV3D.pipeline:
        frames[:, -1] = saved.content  # as in the call
    if saved.decoding.get("loop"):
        frames = np.stack([there_and_back(clip) for clip in frames])
    seconds, is_list = time.perf_counter() - started, len(frames) > 1
    out = ReducioOutput(frames if is_list else frames[0], saved.content, saved.seeds, saved.fps, {}, "np", is_list)
    paths = out.save(arguments.out)
    names = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    result = {"paths": names, "seeds": saved.seeds, "fps": saved.fps, "frames": frames.shape[1], "seconds": seconds}
    return result, [f"wrote {name}: {frames.shape[1]} frames ({seconds:.2f} s)" for name in names]


def decode_reducio(kept: Latents, arguments: argparse.Namespace) -> np.ndarray:
    """uint8 [N, T, H, W, 3]."""
    import numpy as np

    from ..checkpoints.saved_latents import check_vae
    from ..checkpoints.strict_files import embedded_model
    from ..pipelines.call.validation import check_latents
    from ..pipelines.reducio.autoencoder import VideoAutoencoder

    model = embedded_model() if arguments.model is None else arguments.model
    autoencoder = VideoAutoencoder.load(model, arguments.dtype, arguments.device, arguments.backend)
    check_vae(arguments.file, kept, autoencoder.components["vae"])
    shape = autoencoder.config.latent_shape(*kept.content.shape[1:3])
    latents = check_latents(kept.latents, shape, len(kept.content), True)
    motion = {name: kept.decoding[name] for name in ("motion_strength", "keep_content") if name in kept.decoding}
    return np.stack([autoencoder.decode(z, frame, **motion) for z, frame in zip(latents, kept.content, strict=True)])


def decode_svd(kept: Latents, arguments: argparse.Namespace) -> np.ndarray:
    """uint8 [N, T, H, W, 3], by the model's decoder alone."""
    from ..checkpoints.saved_latents import check_vae
    from ..pipelines.svd.decoder import decode_latents
    from ..system.errors import ReducioError

    if arguments.model is None:
        named = "the model that made them" if kept.source is None else kept.source
        raise ReducioError(f"{arguments.file}: holds latents of Stable Video Diffusion; name {named} (--model)")
    places = (arguments.dtype, arguments.device, arguments.backend)
    chunk = kept.decoding.get("decode_chunk_size")
    check = functools.partial(check_vae, arguments.file, kept)
    return decode_latents(arguments.model, kept.latents, *places, chunk, check)
