"""LoRA files (arXiv 2106.09685), read strictly against the network they are for."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..system.devices import widened
from ..system.errors import ReducioError, shown
from ..system.paths import expanded, is_file
from ..system.real_numbers import to_float
from . import hub, strict_files

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # as saved by diffusers, by peft
PEFT_CONFIG = "adapter_config.json"  # beside peft's file
METADATA = "lora_adapter_metadata"  # diffusers keeps the same settings in the header of its file
PREFIXES = ("base_model.model.", "transformer.", "unet.")
KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|alpha)")


@dataclass(frozen=True, slots=True)
class LowRank:
    """One layer's dW = scale * up @ down; for a convolution `down` has the kernel."""

    down: Tensor  # A: [rank, in] or [rank, in, kh, kw]
    up: Tensor  # B: [out, rank] or [out, rank, 1, 1]
    scale: float

    def delta(self, like: Tensor) -> Tensor:
        """dW in the shape, on the device and in the precision of `like`."""
        up, down = (x.to(like).flatten(1) for x in (self.up, self.down))
        return (self.scale * (up @ down)).view_as(like)


Adapter = dict[str, LowRank]  # by the layer's path


def read_adapter(
    source: str | os.PathLike[str] | Mapping[str, Tensor], weight_name: str | None, network: nn.Module
) -> Adapter:
    """A LoRA checked against the network it is for. Raises ReducioError that lists every name that does not fit."""
    tensors, config, where = _read(source, weight_name)
    tensors = {name: widened(tensor, f"{where}: {name}") for name, tensor in tensors.items()}
    peft_type = config.get("peft_type", "LORA")
    if peft_type != "LORA":
        raise ReducioError(f"{where}: is an adapter of type {peft_type}; LORA is what can be loaded")
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
    for path, layer_parts in parts.items():
        absent = [f"{path}.{part}" for part in ("lora_A.weight", "lora_B.weight") if part not in layer_parts]
        if absent:
            missing += absent
            continue
        (down_key, down), (up_key, up) = layer_parts["lora_A.weight"], layer_parts["lora_B.weight"]
        weight, rank = layers[path].weight, len(down) if down.ndim else 0
        kernel = (1,) * (weight.ndim - 2)
        for key, tensor, needed in (
            (down_key, down, (rank or 1, *weight.shape[1:])),
            (up_key, up, (len(weight), rank, *kernel)),
        ):
            if tuple(tensor.shape) != needed:
                misshapen.append(f"{key} {list(tensor.shape)} instead of {list(needed)}")
        alpha = layer_parts["alpha"][1] if "alpha" in layer_parts else None
        adapter[path] = LowRank(down, up, _scale(path, rank or 1, alpha, config, where))
    strict_files.report(where, missing, unexpected, misshapen)
    if not adapter:
        raise ReducioError(f"{where}: holds no LoRA")
    for path, low_rank in adapter.items():
        if not all(torch.isfinite(x).all() for x in (low_rank.down, low_rank.up)):
            raise ReducioError(f"{where}: {path} holds values that are not finite (NaN or infinite)")
    return adapter


def _read(
    source: str | os.PathLike[str] | Mapping[str, Tensor], weight_name: str | None
) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    """The tensors, the settings under peft's names, and their source for error messages."""
    if isinstance(source, Mapping):
        where = Path("the LoRA given")
        if wrong := [n for n, t in source.items() if not isinstance(t, Tensor) or not t.is_floating_point()]:
            raise ReducioError(f"{where}: {wrong[0]!r} is no floating-point tensor")
        return {str(n): t.detach() for n, t in source.items()}, {}, where
    path = expanded(source, "LoRA")
    file = path if is_file(path, "LoRA") else _find_file(hub.find_model(source), weight_name)
    tensors = strict_files.load_tensors(file)
    beside = file.with_name(PEFT_CONFIG)
    if is_file(beside):
        return tensors, strict_files.read_json(beside), file
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(METADATA, "{}")
    try:
        settings = {_without_prefix(name): value for name, value in json.loads(text).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ReducioError(f"{file}: its header's {METADATA} is not readable as JSON ({error})") from error
    return tensors, settings, file


def _find_file(folder: Path, weight_name: str | None) -> Path:
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    choice = [weight_name] if weight_name else [n for n in FILES if n in names] or names
    if len(choice) != 1:
        present = ", ".join(names) or "no .safetensors file (pickles are never loaded)"
        raise ReducioError(f"weight_name: name the LoRA's file in {folder}; there is {present}")
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
    return finite_number(f"{where}: the alpha of {path}", value) / (
        math.sqrt(rank) if config.get("use_rslora") else rank
    )


def finite_number(name: str, value: Any) -> float:
    number = to_float(value)
    if not math.isfinite(number):
        raise ReducioError(f"{name}: must be a finite number, is {shown(value)}")
    return number
