"""The motion of one clip on another picture, or on its own content frame after you have edited it."""

from __future__ import annotations

import argparse
import time

from ..system.errors import ReducioError
from ..system.paths import check_not_input
from . import clip_input, options
from .printing import Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--motion", dest="input", metavar="CLIP", required=True, help=".mp4, .gif, .webp or a folder of images"
    )
    clip_input.add_reading(parser)
    parser.add_argument(
        "--image", metavar="FILE", help="the picture that moves (default: the clip's own content frame)"
    )
    parser.add_argument("--extract", metavar="FILE", help="write the clip's content frame here, to be edited")
    options.add_steering(parser)
    options.add_out(parser, "PATH", options.CLIP_HELP, required=False)


def run(arguments: argparse.Namespace) -> Printed:
    from pathlib import Path

    from PIL import Image

    from ..media.image_files import read_image
    from ..media.video_files import TRIAL_RATE, check_output_path

    if arguments.out is None and arguments.extract is None:
        raise ReducioError("give --out for the clip, --extract for its content frame, or both")
    if arguments.out is None:
        names = ("image", "motion_strength", "keep_content")
        options.refuse(arguments, names, "changes the clip alone, which needs --out")
    if arguments.extract is not None and Path(arguments.extract).suffix.lower() not in Image.registered_extensions():
        raise ReducioError(f"--extract {arguments.extract}: has no suffix of a picture, such as .png")
    for path in (arguments.out, arguments.extract):
        if path is not None:
            check_not_input(path, arguments.input, arguments.image)
    if arguments.out is not None:
        check_output_path(arguments.out, clip_input.rate(arguments) or TRIAL_RATE)
    picture = None if arguments.image is None else read_image(arguments.image)

    from ..media.image_files import fit_image, write_image
    from ..pipelines.call import steering

    arguments.motion_strength = 1.0 if arguments.motion_strength is None else arguments.motion_strength
    strength = steering.check_strength(arguments.motion_strength)
    autoencoder = clip_input.load_autoencoder(arguments)
    clip, fps, step = clip_input.read(arguments, autoencoder)
    content = clip[autoencoder.config.content_frame]
    lines, result = [], {"fps": fps, "step": step, "motion_strength": strength}
    if arguments.extract is not None:
        write_image(content, arguments.extract)
        result["content"] = arguments.extract
        lines.append(f"wrote {arguments.extract}: the content frame; edit it and give it back as --image")
    if arguments.out is not None:
        from ..media.kept_frames import keep_frames
        from ..media.video_files import write_video

        frame = content if picture is None else fit_image(picture, *clip.shape[1:3])
        started = time.perf_counter()
        latent = autoencoder.encode(clip, arguments.refine, arguments.progress)
        frames = autoencoder.decode(latent, frame, motion_strength=strength, keep_content=bool(arguments.keep_content))
        seconds = time.perf_counter() - started
        try:
            write_video(frames, arguments.out, fps)
        except ReducioError as error:
            raise ReducioError(f"{error}; {keep_frames([frames], fps, 'transfer')}") from error
        count, height, width = frames.shape[:3]
        result |= {"path": arguments.out, "frames": count, "height": height, "width": width, "seconds": seconds}
        lines.append(f"wrote {arguments.out}: {count} frames of {height}x{width} ({seconds:.2f} s)")
    return result, lines
