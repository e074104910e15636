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

from . import checkpoints, content, encoders, hub
from .encoders import SemanticEncoder
from .errors import ReducioError
from .reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig

SETTINGS = ("fps", "sample_height", "sample_width", "clean_caption", "content_scaling_factor")
# In the order they are loaded: text_to_image comes last because it may share the others.
COMPONENTS = (
    "vae",
    "transformer",
    "scheduler",
    "text_encoder",
    "tokenizer",
    "image_encoder",
    "content_encoder",
    "text_to_image",
)
OPTIONAL = ("text_encoder", "tokenizer", "image_encoder", "content_encoder", "text_to_image")
# Name within the diffusers pipeline -> name of the component here that it may share.
SHARED = {"text_encoder": "text_encoder", "tokenizer": "tokenizer", "vae": "content_encoder"}


def read_model(folder: Path, given: dict[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """All components and settings of a model folder, by name.

    A component in `given` is taken from there, unread; a folder or hub id given for one is where it is read from.
    """
    path = folder / checkpoints.INDEX
    index = checkpoints.read_json(path)
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
            parts[name] = _read_source(name, sources[name], parts, loaded, dtype, device)
        elif name not in parts:
            parts[name] = _read_component(name, index.get(name), folder, parts, loaded, dtype, device)
    return parts


def write_model(target: Path, parts: dict[str, Any]) -> None:
    """Write what `read_model` reads, each weight in the dtype it has; the folder appears whole or not at all."""
    index: dict[str, Any] = {"_class_name": "ReducioPipeline", "_reducio_fast_version": checkpoints.version()}
    index |= {name: _library_and_class(name, parts[name]) for name in COMPONENTS}
    settings = {name: parts[name] for name in SETTINGS if name in parts}  # what is not said has its default when read
    index |= settings
    with checkpoints.new_folder(target) as folder, checkpoints.quiet_transformers():
        for name in COMPONENTS:
            component = parts[name]
            if component is None:
                continue
            if name == "text_to_image":
                content.save_text_to_image(component, folder / name, _shared(parts))
            elif isinstance(component, ReducioVAE | ReducioDiT):
                checkpoints.save_model(component, folder / name)
            else:
                component.save_pretrained(folder / name)
        checkpoints.write_json(folder / checkpoints.INDEX, index)
        if (target / hub.CARD).is_file():  # the card of the model that is replaced
            shutil.copyfile(target / hub.CARD, folder / hub.CARD)
        components = {name: parts[name] for name in COMPONENTS}
        hub.write_card(folder, components, settings, target.name)


def _read_source(
    name: str,
    source: str | os.PathLike[str],
    parts: dict[str, Any],
    loaded: dict[Path, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """A component from a folder or hub id of its own: alone there, or in a diffusers pipeline that holds one."""
    if name in ("vae", "transformer", "scheduler"):
        raise ReducioError(
            f"{name}: {str(source)!r} given; only encoders and text_to_image can be named, give an object"
        )
    config = parts["transformer"].config
    if name == "text_encoder":
        place = encoders.find_text_encoder(source).resolve()
        loaded[place] = encoders.load_text_encoder(source, dtype, device, config.caption_channels)
        return loaded[place]
    if name == "content_encoder":
        place = encoders.find_content_encoder(source).resolve()
        loaded[place] = encoders.load_content_encoder(source, dtype, device, config.content_channels)
        return loaded[place]
    if name == "image_encoder":
        return SemanticEncoder.from_pretrained(source, dtype, device, config.semantic_channels)
    if name == "tokenizer":
        return encoders.load_tokenizer(source)
    return content.load_text_to_image(content.find_text_to_image(source), _shared(parts), dtype, device, loaded)


def _read_component(
    name: str,
    entry: Any,
    folder: Path,
    parts: dict[str, Any],
    loaded: dict[Path, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    if entry is None or entry == [None, None]:
        if name in OPTIONAL:
            return None
        raise ReducioError(f"{folder / checkpoints.INDEX}: {name} is missing")
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)):
        raise ReducioError(f"{folder / checkpoints.INDEX}: {name} must be [library, class], is {entry!r}")
    if name in OPTIONAL and not (folder / name).is_dir():
        raise ReducioError(f"{folder / name}: no such folder; give {name}=FOLDER_OR_HUB_ID, or None to do without")
    if name == "vae":
        return checkpoints.load_model(ReducioVAE, VAEConfig, folder / name, dtype, device)
    if name == "transformer":
        return checkpoints.load_model(ReducioDiT, DiTConfig, folder / name, dtype, device)
    if name == "image_encoder":
        return SemanticEncoder.from_pretrained(folder / name, dtype, device)
    if name == "text_to_image":
        return content.load_text_to_image(folder / name, _shared(parts), dtype, device, loaded)
    return checkpoints.load_foreign(entry[0], entry[1], folder / name, dtype, device)


def _shared(parts: dict[str, Any]) -> dict[str, Any]:
    return {inner: parts[outer] for inner, outer in SHARED.items()}


def _library_and_class(name: str, component: Any) -> list[str | None]:
    if component is None:
        return [None, None]
    if isinstance(component, ReducioVAE | ReducioDiT):
        return ["reducio_fast", type(component).__name__]
    if isinstance(component, SemanticEncoder):
        return ["reducio_fast", "SemanticEncoder"]
    library, class_name = type(component).__module__.split(".")[0], type(component).__name__
    if library not in checkpoints.LIBRARIES:
        raise ReducioError(
            f"{name}: a {class_name} cannot be saved; it is of none of {', '.join(checkpoints.LIBRARIES)}"
        )
    # Which pipeline a first stage is stands in its own index; in this one, who loads it with what it shares.
    return ["reducio_fast", "TextToImage"] if name == "text_to_image" else [library, class_name]
