"""Converts a single file of Stability AI to a model folder in diffusers' layout: of SVD, which `SVDPipeline` and
diffusers read, or of SV3D, which `SV3DPipeline` reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..reference.svd.config import FrameVAEConfig, TemporalVAEConfig, VideoUNetConfig
from ..reference.svd.unet import VideoUNet
from ..reference.svd.vae import FrameVAE, TemporalVAE
from ..system.atomic_files import new_folder
from ..system.errors import ReducioError
from . import published_svd
from .layouts import SV3D, SVD
from .model_card import write_card
from .networks import published_class, skeleton
from .strict_files import (
    CONFIG,
    INDEX,
    WEIGHTS,
    check_fit,
    check_same_class,
    report,
    save_tensors,
    version,
    write_json,
)

# Frames per clip, which cannot be read from the tensors.
PRESETS = {"svd": 14, "svd-xt": 25}
SV3D_FRAMES, SV3D_SIDE = 21, 576  # frames of an orbit, and their height and width in pixels
COMPONENTS = ("unet", "vae", "image_encoder")


@dataclass(frozen=True, slots=True)
class Part:
    """A network ready to be written."""

    library: str
    class_name: str
    config: dict[str, Any]
    network: nn.Module  # on the meta device, without weights
    tensors: dict[str, Tensor]
    file: str


def is_single_file(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a single file of SVD or SV3D."""
    return any(published_svd.TELLTALE.match(name) for name in tensors)


def frames_of(path: Path, preset: str | None) -> int:
    """The number of frames that the weights were made for, by `preset` or else by the file's name. Raises ReducioError
    if neither gives it."""
    if preset is None:
        stem = path.stem.lower().replace("-", "_")
        match = re.match(r"svd(_xt)?(_|\d|$)", stem)
        if match is None:
            known = ", ".join(f"{name} ({frames} frames)" for name, frames in PRESETS.items())
            raise ReducioError(f"{path}: does not say its frames in its name; give a preset, one of {known}")
        preset = "svd-xt" if match[1] else "svd"
    if preset not in PRESETS:
        raise ReducioError(f"preset: must be one of {', '.join(PRESETS)} for svd, is {preset!r}")
    return PRESETS[preset]


def convert_single_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    out: Path,
    preset: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Write the model folder `out`. `config` overrides fields: {"unet": {...}, "vae": {...}, "image_encoder": {...}}.

    Returns what was written and left out. Raises ReducioError, before a byte is written, for any missing, unexpected or
    misshapen tensor.
    """
    config = dict(config or {})
    if unknown := sorted(set(config) - set(COMPONENTS)):
        raise ReducioError(f"config: {unknown[0]!r} is no component; known are {', '.join(COMPONENTS)}")
    if wrong := [name for name, fields in config.items() if not isinstance(fields, Mapping)]:
        raise ReducioError(f"config: {wrong[0]} must be an object of fields, is {config[wrong[0]]!r}")
    split, left_out = published_svd.split(tensors)
    orbits = not published_svd.is_temporal(split["vae"])
    if orbits and preset is not None:
        raise ReducioError(f"preset: {path} is an SV3D, whose tensors say all; {preset!r} given")
    frames = SV3D_FRAMES if orbits else frames_of(path, preset)
    layout = SV3D if orbits else SVD
    check_same_class(out, INDEX, layout.pipeline)
    if split[""]:
        report(path, [], list(split[""]), [])
    for name, needed in (("vae", "decoder.conv_in.weight"), ("image_encoder", "proj")):
        if needed not in split[name]:
            raise ReducioError(f"{path}: has no {name}; only files with all networks make a model folder")
    parts = {
        "vae": _vae(path, split["vae"], config.get("vae", {}), orbits),
        "unet": _unet(path, split["unet"], {"num_frames": frames, **config.get("unet", {})}),
        "image_encoder": _image_encoder(path, split["image_encoder"], config.get("image_encoder", {})),
    }
    index: dict[str, Any] = {"_class_name": layout.pipeline, "_reducio_fast_version": version()}
    index |= {"sample_height": SV3D_SIDE, "sample_width": SV3D_SIDE} if orbits else {}
    index |= {name: [part.library, part.class_name] for name, part in parts.items()}
    index |= {"scheduler": ["diffusers", published_svd.SCHEDULER["_class_name"]]}
    index |= {"feature_extractor": ["transformers", published_svd.FEATURE_EXTRACTOR["image_processor_type"]]}
    with new_folder(out, INDEX, "model") as folder:
        for name, part in parts.items():
            (folder / name).mkdir()
            write_json(folder / name / CONFIG, part.config)
            cast = {n: t if dtype is None else t.to(dtype) for n, t in part.tensors.items()}
            save_tensors(cast, folder / name / part.file)
        for name, file, values in (
            ("scheduler", "scheduler_config.json", published_svd.SCHEDULER),
            ("feature_extractor", "preprocessor_config.json", published_svd.FEATURE_EXTRACTOR),
        ):
            (folder / name).mkdir()
            write_json(folder / name / file, values)
        write_json(folder / INDEX, index)
        write_card(folder, {name: part.network for name, part in parts.items()}, {}, out.name, layout)
    tensors_written = [t for part in parts.values() for t in part.tensors.values()]
    return {
        "source": str(path),
        "component": layout.pipeline,
        "path": str(out),
        "tensors": len(tensors_written),
        "parameters": sum(t.numel() for t in tensors_written),
        "left_out": left_out,
        "fresh": [],
        "model_lacks": [],
    }


def _read(path: Path, name: str, read: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration that `read` infers from names and shapes. Raises ReducioError if a needed tensor is missing."""
    try:
        return read(tensors)
    except (KeyError, IndexError, ValueError) as error:
        raise ReducioError(f"{path}: {name} is not as published, {error} is missing") from error


def _network(name: str, network_class: Any, config_class: Any, fields: dict[str, Any]) -> Any:
    return skeleton(lambda: network_class(config_class.from_dict(fields)), f"config: {name}")


def _fitted(path: Path, name: str, network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` in the network's order. Raises one ReducioError that lists every disagreement."""
    expected = network.state_dict()
    check_fit(Path(f"{path}: {name}"), expected, tensors)
    return {n: tensors[n] for n in expected}


def _unet(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Part:
    fields = _read(path, "unet", published_svd.unet_config, tensors) | config
    network = _network("unet", VideoUNet, VideoUNetConfig, fields)
    return _ours(network, _fitted(path, "unet", network, published_svd.unet_names(tensors)))


def _vae(path: Path, tensors: dict[str, Tensor], config: dict[str, Any], orbits: bool) -> Part:
    read = _read(path, "vae", published_svd.vae_config, tensors)
    fields = read | config
    if orbits:
        levels = len(read["block_out_channels"])
        fields = {"up_block_types": ["UpDecoderBlock2D"] * levels, "use_post_quant_conv": False} | fields
        network = _network("vae", FrameVAE, FrameVAEConfig, fields)
    else:
        network = _network("vae", TemporalVAE, TemporalVAEConfig, fields)
    return _ours(network, _fitted(path, "vae", network, published_svd.vae_names(tensors)))


def _ours(network: Any, state: dict[str, Tensor]) -> Part:
    library, class_name = published_class(type(network))
    head = {"_class_name": class_name, "_reducio_fast_version": version()}
    return Part(library, class_name, head | network.config.to_dict(), network, state, WEIGHTS)


def _image_encoder(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Part:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    class_name = CLIPVisionModelWithProjection.__name__
    fields = _read(path, "image_encoder", published_svd.image_encoder_config, tensors) | config
    network = _network("image_encoder", CLIPVisionModelWithProjection, CLIPVisionConfig, fields)
    state = _fitted(path, "image_encoder", network, published_svd.image_encoder_names(tensors))
    settings = {"architectures": [class_name], "model_type": "clip_vision_model", **fields}
    return Part("transformers", class_name, settings, network, state, "model.safetensors")
