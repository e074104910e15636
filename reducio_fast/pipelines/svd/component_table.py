"""How each component of an SVD folder is loaded, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...checkpoints import hub, networks, published_svd, strict_files
from ...checkpoints.layouts import SV3D, SVD
from ...checkpoints.model_folder import OURS, Loading
from ...reference.svd.config import NORM_GROUPS, FrameVAEConfig, TemporalVAEConfig, VideoUNetConfig, time_id_widths
from ...reference.svd.consistency import CONFIG_FILE, ConsistencyConfig, ConsistencyScheduler
from ...reference.svd.unet import VideoUNet
from ...reference.svd.vae import FrameVAE, TemporalVAE
from ...system.errors import ReducioError, shown
from ...system.paths import is_folder
from ..call import validation
from ..execution.components import Components
from ..execution.first_stage import load_text_to_image
from ..execution.schedules import check_scheduler

# The possible numbers of a U-Net's added time ids. SVD: fps - 1, motion bucket, noise augmentation. SV3D: the noise
# augmentation; in SV3D_p also the camera's polar angle and azimuth, per frame.
TIME_IDS, ORBIT_IDS = (3,), (1, 3)
IMAGE_ENCODER, FEATURE_EXTRACTOR = "CLIPVisionModelWithProjection", "CLIPImageProcessor"


def load_vae(loading: Loading) -> TemporalVAE:
    return _load(TemporalVAE, TemporalVAEConfig, loading)


def load_frame_vae(loading: Loading) -> FrameVAE:
    return _load(FrameVAE, FrameVAEConfig, loading)


def load_unet(loading: Loading) -> VideoUNet:
    """The folder's U-Net; or the folder's configuration with the weights of a file, as distilled U-Nets are published;
    or the U-Net of another component folder."""
    if loading.source is None:
        return _load(VideoUNet, VideoUNetConfig, loading)
    path = hub.find_weights(loading.source, "unet", "unet")
    if is_folder(path, "unet"):
        path = path / "unet" if is_folder(path / "unet", "unet") else path
        return networks.load_model(VideoUNet, VideoUNetConfig, path, loading.dtype, loading.device, loading.variant)
    if path.suffix != ".safetensors":
        raise ReducioError(f"unet: {str(loading.source)!r} is no .safetensors file; pickles are never loaded")
    return networks.load_model(VideoUNet, VideoUNetConfig, loading.folder, loading.dtype, loading.device, weights=path)


def load_scheduler(loading: Loading) -> Any:
    """The folder's scheduler, or one of `SCHEDULERS` by its name."""
    if loading.source is not None:
        name = str(loading.source)
        if name not in SCHEDULERS:
            raise ReducioError(f"scheduler: {name!r} given; known are {', '.join(SCHEDULERS)}, or give an object")
        return SCHEDULERS[name]()
    if (loading.library, loading.class_name) == (OURS, ConsistencyScheduler.__name__):
        values = strict_files.read_json(loading.folder / CONFIG_FILE)
        try:
            scheduler: Any = ConsistencyScheduler(ConsistencyConfig.from_dict(values))
        except (TypeError, ValueError) as error:
            raise ReducioError(f"{loading.folder / CONFIG_FILE}: {error}") from error
    else:
        scheduler = load_foreign(loading)
    check_scheduler(scheduler, loading.folder)
    return scheduler


def euler_scheduler() -> Any:
    """The scheduler of the published folders."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler.from_config(published_svd.SCHEDULER)


def dpm_scheduler() -> Any:
    """DPM-Solver++ of second order on the same noise levels: fewer steps for the same clip."""
    from diffusers import EDMDPMSolverMultistepScheduler

    schedule = {name: published_svd.SCHEDULER[name] for name in ("sigma_min", "sigma_max", "prediction_type")}
    return EDMDPMSolverMultistepScheduler(**schedule, sigma_data=1.0)


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "euler": euler_scheduler,
    "dpm-solver++": dpm_scheduler,
    "consistency": ConsistencyScheduler,  # for weights that were distilled for it
}


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


LOADERS = {
    "vae": load_vae,
    "unet": load_unet,
    "scheduler": load_scheduler,
    "image_encoder": load_foreign,
    "feature_extractor": load_foreign,
    "text_to_image": load_text_to_image,
}

ORBIT_LOADERS = LOADERS | {"vae": load_frame_vae}


def _refuse_source(loading: Loading) -> None:
    if loading.source is not None:
        raise ReducioError(
            f"{loading.folder.name}: {str(loading.source)!r} given; only unet, scheduler and text_to_image can be "
            "named, give an object"
        )


def check_components(parts: Components) -> None:
    """Raise ReducioError for networks that cannot work together, before a clip could fail with a shape error."""
    orbits = parts.layout is SV3D
    networks_needed: tuple[tuple[str, type], ...] = (("unet", VideoUNet), ("vae", FrameVAE if orbits else TemporalVAE))
    for name, network_class in networks_needed:
        if not isinstance(getattr(parts[name], "_orig_mod", parts[name]), network_class):  # of torch.compile
            raise ReducioError(
                f"{name}: is a {type(parts[name]).__name__}, must be a {network_class.__name__} "
                "(SVDPipeline.from_diffusers takes a diffusers pipeline)"
            )
    for name in SVD.names:
        if parts[name] is None and name not in SVD.optional:
            raise ReducioError(f"{name}: None given, an SVD model needs one")
    if not hasattr(parts["scheduler"], "config"):
        raise ReducioError(f"scheduler: must be one of diffusers' schedulers, is {shown(parts['scheduler'])}")
    unet, vae, encoder = parts["unet"].config, parts["vae"].config, parts["image_encoder"]
    ids, known = len(time_id_widths(unet)), ORBIT_IDS if orbits else TIME_IDS
    width = getattr(getattr(encoder, "config", None), "projection_dim", unet.per_level("cross_attention_dim")[0])
    for needs, needed, source, given in (
        ("out_channels", unet.out_channels, "vae latents", vae.latent_channels),
        ("in_channels", unet.in_channels, "latents and image latents", 2 * vae.latent_channels),
        ("cross_attention_dim", unet.per_level("cross_attention_dim")[0], "image_encoder", width),
        ("added_time_ids", ids, "a call", ids if ids in known else known[-1]),
    ):
        if needed != given:
            raise ReducioError(f"unet has {needs}={needed:g}, {source} gives {given}")


def check_settings(parts: Components) -> None:
    """Raise ReducioError, with the name, for a size of which no clip could be made. A setting comes from the caller or
    from a folder's index."""
    for name in SVD.settings:
        validation.check_multiple(name, parts[name], parts["vae"].config.spatial_factor)


def check_norms(parts: Components, frames: int, height: int, width: int) -> None:
    """Raise ReducioError for a latent of so few cells that a network would normalise single values."""
    unet, vae = parts["unet"].config, parts["vae"].config
    values = [("vae", min(vae.block_out_channels[-2:]) * height * width)]
    for level in range(len(unet.block_out_channels)):
        channels = min(unet.block_out_channels[max(level - 1, 0) : level + 1])  # the first norm has those from before
        cells = -(-height // 2**level) * -(-width // 2**level)
        values.append(("unet", frames * channels * cells))
    for name, count in values:
        if count <= NORM_GROUPS:
            factor = vae.spatial_factor
            size = f"{height * factor}x{width * factor} with num_frames={frames}"
            raise ReducioError(f"height, width: {size} is too small for the {name}, whose norms need two values each")
