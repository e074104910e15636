"""How diffusers' own `DiffusionPipeline.from_pretrained` opens a model folder.

It imports the folder's `pipeline.py`, which names the pipeline below, then reads each component by the [library, class]
of the index: it looks the class up in the package `reducio_fast`, which re-exports these names, and calls its
`from_pretrained`. Installed packages do the work; a folder contains no code except that one import.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ... import reference
from ...checkpoints import diffusers_folders, networks
from ...checkpoints.layouts import REDUCIO
from ...checkpoints.vae_alone import load_vae
from ...reference.reducio import preview
from ...system import devices
from . import encoders, pipeline
from .autoencoder import VideoAutoencoder

ModelMixin = nn.Module  # diffusers looks this name up to find out how to load the networks of a library


def _resolved(torch_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype to load in; None keeps the stored one. Raises ReducioError."""
    return None if torch_dtype is None else devices.resolve_dtype(None, torch_dtype, torch.device("cpu"))


class ReducioVAE(reference.ReducioVAE):
    """Loads a `reference.ReducioVAE`."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        torch_dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = "cpu",
        backend: str = "reference",
    ) -> Any:
        """The video autoencoder alone, from any source of `checkpoints.vae_alone.load_vae`: a model folder, a folder of
        the VAE, the release's .ckpt or a hub id. Raises ReducioError.

        `torch_dtype` None keeps the stored dtype; `device` None is a GPU if there is one. `backend` "fast" returns the
        twin, a frozen `FastReducioVAE` with the same methods; "auto" returns the twin if it can run."""
        vae, settings = load_vae(source, _resolved(torch_dtype), devices.resolve_device(device))
        return vae if backend == "reference" else VideoAutoencoder(vae, settings, backend).network


class ReducioDiT(reference.ReducioDiT):
    """Loads a `reference.ReducioDiT`."""

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None) -> reference.ReducioDiT:
        return networks.load_model(reference.ReducioDiT, reference.DiTConfig, folder, _resolved(torch_dtype))


class PreviewDecoder(preview.PreviewDecoder):
    """Loads a `preview.PreviewDecoder`."""

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None) -> preview.PreviewDecoder:
        return networks.load_model(preview.PreviewDecoder, preview.PreviewConfig, folder, _resolved(torch_dtype))


class SemanticEncoder(encoders.SemanticEncoder):
    """Loads an `encoders.SemanticEncoder`, with diffusers' name for the dtype argument."""

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None) -> encoders.SemanticEncoder:  # type: ignore[override]
        return encoders.SemanticEncoder.from_pretrained(folder, _resolved(torch_dtype))


class TextToImage(nn.Module):
    """Holds the folder of a first stage until the components that it shares are loaded.

    It is a module because diffusers passes the dtype to modules only.
    """

    def __init__(self, folder: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.folder, self.dtype = Path(folder), dtype

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None) -> TextToImage:
        return cls(folder, _resolved(torch_dtype) or torch.float32)

    def load(self, parts: Mapping[str, Any]) -> Any:
        return diffusers_folders.load_text_to_image(self.folder, REDUCIO.shared(parts), self.dtype, "cpu")


class DiffusersReducioPipeline(pipeline.ReducioPipeline, DiffusionPipeline):
    """A `ReducioPipeline` that diffusers' loader can build. All behaviour is ours; only the config is diffusers'."""

    _optional_components = list(REDUCIO.optional)

    def __init__(self, **parts: Any) -> None:
        self.register_to_config()  # before any attribute is set: diffusers looks each one up in the config
        if isinstance(parts["text_to_image"], TextToImage):
            parts["text_to_image"] = parts["text_to_image"].load(parts)
        pipeline.ReducioPipeline.__init__(self, **parts)


def _signature() -> inspect.Signature:
    """The signature of `ReducioPipeline.__init__`, without defaults for components: diffusers treats a parameter with a
    default as a plain setting."""
    ours = inspect.signature(pipeline.ReducioPipeline.__init__)
    parameters = [
        p.replace(default=p.empty if p.name in REDUCIO.names else p.default, kind=p.POSITIONAL_OR_KEYWORD)
        for p in ours.parameters.values()
    ]
    return ours.replace(parameters=parameters)


DiffusersReducioPipeline.__init__.__signature__ = _signature()  # type: ignore[attr-defined]
