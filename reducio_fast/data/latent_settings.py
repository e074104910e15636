"""`latents.json`: the settings that all files of a folder of latents share, checked where they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..system.atomic_files import written_whole
from ..system.errors import ReducioError, first_line, shown
from ..system.paths import is_file
from ..system.real_numbers import to_float

VERSION = 1
ABOUT = "latents.json"


@dataclass(frozen=True, slots=True)
class About:
    """Settings that all files of a folder share. `encoders` maps a component to the SHA-256 of its files."""

    encoders: dict[str, str]
    clips: str  # SHA-256 of the list of clips
    count: int  # number of clips
    captions: int  # number of distinct captions
    caption_channels: int
    shard_size: int
    seed: int
    dtype: str = "float16"
    version: int = VERSION
    # Settings of the encoders. A folder without the first two was made before they were read from the model, with these
    # values; None means that a folder does not say.
    clean_caption: bool = False
    content_scaling_factor: float = 1.0
    encoder_dtype: str | None = None
    caption_length: int | None = None


_Rule = tuple[Callable[[Any], bool], str]  # whether a value is right, and what is right


def _whole(least: int, most: float = math.inf) -> _Rule:
    span = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
    return lambda value: type(value) is int and least <= value <= most, f"a whole number {span}"


def _or_null(rule: _Rule) -> _Rule:
    return lambda value: value is None or rule[0](value), f"{rule[1]} or null"


_TEXT: _Rule = lambda value: isinstance(value, str), "a text"
_FIELDS: dict[str, _Rule] = {  # of `About`
    "encoders": (lambda value: isinstance(value, dict) and all(map(_TEXT[0], value.values())), "an object of texts"),
    "clips": _TEXT,
    "count": _whole(0, 10**9),
    "captions": _whole(0, 10**9),  # `LatentDataset` keeps a byte of each
    "caption_channels": _whole(1),
    "shard_size": _whole(1),
    "seed": _whole(0, 2**32 - 1),
    "dtype": (lambda value: value == "float16", '"float16"'),
    "clean_caption": (lambda value: isinstance(value, bool), "true or false"),
    "content_scaling_factor": (lambda value: 0 < to_float(value) < math.inf, "a finite number above 0"),
    "encoder_dtype": _or_null(_TEXT),
    "caption_length": _or_null(_whole(1)),
}


def write_about(folder: Path, about: About) -> None:
    """Write `latents.json`. Raises `ReducioError` if the folder was started with other clips, encoders or settings."""
    path = folder / ABOUT
    if is_file(path):
        existing = read_about(folder)
        for name, digest in about.encoders.items():
            if existing.encoders.get(name) != digest:
                raise ReducioError(f"{folder} holds latents of another {name}; extract into another folder")
        wanted = asdict(about)
        for name, value in asdict(existing).items():
            if value is not None and value != wanted[name]:
                what = "other clips or another --size" if name == "clips" else f"another {name}"
                raise ReducioError(f"{folder} was begun with {what}; extract into another folder, or remove it")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(asdict(about), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_about(folder: Path) -> About:
    """Read `latents.json`. Raises `ReducioError` if it is missing, damaged or of another version."""
    path = folder / ABOUT
    again = "run reducio-fast extract again, into another folder"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReducioError(f"{folder} holds no latents (no {ABOUT}); make them with: reducio-fast extract") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ReducioError(f"{path} is damaged: {first_line(error)}; {again}") from error
    if not isinstance(values, dict):
        raise ReducioError(f"{path} is damaged: it holds no JSON object; {again}")
    version = values.get("version")
    if type(version) is not int or version != VERSION:
        raise ReducioError(f"{path} has version {shown(version)}, this reads {VERSION}; {again}")
    try:
        about = About(**values)
    except TypeError as error:
        raise ReducioError(f"{path} is damaged: {first_line(error)}; {again}") from error
    for name, (holds, right) in _FIELDS.items():
        if not holds(value := getattr(about, name)):
            raise ReducioError(f"{path} is damaged: {name} is {shown(value)}, it must be {right}; {again}")
    return about
