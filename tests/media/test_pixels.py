"""Conversion between bytes and values in [-1, 1], which the whole package shares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reducio_fast.media.pixels import to_bytes, to_unit


@pytest.mark.parametrize("shape", [(4, 5, 3), (2, 4, 5, 3), (2, 3, 4, 5, 3)], ids=["image", "clip", "batch"])
def test_every_byte_comes_back(shape: tuple[int, ...]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    values = to_unit(frames)
    assert values.shape == (*shape[:-3], 3, *shape[-3:-1]) and values.dtype == torch.float32
    assert values.min() >= -1 and values.max() <= 1
    assert np.array_equal(to_bytes(values).numpy(), frames)


def test_all_256_values_and_clamping() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert np.array_equal(to_bytes(to_unit(ramp)).numpy(), ramp)
    beyond = torch.tensor([-3.0, -1.0, 1.0, 3.0]).view(1, 1, 4).expand(3, 1, 4)
    assert to_bytes(beyond)[0, :, 0].tolist() == [0, 0, 255, 255]


def test_the_dtype_is_cast_last() -> None:
    frame = np.full((2, 2, 3), 77, np.uint8)
    assert torch.equal(to_unit(frame, dtype=torch.bfloat16), to_unit(frame).to(torch.bfloat16))
