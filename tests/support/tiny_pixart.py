"""A PixArt pipeline of diffusers' own classes, small enough for a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def randomise(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.normal_(0, 0.1)
    return network.requires_grad_(False).eval()


def t5() -> tuple[Any, Any]:
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    config = T5Config(vocab_size=384, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16)
    return ByT5Tokenizer(), randomise(T5EncoderModel(config))


def autoencoder(channels: int = 4, **words: Any) -> Any:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    return randomise(AutoencoderKL(**blocks, **sizes, latent_channels=channels, **words))


def pixart(sample_size: int = 8) -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    drawer = PixArtTransformer2DModel(
        sample_size=sample_size,
        num_attention_heads=2,
        attention_head_dim=12 if sample_size == 128 else 8,  # a size has a third of the channels
        num_layers=1,
        in_channels=4,
        out_channels=8,
        caption_channels=16,
        cross_attention_dim=24 if sample_size == 128 else 16,
    )
    return PixArtAlphaPipeline(*t5(), autoencoder(), randomise(drawer), DPMSolverMultistepScheduler())
