"""LPIPS, the perceptual distance of two images, with weights from a file that the user names.

The network is the lpips package's class. Its wheel contains the linear heads; the trunk's weights are a state dict of
torchvision.
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
    """LPIPS per frame. The release passes images in 0..1 although LPIPS expects -1..1, so both values are computed.

    Raises `ReducioError` if lpips is not installed or the file does not hold the weights of `net`.
    """

    def __init__(self, trunk: str | os.PathLike[str], net: str = "alex", device: torch.device | str = "cpu") -> None:
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
        """Means over the frames of two clips, uint8 [T, H, W, 3]: `lpips`, and the release's variant `lpips_0_1`."""
        a, b = (to_unit(x, self.device) for x in (clip, other))
        halves = [(x + 1) / 2 for x in (a, b)]
        return {"lpips": float(self.model(a, b).mean()), "lpips_0_1": float(self.model(*halves).mean())}


def _trunk_weights(path: Path, net: nn.Module) -> dict[str, Tensor]:
    """Load torchvision's `features.N.*` under the names of lpips' slices."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            stored = load_file(path)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors raise different errors
        raise ReducioError(f"LPIPS trunk {path}: {first_line(error)}") from error
    # lpips splits `features` into slices and keeps the layer numbers: slice2.4.weight is features.4.weight.
    wanted = {name: "features." + name.split(".", 1)[1] for name in net.state_dict()}
    lacking = [source for source in wanted.values() if source not in stored]
    if lacking:
        raise ReducioError(f"LPIPS trunk {path}: has no {lacking[0]}; it must be torchvision's weights of that network")
    return {name: stored[source] for name, source in wanted.items()}
