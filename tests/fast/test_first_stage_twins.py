"""The twins of stage one against diffusers' own classes: oracle in float64, eager in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel

from reducio_fast.fast.reducio.image_vae import FastImageVAE
from reducio_fast.fast.reducio.pixart import FastPixArt
from reducio_fast.pipelines.execution.foreign_networks import Adoption
from reducio_fast.reference.reducio.image_vae import ImageVAE, ImageVAEConfig
from reducio_fast.reference.reducio.pixart import PixArt, PixArtConfig
from reducio_fast.system.errors import ReducioError
from tiny_networks import assert_right, lively, plan

PIXART = {
    "sample_size": 16, "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3, "in_channels": 4,
    "out_channels": 8, "caption_channels": 16, "cross_attention_dim": 48,
}  # fmt: skip
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4,
}  # fmt: skip


def pixart(**changes: Any) -> tuple[PixArtTransformer2DModel, PixArt]:
    theirs = lively(PixArtTransformer2DModel(**(PIXART | changes)))
    return theirs, Adoption(theirs, "PixArtTransformer2DModel", PixArt, PixArtConfig).network()


@pytest.mark.parametrize("changes", [{}, {"sample_size": 128}, {"out_channels": 4, "patch_size": 1}], ids=str)
@torch.no_grad()
def test_transformer(changes: dict[str, Any]) -> None:
    theirs, ours = pixart(**changes)
    generator = torch.Generator().manual_seed(1)
    latent, text = torch.randn(2, 4, 12, 8, generator=generator), torch.randn(2, 7, 16, generator=generator)
    mask, size = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]]), torch.tensor([[96.0, 64.0]] * 2)

    def peer(network: Any, dtype: torch.dtype) -> torch.Tensor:
        conditions = {"resolution": size.to(dtype), "aspect_ratio": torch.full((2, 1), 1.5, dtype=dtype)}
        return network(
            latent.to(dtype), text.to(dtype), torch.tensor([400, 400]), conditions, encoder_attention_mask=mask
        ).sample  # fmt: skip

    eager, oracle = peer(theirs, torch.float32), peer(copy.deepcopy(theirs).double(), torch.float64)
    given = (latent, torch.tensor(400), text, mask, size)
    assert_right(ours(*given), eager, oracle)
    fast = FastPixArt(ours, plan())
    assert_right(fast(*given), eager, oracle)
    # A denoising step takes one latent for both halves of guidance, and leaves the variance out.
    denoise = fast.denoiser(text[1:], mask[1:], (text[:1], mask[:1]), 3.0, size[:1])
    both = denoise.predict(latent[:1, :, None], denoise.schedule(torch.tensor([400]), latent[:1, :, None])[0])
    again = fast(latent[:1].expand(2, -1, -1, -1), *given[1:])[:, :4]
    torch.testing.assert_close(both[:, :, 0], again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}], ids=str
)
@torch.no_grad()
def test_autoencoder(changes: dict[str, Any]) -> None:
    theirs = lively(AutoencoderKL(**(VAE | changes)))
    ours = Adoption(theirs, "AutoencoderKL", ImageVAE, ImageVAEConfig).network()
    wide, generator = copy.deepcopy(theirs).double(), torch.Generator().manual_seed(1)
    latent, image = torch.randn(2, 4, 6, 10, generator=generator), torch.randn(2, 3, 32, 16, generator=generator)
    eager, oracle = theirs.decode(latent).sample, wide.decode(latent.double()).sample
    assert_right(ours.decode(latent), eager, oracle)
    assert_right(FastImageVAE(ours, plan()).decode(latent), eager, oracle)
    modes = [n.encode(image.to(n.dtype)).latent_dist.mode() for n in (theirs, wide)]
    assert_right(ours.encode(image), *modes)


def test_what_is_not_pixart_is_named() -> None:
    for change, line in (
        ({"caption_channels": None}, "caption_channels=None: PixArt projects its captions"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True: PixArt has False"),
        ({"cross_attention_dim": 20}, "cross_attention_dim=20: the projected captions have 48"),
    ):
        theirs = PixArtTransformer2DModel(**(PIXART | change))
        with pytest.raises(ReducioError, match=line):
            Adoption(theirs, "PixArtTransformer2DModel", PixArt, PixArtConfig).network()
