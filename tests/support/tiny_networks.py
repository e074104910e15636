"""Networks of the real classes, small enough for a CPU, and the rule that judges their twins."""

from __future__ import annotations

import torch

from reducio_fast.fast.plan import Plan
from reducio_fast.measurement.accuracy_rule import judge

DIT = dict(
    hidden_size=48,
    depth=3,
    num_heads=4,
    caption_channels=20,
    caption_length=7,
    semantic_channels=24,
    position_base_size=4,
)
VAE = dict(
    base_channels=8,
    channel_multipliers=(1, 1, 2, 2, 2, 2),
    content_base_channels=8,
    content_channel_multipliers=(1, 1, 2, 2),
    norm_groups=4,
    num_heads=2,
    fusion_head_dim=8,
    num_res_blocks=1,
)
CPU = torch.device("cpu")


def lively(network: torch.nn.Module) -> torch.nn.Module:
    """Weights with no zero branch, so that every path shows in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / fan_in**0.5 + (1.0 if parameter.ndim == 1 else 0.0))
    return network.requires_grad_(False).eval()


def assert_right(fast: torch.Tensor, eager: torch.Tensor, oracle: torch.Tensor) -> None:
    verdict = judge(fast, eager, oracle)
    assert verdict.right, str(verdict)


def plan(dtype: torch.dtype = torch.float32) -> Plan:
    return Plan(CPU, dtype)
