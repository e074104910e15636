"""The last stage: writes the trained components as one float16 model folder, small enough to ship in the package."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import ByT5Tokenizer

from ...checkpoints.diffusers_folders import load_text_to_image
from ...checkpoints.layouts import REDUCIO
from ...checkpoints.model_folder import write_model
from ...checkpoints.networks import load_foreign, load_model
from ...pipelines.reducio.encoders import SemanticEncoder
from ...reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from ...reference.reducio.preview import PreviewConfig, PreviewDecoder
from ...system.errors import ReducioError
from ..recipe import Context

BUNDLE = "bundle"


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleSettings:
    """Settings of the model, and the folder's maximum size, since every version stays in the repository's history."""

    fps: int = 16
    size: int = 128
    max_bytes: int = 25_000_000
    dtype: torch.dtype = torch.float16


def export(context: Context, settings: BundleSettings) -> dict[str, float]:
    """Write `bundle/` from the components in `context.out`. Figures: the number of its bytes and of its files.

    Raises:
        ReducioError: a component is missing or damaged, a weight does not fit float16, or the folder is too large.
    """
    out, dtype = context.out, settings.dtype
    parts = {
        "vae": load_model(ReducioVAE, VAEConfig, out / "vae", dtype),
        "transformer": load_model(ReducioDiT, DiTConfig, out / "transformer", dtype),
        "preview_decoder": load_model(PreviewDecoder, PreviewConfig, out / "preview_decoder", dtype),
        "image_encoder": SemanticEncoder.from_pretrained(out / "image_encoder", dtype),
        "fps": settings.fps,
        "sample_height": settings.size,
        "sample_width": settings.size,
    }
    for name, library, class_name in (
        ("scheduler", "diffusers", "DPMSolverMultistepScheduler"),
        ("text_encoder", "transformers", "T5EncoderModel"),
        ("tokenizer", "transformers", "ByT5Tokenizer"),
        ("content_encoder", "diffusers", "AutoencoderKL"),
    ):
        parts[name] = load_foreign(library, class_name, out / name, dtype, "cpu")
    # The sentinel tokens after the 256 bytes are for T5's pre-training; no caption contains one.
    parts["tokenizer"] = ByT5Tokenizer(extra_ids=0)
    parts["text_encoder"].resize_token_embeddings(len(parts["tokenizer"]))
    parts["text_encoder"].to(dtype)  # also `wo`, which transformers keeps in float32 when it runs
    shared = REDUCIO.shared(parts)
    parts["text_to_image"] = load_text_to_image(out / "text_to_image", shared, dtype, "cpu")
    for name in ("content_encoder", "text_to_image"):  # their config would contain this machine's path
        network = parts[name].transformer if name == "text_to_image" else parts[name]
        network.register_to_config(_name_or_path=name)
    networks = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    for name, network in {**networks, "text_to_image": parts["text_to_image"].transformer}.items():
        for key, value in network.state_dict().items():
            if not torch.isfinite(value).all():
                raise ReducioError(f"export: {name} has values that do not fit {dtype} in {key}")

    # One byte per weight is enough for a block that never runs and exists because released checkpoints contain it, and
    # for two small networks, to fit into `max_bytes`: previews are coarse, and the image encoder's output is one of
    # three conditions.
    parts["vae"].encoder_2d.mid.block_2.to(torch.float8_e4m3fn)
    for name in ("preview_decoder", "image_encoder"):
        for weight in parts[name].parameters():
            if weight.ndim > 1:
                weight.data = weight.data.to(torch.float8_e4m3fn)
    folder = out / BUNDLE
    write_model(folder, parts, REDUCIO)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes 0600, which other users of a system-wide install could not read
    size = folder_bytes(folder)
    if size > settings.max_bytes:
        shutil.rmtree(folder)
        raise ReducioError(f"export: the bundle has {size:,} bytes, {settings.max_bytes:,} are allowed; it was removed")
    return context.record("export", {"bytes": size, "files": sum(path.is_file() for path in folder.rglob("*"))})


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
