"""Gradient checkpointing: less memory in training, for one more forward pass of some blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .mixed_precision import float32_for_few_frames


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Make blocks keep only their inputs for the backward pass and recompute their activations there."""
    for block in blocks:
        forward = block.forward
        block.forward = lambda *inputs, _forward=forward: (  # type: ignore[method-assign]
            checkpoint(_forward, *inputs, use_reentrant=False, context_fn=_contexts)
            if torch.is_grad_enabled()
            else _forward(*inputs)
        )


def _contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """Of a block's forward pass and of its recomputation, for which torch restores autocast but no function mode."""
    return contextlib.nullcontext(), float32_for_few_frames(torch.is_autocast_enabled("cpu"))
