"""A recipe of the transformer at a width for tests."""

from __future__ import annotations

from dataclasses import replace

from reducio_fast.training.loop import LoopConfig
from reducio_fast.training.reducio import dit

LOOP = LoopConfig(steps=4, learning_rate=1e-4, warmup_steps=1, log_every=2, checkpoint_every=2, autocast=False)


def small_recipe(**changes) -> dit.DiTRecipe:
    recipe = dit.DiTRecipe(
        loop=LOOP,
        batch=2,
        model="reducio-256",
        config=dict(
            hidden_size=48, depth=2, num_heads=2, caption_channels=128, semantic_channels=128, learn_sigma=False
        ),
        objective="v_prediction",
        threads=1,
    )
    return replace(recipe, **changes)
