"""How each component of a Reducio folder is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ...checkpoints import diffusers_folders, networks, strict_files
from ...checkpoints.layouts import OPTIONAL, SHARED
from ...reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from ...system.errors import ReducioError
from ..execution.components import Components
from . import encoders
from .encoders import SemanticEncoder


def read_source(
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
    return diffusers_folders.load_text_to_image(
        diffusers_folders.find_text_to_image(source), shared_components(parts), dtype, device, loaded
    )


def read_component(
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
        raise ReducioError(f"{folder / strict_files.INDEX}: {name} is missing")
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)):
        raise ReducioError(f"{folder / strict_files.INDEX}: {name} must be [library, class], is {entry!r}")
    if name in OPTIONAL and not (folder / name).is_dir():
        raise ReducioError(f"{folder / name}: no such folder; give {name}=FOLDER_OR_HUB_ID, or None to do without")
    if name == "vae":
        return networks.load_model(ReducioVAE, VAEConfig, folder / name, dtype, device)
    if name == "transformer":
        return networks.load_model(ReducioDiT, DiTConfig, folder / name, dtype, device)
    if name == "image_encoder":
        return SemanticEncoder.from_pretrained(folder / name, dtype, device)
    if name == "text_to_image":
        return diffusers_folders.load_text_to_image(folder / name, shared_components(parts), dtype, device, loaded)
    return networks.load_foreign(entry[0], entry[1], folder / name, dtype, device)


def shared_components(parts: dict[str, Any]) -> dict[str, Any]:
    return {inner: parts[outer] for inner, outer in SHARED.items()}


def library_and_class(name: str, component: Any) -> list[str | None]:
    if component is None:
        return [None, None]
    if isinstance(component, ReducioVAE | ReducioDiT):
        return ["reducio_fast", type(component).__name__]
    if isinstance(component, SemanticEncoder):
        return ["reducio_fast", "SemanticEncoder"]
    library, class_name = type(component).__module__.split(".")[0], type(component).__name__
    if library not in networks.LIBRARIES:
        raise ReducioError(f"{name}: a {class_name} cannot be saved; it is of none of {', '.join(networks.LIBRARIES)}")
    # Which pipeline a first stage is stands in its own index; in this one, who loads it with what it shares.
    return ["reducio_fast", "TextToImage"] if name == "text_to_image" else [library, class_name]


def check_components(parts: Components) -> None:
    """Raise ReducioError for networks that cannot work together: at once, not by a shape error within a clip."""
    config = parts["transformer"].config
    text_channels = getattr(getattr(parts["text_encoder"], "config", None), "hidden_size", config.caption_channels)
    tower = getattr(parts["image_encoder"], "visual", None)
    semantic_channels = config.semantic_channels if tower is None else tower.ln_post.normalized_shape[0]
    content_config = getattr(parts["content_encoder"], "config", None)
    content_channels = getattr(content_config, "latent_channels", config.content_channels)
    for name, needed, source, channels in (
        ("latent_channels", config.latent_channels, "vae", parts["vae"].config.latent_channels),
        ("caption_channels", config.caption_channels, "text_encoder", text_channels),
        ("semantic_channels", config.semantic_channels, "image_encoder", semantic_channels),
        ("content_channels", config.content_channels, "content_encoder", content_channels),
    ):
        if needed != channels:
            raise ReducioError(f"transformer has {name}={needed}, {source} gives {channels}")
