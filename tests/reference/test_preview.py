"""The preview decoder, which moves the content image at half the size."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from reducio_fast.reference.reducio.preview import PreviewConfig, PreviewDecoder

SMALL = PreviewConfig(width=8, fine_width=8, num_res_blocks=1)


def still_decoder(config: PreviewConfig = SMALL) -> PreviewDecoder:
    torch.manual_seed(0)
    model = PreviewDecoder(config)
    with torch.no_grad():
        for layer in (model.flow, model.residual[0]):
            layer.weight.zero_()
            layer.bias.zero_()
    return model


def picture() -> torch.Tensor:
    places = torch.linspace(0, 3, 64)
    return (places[:, None] + 2 * places).sin().expand(2, 3, 64, 64).contiguous()


@pytest.mark.parametrize("factor", [4, 2])
def test_without_flow_and_residual_every_frame_is_the_image(factor: int) -> None:
    model = still_decoder(dataclasses.replace(SMALL, temporal_factor=factor))
    out = model(torch.randn(2, 16, 16 // factor, 2, 2), picture())
    assert out.shape == (2, 3, 16, 32, 32)
    torch.testing.assert_close(out, F.avg_pool2d(picture(), 2)[:, :, None].expand_as(out), rtol=0, atol=1e-5)


def test_a_flow_of_a_quarter_cell_moves_the_image_by_four_pixels() -> None:
    """A cell of 32 pixels has 16 in the preview. The flow says where a pixel comes from, x first."""
    model = still_decoder()
    with torch.no_grad():
        model.flow.bias.copy_(torch.tensor([0.25, -0.125]))
    out, half = model(torch.randn(2, 16, 4, 2, 2), picture()), F.avg_pool2d(picture(), 2)
    torch.testing.assert_close(out[:, :, 3, 2:, :28], half[:, :, :30, 4:], rtol=0, atol=1e-5)
    assert torch.equal(out[..., 0, 31], out[..., 0, 30])  # beyond the border is the border


def test_each_frame_has_its_own_motion() -> None:
    torch.manual_seed(0)
    model = PreviewDecoder(SMALL)
    latent = torch.randn(1, 16, 4, 2, 2)
    changed = latent.clone()
    changed[:, :, 3] += 1
    a, b = model(latent, picture()[:1]), model(changed, picture()[:1])
    assert all(not torch.equal(a[:, :, i], a[:, :, j]) for i, j in ((0, 1), (3, 4), (14, 15)))
    # Two convolutions of three time steps: step 3 reaches frames from step 1 on.
    assert torch.equal(a[:, :, :4], b[:, :, :4]) and not torch.equal(a[:, :, 4:8], b[:, :, 4:8])


def test_configurations_are_checked() -> None:
    assert PreviewConfig.from_dict(SMALL.to_dict()) == SMALL
    for changes, line in (({"width": 0}, "width=0"), ({"spatial_factor": 12}, "spatial_factor=12: .* multiple of 8")):
        with pytest.raises(ValueError, match=line):
            PreviewConfig(**changes)
