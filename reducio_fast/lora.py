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
import json
import math
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from . import checkpoints
from .errors import ReducioError
from .reference import ReducioDiT

COMPONENT = "transformer"  # the one component that takes adapters
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # as diffusers, as peft saves them
PEFT_CONFIG = "adapter_config.json"  # beside peft's file
METADATA = "lora_adapter_metadata"  # diffusers keeps the same settings in the header of its file
PREFIXES = ("base_model.model.", "transformer.")
KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|alpha)")


@dataclass(frozen=True, slots=True)
class LowRank:
    """One layer's dW = scale * up @ down; of a convolution the kernel belongs to `down`."""

    down: Tensor  # A: [rank, in] or [rank, in, kh, kw]
    up: Tensor  # B: [out, rank] or [out, rank, 1, 1]
    scale: float

    def delta(self, like: Tensor) -> Tensor:
        """In the shape, on the device and in the precision of `like`."""
        up, down = (x.to(like).flatten(1) for x in (self.up, self.down))
        return (self.scale * (up @ down)).view_as(like)


Adapter = dict[str, LowRank]  # by the layer's path


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
        weights = [1.0 if w is None else _finite("adapter_weights", w) for w in given]
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
        scale = _finite("lora_scale", lora_scale)
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


def read_adapter(
    source: str | os.PathLike[str] | Mapping[str, Tensor], weight_name: str | None, network: nn.Module
) -> Adapter:
    """A LoRA checked against the network it is for. Raises ReducioError that lists every name that does not fit."""
    tensors, config, where = _read(source, weight_name)
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ReducioError(f"{where}: is an adapter of type {kind}; LORA is what can be loaded")
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {}
    missing, unexpected, misshapen = [], [], []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(_without_prefix(key))
        if match is None or match["module"] not in layers:
            unexpected.append(key)
        else:
            parts.setdefault(match["module"], {})[match["part"]] = (key, tensor)
    adapter: Adapter = {}
    for path, found in parts.items():
        absent = [f"{path}.{part}" for part in ("lora_A.weight", "lora_B.weight") if part not in found]
        if absent:
            missing += absent
            continue
        (down_key, down), (up_key, up) = found["lora_A.weight"], found["lora_B.weight"]
        weight, rank = layers[path].weight, len(down) if down.ndim else 0
        kernel = (1,) * (weight.ndim - 2)
        for key, tensor, needed in (
            (down_key, down, (rank or 1, *weight.shape[1:])),
            (up_key, up, (len(weight), rank, *kernel)),
        ):
            if tuple(tensor.shape) != needed:
                misshapen.append(f"{key} {list(tensor.shape)} instead of {list(needed)}")
        alpha = found["alpha"][1] if "alpha" in found else None
        adapter[path] = LowRank(down, up, _scale(path, rank or 1, alpha, config, where))
    checkpoints.report(where, missing, unexpected, misshapen)
    if not adapter:
        raise ReducioError(f"{where}: holds no LoRA")
    for path, low_rank in adapter.items():
        if not all(torch.isfinite(x).all() for x in (low_rank.down, low_rank.up)):
            raise ReducioError(f"{where}: {path} holds values that are not finite (NaN or infinite)")
    return adapter


def _read(
    source: str | os.PathLike[str] | Mapping[str, Tensor], weight_name: str | None
) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    """Tensors, settings by peft's names, and where they are from."""
    if isinstance(source, Mapping):
        where = Path("the LoRA given")
        if wrong := [n for n, t in source.items() if not isinstance(t, Tensor) or not t.is_floating_point()]:
            raise ReducioError(f"{where}: {wrong[0]!r} is no floating-point tensor")
        return {str(n): t.detach() for n, t in source.items()}, {}, where
    path = Path(source).expanduser()
    file = path if path.is_file() else _find_file(checkpoints.find_model(source), weight_name)
    tensors = checkpoints.load_tensors(file)
    beside = file.with_name(PEFT_CONFIG)
    if beside.is_file():
        return tensors, checkpoints.read_json(beside), file
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(METADATA, "{}")
    try:
        settings = {_without_prefix(name): value for name, value in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise ReducioError(f"{file}: its header's {METADATA} is not readable as JSON ({error})") from error
    return tensors, settings, file


def _find_file(folder: Path, weight_name: str | None) -> Path:
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    choice = [weight_name] if weight_name else [n for n in FILES if n in names] or names
    if len(choice) != 1:
        found = ", ".join(names) or "no .safetensors file (pickles are never loaded)"
        raise ReducioError(f"weight_name: name the LoRA's file in {folder}; there is {found}")
    return folder / choice[0]


def _without_prefix(key: str) -> str:
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _scale(path: str, rank: int, alpha: Tensor | None, config: Mapping[str, Any], where: Path) -> float:
    """alpha / rank, or alpha / sqrt(rank) for a rank-stabilised LoRA (arXiv 2312.03732); 1 where alpha is unknown."""
    value = config.get("lora_alpha", rank)
    try:
        for pattern, special in (config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern.removeprefix('^')})", path):
                value = special
                break
        value = float(value if alpha is None else alpha.item())
    except (TypeError, ValueError, AttributeError, RuntimeError, re.error) as error:
        raise ReducioError(f"{where}: the alpha of {path} is not readable ({error})") from error
    return _finite(f"{where}: the alpha of {path}", value) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _names(adapters: Adapters, given: Any) -> list[str]:
    names = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    if unknown := [n for n in names if not isinstance(n, str) or n not in adapters.loaded]:
        known = ", ".join(adapters.loaded) or "none"
        raise ReducioError(f"adapter_names: {', '.join(map(repr, unknown))} not loaded; loaded are {known}")
    if len(set(names)) != len(names):
        raise ReducioError(f"adapter_names: {', '.join(names)} names an adapter twice")
    return names


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ReducioError(f"{name}: must be a finite number, is {value!r}")
    return float(value)
