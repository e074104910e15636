"""The image tower of CLIP, as a vision transformer whose patch tokens are read.

Sources: arXiv 2103.00020 and open_clip's `VisionTransformer`, whose state-dict names it has. Legend: B images, L
tokens (class token first), D width.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .initialization import normal


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int, quick_gelu: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        activation = QuickGELU() if quick_gelu else nn.GELU()
        layers = {"c_fc": nn.Linear(width, mlp_width), "gelu": activation, "c_proj": nn.Linear(mlp_width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x_BLD: Tensor) -> Tensor:
        y = self.ln_1(x_BLD)
        x_BLD = x_BLD + self.attn(y, y, y, need_weights=False)[0]
        return x_BLD + self.mlp(self.ln_2(x_BLD))


class Blocks(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, mlp_width: int, quick_gelu: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, mlp_width, quick_gelu) for _ in range(layers))

    def forward(self, x_BLD: Tensor) -> Tensor:
        for block in self.resblocks:
            x_BLD = block(x_BLD)
        return x_BLD


class VisionTower(nn.Module):
    """image_size, patch_size: pixels of a square image and of its patches. embed_dim: of CLIP's shared space, which the
    tokens are not projected to."""

    def __init__(
        self,
        embed_dim: int,
        image_size: int = 224,
        patch_size: int = 16,
        width: int = 768,
        layers: int = 12,
        head_width: int = 64,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        self.image_size, self.grid_size = (image_size, image_size), (image_size // patch_size,) * 2
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        scale = width**-0.5  # of fresh weights, which are drawn in open_clip's order
        self.class_embedding = nn.Parameter(normal(width, scale=scale))
        self.positional_embedding = nn.Parameter(normal(self.grid_size[0] ** 2 + 1, width, scale=scale))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Blocks(layers, width, width // head_width, int(width * mlp_ratio), quick_gelu)
        self.proj = nn.Parameter(normal(width, embed_dim, scale=scale))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, image_size, image_size] -> the image's embedding [B, embed_dim], and tokens [B, patches, D]."""
        patches_BLD = self.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(image), 1, -1), patches_BLD], dim=1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        x = F.layer_norm(x, x.shape[-1:], self.ln_post.weight, self.ln_post.bias, self.ln_post.eps)
        return x[:, 0] @ self.proj, x[:, 1:]
