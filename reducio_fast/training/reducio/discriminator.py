"""The 3D patch discriminator of the Reducio-VAE release: classifies each patch of a clip as real or generated.

Letters in shapes: B batch, C channels, T frames, H W rows and columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Clips [B, 3, T, H, W] -> one logit per patch, [B, 1, T/8, H/8 - 2, W/8 - 2] if T, H and W are multiples of 8.

    `norm`: "batch" is the release's; its statistics depend on how processes split the batch, those of "group" do not.
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
    """Hinge loss of the discriminator: zero if all real logits are above 1 and all generated ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, most: float = 1e4) -> Tensor:
    """Factor that makes the adversarial loss's gradient at the last layer as large as the reconstruction's (VQGAN)."""
    reconstruction_grad = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0]
    adversarial_grad = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0]
    return (reconstruction_grad.norm() / (adversarial_grad.norm() + 1e-4)).clamp(0, most).detach()
