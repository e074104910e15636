"""`generate()`: a clip in one line, and the loaded pipelines that it keeps between calls."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..system import devices
from ..system.errors import ReducioError, check_switch
from . import registry
from .call import validation
from .call.output import ReducioOutput
from .parallel import parallelize
from .reducio import light

KEPT_PIPELINES = 2  # enough to compare two models; at full size a third would fill most hosts


def generate(
    prompt: str | list[str] | None = None,
    image: Any = None,
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    parallel: bool = False,
    **kwargs: Any,
) -> ReducioOutput:
    """Make a clip in one line: `generate("a red circle moving right on a black background").save("clip.mp4")`.

    `model` is a folder, a hub id, the name of another image-to-video model ("svd", "svd-tiny", "ltx", "wan"; "svd" and
    folders of it take an image), or None for the small model inside the package, which makes moving coloured shapes.
    The loaded model is kept until the files of its folder change, so a second call starts at once. Components and
    settings (`text_to_image=`, `compile=` ...) are keyword arguments of the family's `from_pretrained`, all others are
    those of a call. parallel: all processes that torchrun has started make the clip together, as `parallelize` does.
    """
    device = devices.resolve_device(device)
    resolved = devices.resolve_dtype(dtype, None, device)
    model_entry = registry.find(model, kwargs.get("variant"))
    model_entry.check_call(backend, kwargs)
    validation.resolve_backend(backend)
    check_switch("parallel", parallel)
    unprompted = prompt is None and all(kwargs.get(name) is None for name in ("prompt_embeds", "motion_latents"))
    if model_entry.needs_prompt and unprompted:
        raise ReducioError("prompt: None given; describe the clip")
    # For our models None is not the default dtype: it lets the fast path choose one.
    asked = resolved if dtype is not None or not model_entry.load_arguments else None
    load_kwargs = {name: kwargs.pop(name) for name in model_entry.load_arguments if name in kwargs}
    settings = [(name, _hashable(value)) for name, value in load_kwargs.items()]
    key = (*model_entry.key, asked, device, backend, parallel, *settings)  # `parallelize` changes the pipeline
    folders = [registry.folder_state(v) for v in load_kwargs.values() if isinstance(v, str | os.PathLike)]
    files = (model_entry.files, *folders)
    pipe = None
    load_light = model_entry.light
    if load_light is not None and backend != "reference" and not load_kwargs and light.can_follow(kwargs):
        pipe = _light(key, files, lambda: load_light(resolved, device, asked is None))
    if pipe is None:
        pipe = _kept(key, files, lambda: model_entry.load(asked, device, backend, **load_kwargs))
    if parallel and getattr(getattr(pipe, "executor", None), "ranks", None) is None:
        parallelize(pipe)
    return pipe(prompt=prompt, image=image, **kwargs)


def _hashable(value: Any) -> Hashable:
    """The value, or for one without a hash (a list, a dict) its id, which stays unique: the kept pipeline keeps the
    value alive."""
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return value


def kept() -> list[Any]:
    """The kept pipelines, the most recently used at the end."""
    with _lock:
        return [entry.pipe for entry in _entries.values() if entry.pipe is not None]


def forget() -> None:
    """Free every kept pipeline."""
    with _lock:
        _entries.clear()


@dataclass(slots=True)
class _Entry:
    """A kept pipeline, None until it is loaded, and the state of the files that it was loaded from."""

    files: Hashable
    pipe: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock)  # two threads that ask for one model load it once


_entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
_lock = threading.Lock()  # never held while a model loads: calls of another model go on


_need_libraries: set[Hashable] = set()  # (key, files) of models that this package cannot load without libraries


def _light(key: tuple[Any, ...], files: Hashable, load: Callable[[], Any]) -> Any:
    """The kept pipeline of a model that needs no library, or else `load()`. None if the model needs a library, or if
    its pipeline on the libraries' classes is kept already."""
    with _lock:
        if key in _entries or (key, files) in _need_libraries:
            return None
    try:
        return _kept((*key, "light"), files, lambda: _present(load()))
    except _NeedsLibraries:
        _need_libraries.add((key, files))
        return None


class _NeedsLibraries(Exception):
    pass


def _present(pipe: Any) -> Any:
    if pipe is None:
        raise _NeedsLibraries
    return pipe


def _renew_locks() -> None:
    """Renew the locks in a forked child: a thread of its parent may hold the old ones."""
    global _lock
    _lock = threading.Lock()
    for entry in _entries.values():
        entry.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def _kept(key: tuple[Any, ...], files: Hashable, load: Callable[[], Any]) -> Any:
    """The pipeline that is kept under `key`; `load()` where there is none, or where it was loaded from other files."""
    with _lock:
        entry = _entries.get(key)
        if entry is None or entry.files != files:
            _entries.pop(key, None)
            while len(_entries) >= KEPT_PIPELINES:
                _entries.popitem(last=False)
            entry = _entries[key] = _Entry(files)
        _entries.move_to_end(key)
    with entry.lock:
        if entry.pipe is None:
            try:
                entry.pipe = load()
            except BaseException:
                with _lock:
                    if _entries.get(key) is entry:
                        del _entries[key]
                raise
        return entry.pipe
