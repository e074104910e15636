"""Reading a clip for the video autoencoder: options and frames, shared by `encode` and `reconstruct`."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from ..system.errors import ReducioError
from . import options


class Clip(NamedTuple):
    """frames: uint8 [N * T, H, W, 3], N clips of the model's T frames; step: their distance in frames of the file."""

    frames: Any
    fps: float
    step: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT", help=".mp4, .gif, .webp or a folder of images")
    add_reading(parser)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options for the frames of the clip, their size and the model."""
    parser.add_argument("--start", type=options.not_negative, default=0, help="first frame to use (default: 0)")
    parser.add_argument(
        "--consecutive", action="store_true", help="every frame (default: every n-th, to come near the model's rate)"
    )
    options.add_size(parser)
    options.add_model(parser, dtype="float32")
    options.add_backend(parser)
    options.add_refine(parser)
    options.add_progress(parser)


def rate(arguments: argparse.Namespace) -> float | None:
    """Frames per second of the input, None for a folder of images. Raises ReducioError if the input is missing or
    broken, before torch is imported."""
    from ..media.video_files import read_video

    return read_video(arguments.input, arguments.start, 1)[1]


def load_autoencoder(arguments: argparse.Namespace) -> Any:
    """Load the autoencoder alone, because the text encoder of a full-size model is 9 GB. The default dtype is float32,
    on a GPU too, as in the release."""
    from ..checkpoints.strict_files import embedded_model
    from ..pipelines.reducio.autoencoder import VideoAutoencoder

    source = embedded_model() if arguments.model is None else arguments.model
    return VideoAutoencoder.load(source, arguments.dtype or "float32", arguments.device, arguments.backend)


def read(arguments: argparse.Namespace, autoencoder: Any, clips: int = 1) -> Clip:
    """Read `clips` times T frames at the model's rate and with the release's filter, so that the figures are comparable
    with those of the release."""
    from PIL import Image

    from ..media.image_files import cover_crop
    from ..media.video_files import read_video
    from ..pipelines.call.validation import check_size

    settings, config, fps = autoencoder.settings, autoencoder.config, rate(arguments)
    height, width = arguments.height or settings["sample_height"], arguments.width or settings["sample_width"]
    check_size(config, height, width)
    wanted = clips * config.num_frames
    # As in the release: a model of 16 frames per second gets every second frame of a clip of 30.
    step = 1 if arguments.consecutive or fps is None else max(1, round(fps / settings["fps"]))
    frames, fps = read_video(arguments.input, arguments.start, (wanted - 1) * step + 1)
    frames = frames[::step]
    if len(frames) < wanted:
        where = f" from number {arguments.start} on" if arguments.start else ""
        steps = f" that are {step} apart (--consecutive takes all)" if step > 1 else ""
        needs = f"the model takes {wanted}" if clips == 1 else f"{clips} clips take {wanted}"
        raise ReducioError(f"{arguments.input} has {len(frames)} frames{where}{steps}; {needs}")
    return Clip(cover_crop(frames, height, width, Image.Resampling.BILINEAR), (fps or settings["fps"]) / step, step)
