"""The resize for CLIP towers equals diffusers', which took it from Stability's code (kornia)."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from torch.nn import functional as F

from reducio_fast.media.antialias import blur_and_resize

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "source", [(256, 256), (576, 1024), (1024, 1024), (225, 100), (224, 224), (100, 60), (2000, 30)]
)
@pytest.mark.parametrize("size", [(224, 224), (64, 48)])
def test_equals_diffusers(source: tuple[int, int], size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *source, dtype=torch.float64)
    torch.testing.assert_close(blur_and_resize(image, size), _resize_with_antialiasing(image, size), rtol=0, atol=1e-9)


@pytest.mark.parametrize("source", [(1, 600), (600, 1)])
def test_a_side_of_one_pixel(source: tuple[int, int]) -> None:
    image = torch.rand(1, 3, *source)
    small = blur_and_resize(image, (224, 224))
    wide = image.repeat_interleave(3, 2 + source.index(1))  # the same stripes, three pixels wide
    torch.testing.assert_close(small, blur_and_resize(wide, (224, 224)))


def test_enlarging_is_plain_bicubic() -> None:
    image = torch.rand(1, 3, 40, 50)
    plain = F.interpolate(image, (80, 50), mode="bicubic", align_corners=True)
    torch.testing.assert_close(blur_and_resize(image, (80, 50)), plain)


def test_a_ramp_is_not_shifted() -> None:
    """The shift is below a fifth of a pixel of 1024; torch's antialias shifts by 1.8 pixels."""
    ramp = torch.linspace(0, 1, 1024).expand(1, 1, 1024, 1024)
    small = blur_and_resize(ramp, (224, 224))[0, 0, 112]
    torch.testing.assert_close(small[4:-4], torch.linspace(0, 1, 224)[4:-4], rtol=0, atol=2e-4)
