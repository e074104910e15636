"""Configurations of the reference networks: their presets, their way through JSON, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest

from reducio_fast.reference import DIT_PRESETS, DiTConfig, VAEConfig
from reducio_fast.reference.reducio.image_vae import ImageVAEConfig
from reducio_fast.reference.reducio.pixart import PixArtConfig
from reducio_fast.reference.reducio.preview import PreviewConfig
from reducio_fast.reference.reducio.text_encoder import T5Config
from reducio_fast.reference.svd.config import FrameVAEConfig, TemporalVAEConfig, VideoUNetConfig
from reducio_fast.reference.svd.consistency import ConsistencyConfig

T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 259}


def test_config_round_trip_and_presets():
    for config in (*DIT_PRESETS.values(), DiTConfig(hidden_size=48, depth=3, num_heads=4, learn_sigma=False)):
        assert DiTConfig.from_dict(config.to_dict()) == config
    contract = (
        "latent_channels patch_size hidden_size depth num_heads mlp_ratio caption_channels caption_length "
        "semantic_channels content_channels attention learn_sigma content_groups"
    )
    names = [f.name for f in dataclasses.fields(DiTConfig)]
    assert " ".join(names[:13]) == contract
    with pytest.raises(ValueError, match="unknown hidden; known are latent_channels, .*content_groups"):
        DiTConfig.from_dict({"hidden": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 50, "num_heads": 4}, "hidden_size=50 is not a multiple of num_heads=4"),
        ({"hidden_size": 32, "num_heads": 4, "size_conditioning": True}, "hidden_size=32 .* multiple of 3"),
        ({"hidden_size": 6, "num_heads": 3}, "hidden_size=6: .* multiple of 4"),
        ({"attention": "4d"}, "attention='4d': must be one of 3d, 2d\\+1d"),
        ({"semantic_projection": "conv"}, "semantic_projection='conv'"),
        ({"content_groups": 3}, "content_groups=3: must be a square"),
        ({"depth": 0}, "depth=0"),
        ({"patch_size": (1, 1)}, "patch_size=\\(1, 1\\)"),
        ({"patch_size": (1, 0, 1)}, "patch_size=0"),
        ({"position_scale": 0.0}, "position_scale=0.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**changes)


@pytest.mark.parametrize(
    ("config_class", "changes", "message"),
    [
        (VAEConfig, {"norm_groups": 0}, "norm_groups=0: must be an integer of at least 1"),
        (VAEConfig, {"norm_groups": -4}, "norm_groups=-4"),
        (VAEConfig, {"num_frames": 16.0}, "num_frames=16.0"),
        (VAEConfig, {"latent_channels": 16.0}, "latent_channels=16.0"),
        (VAEConfig, {"tile_size": 0}, "tile_size=0"),
        (VAEConfig, {"window_size": 0}, "window_size=0"),
        (VAEConfig, {"num_heads": 3}, "last width 512 is not a multiple of num_heads=3"),
        (VAEConfig, {"num_res_blocks": (2, 2, 2, 2, 2, "2")}, "num_res_blocks='2'"),
        (VAEConfig, {"channel_multipliers": 4}, "channel_multipliers=4: must be a list of numbers"),
        (VAEConfig, {"content_channel_multipliers": ()}, "content_channel_multipliers=()"),
        (VAEConfig, {"tile_overlap": "0.25"}, "tile_overlap='0.25': must be a finite number"),
        (DiTConfig, {"depth": True}, "depth=True"),
        (DiTConfig, {"patch_size": (1, 0, 1)}, "patch_size=0"),
        (DiTConfig, {"mlp_ratio": float("inf")}, "mlp_ratio=inf: must be a finite number"),
        (PreviewConfig, {"width": 64.0}, "width=64.0"),
        (PixArtConfig, {"patch_size": 0}, "patch_size=0"),
        (ImageVAEConfig, {"norm_num_groups": 0}, "norm_num_groups=0"),
        (ImageVAEConfig, {"scaling_factor": float("nan")}, "scaling_factor=nan"),
        (T5Config, T5 | {"num_heads": 0}, "num_heads=0"),
        (T5Config, T5 | {"relative_attention_num_buckets": 3}, "relative_attention_num_buckets=3: must be at least 4"),
        (VideoUNetConfig, {"num_attention_heads": 0}, "num_attention_heads=0"),
        (VideoUNetConfig, {"addition_time_embed_dim": 0}, "addition_time_embed_dim=0"),
        (VideoUNetConfig, {"addition_time_embed_dim": 3}, "addition_time_embed_dim=3: must be even"),
        (VideoUNetConfig, {"block_out_channels": (320.0, 640, 1280, 1280)}, "block_out_channels=320.0"),
        (TemporalVAEConfig, {"layers_per_block": (2, 2)}, "layers_per_block=(2, 2): must be one number"),
        (FrameVAEConfig, {"latent_channels": 0}, "latent_channels=0"),
        (ConsistencyConfig, {"rho": 0}, "rho=0: must be greater than 0"),
        (ConsistencyConfig, {"num_train_timesteps": 40.5}, "num_train_timesteps=40.5"),
        (ConsistencyConfig, {"s_noise": float("nan")}, "s_noise=nan"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else getattr(value, "__name__", ""),
)
def test_numbers_that_no_network_has_are_refused(config_class, changes, message):
    with pytest.raises(ValueError) as error:
        config_class(**changes)
    assert message in str(error.value)


def test_numbers_that_networks_have_are_accepted():
    VAEConfig(
        num_res_blocks=(2, 2, 0, 2, 0, 0),
        channel_multipliers=(1, 2, 2, 2, 2, 2),
        fusion_levels=(0, *[None] * 5),
        content_channel_multipliers=(1, 2, 2, 2),
    )
    PixArtConfig(interpolation_scale=1.0, sample_size=64, out_channels=None, num_vector_embeds=0)
    ImageVAEConfig(latents_mean=(0.0, -1, 0.5, 2.0))
    VideoUNetConfig(sample_size=None, num_attention_heads=5)
    T5Config(**T5)
    ConsistencyConfig(sigma_max=700)
