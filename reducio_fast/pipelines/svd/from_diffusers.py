"""Our networks on the weights of a loaded diffusers pipeline, which both then share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...checkpoints.layouts import SVD
from ...reference.svd.config import TemporalVAEConfig, VideoUNetConfig
from ...reference.svd.unet import VideoUNet
from ...reference.svd.vae import TemporalVAE
from ...system.errors import ReducioError, shown
from ..execution.foreign_networks import adopt

_NETWORKS = {"unet": (VideoUNet, VideoUNetConfig), "vae": (TemporalVAE, TemporalVAEConfig)}


def networks_of(pipeline: Any) -> dict[str, Any]:
    """The components of an `SVDPipeline` from those of a `StableVideoDiffusionPipeline`. Raises ReducioError for
    another pipeline or a network with other tensors."""
    if not isinstance(getattr(pipeline, "components", None), Mapping):
        raise ReducioError(f"pipeline: must be a pipeline of diffusers, is {shown(pipeline)}")
    parts = {name: getattr(part, "_orig_mod", part) for name, part in pipeline.components.items()}  # of torch.compile
    if missing := [n for n in SVD.names if n not in parts and n not in SVD.optional]:
        raise ReducioError(f"pipeline: a {type(pipeline).__name__} has no {', '.join(missing)}")
    for name, (network_class, config_class) in _NETWORKS.items():
        if isinstance(parts[name], network_class):
            raise ReducioError(f"pipeline: its {name} is ours already; SVDPipeline(**pipeline.components) shares it")
        parts[name] = adopt(parts[name], network_class, config_class, name)
    return {name: parts.get(name) for name in SVD.names}
