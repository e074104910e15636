"""A whole pipeline of Stable Video Diffusion with small random weights: diffusers', its folder, and ours from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image

from reducio_fast.pipelines.peers.models import PEERS, build_random
from reducio_fast.pipelines.svd.pipeline import SVDPipeline
from tiny_svd import seeded


@pytest.fixture(scope="session")
def theirs() -> StableVideoDiffusionPipeline:
    pipe = build_random(PEERS["svd"], True, torch.float32, torch.device("cpu"))
    generator = seeded(0)
    for network in (pipe.unet, pipe.vae):  # mix factors, norms and biases: away from their initial values
        for parameter in network.parameters():
            if parameter.ndim <= 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def folder(theirs: StableVideoDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("svd") / "model"
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pipe(folder: Path) -> SVDPipeline:
    return SVDPipeline.from_pretrained(folder, device="cpu", dtype="float32", backend="reference")


@pytest.fixture(scope="session")
def fast(folder: Path) -> SVDPipeline:
    return SVDPipeline.from_pretrained(folder, device="cpu", dtype="float32", backend="fast")


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """Wider than the clip, so that stretching and cutting differ."""
    rows, columns = np.mgrid[0:80, 0:150]
    return Image.fromarray(np.stack([rows * 3, columns, (rows * columns) % 256], axis=-1).astype(np.uint8))
