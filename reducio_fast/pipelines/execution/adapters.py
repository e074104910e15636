"""LoRA adapters of the denoiser: read strictly, merged into the weights, and removed again bit for bit.

A LoRA (arXiv 2106.09685) is dW = scale * B A, with A [rank, in] and B [out, rank]. Adapters here are always merged:
nothing is added to a step, the fast twins pack the merged weights, and a hot swap is one pass over the weights. Every
weight is made from its kept original, W = W0 + sum(weight_i * dW_i), summed in float32 and rounded once; so any
sequence of calls ends in the same bits, and without an adapter in those of W0.

The merge is our own fifty lines and not peft's: peft adds and later subtracts, which does not give the original bits
back, and its unmerged form puts two more products into every layer.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.lora_files import Adapter, LowRank, finite_number, read_adapter
from ...system import torch_state
from ...system.checksum import checksums
from ...system.errors import ReducioError, check_switch, shown
from .components import Components
from .executor import Executor


class Merge:
    """The adapters of one network, which of them are in its weights, and the originals of these weights."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.loaded: dict[str, Adapter] = {}
        self.active: dict[str, float] = {}  # adapter -> weight
        self.fused: dict[str, float] | None = None  # the same once fused, lora_scale multiplied in
        self.enabled = True
        self._originals: dict[str, Tensor] = {}  # in host memory: they are read at a swap only
        self._written: dict[str, _Written] = {}

    @property
    def effect(self) -> dict[str, float]:
        """The adapters that the weights should contain, each with its weight."""
        return self.fused if self.fused is not None else self.active if self.enabled else {}

    def apply(self) -> None:
        """Write the weights that the settings describe. Call `check_untouched` before changing a setting."""
        chosen = self.effect
        terms: dict[str, list[tuple[float, LowRank]]] = {}
        for name, weight in chosen.items():
            for path, low_rank in self.loaded[name].items():
                terms.setdefault(path, []).append((weight, low_rank))
        with torch_state.inference():
            for path in {**self._originals, **terms}:
                parameter = self.network.get_parameter(f"{path}.weight")
                if path not in self._originals:
                    self._originals[path] = parameter.detach().to("cpu", copy=True)
                value = self._originals[path].to(parameter.device)
                if path in terms:
                    value = value.to(torch.promote_types(parameter.dtype, torch.float32))
                    value = value + sum(weight * low_rank.delta(value) for weight, low_rank in terms[path])
                parameter.copy_(value)
                self._written[path] = _Written.now(parameter)
        for path in self._originals.keys() - terms.keys():
            del self._originals[path], self._written[path]

    def forget(self) -> None:
        """Drop every adapter. Fused adapters stay in the weights for good."""
        if self.fused is not None:
            self._originals, self._written = {}, {}
        self.check_untouched()
        self.loaded, self.active, self.fused, self.enabled = {}, {}, None, True
        self.apply()

    @contextmanager
    def casting(self) -> Iterator[None]:
        """A context in which weights are cast or moved: they change, but still count as those that `apply` wrote."""
        self.check_untouched()
        yield
        self._written = {path: _Written.now(written.parameter) for path, written in self._written.items()}

    def check_untouched(self) -> None:
        """Raise where other code has changed merged weights: restoring the originals would undo that silently."""
        for path, written in self._written.items():
            if not written.is_still(self.network.get_parameter(f"{path}.weight")):
                raise ReducioError(
                    f"LoRA: {path}.weight was changed by others while {', '.join(self.loaded)} was loaded; "
                    "load the model again, or unload_lora_weights() before changing weights"
                )


@dataclass(frozen=True, slots=True)
class _Written:
    """A parameter as `Merge.apply` left it."""

    parameter: Tensor
    dtype: torch.dtype
    checksum: int

    @classmethod
    def now(cls, parameter: Tensor) -> _Written:
        return cls(parameter, parameter.dtype, *checksums([parameter]))

    def is_still(self, parameter: Tensor) -> bool:
        """A cast by `network.to(dtype)` does not count as a change: restoring would not undo it."""
        same_dtype = parameter.dtype == self.dtype
        return parameter is self.parameter and (not same_dtype or checksums([parameter]) == (self.checksum,))


class Adapters:
    """The LoRA methods of a pipeline, for its current denoiser: a denoiser assigned later starts without adapters.

    Methods raise ReducioError, with nothing changed, for adapters that do not exist, for what a fused one forbids, and
    where other code has changed merged weights.
    """

    def __init__(self, components: Components, executor: Executor) -> None:
        self.components, self.executor = components, executor
        self.merge: Merge | None = None

    def load(
        self,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        adapter_name: str | None = None,
        weight_name: str | None = None,
        hotswap: bool = False,
    ) -> None:
        """Read a LoRA and make it the active adapter, with weight 1.

        source: a .safetensors file, a folder or hub id (`weight_name` picks the file), or the tensors by name. Names
        are peft's, `PATH.lora_A.weight` and `PATH.lora_B.weight`, bare or after `transformer.`, `unet.` or
        `base_model.model.`; scale is alpha / rank from `PATH.alpha`, from the file's metadata or from peft's
        adapter_config.json, else 1.
        adapter_name: by default "default_0", "default_1", ... hotswap: replace the loaded adapter of that name, which
        keeps its weight.

        Raises ReducioError, with nothing changed, for names or shapes that do not fit the denoiser, and lists them.
        """
        merge = self._current()
        free = (f"default_{i}" for i in itertools.count() if f"default_{i}" not in merge.loaded)
        name = next(free) if adapter_name is None else adapter_name
        known = ", ".join(merge.loaded) or "none"
        if merge.fused is not None:
            raise ReducioError(
                f"load_lora_weights: {', '.join(merge.fused)} is fused; unfuse_lora() first, "
                "or unload_lora_weights() to keep it in the weights"
            )
        if not isinstance(name, str) or not name:
            raise ReducioError(f"adapter_name: must be text, is {shown(name)}")
        check_switch("hotswap", hotswap)
        if not isinstance(source, str | os.PathLike | Mapping):
            raise ReducioError(f"source: must be a file, a folder, a hub id or tensors by name, is {shown(source)}")
        if hotswap and name not in merge.loaded:
            raise ReducioError(f"hotswap: there is no adapter {name!r} to replace; loaded are {known}")
        if not hotswap and name in merge.loaded:
            raise ReducioError(f"adapter_name: {name!r} is loaded already (loaded are {known}); pass hotswap=True")
        adapter = read_adapter(source, weight_name, merge.network)
        with self._changing(merge):
            merge.loaded[name] = adapter
            if not hotswap:
                merge.active = {name: 1.0}

    def activate(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        merge = self._current("set_adapters")
        names = _names(merge, adapter_names)
        per_name = adapter_weights if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        if len(per_name) != len(names):
            raise ReducioError(f"adapter_weights: {len(per_name)} given for {len(names)} adapters")
        weights = [1.0 if w is None else finite_number("adapter_weights", w) for w in per_name]
        with self._changing(merge):
            merge.active = dict(zip(names, weights, strict=True))

    def fuse(self, components: Sequence[str] | None, lora_scale: float, adapter_names: Sequence[str] | None) -> None:
        merge = self._current("fuse_lora")
        self._check_components(components)
        chosen = list(merge.active) if adapter_names is None else _names(merge, adapter_names)
        if not chosen:
            raise ReducioError(f"fuse_lora: no adapter is active; loaded are {', '.join(merge.loaded) or 'none'}")
        scale = finite_number("lora_scale", lora_scale)
        with self._changing(merge):
            merge.fused = {name: scale * merge.active.get(name, 1.0) for name in chosen}

    def unfuse(self, components: Sequence[str] | None) -> None:
        self._check_components(components)
        merge = self._current()
        with self._changing(merge):
            merge.fused = None

    def unload(self) -> None:
        merge = self._current()
        with self.executor.lock:
            merge.forget()

    def delete(self, adapter_names: str | Sequence[str]) -> None:
        merge = self._current("delete_adapters")
        names = _names(merge, adapter_names)
        with self._changing(merge):
            for name in names:
                del merge.loaded[name]
                merge.active.pop(name, None)

    def enable(self, enabled: bool) -> None:
        merge = self._current("enable_lora" if enabled else "disable_lora")
        with self._changing(merge):
            merge.enabled = enabled

    def check_saving(self) -> None:
        """Raise ReducioError if the weights hold adapters that are not fused: a file would hold them unnoticed."""
        if (active := self.active_names) and not self.fused_names:
            raise ReducioError(
                f"save_pretrained: the adapters {', '.join(active)} are active; fuse_lora() to write them with the "
                "weights, or unload_lora_weights() to leave them out"
            )

    @property
    def active_names(self) -> list[str]:
        return list(self._current().active)

    @property
    def by_component(self) -> dict[str, list[str]]:
        loaded = list(self._current().loaded)
        return {self.components.layout.denoiser: loaded} if loaded else {}

    @property
    def fused_names(self) -> set[str]:
        return {*(self._current().fused or ())}

    @property
    def loaded(self) -> list[str]:
        return list(self._current().loaded)

    @property
    def effect(self) -> dict[str, float]:
        """The adapters that are in the weights now, each with its weight."""
        return self._current().effect

    def casting(self) -> AbstractContextManager[None]:
        """A context in which the caller casts or moves the denoiser with its adapters."""
        return self._current().casting()

    @contextmanager
    def _changing(self, merge: Merge) -> Iterator[None]:
        """A context in which settings of `merge` are changed; at its end the weights follow."""
        with self.executor.lock:
            merge.check_untouched()
            yield
            merge.apply()

    def _check_components(self, components: Sequence[str] | None) -> None:
        only = [self.components.layout.denoiser]
        if components is not None and (not isinstance(components, list | tuple) or list(components) != only):
            raise ReducioError(f"components: must be {only}, is {shown(components)}")

    def _current(self, method: str | None = None) -> Merge:
        """The adapters of the current denoiser. `method`: name of one that may not be called while some are fused."""
        if self.merge is None or self.merge.network is not self.components.denoiser:
            self.merge = Merge(self.components.denoiser)
        if method is not None and self.merge.fused is not None:
            raise ReducioError(f"{method}: {', '.join(self.merge.fused)} is fused; unfuse_lora() first")
        return self.merge


def _names(adapters: Merge, adapter_names: Any) -> list[str]:
    names = list(adapter_names) if isinstance(adapter_names, list | tuple) else [adapter_names]
    if unknown := [n for n in names if not isinstance(n, str) or n not in adapters.loaded]:
        known = ", ".join(adapters.loaded) or "none"
        raise ReducioError(f"adapter_names: {', '.join(map(shown, unknown))} not loaded; loaded are {known}")
    if len(set(names)) != len(names):
        raise ReducioError(f"adapter_names: {', '.join(names)} names an adapter twice")
    return names
