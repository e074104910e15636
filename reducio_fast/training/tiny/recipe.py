"""The recipe of the embedded default model: `train("out")` writes `out/bundle`, the folder that the package ships.

Six stages train a component from scratch; the last stage packs them. The stages run in order. A stage can run alone
once the components that it needs are in the output folder, and each resumes from its checkpoint. This file holds the
schedules; the defaults of a stage's settings define its networks and data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...system.errors import ReducioError
from ..loop import LoopConfig
from ..processes import joined
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
    """A stage of the recipe: `run(context, settings)` trains and saves; `makes` and `needs` are component folders."""

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
        makes=("text_to_image",),
        needs=("text_encoder", "tokenizer", "content_encoder"),
    ),
    "vae": Stage(
        train_vae,
        VAESettings(
            loop=LoopConfig(steps=6000, learning_rate=1e-3, warmup_steps=50, final_rate=0.03, ema_decay=0.995, seed=5)
        ),
        makes=("vae",),
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
    data: str | os.PathLike[str] | None = None,
    accept_changes: bool = False,
) -> dict[str, dict[str, float]]:
    """Run the recipe, or the named stages in the recipe's order, and return the final figures of each stage.

    Args:
        out: folder for components, checkpoints and logs; created if absent.
        scale: multiplies the number of steps of every stage (the shipped weights are scale 1; a trial run is 0.01).
        resume: continue where an earlier call stopped; False starts the named stages anew.
        data: folder of the downloaded film and photographs (`data.real_video`, `data.photos`); None means `out/data`.
        accept_changes: resume although the number of threads changed.

    Raises:
        ReducioError: a stage is unknown or needs a component that is missing, `scale` is not above 0, or a checkpoint
            was made with another scale.
    """
    names = list(STAGES) if stages is None else list(stages)
    for name in names:
        if name not in STAGES:
            raise ReducioError(f"stages={name!r} is not in the recipe; known: {', '.join(STAGES)}")
    if not scale > 0:
        raise ReducioError(f"scale={scale} must be above 0")
    out, figures = Path(out), {}
    with joined(device) as processes:
        if processes.world_size > 1:
            raise ReducioError(f"WORLD_SIZE={processes.world_size}: the embedded model is trained by one process")
        context = Context(
            out=out,
            data=out / "data" if data is None else Path(data),
            resume=resume,
            accept_changes=accept_changes,
            progress=progress,
            processes=processes,
        )
        for name, stage in STAGES.items():
            if name not in names:
                continue
            for folder in stage.needs:
                if not (out / folder).is_dir():
                    maker = next((other for other, entry in STAGES.items() if folder in entry.makes), "another")
                    raise ReducioError(
                        f"stage {name!r} needs {out / folder}, which stage {maker!r} makes; run that first"
                    )
            figures[name] = stage.run(context, _scaled(stage.settings, scale))
    return figures


def _scaled(settings: Any, scale: float) -> Any:
    """Settings with the number of steps multiplied by `scale`; a scale below 1 also reduces the pools."""
    if scale == 1.0 or not hasattr(settings, "loop"):
        return settings
    loop = settings.loop
    fewer = {
        "steps": max(1, round(loop.steps * scale)),
        "warmup_steps": max(1, round(loop.warmup_steps * min(1.0, scale))),
    }
    pools = [name for name in ("pool", "held_out_pool", "prompts", "evaluated") if hasattr(settings, name)]
    smaller = {name: max(4, round(getattr(settings, name) * min(1.0, scale))) for name in pools}
    return replace(settings, loop=replace(loop, **fewer), **smaller)
