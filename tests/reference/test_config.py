"""Configurations of the reference networks: their presets, their way through JSON, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest

from reducio_fast.reference import DIT_PRESETS, DiTConfig


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
