"""Published weights -> our safetensors folders, and back. Names and shapes of other projects are in this room alone.

published                                           becomes
Reducio-VAE release, reducio-ft4-fs32-attn23.ckpt   vae: the same names, without the losses of its training
PixArt-alpha, .pth or diffusers folder              transformer: initial weights for training a Reducio-DiT
SD 2.1 or SDXL VAE, diffusers folder or LDM names   content_encoder
Stability's file of a whole SVD or SV3D             a model folder (see `convert_svd`)

Pickles are read by torch's restricted unpickler, which makes tensors and plain values and calls nothing. Names and
shapes are compared with the configured network, built on the meta device, before a byte is written.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..reference import DIT_PRESETS, VAE_PRESETS, DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from ..system.atomic_files import new_folder, written_whole
from ..system.errors import ReducioError
from ..system.paths import expanded, is_file, is_folder, printable
from . import hub, null_caption, published_names
from .convert_svd import convert_single_file, is_single_file
from .foreign_files import read_weights
from .layouts import REDUCIO
from .networks import load_model, skeleton
from .strict_files import (
    CONFIG,
    INDEX,
    WEIGHTS,
    check_fit,
    check_same_class,
    read_json,
    save_tensors,
    version,
    write_json,
)

# Configuration of diffusers' AutoencoderKL; one architecture, two scales of the latent.
_SD_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
CONTENT_PRESETS: dict[str, dict[str, Any]] = {
    "sd": _SD_VAE | {"scaling_factor": 0.18215},
    "sdxl": _SD_VAE | {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True},
}
PRESETS = {"vae": tuple(VAE_PRESETS), "transformer": tuple(DIT_PRESETS), "content_encoder": tuple(CONTENT_PRESETS)}
CLASSES = {
    "vae": ("reducio_fast", "ReducioVAE"),
    "transformer": ("reducio_fast", "ReducioDiT"),
    "content_encoder": ("diffusers", "AutoencoderKL"),
}
# Patterns of names that only one of the three components has, in any of its spellings.
_TELLTALES = {
    "vae": re.compile(r"^(encoder_3d|encoder_2d)\."),
    "transformer": re.compile(r"^(transformer_)?blocks\.\d"),
    "content_encoder": re.compile(r"^(first_stage_model\.|vae\.)?encoder\.(down|down_blocks)\."),
}
LDM_PREFIX = "first_stage_model."
# PixArt-alpha's own scheduler, for a model folder that has none yet.
_SCHEDULER = {"_class_name": "DPMSolverMultistepScheduler", "beta_start": 0.0001, "beta_end": 0.02}


@dataclasses.dataclass(frozen=True, slots=True)
class Component:
    """A component ready to be written: its configuration and tensors, and how they differ from the source."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    left_out: list[str]  # names in the source that belong to no network: losses, tables
    fresh: list[str]  # names in the result that the source does not have, freshly initialised
    sample_size: int = 256  # height and width in pixels of the clips it was made for; 256 for the release's VAE


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    into: str | os.PathLike[str] | None = None,
    component: str | None = None,
    preset: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    null_text: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Convert a published file, folder or hub id to the component folder `out`, or to a component of the model folder
    `into`.

    `component` (vae, transformer, content_encoder) and `preset` (see PRESETS) are inferred from names and shapes if
    possible; `config` overrides single fields. `dtype` None keeps the stored dtype. `null_text` is the source of the
    null caption for a PixArt that has none (see `null_caption`). Returns what was written, left out and freshly
    initialised. A single file of Stable Video Diffusion becomes a whole model folder; its `preset` gives the number of
    frames (svd: 14, svd-xt: 25; by default the file's name does).

    Raises ReducioError for a file that cannot be read without running code, and for any missing, unexpected or
    misshapen tensor; then nothing is written.
    """
    if (out is None) == (into is None):
        raise ReducioError(f"convert: give out or into, not {'neither' if out is None else 'both'}")
    folder = expanded(out, "out") if out is not None else expanded(str(into), "into")
    path = hub.find_weights(source, component)
    tensors, stated = read_weights(path, component)
    if component is None and is_single_file(tensors):
        if out is None or null_text is not None:
            raise ReducioError(f"{path}: is a whole model and makes a folder of its own; give out, and no null_text")
        _check_outside(path, folder)
        return convert_single_file(path, tensors, folder, preset, config, dtype)
    name = component or _recognise(path, tensors)
    if name not in PRESETS:
        raise ReducioError(f"component: must be one of {', '.join(PRESETS)}, is {name!r}")
    target = folder if out is not None else folder / name
    _check_outside(path, target)
    if preset is not None and preset not in PRESETS[name]:
        raise ReducioError(f"preset: must be one of {', '.join(PRESETS[name])} for {name}, is {preset!r}")
    if name == "transformer":
        converted = _make_transformer(path, tensors, stated, preset, dict(config or {}), null_text)
    elif null_text is None:
        converted = _MAKERS[name](path, tensors, stated, preset, dict(config or {}))
    else:
        raise ReducioError(f"null_text: is of a transformer, {path} holds a {name}")
    if dtype is not None:
        cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in converted.tensors.items()}
        converted = dataclasses.replace(converted, tensors=cast)
    lacks = _write(converted, target, None if into is None else target.parent)
    return {
        "source": str(path),
        "component": name,
        "path": str(target),
        "tensors": len(converted.tensors),
        "parameters": sum(t.numel() for t in converted.tensors.values()),
        "left_out": converted.left_out,
        "fresh": converted.fresh,
        "model_lacks": lacks,
    }


def export(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> dict[str, Any]:
    """Write a vae in the release's format: a pickled {"state_dict": ...} (.ckpt, .pt, .pth), or plain safetensors.

    `source` is a component folder or a model folder. Raises ReducioError for another component or file suffix.
    """
    folder, target = expanded(source, "source"), expanded(out, "out")
    if not is_folder(folder, "source"):
        raise ReducioError(f"source: {printable(folder)} is no folder; --to official takes one of this computer")
    folder = folder / "vae" if is_file(folder / INDEX, "source") else folder
    if target.suffix not in (".ckpt", ".pt", ".pth", ".safetensors"):
        raise ReducioError(f"out: must end in .ckpt, .pt, .pth or .safetensors, is {str(out)!r}")
    state = load_model(ReducioVAE, VAEConfig, folder).state_dict()

    def write(path: Path) -> None:
        if target.suffix == ".safetensors":
            save_tensors(state, path)
        else:
            torch.save({"state_dict": dict(state)}, path)

    _replace(target, write)
    return {"source": str(folder), "component": "vae", "path": str(target), "tensors": len(state)}


def _recognise(path: Path, tensors: Mapping[str, Tensor]) -> str:
    for name, telltale in _TELLTALES.items():
        if any(telltale.match(n) for n in tensors):
            return name
    raise ReducioError(
        f"{path}: neither a Reducio-VAE nor a PixArt transformer nor an image VAE; its names begin with "
        f"{', '.join(list(tensors)[:3])}"
    )


# ---- the three components ----------------------------------------------------------------------------------------


def _configured(config_class: Any, base: Any, config: dict[str, Any]) -> Any:
    """`base` with the fields of `config` replaced."""
    try:
        return config_class.from_dict(base.to_dict() | config)
    except (TypeError, ValueError) as error:
        raise ReducioError(f"config: {error}") from error


def _make_vae(
    path: Path, tensors: dict[str, Tensor], stated: dict[str, Any], preset: str | None, config: dict[str, Any]
) -> Component:
    """The release uses our names; its files also hold the discriminator and LPIPS of the training."""
    if stated.get("_class_name") != CLASSES["vae"][1]:  # the release's repository has a config.json of another program
        stated = {}
    left_out = [n for n in tensors if n.startswith("loss.")]
    tensors = {n: t for n, t in tensors.items() if not n.startswith("loss.")}
    base = VAE_PRESETS[preset] if preset is not None else VAEConfig()
    if preset is None and not stated:
        # A down-sampling that also halves the number of frames has a kernel of three frames instead of one.
        kernels = [t for n, t in tensors.items() if re.fullmatch(r"encoder_3d\.down\.\d+\.downsample\.conv\.weight", n)]
        base = dataclasses.replace(base, temporal_factor=2 ** sum(k.ndim == 5 and k.shape[2] == 3 for k in kernels))
    final = _configured(VAEConfig, base, {n: v for n, v in stated.items() if not n.startswith("_")} | config)
    expected = skeleton(lambda: ReducioVAE(final), "config").state_dict()
    check_fit(path, expected, tensors)
    return Component("vae", _head("vae") | final.to_dict(), {n: tensors[n] for n in expected}, left_out, [])


def as_vae(path: Path, tensors: dict[str, Tensor]) -> Component:
    """The tensors of a file of the release as a component, its configuration read from their shapes."""
    return _make_vae(path, tensors, {}, None, {})


def _make_transformer(
    path: Path,
    tensors: dict[str, Tensor],
    stated: dict[str, Any],
    preset: str | None,
    config: dict[str, Any],
    null_text: str | os.PathLike[str] | None,
) -> Component:
    """Convert PixArt's tensors, its patches to channels; the image condition starts as in a fresh Reducio-DiT."""
    grid = tensors.get("pos_embed")  # the table of the .pth files, [1, rows * columns, D], and its size in tokens
    sample = stated.get("sample_size")
    side = sample // 2 if type(sample) is int and sample > 0 else 0
    side = math.isqrt(grid.shape[1]) if grid is not None and grid.ndim == 3 else side
    if not side and any(n.startswith("csize_embedder.") for n in tensors):
        side = 64  # only the 1024 model is conditioned on sizes
    state, left_out = published_names.pixart_names(tensors)
    if preset is None:
        preset = f"reducio-{side * 16}"
        if preset not in DIT_PRESETS:
            raise ReducioError(f"{path}: does not say its size; give a preset, one of {', '.join(DIT_PRESETS)}")
    final = _configured(DiTConfig, DIT_PRESETS[preset], config)
    expected = skeleton(lambda: ReducioDiT(final), "config").state_dict()
    state = published_names.pixart_patches(final, state)
    if "null_text" not in state:
        shape = (final.caption_length, final.caption_channels)
        if (null := null_caption.read_null_text(path, null_text, shape)) is not None:
            state["null_text"] = null.to(next(iter(state.values())).dtype)
    elif null_text is not None:
        raise ReducioError(f"null_text: {path} has its own")
    fresh = [n for n in expected if n not in state and any(part in n for part in published_names.PIXART_LACKS)]
    check_fit(path, expected, state, fresh)
    start = _fresh_transformer(final, fresh)
    weights = {n: start[n].to(state["proj_out.weight"].dtype) if n in fresh else state[n] for n in expected}
    # The preset gives the size, because coordinates, and with them `position_base_size`, may have another scale.
    size = int(preset.rpartition("-")[2])
    return Component("transformer", _head("transformer") | final.to_dict(), weights, left_out, fresh, size)


def _fresh_transformer(config: DiTConfig, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of a new Reducio-DiT, at least `names`. Only one block exists at a time: a whole XL takes 2.4 GB."""
    one_block = dataclasses.replace(config, depth=1)
    tensors: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same file twice gives the same folder
        for block in range(config.depth if any("transformer_blocks." in n for n in names) else 1):
            drawn = ReducioDiT(one_block).state_dict()
            tensors |= {n.replace("transformer_blocks.0.", f"transformer_blocks.{block}."): t for n, t in drawn.items()}
    return tensors


def _make_content_encoder(
    path: Path, tensors: dict[str, Tensor], stated: dict[str, Any], preset: str | None, config: dict[str, Any]
) -> Component:
    from diffusers import AutoencoderKL

    base = {n: v for n, v in stated.items() if not n.startswith("_")}
    if preset is not None or not base:
        base = base | CONTENT_PRESETS[preset or "sd"]
    network: Any = skeleton(lambda: AutoencoderKL(**base | config), "config")
    expected = network.state_dict()
    left_out: list[str] = []
    if any(n.startswith(LDM_PREFIX) for n in tensors):  # a whole latent diffusion model in one file
        left_out = [n for n in tensors if not n.startswith(LDM_PREFIX)]
        tensors = {n.removeprefix(LDM_PREFIX): t for n, t in tensors.items() if n.startswith(LDM_PREFIX)}
    if any(".down." in n for n in tensors):
        tensors = published_names.ldm_vae_names(tensors, network)
    tensors = {published_names.attention_name(n): t for n, t in tensors.items()}
    for n, t in tensors.items():
        # Older files store the linear layers of the attention as 1x1 convolutions.
        if n in expected and expected[n].ndim == 2 and t.ndim == 4 and t.shape[2:] == (1, 1):
            tensors[n] = t.flatten(1)
    check_fit(path, expected, tensors)
    settings = {n: v for n, v in json.loads(network.to_json_string()).items() if n != "_name_or_path"}
    return Component("content_encoder", settings, {n: tensors[n] for n in expected}, left_out, [])


_MAKERS = {"vae": _make_vae, "content_encoder": _make_content_encoder}


def _head(name: str) -> dict[str, Any]:
    return {"_class_name": CLASSES[name][1], "_reducio_fast_version": version()}


# ---- writing -----------------------------------------------------------------------------------------------------


def _check_outside(source: Path, target: Path) -> None:
    """Raise ReducioError if `source` lies in the folder `target`, which is replaced as a whole."""
    if Path(os.path.realpath(target)) in Path(os.path.realpath(source)).parents:
        raise ReducioError(f"{printable(target)}: holds the source {source.name}, which it would replace; name another")


def _write(component: Component, target: Path, model: Path | None) -> list[str]:
    """Write the component folder, and the index of the `model` it belongs to; returns the components it lacks."""
    check_same_class(target, CONFIG, CLASSES[component.name][1])
    index: dict[str, Any] = {"_class_name": "ReducioPipeline", "_reducio_fast_version": version()}
    if model is not None and is_file(model / INDEX):
        index = read_json(model / INDEX)
        if index.get("_class_name") != "ReducioPipeline":
            raise ReducioError(f"{model}: is the folder of a {index.get('_class_name')}, not of a ReducioPipeline")
    with new_folder(target, CONFIG, "component") as folder:
        write_json(folder / CONFIG, component.config)
        save_tensors(component.tensors, folder / WEIGHTS)
    if model is None:
        return []
    index[component.name] = list(CLASSES[component.name])
    if component.name == "transformer":
        index |= {"sample_height": component.sample_size, "sample_width": component.sample_size}
        index.setdefault("clean_caption", True)  # PixArt was trained on cleaned captions
    index.setdefault("fps", 16)
    if component.name == "vae":  # the size that the release was trained on, until a transformer sets its own
        index.setdefault("sample_height", component.sample_size)
        index.setdefault("sample_width", component.sample_size)
    if "scheduler" not in index:
        (model / "scheduler").mkdir(exist_ok=True)
        write_json(model / "scheduler" / "scheduler_config.json", _SCHEDULER)
        index["scheduler"] = ["diffusers", _SCHEDULER["_class_name"]]
    _replace(model / INDEX, lambda path: write_json(path, index))
    return [n for n in REDUCIO.names if index.get(n) in (None, [None, None])]


def _replace(target: Path, write: Callable[[Path], None]) -> None:
    try:
        with written_whole(target) as fresh:
            write(fresh)
    except OSError as error:
        raise ReducioError(f"{target}: cannot be written ({error.strerror})") from error
