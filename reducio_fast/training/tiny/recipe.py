"""The recipe of the embedded default model: `train("out")` makes `out/bundle`, the folder that the package ships.

The stages run in order; each can be run alone once those it needs have left their components in the output folder, and
each resumes from its checkpoint. Schedules are here; what a stage trains, and on what, is in its settings' defaults.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...system.errors import ReducioError
from ..loop import LoopConfig
from ..recipe import Context
from .bundle import BundleSettings, export
from .content_autoencoder import ContentSettings, train_content
from .image_encoder import SemanticSettings, train_semantic
from .motion import MotionSettings, train_motion
from .text_encoder import TextSettings, train_text
from .text_to_image import TextToImageSettings, train_text_to_image
from .video_autoencoder import VAESettings, train_vae


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the recipe: `run(context, settings)` trains and saves; `makes` are the folders it leaves behind."""

    run: Callable[[Context, Any], dict[str, float]]
    settings: Any
    makes: tuple[str, ...]
    needs: tuple[str, ...] = ()


STAGES: dict[str, Stage] = {
    "text": Stage(
        train_text,
        TextSettings(loop=LoopConfig(steps=1200, learning_rate=2e-3, warmup_steps=50, ema_decay=0.99, seed=1)),
        makes=("text_encoder", "tokenizer"),
    ),
    "semantic": Stage(
        train_semantic,
        SemanticSettings(loop=LoopConfig(steps=1200, learning_rate=1e-3, warmup_steps=100, ema_decay=0.995, seed=2)),
        makes=("image_encoder",),
    ),
    "content": Stage(
        train_content,
        ContentSettings(loop=LoopConfig(steps=1500, learning_rate=1.2e-3, warmup_steps=50, ema_decay=0.99, seed=3)),
        makes=("content_encoder",),
    ),
    "text_to_image": Stage(
        train_text_to_image,
        TextToImageSettings(
            loop=LoopConfig(steps=5000, learning_rate=1e-3, warmup_steps=200, ema_decay=0.998, weight_decay=0.0, seed=4)
        ),
        makes=("text_to_image", "runs/text_to_image"),
        needs=("text_encoder", "tokenizer", "content_encoder"),
    ),
    "portraits": Stage(
        partial(train_text_to_image, stage="portraits"),
        TextToImageSettings(
            loop=LoopConfig(steps=900, learning_rate=6e-4, warmup_steps=30, ema_decay=0.99, weight_decay=0.0, seed=11),
            pool=6000,
            portraits=True,
            after="text_to_image",
        ),
        makes=("runs/portraits",),
        needs=("text_encoder", "tokenizer", "content_encoder", "runs/text_to_image"),
    ),
    "vae_sketch": Stage(
        partial(train_vae, stage="vae_sketch"),
        VAESettings(
            loop=LoopConfig(
                steps=900,
                learning_rate=1e-3,
                warmup_steps=30,
                final_rate=0.5,
                ema_decay=0.98,
                seed=5,
            ),
            trains="encoder",
            size=64,
            batch=8,
            photo_share=0.2,
        ),
        makes=("runs/vae_sketch",),
    ),
    "vae_crops": Stage(
        partial(train_vae, stage="vae_crops"),
        VAESettings(
            loop=LoopConfig(
                steps=1800,
                learning_rate=8e-4,
                warmup_steps=30,
                final_rate=0.05,
                ema_decay=0.99,
                seed=6,
            ),
            trains="all",
            size=64,
            batch=4,
            after="vae_sketch",
        ),
        makes=("runs/vae_crops",),
        needs=("runs/vae_sketch",),
    ),
    "vae_whole": Stage(
        partial(train_vae, stage="vae_whole"),
        VAESettings(
            loop=LoopConfig(
                steps=1000,
                learning_rate=6e-4,
                warmup_steps=20,
                final_rate=0.03,
                ema_decay=0.99,
                seed=7,
            ),
            trains="decoder",
            size=128,
            batch=2,
            photo_share=0.25,
            after="vae_crops",
        ),
        makes=("runs/vae_whole",),
        needs=("runs/vae_crops",),
    ),
    "vae_colour": Stage(
        partial(train_vae, stage="vae_colour"),
        VAESettings(
            loop=LoopConfig(steps=2200, learning_rate=1e-3, warmup_steps=30, final_rate=0.05, ema_decay=0.99, seed=9),
            trains="decoder",
            size=64,
            batch=4,
            photo_share=0.2,
            chroma_weight=1.0,
            after="vae_whole",
        ),
        makes=("runs/vae_colour",),
        needs=("runs/vae_whole",),
    ),
    "vae_portraits": Stage(
        partial(train_vae, stage="vae_portraits"),
        VAESettings(
            loop=LoopConfig(steps=650, learning_rate=6e-4, warmup_steps=20, final_rate=0.02, ema_decay=0.99, seed=10),
            trains="decoder",
            size=128,
            batch=2,
            photo_share=0.15,
            portrait_share=0.6,
            chroma_weight=1.0,
            after="vae_colour",
        ),
        makes=("runs/vae_portraits",),
        needs=("runs/vae_colour",),
    ),
    "vae_outlines": Stage(
        partial(train_vae, stage="vae_outlines"),
        VAESettings(
            loop=LoopConfig(steps=1000, learning_rate=6e-4, warmup_steps=20, final_rate=0.02, ema_decay=0.99, seed=12),
            trains="decoder",
            size=96,
            batch=2,
            photo_share=0.1,
            portrait_share=0.9,
            chroma_weight=1.0,
            moving_weight=3.0,
            after="vae_portraits",
        ),
        makes=("runs/vae_outlines",),
        needs=("runs/vae_portraits",),
    ),
    "vae_carriage": Stage(
        partial(train_vae, stage="vae_carriage"),
        VAESettings(
            loop=LoopConfig(
                steps=1500,
                learning_rate=1e-3,
                warmup_steps=30,
                final_rate=0.2,
                ema_decay=0.99,
                seed=13,
                autocast=False,
            ),
            trains="carriage",
            size=96,
            batch=3,
            photo_share=0.15,
            portrait_share=0.95,
            moving_weight=5.0,
            carriage_weight=1.0,
            latent_noise=0.25,
            after="vae_outlines",
        ),
        makes=("runs/vae_carriage",),
        needs=("runs/vae_outlines",),
    ),
    "vae_shapes": Stage(
        partial(train_vae, stage="vae_shapes"),
        VAESettings(
            loop=LoopConfig(
                steps=1100,
                learning_rate=8e-4,
                warmup_steps=20,
                final_rate=0.02,
                ema_decay=0.99,
                seed=14,
                autocast=False,
            ),
            trains="decoder",
            size=96,
            batch=2,
            photo_share=0.3,
            portrait_share=0.9,
            chroma_weight=1.0,
            moving_weight=4.0,
            carriage_weight=0.3,
            latent_noise=0.2,
            after="vae_carriage",
        ),
        makes=("runs/vae_shapes",),
        needs=("runs/vae_carriage",),
    ),
    "vae_joint": Stage(
        partial(train_vae, stage="vae_joint"),
        VAESettings(
            loop=LoopConfig(steps=5500, learning_rate=1e-3, warmup_steps=50, final_rate=0.05, ema_decay=0.995, seed=15),
            trains="all",
            size=96,
            batch=2,
            photo_share=0.12,
            portrait_share=0.85,
            sketch_weight=0.3,
            chroma_weight=0.5,
            moving_weight=12.0,
            level_weights=True,
            carriage_weight=0.5,
            latent_noise=0.3,
            after="vae_shapes",
        ),
        makes=("vae",),
        needs=("runs/vae_shapes",),
    ),
    "motion": Stage(
        train_motion,
        MotionSettings(
            loop=LoopConfig(
                steps=4000, learning_rate=1e-3, warmup_steps=100, ema_decay=0.998, weight_decay=0.0, seed=8
            ),
            portrait_share=0.7,
        ),
        makes=("transformer", "scheduler"),
        needs=("text_encoder", "tokenizer", "image_encoder", "content_encoder", "vae"),
    ),
    "export": Stage(
        export,
        BundleSettings(),
        makes=("bundle",),
        needs=(
            "text_encoder",
            "tokenizer",
            "image_encoder",
            "content_encoder",
            "text_to_image",
            "vae",
            "transformer",
            "scheduler",
        ),
    ),
}


def train(
    out: str | os.PathLike[str],
    stages: Iterable[str] | None = None,
    scale: float = 1.0,
    resume: bool = True,
    progress: bool = True,
    device: str = "cpu",
) -> dict[str, dict[str, float]]:
    """Runs the recipe, or the named stages of it in the recipe's order, and returns the figures each stage reached.

    Args:
        out: folder for components, checkpoints and logs; made if absent.
        scale: multiplies the number of steps of every stage (the shipped weights are scale 1; a trial run is 0.01).
        resume: continue where an earlier call stopped; False starts the named stages anew.

    Raises:
        ReducioError: an unknown stage, a stage whose forerunners have not run, a scale that is not above 0, or a
            checkpoint made with another scale.
    """
    names = list(STAGES) if stages is None else list(stages)
    for name in names:
        if name not in STAGES:
            raise ReducioError(f"stages={name!r} is not in the recipe; known: {', '.join(STAGES)}")
    if not scale > 0:
        raise ReducioError(f"scale={scale} must be above 0")
    context = Context(out=Path(out), resume=resume, progress=progress, device=device)
    figures = {}
    for name, stage in STAGES.items():
        if name not in names:
            continue
        for folder in stage.needs:
            if not (context.out / folder).is_dir():
                maker = next((other for other, entry in STAGES.items() if folder in entry.makes), "another")
                raise ReducioError(
                    f"stage {name!r} needs {context.out / folder}, which stage {maker!r} makes; run that first"
                )
        figures[name] = stage.run(context, _scaled(stage.settings, scale))
    return figures


def _scaled(settings: Any, scale: float) -> Any:
    """The settings with the loop inside them made shorter (or longer) by `scale`, and for a trial run smaller pools."""
    if scale == 1.0 or not hasattr(settings, "loop"):
        return settings
    loop = settings.loop
    fewer = {
        "steps": max(1, round(loop.steps * scale)),
        "warmup_steps": max(1, round(loop.warmup_steps * min(1.0, scale))),
    }
    pools = [name for name in ("pool", "held_out_pool", "prompts", "judged") if hasattr(settings, name)]
    smaller = {name: max(4, round(getattr(settings, name) * min(1.0, scale))) for name in pools}
    return replace(settings, loop=replace(loop, **fewer), **smaller)
