"""LPIPS: how different two images look to a network. Its weights are a file that the user names.

lpips' own class; its linear heads are in the wheel, the trunk's weights are torchvision's state dict.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..system.errors import ReducioError, first_line
from .pixels import to_unit

TRUNKS = ("alex", "vgg", "squeeze")


class Perceptual:
    """LPIPS a frame. The release feeds it images in 0..1 although it expects -1..1: both are given."""

    def __init__(self, trunk: str | os.PathLike[str], net: str = "alex", device: str = "cpu") -> None:
        if net not in TRUNKS:
            raise ReducioError(f"net={net!r}: must be one of {', '.join(TRUNKS)}")
        try:
            import lpips
        except ImportError as error:
            raise ReducioError('LPIPS needs lpips; pip install "reducio-fast[evaluate]"') from error
        self.model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        self.model.net.load_state_dict(_trunk_weights(Path(trunk), self.model.net))
        self.model.eval().to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, clip: np.ndarray, other: np.ndarray) -> dict[str, float]:
        """Of two clips uint8 [T, H, W, 3]: means over frames, `lpips` and, as the release computes it, `lpips_0_1`."""
        a, b = (to_unit(x, self.device) for x in (clip, other))
        halves = [(x + 1) / 2 for x in (a, b)]
        return {"lpips": float(self.model(a, b).mean()), "lpips_0_1": float(self.model(*halves).mean())}


def _trunk_weights(path: Path, net: nn.Module) -> dict[str, Tensor]:
    """torchvision's `features.N.*` under the names that lpips gives its slices."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            stored = load_file(path)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle, a zip, a safetensors header: each fails in its own way
        raise ReducioError(f"LPIPS trunk {path}: {first_line(error)}") from error
    # lpips cuts `features` into slices and keeps the numbers: slice2.4.weight is features.4.weight.
    wanted = {name: "features." + name.split(".", 1)[1] for name in net.state_dict()}
    lacking = [source for source in wanted.values() if source not in stored]
    if lacking:
        raise ReducioError(f"LPIPS trunk {path}: has no {lacking[0]}; it must be torchvision's weights of that network")
    return {name: stored[source] for name, source in wanted.items()}
