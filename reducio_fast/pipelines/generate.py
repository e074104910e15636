"""The one-line front door: `generate`, and the loaded pipelines it keeps between calls."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from ..checkpoints import hub, layouts, strict_files
from ..system import devices
from ..system.errors import ReducioError
from .call.output import ReducioOutput
from .peers import pipeline
from .reducio.pipeline import ReducioPipeline

CACHED_PIPELINES = 2  # enough to compare two models; at full size a third would fill most hosts


def generate(
    prompt: str | list[str] | None = None,
    image: Any = None,
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    **words: Any,
) -> ReducioOutput:
    """Make a clip in one line: `generate("a red circle moving right on a black background").save("clip.mp4")`.

    `model` is a folder or hub id, None the small model inside the package, which knows coloured shapes that move, or a
    peer (see `peers`; "svd" takes no prompt). The loaded model is kept, so a second call starts at once. Components and
    settings by name (`text_to_image=`, `compile=` ...) are those of `ReducioPipeline.from_pretrained`, all other
    words those of a call.
    """
    device = devices.resolve_device(device)
    kind = devices.resolve_dtype(dtype, None, device)
    key: tuple[Any, ...]
    if (peer := pipeline.find(model)) is not None:
        pipeline.check_words(peer, backend, words)
        key = (peer.peer.name, peer.weights, kind, device)
        return _cached(key, lambda: pipeline.PeerPipeline.from_pretrained(peer, kind, device))(prompt, image, **words)
    if prompt is None and words.get("prompt_embeds") is None:
        raise ReducioError("prompt: None given; say what the clip shall show")
    dtype = None if dtype is None else kind  # None is more than float32: the fast path then chooses its own
    folder = strict_files.embedded_model() if model is None else hub.find_model(model)
    parts = {name: words.pop(name) for name in (*layouts.COMPONENTS, *layouts.SETTINGS, "compile") if name in words}
    key = (folder.resolve(), dtype, device, backend, *parts.items())
    load: dict[str, Any] = {"dtype": dtype, "device": device, "backend": backend} | parts
    pipe = _cached(key, lambda: ReducioPipeline.from_pretrained(folder, **load))
    return pipe(prompt, image, **words)


_pipelines: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
_pipelines_lock = threading.Lock()  # two threads that ask for one model shall load it once


def _cached(key: tuple[Any, ...], load: Callable[[], Any]) -> Any:
    with _pipelines_lock:
        if key not in _pipelines:
            while len(_pipelines) >= CACHED_PIPELINES:
                _pipelines.popitem(last=False)
            _pipelines[key] = load()
        _pipelines.move_to_end(key)
        return _pipelines[key]
