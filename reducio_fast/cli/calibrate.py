"""Measure the ranges that quantisation needs, on clips, and keep them in the model folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import options
from .printing import Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder, into which the ranges go")
    parser.add_argument(
        "--videos", nargs="+", metavar="PATH", help="videos and folders of them (default: clips of the toy world)"
    )
    parser.add_argument("--clips", type=options.positive, default=8, help="at most so many (default: 8)")
    parser.add_argument("--size", type=options.positive, help="pixels a side (default: the model's)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")


def run(arguments: argparse.Namespace) -> Printed:
    import torch

    from ..checkpoints import calibration_file, strict_files
    from ..checkpoints.networks import load_model
    from ..evaluation.calibration import calibrate, toy_clips, video_clips
    from ..pipelines.call.validation import check_multiple
    from ..reference import ReducioVAE, VAEConfig
    from ..system.devices import resolve_device

    folder = Path(arguments.model)
    strict_files.check_model_folder(folder)
    index: dict[str, Any] = strict_files.read_json(folder / strict_files.INDEX)
    size = arguments.size or index.get("sample_height", 256)
    check_multiple("--size" if arguments.size else "sample_height", size, 32)
    vae = load_model(ReducioVAE, VAEConfig, folder / "vae", torch.float32, resolve_device(arguments.device)).eval()
    length = vae.config.num_frames
    if arguments.videos:
        clips = video_clips(arguments.videos, size, length, arguments.clips)
    else:
        clips = toy_clips(arguments.clips, size, length)
    largest, count = calibrate(vae, clips)
    path = calibration_file.write(folder, largest)
    values = [float(x.max()) for x in largest.values()]
    result = {"path": str(path), "clips": count, "convolutions": len(largest), "largest": max(values)}
    return result, [f"wrote {path}: {len(largest)} convolutions, {count} clips, largest value {max(values):.1f}"]
