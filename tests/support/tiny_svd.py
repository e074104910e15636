"""Stable Video Diffusion small enough for a CPU: diffusers' own classes with random weights, and ours on the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import nn

from reducio_fast.reference.svd.config import (
    ATTENTION_DOWN,
    ATTENTION_UP,
    PLAIN_DOWN,
    PLAIN_UP,
    TemporalVAEConfig,
    VideoUNetConfig,
)
from reducio_fast.reference.svd.unet import VideoUNet
from reducio_fast.reference.svd.vae import TemporalVAE

CALL = {"height": 32, "width": 32, "num_frames": 4, "num_inference_steps": 3}
QUIET = {"progress": False}


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unet_config(*channels: int, **changes: Any) -> dict[str, Any]:
    """Of as many levels as widths are given, the coarsest without attention."""
    levels = len(channels)
    return {
        "sample_size": 16,
        "in_channels": 8,
        "out_channels": 4,
        "block_out_channels": channels,
        "down_block_types": (ATTENTION_DOWN,) * (levels - 1) + (PLAIN_DOWN,),
        "up_block_types": (PLAIN_UP,) + (ATTENTION_UP,) * (levels - 1),
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 96,
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "num_attention_heads": tuple(channel // 32 for channel in channels),
        "num_frames": 5,
    } | changes


def vae_config(*channels: int, **changes: Any) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 32,
    } | changes


def lively_svd(network: nn.Module, seed: int = 0) -> Any:
    """Weights of the size of trained ones; biases, norms and mix factors away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("mix_factor"):
                parameter.copy_(noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return network.requires_grad_(False).eval()


def unets(*channels: int, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[VideoUNet, Any]:
    """Ours and diffusers', with the same weights."""
    config = unet_config(*channels, **changes)
    theirs = lively_svd(UNetSpatioTemporalConditionModel(**config)).to(dtype)
    ours = VideoUNet(VideoUNetConfig.from_dict(dict(theirs.config))).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours.requires_grad_(False).eval(), theirs


def vaes(*channels: int, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[TemporalVAE, Any]:
    """Ours and diffusers', with the same weights."""
    theirs = lively_svd(AutoencoderKLTemporalDecoder(**vae_config(*channels, **changes))).to(dtype)
    ours = TemporalVAE(TemporalVAEConfig.from_dict(dict(theirs.config))).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours.requires_grad_(False).eval(), theirs


def unet_inputs(
    config: Any, frames: int, size: tuple[int, int], dtype: torch.dtype = torch.float32, batch: int = 2, tokens: int = 1
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    return {
        "sample": draw(batch, frames, config.in_channels, *size),
        "timestep": torch.tensor(0.7, dtype=dtype),
        "encoder_hidden_states": draw(batch, tokens, 24),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02], [6.0, 90.0, 0.1]], dtype=dtype)[:batch],
    }


def same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within 2/255 and above 50 dB: `theirs` as floats in [0, 1]."""
    difference = np.abs(np.asarray(ours).astype(float) - theirs * 255)
    assert difference.max() <= 2
    assert 10 * np.log10(255**2 / max((difference**2).mean(), 1e-9)) > 50
