"""Folders of diffusers pipelines, loaded one component at a time."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch

from ..system.errors import ReducioError, first_line
from ..system.paths import expanded, is_folder
from .hub import find_model, not_fetched
from .networks import LIBRARIES, load_foreign
from .strict_files import INDEX, read_json, write_json

# Key of a pipeline's index: {argument: default} for its call through this package. diffusers skips keys that begin
# with an underscore.
CALL_DEFAULTS = "_call_defaults"


def find_text_to_image(name: str | os.PathLike[str]) -> Path:
    """The folder of a diffusers text-to-image pipeline, or the local copy of that hub repository `owner/name`.

    From the hub only the files that the pipeline names are fetched, as safetensors. Raises ReducioError if there is
    neither; the message says what to download.
    """
    path = expanded(name, "text_to_image")
    if is_folder(path, "text_to_image") or str(name).count("/") != 1:
        return find_model(name, "text_to_image")
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.constants import HF_HUB_OFFLINE

    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # without a network it would log three lines besides our one-line error
    try:
        return Path(DiffusionPipeline.download(str(name), use_safetensors=True, local_files_only=HF_HUB_OFFLINE))
    except Exception as error:  # the hub client's errors, and those of its HTTP library, have no class in common
        raise not_fetched("text_to_image", str(name), error) from error
    finally:
        diffusers_logging.set_verbosity(verbosity)


def load_text_to_image(
    folder: Path,
    shared: dict[str, Any],
    dtype: torch.dtype,
    device: str | torch.device,
    loaded: dict[Path, Any] | None = None,
) -> Any:
    """Load a diffusers pipeline folder. A component without a sub-folder of its own is taken from `shared`.

    `loaded`: components by the folder they came from; a component in the same folder is reused, not loaded again.
    The pipeline's attribute `call_defaults` has the index's defaults for its call, under CALL_DEFAULTS.
    Components are loaded one by one instead of by the pipeline's `from_pretrained`, so that loading is strict and
    imports only what they need.
    """
    index, cls = read_json(folder / INDEX), _pipeline_class(folder)
    components: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not _is_component(value):
            components[name] = value  # a plain setting of the pipeline
        elif value[0] is None:
            components[name] = None
        elif (known := (loaded or {}).get((folder / name).resolve())) is not None:
            components[name] = known
        elif is_folder(folder / name):
            components[name] = load_foreign(_library(value[0]), value[1], folder / name, dtype, device)
        elif shared.get(name) is not None:
            components[name] = shared[name]
        else:
            raise ReducioError(f"{folder}: {name} has no folder here and the model shares no component of that name")
    try:
        pipeline = cls(**components)
    except Exception as error:  # any: a pipeline computes with its components' configurations
        raise ReducioError(f"{folder / INDEX}: {cls.__name__} cannot be built: {first_line(error)}") from error
    pipeline.call_defaults = index.get(CALL_DEFAULTS) or {}
    return pipeline


def without_parts(folder: Path) -> Any:
    """An object of the pipeline's class without components, to inspect the arguments of its call."""
    cls = _pipeline_class(folder)
    return cls.__new__(cls)


def _pipeline_class(folder: Path) -> Any:
    class_name = read_json(folder / INDEX).get("_class_name")
    cls = getattr(importlib.import_module("diffusers"), str(class_name), None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise ReducioError(f"{folder / INDEX}: names the pipeline {class_name!r}, which diffusers does not have")
    return cls


def save_text_to_image(pipeline: Any, folder: Path, shared: dict[str, Any]) -> None:
    """Write a diffusers pipeline, except components that are the same objects as in `shared`; the index names all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, component in pipeline.components.items():
        if component is not None and component is not shared.get(name):
            component.save_pretrained(folder / name)
    settings = {n: list(v) if isinstance(v, tuple) else v for n, v in pipeline.config.items() if n != "_name_or_path"}
    own = {CALL_DEFAULTS: pipeline.call_defaults} if getattr(pipeline, "call_defaults", None) else {}
    write_json(folder / INDEX, {"_class_name": type(pipeline).__name__} | own | settings)


def _library(name: str) -> str:
    """The module to import for a library's name in an index. diffusers names the modules of its own pipelines without
    their package: the library of a safety checker is stable_diffusion."""
    pipelines = importlib.import_module("diffusers.pipelines")
    return f"diffusers.pipelines.{name}" if name not in LIBRARIES and hasattr(pipelines, name) else name


def _is_component(value: Any) -> bool:
    """In a diffusers index a component is a pair [library, class], or [null, null] if it is left out."""
    return isinstance(value, list) and len(value) == 2 and all(v is None or isinstance(v, str) for v in value)
