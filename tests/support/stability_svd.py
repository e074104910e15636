"""Stable Video Diffusion and SV3D as Stability AI lays them out in one file: names, shapes, and small weights for them.

Weights and inputs follow the recipe in `tests/golden/README.md`, so that they can be compared with what Stability's own
classes made of them.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
FRAMES = 3
# What no shape shows, at the goldens' widths.
TINY_CONFIG = {
    "unet": {"num_attention_heads": [1, 2], "addition_time_embed_dim": 32},
    "image_encoder": {"num_attention_heads": 2},
}
_NETWORK = re.compile(
    r"model\.diffusion_model\.|first_stage_model\.(encoder|decoder)\.|conditioner\.embedders\.\d+\."
    r"(encoder\.(encoder\.|decoder\.)?|open_clip\.model\.(visual\.)?)"
)


def single_file(name: str) -> dict[str, list[int]]:
    """Name -> shape of every tensor in the file `name` (svd_xt at full size, svd_tiny, sv3d_tiny), as Stability's
    classes and open_clip build them."""
    return json.loads(gzip.decompress((GOLDEN / f"{name}_single_file.json.gz").read_bytes()))


def draw(name: str, *shape: int) -> Tensor:
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def tiny_file(name: str) -> dict[str, Tensor]:
    """The small file `name`, each weight by the recipe from its name within its network."""
    return {n: _weight(_NETWORK.sub("", n, count=1), shape) for n, shape in single_file(name).items()}


def _weight(name: str, shape: list[int]) -> Tensor:
    r = draw(name, *shape)
    if name.endswith("mix_factor") or not shape:
        return r
    if name.endswith(".bias"):
        return 0.1 * r
    return 1 + 0.1 * r if r.ndim == 1 else r / math.prod(shape[1:]) ** 0.5
