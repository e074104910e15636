"""Files of latents: `reducio-fast encode` writes one, and a clip whose decoding runs out of memory leaves one, so that
`reducio-fast decode` can finish it.

One safetensors file: `latents` float32 [N, ...], `content` uint8 [N, H, W, 3] (the content frames), and as metadata the
frame rate, the seeds and the family.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..system.atomic_files import written_whole
from ..system.cache_folder import root
from ..system.errors import ReducioError, first_line
from ..system.paths import check_output_folder, expanded, is_folder, printable
from .layouts import REDUCIO

FORMAT = "reducio-fast latents 1"


@dataclass(frozen=True, slots=True)
class Latents:
    latents: Tensor
    content: np.ndarray
    fps: float
    seeds: list[int]
    pipeline: str = REDUCIO.pipeline  # the family, by the `_class_name` of its folders


def check_path(path: str | os.PathLike[str]) -> Path:
    """Check before any work whether `save` can write there. Raises ReducioError."""
    path = expanded(path)
    if path.suffix != ".safetensors" or is_folder(path):
        raise ReducioError(f"latents are kept in a .safetensors file, not in {printable(path)}")
    check_output_folder(path)
    return path


def save(path: Path, clips: Latents) -> None:
    """Write the file, whole or not at all. Raises OSError where it cannot be written."""
    tensors = {
        "latents": clips.latents.detach().float().cpu().contiguous(),
        "content": torch.from_numpy(np.ascontiguousarray(clips.content)),
    }
    about = {
        "format": FORMAT,
        "fps": json.dumps(clips.fps),
        "seeds": json.dumps(clips.seeds),
        "pipeline": clips.pipeline,
    }
    with written_whole(path) as temporary:
        save_file(tensors, temporary, about)


def load(path: str | os.PathLike[str]) -> Latents:
    """Read what `save` has written. Raises ReducioError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ReducioError(f"{path}: holds {about.get('format', 'no latents')!r}, must hold {FORMAT!r}")
            latents, content = file.get_tensor("latents"), file.get_tensor("content")
        fps, seeds = json.loads(about["fps"]), json.loads(about["seeds"])
    except FileNotFoundError:
        raise ReducioError(f"{path}: no such file") from None
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        if isinstance(error, ReducioError):
            raise
        raise ReducioError(f"{path}: is no file of latents ({first_line(error)})") from error
    as_saved = {
        "latents": latents.is_floating_point() and latents.ndim > 0 and len(latents) == len(content),
        "content": content.dtype == torch.uint8 and content.ndim == 4 and content.shape[3] == 3 and content.numel() > 0,
        "fps": type(fps) in (int, float) and 0 < fps < math.inf,
        "seeds": isinstance(seeds, list) and all(type(seed) is int for seed in seeds),
    }
    if wrong := [name for name, is_right in as_saved.items() if not is_right]:
        raise ReducioError(f"{path}: is no file of latents ({', '.join(wrong)} not as `encode` writes them)")
    return Latents(latents, content.numpy(), float(fps), seeds, about.get("pipeline", REDUCIO.pipeline))


def rescue(
    clips: list[tuple[Tensor, np.ndarray]], seeds: list[int], fps: float, folder: Path | None, pipeline: str
) -> str:
    """Save latents and content frames in `folder`, by default within the cache folder; returns the end of an error line
    that names the file."""
    name = f"clip-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-seed{seeds[0]}.safetensors"
    path = (folder or root() / "latents") / name
    latents, frames = torch.cat([z for z, _ in clips]), np.stack([frame for _, frame in clips])
    try:
        save(path, Latents(latents, frames, fps, seeds, pipeline))
    except OSError as error:
        return f"the latents could not be kept in {path} either ({error.strerror})"
    return f"the latents are kept, `reducio-fast decode {path} --out clip.mp4` makes frames of them"
