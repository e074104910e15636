"""The video autoencoder without the rest of a model: the only part of Reducio whose weights are public."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..reference import ReducioVAE, VAEConfig
from ..system.errors import ReducioError
from ..system.paths import entries, expanded, is_file, status
from . import convert, hub, networks
from .foreign_files import read_weights
from .strict_files import CONFIG, INDEX, PICKLES, read_json

# Settings that a whole model has in its index; the release was trained on clips of 256 pixels at 16 frames per second.
DEFAULTS: dict[str, Any] = {"sample_height": 256, "sample_width": 256, "fps": 16}


def load_vae(
    source: str | os.PathLike[str], dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[ReducioVAE, dict[str, Any]]:
    """Load a frozen `ReducioVAE`, and the settings DEFAULTS with the model's values.

    source: a model folder, the component folder of a VAE, a weights file of the release (`.ckpt`, read without running
    its code) or a folder that holds one, or a hub id. `dtype` None keeps the stored dtype. Raises ReducioError, in one
    line, for anything else.
    """
    path = expanded(source, "model")
    if is_file(path, "model"):
        return _from_file(path, dtype, device), DEFAULTS
    if str(source) == hub.RELEASE and status(path) is None:
        return _from_file(hub.find_weights(source, argument="model"), dtype, device), DEFAULTS
    folder = hub.find_model(source)
    if is_file(folder / INDEX):
        index = read_json(folder / INDEX)
        settings = {name: index.get(name, value) for name, value in DEFAULTS.items()}
        return networks.load_model(ReducioVAE, VAEConfig, folder / "vae", dtype, device), settings
    if is_file(folder / CONFIG) and "_class_name" in read_json(folder / CONFIG):
        return networks.load_model(ReducioVAE, VAEConfig, folder, dtype, device), DEFAULTS
    files = [file for file in entries(folder) if file.suffix in (*PICKLES, ".safetensors")]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or f"no {INDEX} and no weights"
        raise ReducioError(f"model: {folder} holds {names}; name a model folder or one file of weights")
    return _from_file(files[0], dtype, device), DEFAULTS


def _from_file(path: Path, dtype: torch.dtype | None, device: str | torch.device) -> ReducioVAE:
    tensors, _ = read_weights(path)
    component = convert.as_vae(path, tensors)
    config = VAEConfig.from_dict(component.config)
    cast = {n: t.to(dtype) if dtype is not None and t.is_floating_point() else t for n, t in component.tensors.items()}
    return networks.build(lambda: ReducioVAE(config), cast, path, device)
