"""The recipe of the embedded default model: `train("out")` writes `out/bundle`, the folder that the package ships.

Seven stages train a component from scratch; the last stage packs them. The stages run in order. A stage can run alone
once the components that it needs are in the output folder, and each resumes from its checkpoint. This file holds the
schedules; the defaults of a stage's settings define its networks and data.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from ..loop import LoopConfig
from ..recipe import Stage, run_stages
from .bundle import BundleSettings, export
from .content_autoencoder import ContentSettings, train_content
from .image_encoder import SemanticSettings, train_semantic
from .motion import MotionSettings, train_motion
from .preview import PreviewSettings, train_preview
from .text_encoder import TextSettings, train_text
from .text_to_image import TextToImageSettings, train_text_to_image
from .video_autoencoder import EncoderSettings, VAESettings, train_vae

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
            loop=LoopConfig(steps=8000, learning_rate=1e-3, warmup_steps=200, ema_decay=0.998, weight_decay=0.0, seed=4)
        ),
        makes=("text_to_image",),
        needs=("text_encoder", "tokenizer", "content_encoder"),
    ),
    "vae": Stage(
        train_vae,
        VAESettings(
            loop=LoopConfig(steps=4100, learning_rate=1e-3, warmup_steps=50, final_rate=0.03, ema_decay=0.995, seed=5),
            # With a rate of 6e-4 photographs were 0.3 dB worse after 200 steps, and scenes 0.5 dB.
            encoder=EncoderSettings(
                loop=LoopConfig(
                    steps=900,
                    learning_rate=2e-4,
                    warmup_steps=50,
                    final_rate=0.03,
                    betas=(0.9, 0.999),
                    ema_decay=0.995,
                    seed=6,
                )
            ),
        ),
        makes=("vae",),
    ),
    "preview": Stage(
        train_preview,
        PreviewSettings(
            loop=LoopConfig(steps=1000, learning_rate=2e-3, warmup_steps=50, ema_decay=0.99, weight_decay=0.0, seed=9)
        ),
        makes=("preview_decoder",),
        needs=("vae",),
    ),
    "motion": Stage(
        train_motion,
        MotionSettings(
            loop=LoopConfig(
                steps=3000, learning_rate=1e-3, warmup_steps=100, ema_decay=0.998, weight_decay=0.0, seed=8
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
            "preview_decoder",
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
        accept_changes: resume although a stage's settings or the number of threads changed.

    Raises:
        ReducioError: a stage is unknown or needs a component that is missing, `scale` is not above 0 and finite, or a
            checkpoint was made with other settings or another scale.
    """
    return run_stages(
        STAGES,
        out,
        stages,
        scale,
        resume=resume,
        progress=progress,
        device=device,
        data=data,
        accept_changes=accept_changes,
    )
