"""The model folder as a whole: which component lies where, of which class, and what the two stages share.

model_index.json   {"_class_name": "ReducioPipeline", COMPONENT: [library, class], ..., SETTING: value, ...}
vae/ transformer/  ours: config.json and diffusion_pytorch_model.safetensors
README.md          the model card, and pipeline.py for diffusers (see `hub`)
image_encoder/     open_clip: open_clip_config.json and open_clip_model.safetensors
text_to_image/     a diffusers pipeline folder; text_encoder, tokenizer and vae may be absent and are then shared
the others         as their library writes them
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..pipelines.reducio.component_table import library_and_class, read_component, read_source, shared_components
from ..reference import ReducioDiT, ReducioVAE
from ..system import atomic_files
from ..system.errors import ReducioError
from . import diffusers_folders, model_card, networks, strict_files
from .layouts import COMPONENTS, SETTINGS


def read_model(folder: Path, given: dict[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """All components and settings of a model folder, by name.

    A component in `given` is taken from there, unread; a folder or hub id given for one is where it is read from.
    """
    path = folder / strict_files.INDEX
    index = strict_files.read_json(path)
    if index.get("_class_name") != "ReducioPipeline":
        raise ReducioError(f"{path}: is of a {index.get('_class_name')}, not of a ReducioPipeline")
    known = (*COMPONENTS, *SETTINGS)
    for names, where in ((given, "from_pretrained"), (index, str(path))):
        if unknown := sorted(n for n in names if n not in known and not n.startswith("_")):
            raise ReducioError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    sources = {n: v for n, v in given.items() if n in COMPONENTS and isinstance(v, str | os.PathLike)}
    if "text_encoder" in sources and "tokenizer" not in given:
        sources["tokenizer"] = sources["text_encoder"]  # it lies beside the encoder, and no other would fit
    parts = {name: index[name] for name in SETTINGS if name in index}
    parts |= {name: value for name, value in given.items() if name not in sources}
    loaded: dict[Path, Any] = {}  # so that a network which both stages name is in memory once
    for name in COMPONENTS:
        if name in sources:
            parts[name] = read_source(name, sources[name], parts, loaded, dtype, device)
        elif name not in parts:
            parts[name] = read_component(name, index.get(name), folder, parts, loaded, dtype, device)
    return parts


def write_model(target: Path, parts: dict[str, Any]) -> None:
    """Write what `read_model` reads, each weight in the dtype it has; the folder appears whole or not at all."""
    index: dict[str, Any] = {"_class_name": "ReducioPipeline", "_reducio_fast_version": strict_files.version()}
    index |= {name: library_and_class(name, parts[name]) for name in COMPONENTS}
    settings = {name: parts[name] for name in SETTINGS if name in parts}  # what is not said has its default when read
    index |= settings
    with atomic_files.new_folder(target) as folder, networks.quiet_transformers():
        for name in COMPONENTS:
            component = parts[name]
            if component is None:
                continue
            if name == "text_to_image":
                diffusers_folders.save_text_to_image(component, folder / name, shared_components(parts))
            elif isinstance(component, ReducioVAE | ReducioDiT):
                networks.save_model(component, folder / name)
            else:
                component.save_pretrained(folder / name)
        strict_files.write_json(folder / strict_files.INDEX, index)
        if (target / model_card.CARD).is_file():  # the card of the model that is replaced
            shutil.copyfile(target / model_card.CARD, folder / model_card.CARD)
        components = {name: parts[name] for name in COMPONENTS}
        model_card.write_card(folder, components, settings, target.name)
