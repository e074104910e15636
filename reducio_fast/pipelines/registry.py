"""Which family a model name, folder or hub id belongs to: the only place that lists families.

A family is told by the word before a colon (`svd`, `svd:FOLDER`) or by the pipeline that a folder's model_index.json
names; anything else is a Reducio model.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import hub, strict_files
from ..system.errors import ReducioError
from ..system.paths import status
from .peers import pipeline as peers
from .reducio.pipeline import ReducioPipeline


@dataclass(frozen=True, slots=True)
class Model:
    """A model that was found, not yet loaded.

    load(dtype, device, backend, **load_arguments): the pipeline. load_arguments: names that belong to loading.
    call_defaults: arguments of a call and their defaults. key: equal for the same source of weights. files: the state
    of what lies there, another one once a file of it was replaced or written.
    """

    key: tuple[Any, ...]
    load: Callable[..., Any]
    load_arguments: tuple[str, ...]
    call_defaults: dict[str, Any]
    check_call: Callable[[str, dict[str, Any]], None] = lambda backend, kwargs: None
    files: Hashable = None
    fps: float | None = None


def find(model: str | os.PathLike[str] | None) -> Model:
    """The model of this name; None is the embedded one. Raises ReducioError where there is none."""
    if (source := peers.find(model)) is not None:
        return Model(
            key=(source.peer.name, source.weights),
            load=lambda dtype, device, backend: peers.PeerPipeline.from_pretrained(source, dtype, device),
            load_arguments=(),
            call_defaults=source.defaults,
            check_call=lambda backend, kwargs: peers.check_call(source, backend, kwargs),
            files=folder_state(source.weights),
        )
    folder = strict_files.embedded_model() if model is None else hub.find_model(model)
    layout = ReducioPipeline.layout

    def load(dtype: Any, device: torch.device, backend: str, **kwargs: Any) -> ReducioPipeline:
        return ReducioPipeline.from_pretrained(folder, dtype=dtype, device=device, backend=backend, **kwargs)

    return Model(
        key=(folder.resolve(),),
        load=load,
        load_arguments=(*layout.names, *layout.settings, "compile"),
        call_defaults=_defaults(ReducioPipeline.__call__),
        check_call=_check_call,
        files=folder_state(folder),
        fps=_fps(folder),
    )


def _fps(folder: Path) -> float | None:
    """Of a model folder's clips, as its index says it; None where that cannot be read, which loading will refuse."""
    try:
        fps = strict_files.read_json(folder / strict_files.INDEX).get("fps", _defaults(ReducioPipeline.__init__)["fps"])
    except ReducioError:
        return None
    return fps if isinstance(fps, int | float) and not isinstance(fps, bool) and fps > 0 else None


def folder_state(folder: str | os.PathLike[str]) -> Hashable:
    """Which files a folder holds, and of each what changes when it is replaced or written: for a model of twenty files
    a fifth of a millisecond. Empty where there is no folder."""
    files = sorted(os.path.join(path, name) for path, _, names in os.walk(folder) for name in names)
    stats = [(file, status(file)) for file in files]
    return tuple((file, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in stats if s is not None)


def _check_call(backend: str, kwargs: dict[str, Any]) -> None:
    """Refuse, by name, what is neither an argument of a Reducio call nor of loading."""
    layout = ReducioPipeline.layout
    call = list(inspect.signature(ReducioPipeline.__call__).parameters)[1:]
    if unknown := sorted(set(kwargs) - {*call, *layout.names, *layout.settings, "compile"}):
        raise ReducioError(f"{unknown[0]}: no argument of a Reducio model; known are {', '.join(call)}")


def call_defaults(model: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Arguments of a call of this model that have a default, with their defaults. Loads nothing."""
    source = peers.find(model)
    return _defaults(ReducioPipeline.__call__) if source is None else source.defaults


def _defaults(call: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(call).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}
