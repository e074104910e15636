"""How each component of a Reducio folder is loaded, and whether they fit each other."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...checkpoints import networks
from ...checkpoints.layouts import REDUCIO
from ...checkpoints.lora_files import finite_number
from ...checkpoints.model_folder import Loading
from ...reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from ...reference.reducio.preview import PreviewConfig, PreviewDecoder
from ...system.errors import ReducioError
from ...system.paths import expanded
from ..call import validation
from ..call.quality import resolve
from ..execution.components import Components
from ..execution.first_stage import load_text_to_image
from ..execution.schedules import check_scheduler
from . import encoders
from .encoders import SemanticEncoder


def load_vae(loading: Loading) -> ReducioVAE:
    _refuse_source("vae", loading)
    return networks.load_model(ReducioVAE, VAEConfig, loading.folder, loading.dtype, loading.device)


def load_transformer(loading: Loading) -> ReducioDiT:
    _refuse_source("transformer", loading)
    return networks.load_model(ReducioDiT, DiTConfig, loading.folder, loading.dtype, loading.device)


def load_scheduler(loading: Loading) -> Any:
    _refuse_source("scheduler", loading)
    scheduler = _load_foreign(loading)
    check_scheduler(scheduler, loading.folder)
    return scheduler


def load_text_encoder(loading: Loading) -> nn.Module:
    if loading.source is None:
        return _load_foreign(loading)
    folder = encoders.find_text_encoder(loading.source).resolve()
    width = loading.parts["transformer"].config.caption_channels
    loading.loaded[folder] = encoders.load_text_encoder(loading.source, loading.dtype, loading.device, width)
    return loading.loaded[folder]


def load_tokenizer(loading: Loading) -> Any:
    return _load_foreign(loading) if loading.source is None else encoders.load_tokenizer(loading.source)


def load_image_encoder(loading: Loading) -> SemanticEncoder:
    if loading.source is None:
        return SemanticEncoder.from_pretrained(loading.folder, loading.dtype, loading.device)
    width = loading.parts["transformer"].config.semantic_channels
    return SemanticEncoder.from_pretrained(loading.source, loading.dtype, loading.device, width)


def load_content_encoder(loading: Loading) -> nn.Module:
    if loading.source is None:
        return _load_foreign(loading)
    folder = encoders.find_content_encoder(loading.source).resolve()
    channels = loading.parts["transformer"].config.content_channels
    loading.loaded[folder] = encoders.load_content_encoder(loading.source, loading.dtype, loading.device, channels)
    return loading.loaded[folder]


def load_preview_decoder(loading: Loading) -> PreviewDecoder:
    folder = loading.folder if loading.source is None else expanded(loading.source, "preview_decoder")
    return networks.load_model(PreviewDecoder, PreviewConfig, folder, loading.dtype, loading.device)


LOADERS = {
    "vae": load_vae,
    "transformer": load_transformer,
    "scheduler": load_scheduler,
    "text_encoder": load_text_encoder,
    "tokenizer": load_tokenizer,
    "image_encoder": load_image_encoder,
    "content_encoder": load_content_encoder,
    "preview_decoder": load_preview_decoder,
    "text_to_image": load_text_to_image,
}


def _load_foreign(loading: Loading) -> Any:
    """A component of diffusers or transformers, from the model folder itself."""
    return networks.load_foreign(loading.library, loading.class_name, loading.folder, loading.dtype, loading.device)


def _refuse_source(name: str, loading: Loading) -> None:
    if loading.source is not None:
        raise ReducioError(
            f"{name}: {str(loading.source)!r} given; only encoders, preview_decoder and text_to_image can be named, "
            "give an object"
        )


def check_settings(parts: Components) -> None:
    """Raise ReducioError, with the name, for a setting with which no clip could be made or saved. A setting comes from
    the caller or from a folder's index."""
    check_encoder_settings(parts["clean_caption"], parts["content_scaling_factor"])
    check_clip_settings(parts)
    resolve(parts["sampling"], None, {})


def check_clip_settings(parts: Components) -> None:
    """Raise ReducioError, with the name, for an invalid frame rate or size of a model's clips."""
    if not (finite_number("fps", parts["fps"]) > 0):
        raise ReducioError(f"fps: must be above 0, is {parts['fps']!r}")
    for name in ("sample_height", "sample_width"):
        validation.check_multiple(name, parts[name], parts["vae"].config.spatial_factor)


def check_encoder_settings(clean_caption: Any, content_scaling_factor: Any) -> None:
    """Raise ReducioError, with the name, for an invalid setting of the text encoder or the content encoder."""
    if not isinstance(clean_caption, bool):
        raise ReducioError(f"clean_caption: must be True or False, is {clean_caption!r}")
    if not (finite_number("content_scaling_factor", content_scaling_factor) > 0):
        raise ReducioError(f"content_scaling_factor: must be above 0, is {content_scaling_factor!r}")


def check_components(parts: Components) -> None:
    """Raise ReducioError for networks that cannot work together, before a clip could fail with a shape error."""
    for name in REDUCIO.names:
        if parts[name] is None and name not in REDUCIO.optional:
            raise ReducioError(f"{name}: None given, a Reducio model needs one")
    config = parts["transformer"].config
    text_channels = getattr(getattr(parts["text_encoder"], "config", None), "hidden_size", config.caption_channels)
    tower = getattr(parts["image_encoder"], "visual", None)
    semantic_channels = config.semantic_channels if tower is None else tower.ln_post.normalized_shape[0]
    content_config = getattr(parts["content_encoder"], "config", None)
    content_channels = getattr(content_config, "latent_channels", config.content_channels)
    for name, needed, source, channels in (
        ("latent_channels", config.latent_channels, "vae", parts["vae"].config.latent_channels),
        ("caption_channels", config.caption_channels, "text_encoder", text_channels),
        ("semantic_channels", config.semantic_channels, "image_encoder", semantic_channels),
        ("content_channels", config.content_channels, "content_encoder", content_channels),
    ):
        if needed != channels:
            raise ReducioError(f"transformer has {name}={needed}, {source} gives {channels}")
    preview, vae = getattr(parts["preview_decoder"], "config", None), parts["vae"].config
    for name in ("latent_channels", "temporal_factor", "spatial_factor") if preview is not None else ():
        if getattr(preview, name) != getattr(vae, name):
            raise ReducioError(f"preview_decoder has {name}={getattr(preview, name)}, vae has {getattr(vae, name)}")
