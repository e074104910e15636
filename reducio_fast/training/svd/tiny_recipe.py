"""The recipe of the small embedded SVD: `train("out")` makes `out/bundle`, the folder that the package ships.

Three networks are trained from scratch on the toy world; the last stage packs them in float16. The stages run in order.
A stage can run alone once the components that it needs are in the output folder, and each resumes from its checkpoint.

With two threads of a CPU that multiplies bfloat16 (AMX) a step takes 0.75 to 1.15 s in the autoencoder (33.0 dB on
held-out clips at the end), 0.25 s in the image encoder and 1.1 s in the U-Net. docs/training.md has the figures.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...checkpoints.layouts import SVD
from ...checkpoints.model_folder import write_model
from ...checkpoints.networks import load_foreign, load_model
from ...checkpoints.published_svd import FEATURE_EXTRACTOR, SCHEDULER
from ...media.similarity import psnr_of_error
from ...pipelines.svd.pipeline import SVDPipeline
from ...reference.svd.config import TemporalVAEConfig, VideoUNetConfig
from ...reference.svd.unet import VideoUNet
from ...reference.svd.vae import TemporalVAE
from ...system.errors import ReducioError
from ..loop import LoopConfig
from ..recipe import Context, Stage, run_stages
from .tiny_autoencoder import AutoencoderSettings, train_autoencoder
from .tiny_image_encoder import ImageEncoderSettings, train_image_encoder
from .tiny_unet import UNetSettings, train_unet
from .toy_clips import MOTION_BUCKETS, SIZE, draw_clip

BUNDLE = "bundle"


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleSettings:
    """The folder's maximum size, and the number and the steps of the clips that are made with it."""

    size: int = SIZE
    max_bytes: int = 8_000_000
    dtype: torch.dtype = torch.float16
    clips: int = 4
    steps: int = 15


def export(context: Context, settings: BundleSettings) -> dict[str, float]:
    """Write `bundle/` from the components in `context.out`, and make clips with it.

    Figures: bytes; PSNR of the first frames against the pictures that they were made from; mean change from frame to
    frame, of 0..255, for a low and for a high motion bucket.

    Raises ReducioError if a weight does not fit the dtype, or if the folder is too large, which is then removed.
    """
    from diffusers import EulerDiscreteScheduler
    from transformers import CLIPImageProcessor

    out, dtype = context.out, settings.dtype
    encoder = load_foreign("transformers", "CLIPVisionModelWithProjection", out / "image_encoder", dtype, "cpu")
    parts: dict[str, Any] = {
        "vae": load_model(TemporalVAE, TemporalVAEConfig, out / "vae", dtype),
        "unet": load_model(VideoUNet, VideoUNetConfig, out / "unet", dtype),
        "image_encoder": encoder,
        "scheduler": EulerDiscreteScheduler.from_config(SCHEDULER),
        "feature_extractor": CLIPImageProcessor(**FEATURE_EXTRACTOR),
        "text_to_image": None,
        "sample_height": settings.size,
        "sample_width": settings.size,
    }
    for name in ("vae", "unet", "image_encoder"):
        for key, value in parts[name].state_dict().items():
            if not torch.isfinite(value).all():
                raise ReducioError(f"export: {name} has values that do not fit {dtype} in {key}")
    folder = out / BUNDLE
    write_model(folder, parts, SVD)
    # transformers loads a network in the dtype of its configuration, diffusers in float32: without a dtype,
    # `StableVideoDiffusionPipeline.from_pretrained` would mix the two.
    config = folder / "image_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes 0600, which other users of a system-wide install could not read
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > settings.max_bytes:
        shutil.rmtree(folder)
        raise ReducioError(f"export: the bundle has {size:,} bytes, {settings.max_bytes:,} are allowed; it was removed")
    pipe = SVDPipeline.from_pretrained(folder, dtype=torch.float32, device="cpu", backend="reference")
    rng = np.random.default_rng(0)
    pictures = [draw_clip(rng, held_out=True, size=settings.size).frames[0] for _ in range(settings.clips)]
    figures: dict[str, float] = {"bytes": size}
    for amount, pace in (("little", "slowly"), ("much", "fast")):
        call = {"num_inference_steps": settings.steps, "motion_bucket_id": MOTION_BUCKETS[pace], "progress": False}
        clips = torch.from_numpy(pipe(pictures, **call).frames).float()
        figures[f"{amount}_motion"] = float(clips.diff(dim=1).abs().mean())
        first = (clips[:, 0] - torch.from_numpy(np.stack(pictures)).float()).square().flatten(1).mean(1)
        figures[f"first_frame_psnr_{amount}"] = float(psnr_of_error(first, 255.0).mean())
    return context.record("export", figures)


STAGES: dict[str, Stage] = {
    "autoencoder": Stage(
        train_autoencoder,
        AutoencoderSettings(
            loop=LoopConfig(steps=2000, learning_rate=1e-3, warmup_steps=50, final_rate=0.03, ema_decay=0.995, seed=1)
        ),
        makes=("vae",),
    ),
    "image_encoder": Stage(
        train_image_encoder,
        ImageEncoderSettings(
            loop=LoopConfig(steps=2000, learning_rate=1e-3, warmup_steps=100, ema_decay=0.995, seed=2)
        ),
        makes=("image_encoder",),
    ),
    "unet": Stage(
        train_unet,
        UNetSettings(
            loop=LoopConfig(steps=2400, learning_rate=8e-4, warmup_steps=200, ema_decay=0.999, weight_decay=0.0, seed=3)
        ),
        makes=("unet",),
        needs=("vae", "image_encoder"),
    ),
    "export": Stage(export, BundleSettings(), makes=(BUNDLE,), needs=("vae", "image_encoder", "unet")),
}


def train(
    out: str | os.PathLike[str],
    stages: Iterable[str] | None = None,
    scale: float = 1.0,
    resume: bool = True,
    progress: bool = True,
    device: str = "cpu",
    accept_changes: bool = False,
) -> dict[str, dict[str, float]]:
    """Run the recipe, or its named stages in the recipe's order, and return the final figures of each stage.

    Args and errors as in `training.tiny.recipe.train`; nothing is downloaded.
    """
    return run_stages(STAGES, out, stages, scale, resume, progress, device, accept_changes=accept_changes)
