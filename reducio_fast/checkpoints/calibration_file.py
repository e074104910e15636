"""calibration.safetensors of a model folder: the largest magnitude of each input channel of a quantised convolution.

One float32 tensor [C] per convolution, named by its path in the autoencoder. The header's metadata identify the weights
by the SHA-256 of the autoencoder's files, because scales of other weights would clip values silently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..system import atomic_files
from ..system.checksum import file_sha256
from ..system.errors import ReducioError
from ..system.paths import is_file
from . import networks, strict_files

FILE = "calibration.safetensors"
FINGERPRINT = "vae_sha256"


def fingerprint(folder: Path) -> str:
    """SHA-256 of the autoencoder's weights in a model folder. Raises ReducioError if there are none."""
    files = strict_files.weight_files(folder / "vae")
    if not files:
        raise ReducioError(f"{folder / 'vae'}: no weights in safetensors")
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()


def write(folder: Path, largest: Mapping[str, Tensor]) -> Path:
    """Write the calibration of the model in `folder` into it. Raises ReducioError if the file cannot be written."""
    target, metadata = folder / FILE, {"format": "pt", FINGERPRINT: fingerprint(folder)}
    try:
        with atomic_files.written_whole(target) as file:
            save_file({path: x.detach().float().cpu().contiguous() for path, x in largest.items()}, file, metadata)
    except OSError as error:
        raise ReducioError(f"{target}: cannot be written: {error}") from error
    return target


def read(folder: Path) -> dict[str, Tensor]:
    """The calibration of the model in `folder`. Raises ReducioError if there is none or it is of another model."""
    path = folder / FILE
    if not is_file(path):
        raise ReducioError(f"quantise: {folder} has no {FILE}; make it by: reducio-fast calibrate --model {folder}")
    strict_files.check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        stored = (file.metadata() or {}).get(FINGERPRINT)
    if stored != fingerprint(folder):
        raise ReducioError(f"{path}: is the calibration of another model; reducio-fast calibrate --model {folder}")
    return strict_files.load_tensors(path, torch.float32)


def of_same_weights(folders: Iterable[Path], vae: nn.Module) -> dict[str, Tensor]:
    """The calibration in the first of `folders` that has a valid one for weights equal to those of `vae`, apart from a
    cast to another dtype; {} if none has."""
    for folder in folders:
        if (folder / FILE).is_file():
            try:
                largest = read(folder)
                stored = networks.load_model(type(vae), type(vae.config), folder / "vae").state_dict()
            except ReducioError:  # of other weights, or damaged: it would be refused there too
                continue
            if _equal_but_cast(vae.state_dict(), stored):
                return largest
    return {}


def _equal_but_cast(weights: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> bool:
    if weights.keys() != stored.keys():
        return False
    return any(
        all(torch.equal(x.cpu().float(), stored[name].to(dtype).float()) for name, x in weights.items())
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def check(folder: Path, largest: Mapping[str, Tensor], expected: Mapping[str, int]) -> None:
    """Raise ReducioError unless `largest` has exactly the convolutions of `expected` (path: channels), and for each
    convolution finite numbers that are not negative and not all zero."""
    path = folder / FILE
    if set(largest) != set(expected):
        names = ", ".join(sorted(set(largest) ^ set(expected))[:3])
        raise ReducioError(f"{path}: does not fit the model: {names}")
    for name, x in largest.items():
        if x.shape != (expected[name],) or not bool(torch.isfinite(x).all()) or bool((x < 0).any()) or not x.any():
            raise ReducioError(f"{path}: {name} must be {expected[name]} numbers that are not negative, not all zero")
