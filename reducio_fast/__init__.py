"""Reducio, fast: text and an image in, a short clip out.

`generate` makes a clip with the embedded model, or with the one named; `ReducioPipeline` is the same with every part in
the caller's hands. Both are loaded on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .front import generate
    from .pipeline import ReducioPipeline

__all__ = ["ReducioPipeline", "__version__", "generate"]


def __getattr__(name: str) -> Any:
    if name in ("ReducioPipeline", "generate"):
        from .compile import collector

        with collector.paused():  # torch is imported here
            if name == "generate":
                from .front import generate

                return generate
            from .pipeline import ReducioPipeline

            return ReducioPipeline
    if name in ("ReducioVAE", "ReducioDiT", "SemanticEncoder", "TextToImage", "ModelMixin"):
        # Not for users: [library, class] of a model's index, which diffusers resolves here.
        from . import diffusers_loader

        return getattr(diffusers_loader, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("reducio-fast")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
