"""The model folder as a whole: which component lies where, of which class, and what the two stages share.

model_index.json   {"_class_name": "ReducioPipeline", COMPONENT: [library, class], ..., SETTING: value, ...}
vae/ transformer/  ours, and preview_decoder/: config.json and diffusion_pytorch_model.safetensors
README.md          the model card, and pipeline.py for diffusers (see `hub`)
calibration.safetensors   of Reducio's vae, if it was calibrated (see `calibration_file`)
image_encoder/     open_clip: open_clip_config.json and open_clip_model.safetensors
text_to_image/     a diffusers pipeline folder; text_encoder, tokenizer and vae may be absent and are then shared
the others         as their library writes them
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..system import atomic_files
from ..system.errors import ReducioError
from ..system.paths import is_file, is_folder
from . import calibration_file, diffusers_folders, model_card, networks, strict_files
from .layouts import Layout

OURS = "reducio_fast"  # the library that an index names for classes of this package


@dataclass(frozen=True, slots=True)
class Loading:
    """The argument of a component's loader.

    source: the folder or hub id that the caller named for the component; None if it lies in `folder`, with `library`
    and `class_name` from the index. parts: what has been loaded before it. loaded: networks by the folder that they
    came from, so that a network named by two components is in memory once; a loader adds to it.
    """

    folder: Path
    library: str
    class_name: str
    source: str | os.PathLike[str] | None
    layout: Layout
    parts: Mapping[str, Any]
    loaded: dict[Path, Any]
    dtype: torch.dtype
    device: torch.device
    variant: str | None = None  # of the weights' files


Loaders = Mapping[str, Callable[[Loading], Any]]


# Arguments of diffusers' `from_pretrained` that ask for what is always so here: only safetensors are read, and no
# weight is in memory twice.
ALWAYS = ("use_safetensors", "low_cpu_mem_usage")


def read_model(
    folder: Path,
    overrides: dict[str, Any],
    layout: Layout,
    loaders: Loaders,
    dtype: torch.dtype,
    device: torch.device,
    variant: str | None = None,
) -> dict[str, Any]:
    """All components and settings of a model folder, by name.

    An object in `overrides` replaces a component, which is then not read. A folder or hub id in `overrides` is the
    place to read the component from.
    """
    overrides = {n: v for n, v in overrides.items() if not (n in ALWAYS and (v is True or v is None))}
    _check_names(overrides, "from_pretrained", layout)
    index = read_index(folder, layout)
    if needed := [n for n, v in overrides.items() if v is None and n in layout.names and n not in layout.optional]:
        raise ReducioError(f"{needed[0]}: None given, a {layout.pipeline} needs one")
    sources = {n: v for n, v in overrides.items() if n in layout.names and isinstance(v, str | os.PathLike)}
    for component in layout.components:
        if component.beside in sources and component.name not in overrides:
            sources[component.name] = sources[component.beside]  # no other would fit
    parts = {name: index[name] for name in layout.settings if name in index}
    parts |= {name: value for name, value in overrides.items() if name not in sources}
    loaded: dict[Path, Any] = {}
    for name in layout.names:
        if name in parts:
            continue
        library, class_name = "", ""
        if name not in sources:
            entry = _entry(index, name, folder, layout)
            if entry is None:
                parts[name] = None
                continue
            library, class_name = entry
        source = sources.get(name)
        parts[name] = loaders[name](
            Loading(folder / name, library, class_name, source, layout, parts, loaded, dtype, device, variant)
        )
    return parts


def read_index(folder: Path, layout: Layout) -> dict[str, Any]:
    """The index of a model folder. Raises ReducioError for one of another family or with unknown names."""
    strict_files.check_model_folder(folder)
    path = folder / strict_files.INDEX
    index = strict_files.read_json(path)
    if index.get("_class_name") != layout.pipeline:
        raise ReducioError(f"{path}: is of a {index.get('_class_name')}, not of a {layout.pipeline}")
    _check_names(index, str(path), layout)
    return index


def _check_names(names: Mapping[str, Any], where: str, layout: Layout) -> None:
    known = (*layout.names, *layout.settings)
    if unknown := sorted(n for n in names if n not in known and not n.startswith("_")):
        raise ReducioError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(known)}")


def read_facts(
    folder: Path,
    layout: Layout,
    configs: Mapping[str, Any],
    loaders: Loaders,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Components and settings of a model folder, from its JSON files alone, for checks without weights.

    A network in `configs` becomes an object with its `config`, a diffusers pipeline an object of its class without
    components, and any other component an object whose `config` has the entries of its configuration as attributes. The
    scheduler is loaded, as in `read_model`. An object in `given` replaces a component, which is then not read.
    """
    index = strict_files.read_json(folder / strict_files.INDEX)
    facts: dict[str, Any] = {name: index[name] for name in layout.settings if name in index}
    facts |= given or {}
    for name in layout.names:
        if name in facts:
            continue
        entry, place = _entry(index, name, folder, layout), folder / name
        if entry is None:
            facts[name] = None
        elif name in configs:
            facts[name] = SimpleNamespace(config=networks.read_config(configs[name], place))
        elif is_file(place / strict_files.INDEX):
            facts[name] = diffusers_folders.without_parts(place)
        elif name == "scheduler":
            facts[name] = loaders[name](
                Loading(place, *entry, None, layout, facts, {}, torch.float32, torch.device("cpu"))
            )
        else:
            path = place / networks.CONFIG
            facts[name] = SimpleNamespace(
                config=SimpleNamespace(**strict_files.read_json(path) if is_file(path) else {})
            )
    return facts


def _entry(index: dict[str, Any], name: str, folder: Path, layout: Layout) -> tuple[str, str] | None:
    """[library, class] of a component in a folder's index; None if an optional component is left out."""
    path, entry = folder / strict_files.INDEX, index.get(name)
    if entry is None or entry == [None, None]:
        if name in layout.optional:
            return None
        raise ReducioError(f"{path}: {name} is missing")
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)):
        raise ReducioError(f"{path}: {name} must be [library, class], is {entry!r}")
    if name in layout.optional and not is_folder(folder / name):
        raise ReducioError(f"{folder / name}: no such folder; give {name}=FOLDER_OR_HUB_ID, or None to do without")
    return entry[0], entry[1]


def write_model(target: Path, parts: dict[str, Any], layout: Layout, source: Path | None = None) -> None:
    """Write what `read_model` reads, each weight in the dtype it has; the folder appears whole or not at all.

    source: the folder that the parts were read from. If its vae, or that of the model that is replaced, has a
    calibration and the same weights, the new folder gets the calibration too.
    """
    strict_files.check_same_class(target, strict_files.INDEX, layout.pipeline)
    index: dict[str, Any] = {"_class_name": layout.pipeline, "_reducio_fast_version": strict_files.version()}
    index |= {name: _library_and_class(name, parts[name]) for name in layout.names}
    # A setting that is left out gets its default when it is read.
    settings = {name: parts[name] for name in layout.settings if parts.get(name) is not None}
    index |= settings
    with atomic_files.new_folder(target, strict_files.INDEX, "model") as folder, networks.quiet_transformers():
        for name in layout.names:
            component = parts[name]
            if component is None:
                continue
            if hasattr(component, "components"):  # a diffusers pipeline
                diffusers_folders.save_text_to_image(component, folder / name, layout.shared(parts))
            elif networks.is_ours(component):
                networks.save_model(component, folder / name)
            else:
                component.save_pretrained(folder / name)
        strict_files.write_json(folder / strict_files.INDEX, index)
        if (target / model_card.CARD).is_file():  # the card of the model that is replaced
            shutil.copyfile(target / model_card.CARD, folder / model_card.CARD)
        places = (target,) if source is None else (source, target)
        if largest := calibration_file.of_same_weights(places, parts["vae"]):
            calibration_file.write(folder, largest)
        components = {name: parts[name] for name in layout.names}
        model_card.write_card(folder, components, settings, target.name, layout)


def _library_and_class(name: str, component: Any) -> list[str | None]:
    if component is None:
        return [None, None]
    if networks.is_ours(component):
        return list(networks.published_class(type(component)))
    library, class_name = type(component).__module__.split(".")[0], type(component).__name__
    if library not in (OURS, *networks.LIBRARIES):
        raise ReducioError(f"{name}: a {class_name} cannot be saved; it is of none of {', '.join(networks.LIBRARIES)}")
    # The class of an inner pipeline is in its own index; this index names the class that loads it with shared parts.
    return [OURS, "TextToImage"] if hasattr(component, "components") else [library, class_name]
