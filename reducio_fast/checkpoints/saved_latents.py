"""Files of latents: `reducio-fast encode` writes one, and a clip whose decoding runs out of memory leaves one, so that
`reducio-fast decode` can finish it.

One safetensors file: `latents` float32 [N, ...], `content` uint8 [N, H, W, 3] (the content frames), and as metadata the
frame rate, the seeds, the family, the model's name, marks of its autoencoder, and what the call asked of the decode.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from .networks import is_ours

FORMAT = "reducio-fast latents 1"
ROUNDING = 0.005  # the relative error of a weight that was rounded to bfloat16 or float16, with some room
# What a call can ask of its decode, and whether a value of it is one.
DECODING = {
    "motion_strength": lambda value: type(value) in (int, float) and 0 <= value <= 4,
    "keep_content": lambda value: type(value) is bool,
    "loop": lambda value: type(value) is bool,
    "decode_chunk_size": lambda value: value is None or (type(value) is int and value > 0),
}


@dataclass(frozen=True, slots=True)
class Latents:
    latents: Tensor
    content: np.ndarray
    fps: float
    seeds: list[int]
    pipeline: str = REDUCIO.pipeline  # the family, by the `_class_name` of its folders
    source: str | None = None  # the model that made them: a folder or a hub id, where it is known
    vae: dict[str, Any] | None = None  # `marks` of its autoencoder; None in older files
    decoding: dict[str, Any] = field(default_factory=dict)  # of DECODING; what is absent has the call's default


def marks(vae: Any) -> dict[str, Any] | None:
    """Marks by which `check_vae` recognises an autoencoder of ours in any dtype: its configuration and the first number
    of each weight. None for a network that is not ours."""
    if not is_ours(vae):
        return None
    fields: Any = vae.config
    config = {name: value for name, value in fields.to_dict().items() if not name.startswith("_")}
    firsts = {name: weight[(0,) * weight.ndim].item() for name, weight in sorted(vae.state_dict().items())}
    return json.loads(json.dumps({"config": config, "weights": firsts}))


def check_vae(file: str | os.PathLike[str], clips: Latents, vae: Any) -> None:
    """Raise ReducioError if the latents of `file` are known to be of another autoencoder than `vae`."""
    own, kept = marks(vae), clips.vae
    if own is None or kept is None:
        return
    same = own["config"] == kept["config"] and own["weights"].keys() == kept["weights"].keys()
    pairs = [(value, kept["weights"][name]) for name, value in own["weights"].items()] if same else []
    if not same or not all(math.isclose(a, b, rel_tol=ROUNDING, abs_tol=1e-6) for a, b in pairs):
        named = "the model that made them" if clips.source is None else clips.source
        raise ReducioError(f"{file}: holds latents of another autoencoder; name {named} (--model)")


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
        "vae": json.dumps(clips.vae),
        "decoding": json.dumps(clips.decoding),
    }
    if clips.source is not None:
        about["source"] = clips.source
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
        vae, decoding = json.loads(about.get("vae", "null")), json.loads(about.get("decoding", "{}"))
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
        "vae": vae is None or _are_marks(vae),
        "decoding": isinstance(decoding, dict)
        and all(name in DECODING and DECODING[name](value) for name, value in decoding.items()),
    }
    if wrong := [name for name, is_right in as_saved.items() if not is_right]:
        raise ReducioError(f"{path}: is no file of latents ({', '.join(wrong)} not as `encode` writes them)")
    pipeline, source = about.get("pipeline", REDUCIO.pipeline), about.get("source")
    return Latents(latents, content.numpy(), float(fps), seeds, pipeline, source, vae, decoding)


def _are_marks(value: Any) -> bool:
    weights = value.get("weights") if isinstance(value, dict) else None
    return isinstance(weights, dict) and "config" in value and all(type(w) in (int, float) for w in weights.values())


def rescue(clips: Latents, folder: Path | None) -> str:
    """Save the clips in `folder`, by default within the cache folder; returns the end of an error line that names the
    file and the command that decodes it."""
    name = f"clip-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-seed{clips.seeds[0]}.safetensors"
    path = (folder or root() / "latents") / name
    try:
        save(path, clips)
    except OSError as error:
        return f"the latents could not be kept in {path} either ({error.strerror})"
    model = "MODEL" if clips.source is None else shlex.quote(clips.source)
    command = f"reducio-fast decode {shlex.quote(str(path))} --model {model} --out clip.mp4"
    return f"the latents are kept, `{command}` makes frames of them"
