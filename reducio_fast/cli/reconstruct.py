"""A clip -> VAE -> original and reconstruction side by side, with PSNR and SSIM."""

from __future__ import annotations

import argparse
import time
from typing import Any

from ..system.errors import ReducioError
from . import options
from .printing import Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT", help=".mp4, .gif, .webp or a folder of images")
    options.add_out(parser, "PATH", options.CLIP_HELP)
    parser.add_argument("--start", type=options.not_negative, default=0, help="first frame to use (default: 0)")
    parser.add_argument(
        "--consecutive", action="store_true", help="every frame (default: every n-th, to come near the model's rate)"
    )
    options.add_size(parser)
    options.add_model(parser)


def run(arguments: argparse.Namespace) -> Printed:
    from ..media.image_files import cover_crop
    from ..media.video_files import TRIAL_RATE, check_output_path, read_video, side_by_side, write_video

    # Both before torch is imported: an output that cannot be written, and a missing or broken input.
    _, fps = read_video(arguments.input, arguments.start, 1)
    check_output_path(arguments.out, fps or TRIAL_RATE)

    from PIL import Image

    from ..evaluation import reconstruction
    from ..media.kept_frames import keep_frames
    from ..media.similarity import psnr, ssim
    from ..pipelines.call.validation import check_size

    vae, settings = _load_vae(arguments)
    wanted = vae.config.num_frames
    height, width = arguments.height or settings["sample_height"], arguments.width or settings["sample_width"]
    check_size(vae.config, height, width, wanted)
    # As the release: a model of 16 frames a second sees every second frame of a clip of 30.
    step = 1 if arguments.consecutive or fps is None else max(1, round(fps / settings["fps"]))
    clip, fps = read_video(arguments.input, arguments.start, (wanted - 1) * step + 1)
    clip = clip[::step]
    if len(clip) < wanted:
        where = f" from number {arguments.start} on" if arguments.start else ""
        steps = f" that are {step} apart (--consecutive takes all)" if step > 1 else ""
        raise ReducioError(f"{arguments.input} has {len(clip)} frames{where}{steps}; the model takes {wanted}")
    # The release's filter, so that figures can be set beside its own.
    clip = cover_crop(clip, height, width, Image.Resampling.BILINEAR)
    started = time.perf_counter()
    restored = reconstruction.reconstruct(vae, clip)
    seconds = time.perf_counter() - started
    both, rate = side_by_side(clip, restored), (fps or settings["fps"]) / step
    try:
        write_video(both, arguments.out, rate)
    except ReducioError as error:
        raise ReducioError(f"{error}; {keep_frames([both], rate, 'reconstruction')}") from error

    dtype = str(next(vae.parameters()).dtype).removeprefix("torch.")
    result = {"path": arguments.out, "frames": wanted, "height": height, "width": width, "step": step, "dtype": dtype}
    result |= {"psnr": psnr(clip, restored), "ssim": ssim(clip, restored), "seconds": seconds}
    lines = [
        f"PSNR {result['psnr']:.2f} dB in {dtype}, of frames {step} apart",
        f"SSIM {result['ssim']:.4f}",
        f"wrote {arguments.out}: {wanted} frames of {height}x{width}, original left, reconstruction right "
        f"({seconds:.2f} s)",
    ]
    return result, lines


def _load_vae(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The VAE alone and the settings in the model's index: the text encoder of a full-size model is 9 GB."""
    from ..checkpoints.strict_files import embedded_model
    from ..checkpoints.vae_alone import load_vae
    from ..system.devices import resolve_device, resolve_dtype

    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype or "float32", None, device)  # on a GPU too: figures beside the release's
    return load_vae(embedded_model() if arguments.model is None else arguments.model, dtype, device)
