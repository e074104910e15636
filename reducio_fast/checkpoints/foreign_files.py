"""Weights as other projects publish them, pickles included, read without running any code."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..system.errors import ReducioError, first_line
from ..system.paths import entries, is_file, is_folder, status
from .strict_files import CONFIG, INDEX, PICKLES, load_tensors, read_json, weight_files


def read_weights(path: Path, component: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a weights file or a component folder by name, and the folder's configuration ({} for a file).

    From the folder of a whole pipeline `component` is read; diffusers' name of a content encoder is "vae". Without
    `component` it is the transformer, or the vae if there is no transformer.
    """
    if status(path) is None:
        raise ReducioError(f"{path}: no such file or folder")
    if not is_folder(path):
        return _read_file(path), {}
    if is_file(path / INDEX):
        has = read_json(path / INDEX)
        if component in has:
            return read_weights(path / component)
        is_vae = component in ("vae", "content_encoder") or "transformer" not in has
        return read_weights(path / ("vae" if is_vae else "transformer"))
    stated = read_json(path / CONFIG) if is_file(path / CONFIG) else {}
    if files := weight_files(path):
        return {name: tensor for file in files for name, tensor in _read_file(file).items()}, stated
    files = sorted(path.glob("*.safetensors")) or [p for p in entries(path) if p.suffix in PICKLES]
    if len(files) != 1:
        names = ", ".join(f.name for f in files) or "none"
        raise ReducioError(f"{path}: must hold one file of weights, holds {names}; name the file itself")
    return _read_file(files[0]), stated


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_tensors(path)
    loaded = _unpickle(path)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping) or not state:
        raise ReducioError(f"{path}: holds a {type(state).__name__}, must hold tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ReducioError(f"{path}: entry {name!r} is a {type(value).__name__}, must be a tensor")
    if all(name.startswith("module.") for name in state):  # written by DistributedDataParallel
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return dict(state)


def _unpickle(path: Path) -> Any:
    """torch.load, restricted to tensors and plain values; memory-mapped where the file allows it."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"  # torch's format since 1.6; older files cannot be mapped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # warnings about old pickles: they are read or refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError as error:
        raise ReducioError(f"{path}: not readable ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        # torch's own message explains at length how to switch the restriction off.
        class_match = re.search(r"(?:GLOBAL|[Cc]lass) ([\w.]+)", str(error))
        reason = f"asks for {class_match[1]}" if class_match else "cannot be read without running what it says"
        raise ReducioError(f"{path}: refused, a pickle of more than tensors: it {reason}") from error
    except Exception as error:  # a damaged file raises one of six types
        raise ReducioError(f"{path}: damaged ({first_line(error)})") from error
