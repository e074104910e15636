"""The 3D patch discriminator of the Reducio-VAE release: is this piece of a clip real?

Letters in shapes: B batch, C channels, T frames, H W rows and columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Clips [B, 3, T, H, W] -> one logit a patch, [B, 1, T/8, H/8 - 2, W/8 - 2] of a clip whose sides 8 divides.

    `norm`: "batch", as the release has it, depends on how a batch is shared by processes; "group" does not.
    """

    def __init__(self, width: int = 64, norm: str = "batch") -> None:
        super().__init__()
        kernels = (((4, 4, 4), 2), ((4, 4, 4), 2), ((3, 4, 4), 2), ((1, 4, 4), 1), ((1, 4, 4), 1))
        widths = (3, width, 2 * width, 4 * width, 8 * width, 1)
        layers: list[nn.Module] = []
        for i, (kernel, stride) in enumerate(kernels):
            padding = tuple((k - 1) // 2 for k in kernel)
            inner = 0 < i < len(kernels) - 1
            layers.append(nn.Conv3d(widths[i], widths[i + 1], kernel, stride, padding, bias=not inner))
            if inner:
                layers.append(_norm(norm, widths[i + 1]))
            if i < len(kernels) - 1:
                layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.BatchNorm3d | nn.GroupNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, clip_BCTHW: Tensor) -> Tensor:
        return self.layers(clip_BCTHW)


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm3d(channels) if kind == "batch" else nn.GroupNorm(min(32, channels), channels)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Of the discriminator: real logits above 1, generated ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, most: float = 1e4) -> Tensor:
    """By how much the adversarial loss must be scaled for gradients of equal size at the last layer (VQGAN)."""
    of_pixels = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0]
    of_judge = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0]
    return (of_pixels.norm() / (of_judge.norm() + 1e-4)).clamp(0, most).detach()
