"""How each component of an SVD folder is loaded, and whether they fit each other."""

from __future__ import annotations

from typing import Any

from ...checkpoints import diffusers_folders, networks
from ...checkpoints.layouts import SVD
from ...checkpoints.model_folder import Loading
from ...reference.svd.config import TemporalVAEConfig, VideoUNetConfig
from ...reference.svd.unet import VideoUNet
from ...reference.svd.vae import TemporalVAE
from ...system.errors import ReducioError
from ..execution.components import Components

TIME_IDS = 3  # fps - 1, motion bucket, noise augmentation
IMAGE_ENCODER, FEATURE_EXTRACTOR = "CLIPVisionModelWithProjection", "CLIPImageProcessor"


def load_vae(loading: Loading) -> TemporalVAE:
    return _load(TemporalVAE, TemporalVAEConfig, loading)


def load_unet(loading: Loading) -> VideoUNet:
    return _load(VideoUNet, VideoUNetConfig, loading)


def _load(network_class: Any, config_class: Any, loading: Loading) -> Any:
    _refuse_source(loading)
    return networks.load_model(
        network_class, config_class, loading.folder, loading.dtype, loading.device, loading.variant
    )


def load_foreign(loading: Loading) -> Any:
    """A component of diffusers or transformers, from the model folder itself."""
    _refuse_source(loading)
    return networks.load_foreign(
        loading.library, loading.class_name, loading.folder, loading.dtype, loading.device, variant=loading.variant
    )


def load_text_to_image(loading: Loading) -> Any:
    folder = loading.folder
    if loading.source is not None:
        folder = diffusers_folders.find_text_to_image(loading.source)
    return diffusers_folders.load_text_to_image(folder, {}, loading.dtype, loading.device, loading.loaded)


LOADERS = {
    "vae": load_vae,
    "unet": load_unet,
    "scheduler": load_foreign,
    "image_encoder": load_foreign,
    "feature_extractor": load_foreign,
    "text_to_image": load_text_to_image,
}


def _refuse_source(loading: Loading) -> None:
    if loading.source is not None:
        raise ReducioError(
            f"{loading.folder.name}: {str(loading.source)!r} given; only text_to_image can be named, give an object"
        )


def check_components(parts: Components) -> None:
    """Raise ReducioError for networks that cannot work together: at once, not by a shape error within a clip."""
    for name, network_class in (("unet", VideoUNet), ("vae", TemporalVAE)):
        if not isinstance(parts[name], network_class):
            raise ReducioError(
                f"{name}: is a {type(parts[name]).__name__}, must be a {network_class.__name__} "
                "(SVDPipeline.from_diffusers takes a diffusers pipeline)"
            )
    for name in SVD.names:
        if parts[name] is None and name not in SVD.optional:
            raise ReducioError(f"{name}: None given, an SVD model needs one")
    unet, vae, encoder = parts["unet"].config, parts["vae"].config, parts["image_encoder"]
    ids = unet.projection_class_embeddings_input_dim / unet.addition_time_embed_dim
    width = getattr(getattr(encoder, "config", None), "projection_dim", unet.per_level("cross_attention_dim")[0])
    for needs, needed, source, given in (
        ("out_channels", unet.out_channels, "vae latents", vae.latent_channels),
        ("in_channels", unet.in_channels, "latents and image latents", 2 * vae.latent_channels),
        ("cross_attention_dim", unet.per_level("cross_attention_dim")[0], "image_encoder", width),
        ("added_time_ids", ids, "a call", TIME_IDS),
    ):
        if needed != given:
            raise ReducioError(f"unet has {needs}={needed:g}, {source} gives {given}")
