"""Our networks on the weights of a loaded diffusers pipeline, which both then share."""

from __future__ import annotations

from typing import Any

from ...checkpoints.layouts import SVD
from ...reference.svd.config import TemporalVAEConfig, VideoUNetConfig
from ...reference.svd.unet import VideoUNet
from ...reference.svd.vae import TemporalVAE
from ...system.errors import ReducioError
from ..execution.foreign_networks import adopt

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
