"""SVD against diffusers' classes on shared random weights, and against a U-Net of images."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNet2DConditionModel, UNetSpatioTemporalConditionModel
from torch import Tensor

from reducio_fast.reference.svd.config import TemporalVAEConfig, VideoUNetConfig
from reducio_fast.reference.svd.unet import VideoUNet, sinusoid
from reducio_fast.reference.svd.vae import TemporalVAE
from tiny_svd import unet_inputs, unets, vaes

pytestmark = pytest.mark.slow


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).double().norm() / expected.double().norm()).item()


def shapes(network: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def test_names_and_shapes_at_published_size():
    with torch.device("meta"):
        unet, vae = VideoUNet(VideoUNetConfig()), TemporalVAE(TemporalVAEConfig())
        their_unet = UNetSpatioTemporalConditionModel(num_attention_heads=(5, 10, 20, 20))
        their_vae = AutoencoderKLTemporalDecoder(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            layers_per_block=2,
        )
    assert shapes(unet) == shapes(their_unet) and len(shapes(unet)) == 1428
    assert shapes(vae) == shapes(their_vae) and len(shapes(vae)) == 374
    assert sum(p.numel() for p in unet.parameters()) == 1_524_623_082


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize(
    ("channels", "frames", "size", "tokens", "changes"),
    [
        ((32, 64), 5, (8, 6), 1, {}),
        ((32, 64), 1, (4, 4), 3, {}),
        ((32, 64, 64), 14, (8, 8), 1, {"transformer_layers_per_block": 2}),
        ((32, 32, 64, 64), 3, (8, 16), 1, {"layers_per_block": 2, "num_attention_heads": 2}),
        ((32, 64, 64), 2, (5, 7), 1, {}),
    ],
    ids=["two-levels", "one-frame-three-tokens", "three-levels-14-frames", "four-levels", "odd-size"],
)
def test_unet_equals_diffusers(
    channels: tuple[int, ...],
    frames: int,
    size: tuple[int, int],
    tokens: int,
    changes: dict,
    dtype: torch.dtype,
    limit: float,
):
    ours, theirs = unets(*channels, dtype=dtype, **changes)
    inputs = unet_inputs(ours.config, frames, size, dtype, tokens=tokens)
    assert relative(ours(**inputs), theirs(**inputs).sample) < limit


def test_a_token_and_an_embedding_a_frame():
    """Equal tokens and ids per frame give the same result as one set for the clip; other values change the result."""
    ours, _ = unets(32, 64, dtype=torch.float64)
    inputs = unet_inputs(ours.config, 3, (4, 4), torch.float64)
    once = ours(**inputs)
    tokens = inputs["encoder_hidden_states"][:, None].repeat(1, 3, 1, 1)
    ids = inputs["added_time_ids"][:, None].repeat(1, 3, 1)
    same = ours(inputs["sample"], inputs["timestep"], tokens, ids)
    torch.testing.assert_close(same, once, rtol=1e-12, atol=1e-12)
    tokens[:, 2] += 1.0
    ids[:, 1, 1] += 100
    assert relative(ours(inputs["sample"], inputs["timestep"], tokens, ids), once) > 1e-3


def test_without_time_it_is_a_unet_of_images():
    """Mix factors of +30 leave the blocks in space alone: diffusers' image U-Net on those weights, frame by frame."""
    ours, _ = unets(32, 64)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("mix_factor"):
                parameter.fill_(30.0)
    image = (
        UNet2DConditionModel(
            sample_size=16,
            in_channels=8,
            out_channels=4,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=24,
            attention_head_dim=(1, 2),  # by this name diffusers takes the number of heads
            use_linear_projection=True,
            norm_eps=1e-5,
        )
        .requires_grad_(False)
        .eval()
    )
    state = {}
    for name in image.state_dict():
        parts = name.split(".")
        if "resnets" in parts:
            at = parts.index("resnets") + 2
            parts.insert(at, "spatial_res_block")
        state[name] = ours.state_dict()[".".join(parts)]
    image.load_state_dict(state)
    for name, module in image.named_modules():  # diffusers' video blocks have other epsilons
        if isinstance(module, torch.nn.GroupNorm) and ".resnets." in name:
            module.eps = 1e-6 if name.startswith(("up_blocks", "down_blocks.0")) else 1e-5
    inputs = unet_inputs(ours.config, 4, (8, 8), batch=1)
    clip = ours(**inputs)[0]
    # The image U-Net embeds only the timestep: the embedding of the added time ids is added to its bias.
    added = ours.embed(inputs["timestep"], inputs["added_time_ids"], 1, 1)
    plain = ours.time_embedding(sinusoid(inputs["timestep"][None], 32))
    image.time_embedding.linear_2.bias += (added - plain)[0]
    for frame, expected in zip(inputs["sample"][0], clip, strict=True):
        single = image(frame[None], inputs["timestep"], inputs["encoder_hidden_states"]).sample[0]
        assert relative(single, expected) < 1e-5


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_vae_equals_diffusers(layers: int, dtype: torch.dtype, limit: float):
    ours, theirs = vaes(32, 64, dtype=dtype, layers_per_block=layers)
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, 12, 16, generator=generator).to(dtype)
    assert relative(ours.encode(images), theirs.encode(images).latent_dist.mode()) < limit
    latents = torch.randn(2, 5, 4, 6, 8, generator=generator).to(dtype)
    whole = theirs.decode(latents.flatten(0, 1), num_frames=5).sample
    assert relative(ours.decode(latents).flatten(0, 1), whole) < limit
    chunks = [theirs.decode(z, num_frames=len(z)).sample for z in latents.flatten(0, 1).split(4)]
    assert relative(ours.decode(latents, chunk=4).flatten(0, 1), torch.cat(chunks)) < limit
    assert relative(torch.cat(chunks), whole) > 1e-2, "chunks make another clip"


def test_configurations_are_those_of_the_folders():
    with torch.device("meta"):
        peer = UNetSpatioTemporalConditionModel(num_attention_heads=(5, 10, 20, 20), sample_size=96)
    stated = json.loads(peer.to_json_string())
    config = VideoUNetConfig.from_dict(stated)
    assert config == VideoUNetConfig() and VideoUNetConfig.from_dict(config.to_dict()) == config
    assert set(config.to_dict()) <= set(stated), "diffusers reads what we write"
    kept = VideoUNetConfig(up_eps=1e-5)
    assert VideoUNetConfig.from_dict(kept.to_dict()) == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": (320, 640)}, "down_block_types has 4 entries, block_out_channels 2"),
        ({"block_out_channels": (320, 640, 1280, 1000)}, "1000 is no multiple of 32 norm groups and 20 heads"),
        ({"up_block_types": ("UpBlock2D",) * 4}, "'UpBlock2D' is not one of"),
        ({"layers_per_block": (2, 2)}, "layers_per_block has 2 entries"),
        ({"time_embedding": 3}, "unknown time_embedding"),
    ],
)
def test_other_configurations_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        VideoUNetConfig.from_dict(VideoUNetConfig().to_dict() | changes)


def test_shapes_that_do_not_fit_are_named():
    ours, _ = unets(32, 64)
    inputs = unet_inputs(ours.config, 3, (4, 4))
    with pytest.raises(ValueError, match=r"must be \[B, T, 8, H, W\]"):
        ours(**inputs | {"sample": inputs["sample"][:, :, :4]})
    with pytest.raises(ValueError, match=r"added_time_ids has shape \(2, 2\), must be \[2, 3\] or \[2, 3, 3\]"):
        ours(**inputs | {"added_time_ids": inputs["added_time_ids"][:, :2]})
    with pytest.raises(ValueError, match=r"encoder_hidden_states has shape \(1, 1, 24\), must be \[2, S, 24\]"):
        ours(**inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"][:1]})
    vae, _ = vaes(32, 64)
    with pytest.raises(ValueError, match="sides must be multiples of 2"):
        vae.encode(torch.zeros(1, 3, 9, 8))
    with pytest.raises(ValueError, match=r"must be \[B, T, 4, h, w\]"):
        vae.decode(torch.zeros(5, 4, 4, 4))
