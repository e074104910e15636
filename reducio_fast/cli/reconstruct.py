"""A clip -> VAE -> original and reconstruction side by side, with PSNR and SSIM."""

from __future__ import annotations

import argparse
import time

from ..system.errors import ReducioError
from ..system.paths import check_not_input
from . import clip_input, options
from .printing import Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    clip_input.add_arguments(parser)
    options.add_out(parser, "PATH", options.CLIP_HELP)


def run(arguments: argparse.Namespace) -> Printed:
    from ..media.video_files import TRIAL_RATE, check_output_path, side_by_side, write_video

    check_not_input(arguments.out, arguments.input)
    check_output_path(arguments.out, clip_input.rate(arguments) or TRIAL_RATE)

    from ..media.kept_frames import keep_frames
    from ..media.similarity import psnr, ssim

    autoencoder = clip_input.load_autoencoder(arguments)
    clip, fps, step = clip_input.read(arguments, autoencoder)
    started = time.perf_counter()
    latent = autoencoder.encode(clip, arguments.refine, arguments.progress)
    restored = autoencoder.decode(latent, clip[autoencoder.config.content_frame])
    seconds = time.perf_counter() - started
    both = side_by_side(clip, restored)
    try:
        write_video(both, arguments.out, fps)
    except ReducioError as error:
        raise ReducioError(f"{error}; {keep_frames([both], fps, 'reconstruction')}") from error

    wanted, height, width = clip.shape[:3]
    dtype = str(next(autoencoder.network.parameters()).dtype).removeprefix("torch.")
    result = {"path": arguments.out, "frames": wanted, "height": height, "width": width, "step": step, "dtype": dtype}
    result |= {"psnr": psnr(clip, restored), "ssim": ssim(clip, restored), "seconds": seconds}
    lines = [
        f"PSNR {result['psnr']:.2f} dB in {dtype}, of frames {step} apart",
        f"SSIM {result['ssim']:.4f}",
        f"wrote {arguments.out}: {wanted} frames of {height}x{width}, original left, reconstruction right "
        f"({seconds:.2f} s)",
    ]
    return result, lines
