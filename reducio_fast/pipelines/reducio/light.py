"""A model folder read with this package's own networks alone: what `generate` needs for a clip in a fresh process.

Importing diffusers, transformers and open_clip takes two seconds and loads 1600 modules. If this package has its own
version of every component of a folder (a byte-level T5, Stable Diffusion's autoencoder, PixArt, DPM-Solver++), a clip
needs none of them, and its bytes are the same: tests compare each of these components with the library's to the bit.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from ...checkpoints import hub, networks, strict_files
from ...checkpoints.diffusers_folders import CALL_DEFAULTS
from ...checkpoints.layouts import REDUCIO
from ...reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from ...reference.multistep_schedule import MultistepSchedule
from ...reference.reducio.image_vae import ImageVAE, ImageVAEConfig
from ...reference.reducio.pixart import PixArt, PixArtConfig
from ...reference.reducio.preview import PreviewConfig, PreviewDecoder
from ...reference.reducio.text_encoder import ByteTokenizer, T5Config, T5Encoder
from ...system import torch_state
from ...system.errors import is_out_of_memory
from ...system.paths import is_file, is_folder
from ..execution.drawing import check_content_kwargs
from ..execution.first_stage import Parts
from ..execution.loading import loading
from ..execution.schedules import unfollowed_by_twins
from .encoders import SemanticEncoder
from .pipeline import ReducioPipeline

SCHEDULER = "DPMSolverMultistepScheduler"
# [library, class] of each component that can be read here.
KNOWN = {
    "vae": ("reducio_fast", "ReducioVAE"),
    "transformer": ("reducio_fast", "ReducioDiT"),
    "scheduler": ("diffusers", SCHEDULER),
    "text_encoder": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "ByT5Tokenizer"),
    "image_encoder": ("reducio_fast", "SemanticEncoder"),
    "content_encoder": ("diffusers", "AutoencoderKL"),
    "text_to_image": ("reducio_fast", "TextToImage"),
}
PREVIEW = {"preview_decoder": ("reducio_fast", "PreviewDecoder")}  # may be absent
KNOWN_DRAWER = {name: KNOWN[name] for name in ("scheduler", "text_encoder", "tokenizer")} | {
    "vae": KNOWN["content_encoder"],
    "transformer": ("diffusers", "PixArtTransformer2DModel"),
}
# Arguments of a call that need the libraries' own objects.
FOREIGN_ARGUMENTS = ("content_kwargs", "schedule")


def can_follow(kwargs: dict[str, Any]) -> bool:
    """Whether a call with these arguments needs no object of a library."""
    return all(kwargs.get(name) is None for name in FOREIGN_ARGUMENTS)


@torch_state.inference()
def load(folder: Path, dtype: torch.dtype, device: torch.device, free_dtype: bool) -> ReducioPipeline | None:
    """The pipeline on the fast path; None for a folder that the libraries must read or reject."""
    try:
        with loading():
            parts = _read(folder, dtype, device)
            pipe = ReducioPipeline(**parts, backend="auto")
    except Exception as error:  # of a folder's values of any type; the libraries' path says what is wrong
        if is_out_of_memory(error):
            raise
        return None
    if pipe.backend != "fast" or pipe.content.first_stage.obstacle() is not None:
        return None
    pipe.executor.choose_dtype(free_dtype)
    pipe.parts.source = hub.lasting_name(folder)
    return pipe


def _read(folder: Path, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Components and settings. Raises an error for a folder that cannot be read here."""
    index = strict_files.read_json(folder / strict_files.INDEX)
    if index.get("_class_name") != REDUCIO.pipeline or dtype == torch.float16:  # some T5 layers stay in float32
        raise ValueError("another pipeline")
    previews = index.get("preview_decoder") not in (None, [None, None])
    _compare(index, KNOWN | PREVIEW if previews else KNOWN)
    known = {*REDUCIO.names, *REDUCIO.settings}
    if unknown := [name for name in index if name not in known and not name.startswith("_")]:
        raise ValueError(f"unknown {unknown}")
    if is_file(folder / "tokenizer" / "spiece.model") or not is_folder(folder / "tokenizer"):
        raise ValueError("another tokenizer")

    def read(network_class: Any, config_class: Any, name: str) -> Any:
        return networks.load_model(network_class, config_class, folder / name, dtype, device)

    parts: dict[str, Any] = {name: index[name] for name in REDUCIO.settings if name in index}
    parts["vae"] = read(ReducioVAE, VAEConfig, "vae")
    parts["transformer"] = read(ReducioDiT, DiTConfig, "transformer")
    parts["scheduler"] = _read_schedule(folder)
    parts["text_encoder"] = read(T5Encoder, T5Config, "text_encoder")
    parts["tokenizer"] = ByteTokenizer()
    parts["image_encoder"] = SemanticEncoder.from_pretrained(folder / "image_encoder", dtype, device)
    parts["content_encoder"] = read(ImageVAE, ImageVAEConfig, "content_encoder")
    parts["preview_decoder"] = read(PreviewDecoder, PreviewConfig, "preview_decoder") if previews else None
    parts["text_to_image"] = _read_drawer(folder / "text_to_image", parts, dtype, device)
    return parts


def _read_drawer(folder: Path, parts: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Parts:
    index = strict_files.read_json(folder / strict_files.INDEX)
    if index.get("_class_name") != "PixArtAlphaPipeline":
        raise ValueError("another first stage")
    _compare(index, KNOWN_DRAWER)
    shared = REDUCIO.shared(parts)
    if own := [name for name in ("text_encoder", "tokenizer", "vae") if is_folder(folder / name)]:
        raise ValueError(f"{own} of its own")
    drawer = Parts(
        transformer=networks.load_model(PixArt, PixArtConfig, folder / "transformer", dtype, device),
        vae=shared["vae"],
        text_encoder=shared["text_encoder"],
        tokenizer=copy.copy(shared["tokenizer"]),
        scheduler=_read_schedule(folder),
        call_defaults=index.get(CALL_DEFAULTS) or {},
    )
    check_content_kwargs(drawer, drawer.call_defaults)
    return drawer


def _read_schedule(folder: Path) -> MultistepSchedule:
    schedule = MultistepSchedule(strict_files.read_json(folder / "scheduler" / "scheduler_config.json"))
    if (why := unfollowed_by_twins(schedule, min(4, schedule.config["num_train_timesteps"]))) is not None:
        raise ValueError(f"the scheduler of {folder}: {why}")
    return schedule


def _compare(index: dict[str, Any], known: dict[str, tuple[str, str]]) -> None:
    for name, (library, class_name) in known.items():
        if index.get(name) != [library, class_name]:
            raise ValueError(f"{name} is {index.get(name)}")
