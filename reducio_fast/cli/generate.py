"""Text (and an image) -> a clip on disk."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoints.layouts import REDUCIO, SVD
from ..system.errors import ReducioError
from . import options
from .printing import NOTHING, Printed

# Components that an option can replace by a folder, a hub id or a keyword.
NAMED = {c.name: c.source for family in (SVD, REDUCIO) for c in family.components if c.source}
FIRST_STAGE = ("num_inference_steps", "guidance_scale")


def sigmas(text: str) -> str | list[float]:
    """The name of a schedule, or numbers separated by commas."""
    return [float(number) for number in text.split(",")] if "," in text else text


def degrees(text: str) -> float | list[float]:
    """One angle for all frames, or one per frame separated by commas."""
    return [float(number) for number in text.split(",")] if "," in text else float(text)


# Arguments of Stable Video Diffusion's own call; `fps` is a setting of our models too.
SVD_OWN: dict[str, Callable[[str], Any]] = {
    "fps": options.positive,
    "motion_bucket_id": options.not_negative,
    "noise_aug_strength": float,
    "decode_chunk_size": options.positive,
    "min_guidance_scale": float,
    "max_guidance_scale": float,
    "sigmas": sigmas,
    "image_fit": str,
    "last_image": str,
    "elevations": degrees,  # SV3D has these two
    "azimuths": degrees,
    "variant": str,
    "overlap": options.positive,
}
SVD_HELP = {
    "fps": "frames per second, of a Reducio clip too; here also a condition of the network",
    "motion_bucket_id": "how much moves, 0 to 255",
    "noise_aug_strength": "noise added to the image: more lets the clip leave it",
    "decode_chunk_size": "decode so many frames at a time, as diffusers does",
    "min_guidance_scale": "guidance of the first frame",
    "max_guidance_scale": "guidance of the last frame",
    "sigmas": "noise levels with commas, or align-your-steps",
    "image_fit": "crop or stretch an image of another shape",
    "last_image": "a file: the picture in which the clip ends",
    "elevations": "SV3D: degrees of each view, or one number",
    "azimuths": "SV3D: degrees of each view",
    "variant": "fp16: the half-precision files of a repository",
    "overlap": "frames that a further clip shares with the one before",
}
# Arguments of Reducio's own call.
REDUCIO_OWN = ("direction", "motion_strength", "motion_score", "keep_content")


def interval(text: str) -> tuple[float, ...]:
    """Two numbers separated by a comma."""
    return tuple(float(number) for number in text.split(","))


# Arguments of a Reducio call that save work at the cost of fidelity.
SAMPLING: dict[str, Callable[[str], Any]] = {
    "quality": str,
    "schedule": str,
    "guidance_interval": interval,
    "guidance_reuse": options.positive,
    "cache_threshold": float,
}
SAMPLING_HELP = {
    "quality": "exact, balanced or draft",
    "schedule": "where the steps lie: own, quadratic, lu or exponential",
    "guidance_interval": "START,STOP: shares of the steps between which guidance works",
    "guidance_reuse": "compute guidance in one of so many steps, and use it again in the others",
    "cache_threshold": "leave blocks out of steps that change the first one's output by less than this share",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="what the clip shows (none for --model svd)")
    options.add_out(parser, "PATH", options.CLIP_HELP)
    parser.add_argument("--image", metavar="FILE", help="your own content frame instead of the first stage's")
    parser.add_argument("--negative-prompt", metavar="TEXT")
    options.add_size(parser, options.SIZE_OF_A_CALL)
    parser.add_argument(
        "--size", type=options.positive, metavar="N", help="256, 512 or 1024: the aspect bucket of --image, else square"
    )
    parser.add_argument(
        "--num-frames", type=options.positive, help="more than the model's are made by further clips (default: its own)"
    )
    parser.add_argument("--direction", choices=("forward", "both"), help="of further clips (default: forward)")
    parser.add_argument(
        "--match-colours", action="store_true", default=None, help="hold further clips to the first one's colours"
    )
    options.add_steering(parser)
    parser.add_argument(
        "--motion-score", type=float, metavar="X", help="how much moves, for a model trained with clip_conditioning"
    )
    parser.add_argument("--loop", action="store_true", default=None, help="play the clip forward, then backward")
    parser.add_argument(
        "--num-videos", type=options.positive, default=1, metavar="N", help="clips, of SEED, SEED + 1 ... (default: 1)"
    )
    parser.add_argument(
        "--interpolate", type=options.positive, metavar="N", help="2 or 4 times the frames a second, by ffmpeg"
    )
    parser.add_argument("--grid", action="store_true", help="with --num-videos: all clips side by side in one")
    parser.add_argument(
        "--preview-every", type=options.positive, metavar="N", help="every N steps, four frames in PATH-preview.png"
    )
    parser.add_argument("--num-inference-steps", type=options.positive, help="(default: the model's)")
    parser.add_argument("--guidance-scale", type=float, help="(default: the model's)")
    parser.add_argument("--seed", type=options.not_negative, default=0)
    options.add_model(parser, ", hub id, or another model: svd, svd-tiny, svd:DIR, svd:random, ltx, wan")
    options.add_backend(parser)
    options.add_compile(parser)
    options.add_quantise(parser)
    for name, source in NAMED.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="NAME", help=f"{source} (default: the model's)")
    first_stage = "of the first stage (default: its own)"
    parser.add_argument("--content-num-inference-steps", type=options.positive, help=first_stage)
    parser.add_argument("--content-guidance-scale", type=float, help=first_stage)
    parser.add_argument(
        "--clean-caption",
        action=argparse.BooleanOptionalAction,
        help="clean the prompt as PixArt's captions were (default: as the model says)",
    )
    for name, value_type in SAMPLING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=value_type, help=f"{SAMPLING_HELP[name]} (Reducio)")
    for name, value_type in SVD_OWN.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=value_type, help=f"{SVD_HELP[name]} (SVD)")
    options.add_encoding(parser)
    options.add_progress(parser)


def run(arguments: argparse.Namespace) -> Printed:
    from ..media.ffmpeg import encoder
    from ..media.frame_interpolation import check_factor
    from ..media.image_files import read_image
    from ..media.video_files import TRIAL_RATE, check_output_path, numbered
    from ..system.paths import check_not_input, named

    several = arguments.num_videos > 1 and not arguments.grid
    first_path = numbered(arguments.out, 1)[0] if several else arguments.out
    check_not_input(first_path, arguments.image)
    check_output_path(first_path, trial=False)
    encoder(arguments.encoding)
    if arguments.grid and arguments.num_videos < 2:
        raise ReducioError(f"--grid: shows several clips, --num-videos is {arguments.num_videos}")
    if arguments.interpolate is not None:
        check_factor(arguments.interpolate)
    # A broken file is refused now, not after the model has loaded.
    picture = None if arguments.image is None else read_image(arguments.image).shape[:2]
    if arguments.size is not None:
        arguments.height, arguments.width = _size(arguments, picture)
    from ..pipelines import registry
    from ..pipelines.call import validation
    from ..pipelines.generate import generate
    from ..pipelines.parallel import count_processes
    from ..system.devices import resolve_device

    model = registry.find(arguments.model, arguments.variant)
    rate = (arguments.fps or model.fps or TRIAL_RATE) * (arguments.interpolate or 1)
    check_output_path(first_path, rate, arguments.height, arguments.width, encoding=arguments.encoding)
    validation.check_count("--num-videos", arguments.num_videos, validation.MAX_VIDEOS)
    for path in numbered(arguments.out, arguments.num_videos)[1:] if several else ():
        check_output_path(path, trial=False)

    kwargs = {
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative_prompt,
        "image": arguments.image,
        "model": arguments.model,
        "height": arguments.height,
        "width": arguments.width,
        "num_frames": arguments.num_frames,
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale,
        "seed": arguments.seed,
        "backend": arguments.backend,
        "compile": arguments.compile,
        "quantise": arguments.quantise,
        "dtype": arguments.dtype,
        "device": arguments.device,
        **{name: getattr(arguments, name) for name in (*NAMED, "clean_caption", *SAMPLING, *SVD_OWN)},
        "content_kwargs": _first_stage(arguments),
        **{name: getattr(arguments, name) for name in (*REDUCIO_OWN, "match_colours", "loop", "preview_every")},
        "num_videos_per_prompt": arguments.num_videos if arguments.num_videos > 1 else None,
    }
    if arguments.preview_every is not None:
        out_path = named(arguments.out)
        kwargs["callback_on_step_end"] = Preview(out_path.with_name(f"{out_path.stem}-preview.png"))
    started = time.perf_counter()
    processes = count_processes()
    if processes > 1 and arguments.device in (None, "cuda") and resolve_device(arguments.device).type == "cuda":
        kwargs["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    kwargs["parallel"] = True if processes > 1 else None
    given = {k: v for k, v in kwargs.items() if v is not None}
    out = generate(**given, progress=arguments.progress)
    if processes > 1 and os.environ["RANK"] != "0":
        return NOTHING  # all processes have the clip, the first one writes it
    if arguments.interpolate is not None:
        out = out.interpolated(arguments.interpolate)
    if arguments.grid:
        out = out.as_grid()
    paths = out.save(arguments.out, encoding=arguments.encoding)
    paths = paths if isinstance(paths, list) else [paths]
    timings = {**out.timings, "total": time.perf_counter() - started}  # the total includes loading

    frames, height, width = out.frames.shape[-4:-1]
    shown = {name: value for name, value in kwargs.items() if name != "callback_on_step_end"}
    config = {name: model.call_defaults.get(name) if value is None else value for name, value in shown.items()}
    config |= {"num_frames": frames, "height": height, "width": width, "seed": out.seed}
    config["model"] = config["model"] or "the embedded default"
    result = {
        "path": arguments.out,
        "paths": [str(path) for path in paths],
        "seeds": out.seeds,
        "fps": out.fps,
        "seed": out.seed,
        "encoder": out.encoder,
        "config": config,
        "timings": timings,
    }
    lines = [f"  {name:<20} {value}" for name, value in config.items() if value is not None]
    lines += ["seconds"] + [f"  {name:<20} {seconds:.2f}" for name, seconds in timings.items()]
    shape = f"{frames} frames of {height}x{width} at {out.fps:g} frames a second ({out.encoder})"
    lines += [f"wrote {path}: {shape}" for path in paths]
    return result, lines


class Preview:
    """A step callback that writes a film strip of the unfinished clip to a file; each one replaces the one before."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        from ..media.contact_sheet import film_strip
        from ..media.image_files import write_image

        if (frames := tensors["frames"]) is not None:
            write_image(film_strip(frames), self.path)


def _first_stage(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Arguments for the text-to-image pipeline: the options that begin with --content-."""
    kwargs = {name: getattr(arguments, f"content_{name}") for name in FIRST_STAGE}
    return {name: value for name, value in kwargs.items() if value is not None} or None


def _size(arguments: argparse.Namespace, picture: tuple[int, int] | None) -> tuple[int, int]:
    """--size as height and width: the aspect bucket of the picture, or a square if there is no picture."""
    from ..media.aspect_buckets import buckets, choose_size

    if arguments.height is not None or arguments.width is not None:
        both = f"--height {arguments.height} --width {arguments.width}"
        raise ReducioError(f"--size {arguments.size} and {both}: give one or the other")
    buckets(arguments.size)  # refuses a number that has no table
    return choose_size(None, None, (arguments.size, arguments.size), [picture] if picture else ())
