"""Low-rank updates (LoRA, arXiv 2106.09685) of chosen layers while they are trained.

A trained layer computes with W + B A; W is frozen. `torch.nn.utils.parametrize` puts the sum in place of the weight, so
that the network's own code runs unchanged.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...checkpoints.lora_files import FILES
from ...checkpoints.strict_files import save_tensors
from ...system.atomic_files import written_whole
from ...system.errors import ReducioError

# The layers trained for camera motions (arXiv 2311.15127, appendix): attention over frames, none within a frame.
TEMPORAL_ATTENTION = r"(.+\.)?temporal_transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"


class LowRankUpdate(nn.Module):
    """weight -> weight + up @ down. The update starts at zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(rank, columns, device=weight.device) / rank)
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).to(weight.dtype)


def add_updates(network: nn.Module, rank: int, pattern: str = TEMPORAL_ATTENTION) -> nn.ModuleDict:
    """Freeze the network and add an update to each linear layer whose path `pattern` matches. Returns the updates by
    path, with bars for dots. Raises ReducioError for a rank below 1 and if no layer matches."""
    if rank < 1:
        raise ReducioError(f"rank={rank}: must be at least 1")
    network.requires_grad_(False)
    layers = {
        path: layer
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and re.fullmatch(pattern, path)
    }
    if not layers:
        raise ReducioError(f"the network has no linear layer whose path matches {pattern}")
    updates = nn.ModuleDict()
    for path, layer in layers.items():
        update = updates[path.replace(".", "|")] = LowRankUpdate(layer.weight, rank)
        parametrize.register_parametrization(layer, "weight", update)
    return updates


def remove_updates(network: nn.Module) -> None:
    """Give the layers their own weights again."""
    for layer in network.modules():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def save_updates(updates: nn.ModuleDict, folder: Path, prefix: str = "unet.") -> Path:
    """Write a LoRA with peft's names, which `load_lora_weights` reads here and in diffusers; return the file."""
    tensors = {}
    for key, update in updates.items():
        path = prefix + key.replace("|", ".")
        tensors |= {f"{path}.lora_A.weight": update.down, f"{path}.lora_B.weight": update.up}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILES[0]
    with written_whole(file) as temporary:
        save_tensors(tensors, temporary)
    return file
