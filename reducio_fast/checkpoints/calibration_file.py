"""calibration.safetensors of a model folder: how large each channel before a quantised convolution becomes.

One float32 tensor [C] a convolution, by its path in the autoencoder. The header's metadata say of which weights they
are, by the SHA-256 of the autoencoder's files: scales of other weights would clip a clip's values in silence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..system import atomic_files
from ..system.checksum import file_sha256
from ..system.errors import ReducioError
from . import strict_files

FILE = "calibration.safetensors"
FINGERPRINT = "vae_sha256"


def fingerprint(folder: Path) -> str:
    """Of the autoencoder's weights in a model folder. Raises ReducioError where there are none."""
    files = strict_files.weight_files(folder / "vae")
    if not files:
        raise ReducioError(f"{folder / 'vae'}: no weights in safetensors")
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()


def write(folder: Path, largest: Mapping[str, Tensor]) -> Path:
    """Put the calibration of the model in `folder` there. Raises ReducioError where that cannot be written."""
    target, told = folder / FILE, {"format": "pt", FINGERPRINT: fingerprint(folder)}
    try:
        with atomic_files.written_whole(target) as file:
            save_file({path: x.detach().float().cpu().contiguous() for path, x in largest.items()}, file, metadata=told)
    except OSError as error:
        raise ReducioError(f"{target}: cannot be written: {error}") from error
    return target


def read(folder: Path) -> dict[str, Tensor]:
    """The calibration of the model in `folder`. Raises ReducioError where there is none, or that of another model."""
    path = folder / FILE
    if not path.is_file():
        raise ReducioError(f"quantise: {folder} has no {FILE}; make it by: reducio-fast calibrate --model {folder}")
    strict_files.check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        told = (file.metadata() or {}).get(FINGERPRINT)
    if told != fingerprint(folder):
        raise ReducioError(f"{path}: is the calibration of another model; reducio-fast calibrate --model {folder}")
    return strict_files.load_tensors(path, torch.float32)


def check(folder: Path, largest: Mapping[str, Tensor], expected: Mapping[str, int]) -> None:
    """Raises ReducioError unless there are positive numbers for exactly these convolutions, paths and channels."""
    path = folder / FILE
    if set(largest) != set(expected):
        names = ", ".join(sorted(set(largest) ^ set(expected))[:3])
        raise ReducioError(f"{path}: does not fit the model: {names}")
    for name, x in largest.items():
        if x.shape != (expected[name],) or not bool(torch.isfinite(x).all()) or bool((x < 0).any()) or not x.any():
            raise ReducioError(f"{path}: {name} must be {expected[name]} numbers that are not negative, not all zero")
