"""LoRA adapters of the transformer, in diffusers' words: read strictly, merged into the weights, taken out bit by bit.

A LoRA (arXiv 2106.09685) says dW = scale * B A, with A [rank, in] and B [out, rank]. Adapters here are always merged:
nothing is added to a step, the fast twins pack what they find, and a hot swap is one pass over the weights. Every
weight is made from its kept original, W = W0 + sum(weight_i * dW_i), added up in float32 and rounded once; so any
sequence of words ends in the same bits, and without an adapter in W0's own.

The merge is our own fifty lines and not peft's: peft adds and later subtracts, which does not give the original bits
back, and its unmerged form puts two more products into every layer.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.lora_files import COMPONENT, Adapter, LowRank, finite_number, read_adapter
from ...reference import ReducioDiT
from ...system.errors import ReducioError


class Adapters:
    """The adapters of one network, which of them are in its weights, and the originals of these weights."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.loaded: dict[str, Adapter] = {}
        self.active: dict[str, float] = {}  # adapter -> weight
        self.fused: dict[str, float] | None = None  # the same once fused, lora_scale multiplied in
        self.enabled = True
        self._originals: dict[str, Tensor] = {}  # in host memory: they are read at a swap only
        self._written: dict[str, tuple[Tensor, int]] = {}  # the parameter and its version as left by `apply`

    def apply(self) -> None:
        """Bring the weights to what the settings say."""
        chosen = self.fused if self.fused is not None else self.active if self.enabled else {}
        terms: dict[str, list[tuple[float, LowRank]]] = {}
        for name, weight in chosen.items():
            for path, low_rank in self.loaded[name].items():
                terms.setdefault(path, []).append((weight, low_rank))
        self._check_untouched()
        with torch.no_grad():
            for path in {**self._originals, **terms}:
                parameter = self.network.get_parameter(f"{path}.weight")
                if path not in self._originals:
                    self._originals[path] = parameter.detach().to("cpu", copy=True)
                value = self._originals[path].to(parameter.device)
                if path in terms:
                    value = value.to(torch.promote_types(parameter.dtype, torch.float32))
                    value = value + sum(weight * low_rank.delta(value) for weight, low_rank in terms[path])
                parameter.copy_(value)
                self._written[path] = (parameter, parameter._version)
        for path in self._originals.keys() - terms.keys():
            del self._originals[path], self._written[path]

    def forget(self) -> None:
        """No adapter any more. What is fused stays in the weights for good."""
        if self.fused is not None:
            self._originals, self._written = {}, {}
        self.loaded, self.active, self.fused, self.enabled = {}, {}, None, True
        self.apply()

    def _check_untouched(self) -> None:
        """An original of weights that others have replaced would undo their work without a word."""
        for path, (parameter, version) in self._written.items():
            now = self.network.get_submodule(path).weight
            if now is not parameter or now._version != version:
                raise ReducioError(
                    f"LoRA: {path}.weight was changed by others while {', '.join(self.loaded)} was loaded; "
                    "load the model again, or unload_lora_weights() before changing weights"
                )


class LoraLoader:
    """The words of diffusers' LoRA loaders, for a pipeline with a `transformer`."""

    transformer: ReducioDiT
    _lock: threading.RLock
    _adapters: Adapters | None = None

    def load_lora_weights(
        self,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        adapter_name: str | None = None,
        weight_name: str | None = None,
        hotswap: bool = False,
    ) -> None:
        """Read a LoRA and make it the active adapter, with weight 1.

        source: a .safetensors file, a folder or hub id (`weight_name` picks the file), or the tensors by name. Names
        are peft's, `PATH.lora_A.weight` and `PATH.lora_B.weight`, bare or behind `transformer.` or `base_model.model.`;
        scale is alpha / rank from `PATH.alpha`, from the file's metadata or from peft's adapter_config.json, else 1.
        adapter_name: by default "default_0", "default_1", ... hotswap: replace the loaded adapter of that name, which
        keeps its weight.

        Raises ReducioError, with nothing changed, for names or shapes that do not fit the transformer, and lists them.
        """
        adapters = self._lora()
        free = (f"default_{i}" for i in itertools.count() if f"default_{i}" not in adapters.loaded)
        name = next(free) if adapter_name is None else adapter_name
        known = ", ".join(adapters.loaded) or "none"
        if adapters.fused is not None:
            raise ReducioError(
                f"load_lora_weights: {', '.join(adapters.fused)} is fused; unfuse_lora() first, "
                "or unload_lora_weights() to keep it in the weights"
            )
        if not isinstance(name, str) or not name:
            raise ReducioError(f"adapter_name: must be text, is {name!r}")
        if hotswap and name not in adapters.loaded:
            raise ReducioError(f"hotswap: there is no adapter {name!r} to replace; loaded are {known}")
        if not hotswap and name in adapters.loaded:
            raise ReducioError(f"adapter_name: {name!r} is loaded already (loaded are {known}); pass hotswap=True")
        adapter = read_adapter(source, weight_name, self.transformer)
        with self._lock:
            adapters.loaded[name] = adapter
            if not hotswap:
                adapters.active = {name: 1.0}
            adapters.apply()

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Make these adapters the active ones, each with its weight (one for all, or one each; None: 1)."""
        adapters = self._lora("set_adapters")
        names = _names(adapters, adapter_names)
        given = adapter_weights if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        if len(given) != len(names):
            raise ReducioError(f"adapter_weights: {len(given)} given for {len(names)} adapters")
        weights = [1.0 if w is None else finite_number("adapter_weights", w) for w in given]
        with self._lock:
            adapters.active = dict(zip(names, weights, strict=True))
            adapters.apply()

    def fuse_lora(
        self,
        components: Sequence[str] = (COMPONENT,),
        lora_scale: float = 1.0,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Scale the active adapters (or those named) by `lora_scale` and hold them: only `unfuse_lora` lets go.

        Fused weights are what `save_pretrained` writes, and what `unload_lora_weights` leaves behind.
        """
        adapters = self._lora("fuse_lora")
        if list(components) != [COMPONENT]:
            raise ReducioError(f"components: must be [{COMPONENT!r}], is {list(components)!r}")
        chosen = list(adapters.active) if adapter_names is None else _names(adapters, adapter_names)
        if not chosen:
            raise ReducioError(f"fuse_lora: no adapter is active; loaded are {', '.join(adapters.loaded) or 'none'}")
        scale = finite_number("lora_scale", lora_scale)
        with self._lock:
            adapters.fused = {name: scale * adapters.active.get(name, 1.0) for name in chosen}
            adapters.apply()

    def unfuse_lora(self, components: Sequence[str] = (COMPONENT,)) -> None:
        """Back to the adapters and weights before `fuse_lora`, to the bit; nothing where none is fused."""
        if list(components) != [COMPONENT]:
            raise ReducioError(f"components: must be [{COMPONENT!r}], is {list(components)!r}")
        adapters = self._lora()
        with self._lock:
            adapters.fused = None
            adapters.apply()

    def unload_lora_weights(self) -> None:
        """Forget every adapter. The weights become the originals again, to the bit; fused ones stay as they are."""
        adapters = self._lora()
        with self._lock:
            adapters.forget()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        adapters = self._lora("delete_adapters")
        names = _names(adapters, adapter_names)
        with self._lock:
            for name in names:
                del adapters.loaded[name]
                adapters.active.pop(name, None)
            adapters.apply()

    def disable_lora(self) -> None:
        """Compute without the active adapters until `enable_lora`."""
        self._enable_lora(False)

    def enable_lora(self) -> None:
        self._enable_lora(True)

    def get_active_adapters(self) -> list[str]:
        return list(self._lora().active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Loaded adapters by component."""
        loaded = list(self._lora().loaded)
        return {COMPONENT: loaded} if loaded else {}

    @property
    def fused_loras(self) -> set[str]:
        return set(self._lora().fused or ())

    def _enable_lora(self, enabled: bool) -> None:
        adapters = self._lora("enable_lora" if enabled else "disable_lora")
        with self._lock:
            adapters.enabled = enabled
            adapters.apply()

    def _lora(self, changes: str | None = None) -> Adapters:
        """The adapters of the transformer as it is now. `changes`: a word that may not be said while some are fused."""
        if self._adapters is None or self._adapters.network is not self.transformer:
            self._adapters = Adapters(self.transformer)
        if changes is not None and self._adapters.fused is not None:
            raise ReducioError(f"{changes}: {', '.join(self._adapters.fused)} is fused; unfuse_lora() first")
        return self._adapters


def _names(adapters: Adapters, given: Any) -> list[str]:
    names = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    if unknown := [n for n in names if not isinstance(n, str) or n not in adapters.loaded]:
        known = ", ".join(adapters.loaded) or "none"
        raise ReducioError(f"adapter_names: {', '.join(map(repr, unknown))} not loaded; loaded are {known}")
    if len(set(names)) != len(names):
        raise ReducioError(f"adapter_names: {', '.join(names)} names an adapter twice")
    return names
