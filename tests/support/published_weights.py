"""Weights under the names of published checkpoints, narrow or without contents."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from reducio_fast.reference import DiTConfig

# All levels and names of the release, at a 32nd of its width.
NARROW_VAE = {
    "base_channels": 4,
    "content_base_channels": 4,
    "norm_groups": 2,
    "num_heads": 2,
    "fusion_head_dim": 4,
}
NARROW_DIT = {
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "caption_channels": 20,
    "caption_length": 7,
    "semantic_channels": 24,
}
NARROW_SD = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [4, 8, 8],
    "norm_num_groups": 2,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def manifest(root: Path, name: str) -> dict[str, list[int]]:
    return json.loads((root / "tests" / "golden" / f"reducio_vae_{name}_state_dict.json").read_text())


def weightless(shapes: dict) -> dict[str, Tensor]:
    """Tensors of any shape over the memory of one number: a file of them has true names and shapes and no gigabytes."""
    return {name: torch.zeros(()).expand(tuple(shape)) for name, shape in shapes.items()}


def shapes_of(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def randomized(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, x in sorted(module.named_parameters()):
            x.copy_(torch.randn(x.shape, generator=generator) / (x[0].numel() if x.ndim > 1 else 25) ** 0.5)
    return module.eval()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    same = a.keys() == b.keys() and all(a[n].dtype == b[n].dtype for n in a)
    return same and all(torch.equal(a[n], b[n]) for n in a)


def json_file(path: Path, values: dict) -> str:
    path.write_text(json.dumps(values))
    return str(path)


def pixart(config: DiTConfig, **words) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        num_layers=config.depth,
        cross_attention_dim=config.hidden_size,
        caption_channels=config.caption_channels,
        **words,
    )
