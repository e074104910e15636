"""Networks that score whole clips, loaded from files that the user names; nothing is downloaded.

FVD     a TorchScript file that maps clips [B, 3, 16, 224, 224] in [-1, 1] to features [B, C] (I3D, 400 logits)
IS      a TorchScript file with the same input and class logits as output (C3D for UCF-101)
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..media.pixels import to_unit
from ..system.errors import ReducioError, first_line

CLIP_SIZE, CLIP_FRAMES = 224, 16


class ClipNetwork(nn.Module):
    """A TorchScript network on clips with the interface that torchmetrics expects: `num_features`, one row per clip.

    It runs on `device` and returns features on the CPU, where torchmetrics accumulates them in float64.
    Raises `ReducioError` if the file is not TorchScript or does not map a clip to one row of features.
    """

    def __init__(self, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        super().__init__()
        try:
            self.network = torch.jit.load(str(path), map_location=device).eval()
        except Exception as error:
            raise ReducioError(f"{path} is no TorchScript network: {first_line(error)}") from error
        self.device = device
        with torch.no_grad():
            try:
                features = self.network(torch.zeros(1, 3, CLIP_FRAMES, CLIP_SIZE, CLIP_SIZE, device=device))
            except RuntimeError as error:
                raise ReducioError(f"{path} takes no clip [1, 3, 16, 224, 224]: {first_line(error)}") from error
        if features.ndim != 2:
            raise ReducioError(f"{path} gives {tuple(features.shape)} for one clip, not one row of features")
        self.num_features = features.shape[1]

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        return self.network(clips.to(self.device)).cpu()


def prepare(clip: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] -> float32 [1, 3, 16, 224, 224] in [-1, 1]: 16 evenly spaced frames, resized.

    Raises `ReducioError` for fewer than 16 frames.
    """
    if len(clip) < CLIP_FRAMES:
        raise ReducioError(f"a clip of {len(clip)} frames: {CLIP_FRAMES} are needed")
    places = np.linspace(0, len(clip) - 1, CLIP_FRAMES).round().astype(int)
    frames = to_unit(clip[places])
    frames = F.interpolate(frames, (CLIP_SIZE, CLIP_SIZE), mode="bilinear", antialias=True, align_corners=False)
    return frames.transpose(0, 1)[None].contiguous()


class FrechetDistance:
    """Frechet distance between features of real and generated clips, by torchmetrics, which accumulates in float64."""

    def __init__(self, network: ClipNetwork) -> None:
        self.counts = [0, 0]
        self.metric = _torchmetrics("fid").FrechetInceptionDistance(network, normalize=True)

    def add(self, clip: np.ndarray, real: bool) -> None:
        self.metric.update(prepare(clip), real)
        self.counts[0 if real else 1] += 1

    def compute(self) -> float:
        """The distance. It falls with the number of clips, so report that number with it.

        Raises `ReducioError` for fewer than two real or two generated clips.
        """
        check_counts(*self.counts)
        return float(self.metric.compute())


def check_counts(real: int, generated: int) -> None:
    if min(real, generated) < 2:
        raise ReducioError(f"a Frechet distance needs two clips of each kind, there are {[real, generated]}")


class InceptionScore:
    """Inception score of generated clips. `network` returns class logits."""

    def __init__(self, network: ClipNetwork) -> None:
        self.metric = _torchmetrics("inception").InceptionScore(network, splits=1)

    def add(self, clip: np.ndarray) -> None:
        self.metric.update(prepare(clip))

    def compute(self) -> float:
        """The score of all clips together, in one split."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"std\(\)", UserWarning)  # also computes the deviation of the splits
            return float(self.metric.compute()[0])


def _torchmetrics(module: str) -> Any:
    """Import a module of torchmetrics.image. Without torch-fidelity, whose networks are not used here, the package
    does not export these classes."""
    try:
        return importlib.import_module(f"torchmetrics.image.{module}")
    except ImportError as error:
        raise ReducioError('FVD and IS need torchmetrics; pip install "reducio-fast[evaluate]"') from error
