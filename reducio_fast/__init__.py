"""Reducio, fast: text and an image in, a short clip out.

`generate` makes a clip with the embedded model or a named one; `ReducioPipeline`, `SVDPipeline` and `SV3DPipeline`
give access to every part of a loaded model, `ReducioVAE.from_pretrained` loads the video autoencoder alone,
`accelerate` runs a loaded diffusers pipeline on the fast networks, `parallelize` makes each clip with several
processes. `ReducioError` is raised for bad input, with a message of one line. All are loaded at first use: importing
this package loads no torch.
"""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipelines.accelerate import accelerate
    from .pipelines.generate import generate
    from .pipelines.parallel import parallelize
    from .pipelines.reducio.diffusers_bridge import ReducioVAE
    from .pipelines.reducio.pipeline import ReducioPipeline
    from .pipelines.svd.orbit import SV3DPipeline
    from .pipelines.svd.pipeline import SVDPipeline
    from .system.errors import ReducioError

# In a checkout three rooms lie beside this folder. An installation knows where; a Python that was started in the
# checkout finds this folder first, and has to be told.
_CHECKOUT = _Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "triton_kernels").is_dir():
    __path__.append(str(_CHECKOUT))

__all__ = [
    "ReducioError",
    "ReducioPipeline",
    "ReducioVAE",
    "SV3DPipeline",
    "SVDPipeline",
    "__version__",
    "accelerate",
    "generate",
    "parallelize",
]

_IN_PIPELINES = {
    "ReducioPipeline": "reducio.pipeline",
    "SV3DPipeline": "svd.orbit",
    "SVDPipeline": "svd.pipeline",
    "accelerate": "accelerate",
    "generate": "generate",
    "parallelize": "parallel",
}

# Not for users: the [library, class] entries of a model's index, which diffusers looks up in this package, and the
# class that a model folder's `pipeline.py` names.
_FOR_DIFFUSERS = (
    "DiffusersReducioPipeline",
    "ModelMixin",
    "PreviewDecoder",
    "ReducioDiT",
    "ReducioVAE",
    "SemanticEncoder",
    "TextToImage",
)


def __getattr__(name: str) -> Any:
    if name in _IN_PIPELINES:
        import importlib

        from .compile import gc_pause
        from .system import cores

        with gc_pause.paused(), cores.sleeping_threads():  # torch is imported here
            return getattr(importlib.import_module(f".pipelines.{_IN_PIPELINES[name]}", __name__), name)
    if name == "ReducioError":
        from .system.errors import ReducioError

        return ReducioError
    if name in _FOR_DIFFUSERS:
        from .pipelines.reducio import diffusers_bridge

        return getattr(diffusers_bridge, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("reducio-fast")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
