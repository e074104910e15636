"""Our networks on the weights of a loaded diffusers pipeline, which both then share."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from ...checkpoints.layouts import SVD
from ...reference.svd.config import TemporalVAEConfig, VideoUNetConfig
from ...reference.svd.unet import VideoUNet
from ...reference.svd.vae import TemporalVAE
from ...system.errors import ReducioError

_NETWORKS = {"unet": (VideoUNet, VideoUNetConfig), "vae": (TemporalVAE, TemporalVAEConfig)}


def networks_of(pipeline: Any) -> dict[str, Any]:
    """The components of an `SVDPipeline` from those of a `StableVideoDiffusionPipeline`. Raises ReducioError for
    another pipeline or a network with other tensors."""
    parts = dict(pipeline.components)
    if missing := [n for n in SVD.names if n not in parts and n not in SVD.optional]:
        raise ReducioError(f"pipeline: a {type(pipeline).__name__} has no {', '.join(missing)}")
    for name, (network_class, config_class) in _NETWORKS.items():
        parts[name] = adopt(parts[name], network_class, config_class, name)
    return {name: parts.get(name) for name in SVD.names}


def adopt(theirs: nn.Module, network_class: Any, config_class: Any, name: str, as_parameters: bool = False) -> Any:
    """`network_class` on the very tensors of `theirs`, or on its very parameters, which then also move together."""
    stated = json.loads(theirs.to_json_string())  # type: ignore[operator]
    try:
        config = config_class.from_dict(stated)
        with torch.device("meta"):
            network = network_class(config)
        tensors = theirs.state_dict(keep_vars=as_parameters)
        for parameter_name, parameter in network.named_parameters():  # else assigning would switch theirs on
            if parameter_name in tensors:
                parameter.requires_grad_(tensors[parameter_name].requires_grad)
        network.load_state_dict(tensors, strict=True, assign=True)
    except (ValueError, RuntimeError) as error:
        raise ReducioError(f"{name}: a {type(theirs).__name__} that is not as published ({error})") from error
    return network.eval()
