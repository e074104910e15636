"""The components and settings of a loaded model, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...checkpoints import networks
from ...checkpoints.layouts import Layout
from ...checkpoints.networks import pipeline_networks
from ...system.errors import ReducioError, check_word


class Components:
    """What a `Layout` lists, as objects: `components["vae"]`. A component that is left out is None."""

    def __init__(self, layout: Layout, parts: Mapping[str, Any]) -> None:
        self.layout = layout
        self._parts = {name: parts[name] for name in (*layout.names, *layout.settings)}
        self._unloaded: set[str] = set()
        self.source: str | None = None  # the model's folder or hub id, where its autoencoder came from there
        self.folder: Path | None = None  # that the components were read from

    def __getitem__(self, name: str) -> Any:
        return self._parts[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._parts[name] = value

    def as_dict(self) -> dict[str, Any]:
        """Components by name, without the settings."""
        return {name: self._parts[name] for name in self.layout.names}

    @property
    def denoiser(self) -> nn.Module:
        return self._parts[self.layout.denoiser]

    @property
    def device(self) -> torch.device:
        """Where the weights are between calls."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    def of_stage(self, stage: str) -> list[nn.Module]:
        """The networks that a stage runs."""
        return [n for name in self.layout.of_stage(stage) for n in _networks_of(self._parts[name])]

    def networks(self) -> list[nn.Module]:
        """All networks; one that two components share may come twice."""
        return [n for name in self.layout.names for n in _networks_of(self._parts[name])]

    def cast(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move and cast every network in place."""
        for network in self.networks():
            networks.cast(network, device, dtype)

    def unload(self, *names: str) -> None:
        """Remove optional components. See `VideoPipeline.unload`."""
        for name in names:
            check_word("unload", name, self.layout.unloadable)
        # A pipeline within the model, such as text_to_image, may use a component too.
        for owner in self.layout.names:
            pipeline = self._parts[owner]
            if owner in names or not hasattr(pipeline, "components"):
                continue
            kept = {id(network) for network in pipeline_networks(pipeline)}
            for name in names:
                if id(self._parts[name]) in kept:
                    raise ReducioError(f"unload: {owner} uses the {name} too; unload both or neither")
        for name in names:
            if self._parts[name] is not None:
                self._parts[name] = None
                self._unloaded.add(name)

    @property
    def unloaded(self) -> list[str]:
        """Components that `unload` removed and that were not assigned again."""
        return sorted(name for name in self._unloaded if self._parts[name] is None)

    def check_saving(self) -> None:
        """Raise ReducioError if a component was unloaded, because a saved folder would lack it."""
        if self.unloaded:
            raise ReducioError(f"save_directory: {', '.join(self.unloaded)} unloaded; the folder would be without")

    def without_weights(self, strip: Callable[..., dict[str, Any]]) -> Components:
        """A copy with every weight on the meta device: `strip(parts, *networks, keep=...)` makes it
        (`memory.dry_run.without_weights`)."""
        shared = tuple(part for part in self._parts.values() if not _networks_of(part) and part is not self.scheduler)
        copied = strip(self._parts, *self.networks(), keep=shared)
        return Components(self.layout, copied)

    def for_thread(self) -> Components:
        """The same networks, with copies of the schedulers, since a call writes to those."""
        parts = dict(self._parts)
        for name, part in parts.items():
            if name == "scheduler":
                parts[name] = copy.deepcopy(part)
            elif hasattr(part, "components"):  # a diffusers pipeline
                parts[name] = copy.copy(part)
                if hasattr(part, "scheduler"):
                    parts[name].scheduler = copy.deepcopy(part.scheduler)
        other = Components(self.layout, parts)
        other._unloaded, other.source, other.folder = set(self._unloaded), self.source, self.folder
        return other

    @property
    def scheduler(self) -> Any:
        return self._parts["scheduler"]


class PartAttribute:
    """An attribute of a pipeline that `pipe.parts` holds: a component or a setting."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, pipe: Any, owner: type) -> Any:
        return self if pipe is None else pipe.parts[self.name]

    def __set__(self, pipe: Any, value: Any) -> None:
        pipe.parts[self.name] = value


def _networks_of(part: Any) -> list[nn.Module]:
    """The torch modules of a component: itself, or those of a diffusers pipeline."""
    if isinstance(part, nn.Module):
        return [part]
    return pipeline_networks(part) if hasattr(part, "components") else []
