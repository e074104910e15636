"""Which family a model name, folder or hub id belongs to: the only place that lists families.

A family is recognised by the word before a colon (`svd`, `svd:FOLDER`) or by the pipeline that a folder's
model_index.json names.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import hub, model_folder, strict_files
from ..system import devices
from ..system.errors import ReducioError
from ..system.paths import expanded, is_file, is_folder, status
from .call.quality import PRESETS
from .call.validation import check_names
from .execution.components import Components
from .execution.loading import loading
from .peers import pipeline as peers
from .peers.models import PEERS, build_random
from .reducio import light
from .reducio.pipeline import ReducioPipeline
from .svd.decoder import HUB_ID
from .svd.from_diffusers import networks_of
from .svd.orbit import SV3DPipeline
from .svd.pipeline import SVDPipeline


@dataclass(frozen=True, slots=True)
class Model:
    """A model that was found, not yet loaded.

    load(dtype, device, backend, **load_arguments): the pipeline. load_arguments: names of the arguments of loading.
    call_defaults: arguments of a call and their defaults. key: equal for the same source of weights. files: the state
    of the files there; it changes when one of them is replaced or written.
    """

    key: tuple[Any, ...]
    load: Callable[..., Any]
    load_arguments: tuple[str, ...]
    call_defaults: dict[str, Any]
    check_call: Callable[[str, dict[str, Any]], None] = lambda backend, kwargs: None
    files: Hashable = None
    fps: float | None = None
    needs_prompt: bool = True
    # A pipeline for `check_inputs` alone, without weights; None for peers, whose calls check themselves.
    checker: Callable[[], Any] | None = None
    # light(dtype, device, free_dtype): the pipeline without any library's classes; None where the folder needs them.
    light: Callable[..., Any] | None = None


FAMILIES: dict[str, Any] = {family.layout.pipeline: family for family in (ReducioPipeline, SVDPipeline, SV3DPipeline)}
TINY_SIZE, TINY_FRAMES = (64, 64), 4  # of a call on small random weights
# Short names of our models, beside folders and hub ids: `WORD` alone, `WORD:FOLDER_OR_HUB_ID`, `WORD:random`.
WORDS = {"svd": HUB_ID}


def find(model: str | os.PathLike[str] | None, variant: str | None = None) -> Model:
    """The model of this name; None is the embedded one. variant: of the weights that a hub repository of SVD is fetched
    with. Raises ReducioError where there is no such model."""
    if isinstance(model, str) and (word := model.partition(":")[0]) in WORDS and not is_folder(model, "model"):
        weights = model.partition(":")[2] or WORDS[word]
        if weights in (peers.RANDOM, peers.RANDOM_TINY):
            return _random(weights)
        return _of_folder(SVDPipeline.find_folder(weights, variant))
    if (folder := _own_folder(model)) is not None:
        return _of_folder(folder)
    if model == strict_files.SVD_TINY:
        return _of_folder(strict_files.embedded_model(strict_files.SVD_TINY))
    source = peers.find(model)
    if source is None:
        return _of_folder(strict_files.embedded_model() if model is None else _find_folder(model, variant))
    return Model(
        key=(source.peer.name, source.weights),
        load=lambda dtype, device, backend: peers.PeerPipeline.from_pretrained(source, dtype, device),
        load_arguments=(),
        call_defaults=source.defaults,
        check_call=lambda backend, kwargs: peers.check_call(source, backend, kwargs),
        files=folder_state(source.weights),
        needs_prompt="text_encoder" in source.peer.full,
    )


def _own_folder(model: Any) -> Path | None:
    """The folder `model` if it holds a model of one of our families, else None."""
    if not isinstance(model, str | os.PathLike):
        return None
    folder = expanded(model, "model")
    return folder if _family_of(folder) in FAMILIES else None


def _family_of(folder: Path) -> str | None:
    index = folder / strict_files.INDEX
    return str(strict_files.read_json(index).get("_class_name")) if is_file(index, "model") else None


def _find_folder(model: str | os.PathLike[str], variant: str | None) -> Path:
    """A folder or the local copy of a hub repository. SVD's, which alone have variants, need not be fetched whole."""
    if variant is not None or str(model) in WORDS.values() or "stable-video-diffusion" in str(model):
        return SVDPipeline.find_folder(model, variant)
    return hub.find_model(model)


def _of_folder(folder: Path) -> Model:
    strict_files.check_model_folder(folder)
    name = _family_of(folder)
    if name not in FAMILIES:
        raise ReducioError(f"model: {folder} is of a {name}; known are {', '.join(FAMILIES)}")
    family = FAMILIES[name]

    def load(dtype: Any, device: torch.device, backend: str, **kwargs: Any) -> Any:
        return family.from_pretrained(folder, dtype=dtype, device=device, backend=backend, **kwargs)

    return Model(
        key=(folder.resolve(),),
        load=load,
        load_arguments=load_arguments(family),
        call_defaults=_defaults(family.__call__),
        check_call=lambda backend, kwargs: _check_call(family, kwargs),
        files=folder_state(folder),
        fps=_fps(folder) if family is ReducioPipeline else _defaults(family.__call__)["fps"],
        needs_prompt=family is ReducioPipeline,
        checker=lambda: _without_weights(family, folder),
        light=functools.partial(light.load, folder) if family is ReducioPipeline else None,
    )


def _without_weights(family: Any, folder: Path) -> Any:
    """A pipeline for `check_inputs` alone, built from the JSON files of a folder: a front process checks calls with it.

    Raises ReducioError for a folder whose index or configurations do not fit.
    """
    facts = _defaults(family.__init__) | model_folder.read_facts(folder, family.layout, family.configs, family.loaders)
    pipe = family.__new__(family)
    pipe._assemble(Components(family.layout, facts), None)
    return pipe


def _random(weights: str) -> Model:
    """Stable Video Diffusion with random weights: its speed and memory, without its download."""

    tiny = weights == peers.RANDOM_TINY

    def load(
        dtype: Any,
        device: torch.device,
        backend: str,
        compile: bool | None = None,
        variant: str | None = None,
        **parts: Any,
    ) -> SVDPipeline:
        if variant is not None:
            raise ReducioError(f"variant: {variant!r} given; random weights have no files")
        weights_dtype = devices.resolve_dtype(dtype, None, device)
        with loading():
            parts = {name: _named(name, part, weights_dtype, device) for name, part in parts.items()}
            networks = networks_of(build_random(PEERS["svd"], tiny, weights_dtype, device))
            if tiny:
                networks["unet"].config = dataclasses.replace(networks["unet"].config, num_frames=TINY_FRAMES)
                networks |= dict(zip(SVDPipeline.layout.settings, TINY_SIZE, strict=True))
            pipe = SVDPipeline(**(networks | parts), backend=backend, compile=compile)
        pipe.executor.choose_dtype(dtype is None)
        return pipe

    return Model(
        key=("svd", weights),
        load=load,
        load_arguments=load_arguments(SVDPipeline),
        call_defaults=_defaults(SVDPipeline.__call__),
        check_call=lambda backend, kwargs: _check_call(SVDPipeline, kwargs),
        fps=_defaults(SVDPipeline.__call__)["fps"],
        needs_prompt=False,
        checker=lambda: load(torch.float32, torch.device("meta"), "reference"),
    )


def _named(name: str, part: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A component that goes with random weights: an object as it is, a name resolved as beside a folder's weights."""
    if not isinstance(part, str | os.PathLike):
        return part
    if name not in ("scheduler", "text_to_image"):
        raise ReducioError(
            f"{name}: {str(part)!r} given; beside random weights only scheduler and text_to_image can be named"
        )
    return SVDPipeline.loaders[name](
        model_folder.Loading(Path(name), "", "", part, SVDPipeline.layout, {}, {}, dtype, device)
    )


def load_arguments(family: Any) -> tuple[str, ...]:
    """Names of `from_pretrained`'s components and settings."""
    parameters = inspect.signature(family.from_pretrained).parameters
    own = tuple(name for name in ("variant", "quantise") if name in parameters)
    return (*family.layout.names, *family.layout.settings, "compile", *own)


def _fps(folder: Path) -> float | None:
    """Frame rate of a model folder's clips, from its index. None if it cannot be read; loading then refuses it."""
    try:
        fps = strict_files.read_json(folder / strict_files.INDEX).get("fps", _defaults(ReducioPipeline.__init__)["fps"])
    except ReducioError:
        return None
    return fps if isinstance(fps, int | float) and not isinstance(fps, bool) and fps > 0 else None


def folder_state(folder: str | os.PathLike[str]) -> Hashable:
    """The files of a folder, or the file itself, each with the status values that change when it is replaced or
    written. Links to folders are followed. Takes half a millisecond for a model of twenty files. Empty where there
    is neither a folder nor a file."""
    root = expanded(str(folder).removeprefix("local-dir:"))  # open_clip's prefix of a folder, see `find_tower`
    files = [str(root)] if is_file(root) else []
    places: dict[str, str] = {}  # where each folder lies, by its path
    for path, folders, names in os.walk(root, followlinks=True):
        place = os.path.realpath(path)
        if place in places.values():  # its files are known already; a circle of links has no end
            folders.clear()
        else:
            files += [os.path.join(path, name) for name in names]
        places[path] = place
    stats = [(file, status(file)) for file in sorted(files)]
    own = ((file, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in stats if s is not None)
    return (*sorted(places.items()), *own)


def _check_call(family: Any, kwargs: dict[str, Any]) -> None:
    """Refuse, by name, arguments that neither the family's call nor its loading has."""
    names = {ReducioPipeline: "Reducio", SVDPipeline: "Stable Video Diffusion", SV3DPipeline: "Stable Video 3D"}
    check_names(family.__call__, kwargs, load_arguments(family), f"a {names[family]} model")


def _defaults(call: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(call).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    if call is ReducioPipeline.__call__:
        defaults["num_inference_steps"] = PRESETS["exact"].num_inference_steps
    return defaults
