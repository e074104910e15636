"""`generate()`: a clip in one line, and the loaded pipelines that it keeps between calls."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from ..system import devices
from ..system.errors import ReducioError
from . import registry
from .call.output import ReducioOutput

KEPT_PIPELINES = 2  # enough to compare two models; at full size a third would fill most hosts


def generate(
    prompt: str | list[str] | None = None,
    image: Any = None,
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    **kwargs: Any,
) -> ReducioOutput:
    """Make a clip in one line: `generate("a red circle moving right on a black background").save("clip.mp4")`.

    `model` is a folder or hub id, None the small model inside the package, which knows coloured shapes that move, or
    another image-to-video model by name ("svd", "ltx", "wan"; "svd" takes no prompt). The loaded model is kept, so a
    second call starts at once. Components and settings by name (`text_to_image=`, `compile=` ...) are those of
    `ReducioPipeline.from_pretrained`, all other arguments those of a call.
    """
    device = devices.resolve_device(device)
    resolved = devices.resolve_dtype(dtype, None, device)
    model_entry = registry.find(model)
    model_entry.check_call(backend, kwargs)
    if "prompt" in model_entry.call_defaults and prompt is None and kwargs.get("prompt_embeds") is None:
        raise ReducioError("prompt: None given; describe the clip")
    # For our models None is more than the default dtype: the fast path then chooses its own.
    asked = resolved if dtype is not None or not model_entry.load_arguments else None
    load_kwargs = {name: kwargs.pop(name) for name in model_entry.load_arguments if name in kwargs}
    key = (*model_entry.key, asked, device, backend, *load_kwargs.items())
    pipe = _kept(key, lambda: model_entry.load(asked, device, backend, **load_kwargs))
    return pipe(prompt, image, **kwargs)


def kept() -> list[Any]:
    """The pipelines that are kept, the one used last at the end."""
    with _lock:
        return list(_pipelines.values())


def forget() -> None:
    """Let go of every kept pipeline."""
    with _lock:
        _pipelines.clear()


_pipelines: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
_lock = threading.Lock()  # two threads that ask for one model load it once


def _kept(key: tuple[Any, ...], load: Callable[[], Any]) -> Any:
    with _lock:
        if key not in _pipelines:
            while len(_pipelines) >= KEPT_PIPELINES:
                _pipelines.popitem(last=False)
            _pipelines[key] = load()
        _pipelines.move_to_end(key)
        return _pipelines[key]
