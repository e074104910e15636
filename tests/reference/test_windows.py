"""Tiles and attention windows of the reference autoencoder: cut, joined, padded, masked; and their position table."""

from __future__ import annotations

import math

import pytest
import torch

from reducio_fast.reference import VAEConfig
from reducio_fast.reference.reducio import tiling
from reducio_fast.reference.reducio.fusion import AttentionFusion, join_windows, sinusoid_table, split_windows
from reducio_fast.reference.reducio.vae import Layers, SelfAttention

SMALL = dict(
    base_channels=8,
    channel_multipliers=(1, 1, 2, 2, 2, 2),
    content_base_channels=8,
    content_channel_multipliers=(1, 1, 2, 2),
    norm_groups=4,
    num_heads=2,
    fusion_head_dim=8,
    num_res_blocks=1,
)


def test_blend_is_linear_from_zero_and_ends_at_the_tile() -> None:
    a, b = torch.zeros(1, 6, 3), torch.ones(1, 5, 3)
    out = tiling.blend(a, b, overlap=4, dim=-2)
    torch.testing.assert_close(out[0, :, 0], torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert torch.equal(tiling.blend(a, b, overlap=0, dim=-2), b)


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (70, 33)])
def test_stitch_restores_a_field_cut_into_tiles(size: tuple[int, int]) -> None:
    field = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    grid = tiling.tile_grid(field, 32, 40)
    torch.testing.assert_close(tiling.stitch(grid, 8, 32), field)


@pytest.mark.parametrize("size", [(8, 12), (7, 10)])
def test_windows_join_to_what_was_split(size: tuple[int, int]) -> None:
    x = torch.randn(2, 5, 3, *size, generator=torch.Generator().manual_seed(0))
    windows = split_windows(x, (4, 4))
    assert windows.shape == (2 * math.ceil(size[0] / 4) * math.ceil(size[1] / 4), 5, 3, 4, 4)
    assert torch.equal(join_windows(windows, size), x)


@torch.no_grad()
def test_masked_windows_equal_attention_on_the_unpadded_windows() -> None:
    """With `mask_window_padding` a border window attends to its real cells only; the release's default dilutes it."""
    torch.manual_seed(0)
    x, content = torch.randn(1, 16, 2, 10, 6), torch.randn(1, 8, 10, 6)
    results = {}
    for mask in (True, False):
        fusion = AttentionFusion(16, 8, 2, head_dim=8, window_size=4, mask_padding=mask).eval()
        fusion.load_state_dict(results.setdefault("weights", fusion.state_dict()))
        results[mask] = fusion(x, content)
    whole = AttentionFusion(16, 8, 2, head_dim=8, window_size=64, mask_padding=False).eval()
    whole.load_state_dict(results["weights"])
    for i in range(0, 10, 4):
        for j in range(0, 6, 4):
            region = (..., slice(i, i + 4), slice(j, j + 4))
            torch.testing.assert_close(results[True][region], whole(x[region], content[region]))
    assert not torch.allclose(results[True], results[False])
    inner = (..., slice(0, 8), slice(0, 4))  # windows without padding agree
    torch.testing.assert_close(results[True][inner], results[False][inner])


@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_self_attention_windows(dims: int) -> None:
    """Windows of the middle attention work for video too (the release's branch raises an AttributeError)."""
    torch.manual_seed(0)
    settings = SMALL | dict(mask_window_padding=True, window_size=4, content_window_size=4)
    windowed = SelfAttention(Layers(VAEConfig(**settings), dims), 16).eval()
    whole = SelfAttention(
        Layers(VAEConfig(**(settings | dict(window_size=64, content_window_size=64))), dims), 16
    ).eval()
    whole.load_state_dict(windowed.state_dict())
    windowed.norm = whole.norm = torch.nn.Identity()  # its statistics would cover one window in the loop below
    x = torch.randn(2, 16, *((3,) if dims == 3 else ()), 6, 9)
    out = windowed(x)
    for i in range(0, 6, 4):
        for j in range(0, 9, 4):
            region = (..., slice(i, i + 4), slice(j, j + 4))
            torch.testing.assert_close(out[region], whole(x[region]))


@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_windows_are_padded_before_the_projections(dims: int) -> None:
    """As in the release: the keys and values of the padding are the biases of their layers."""
    settings = SMALL | dict(window_size=4, content_window_size=4)
    windowed = SelfAttention(Layers(VAEConfig(**settings), dims), 16).eval()
    whole = SelfAttention(
        Layers(VAEConfig(**(settings | dict(window_size=64, content_window_size=64))), dims), 16
    ).eval()
    whole.load_state_dict(windowed.state_dict())
    windowed.norm = whole.norm = torch.nn.Identity()
    x = torch.randn(2, 16, *((3,) if dims == 3 else ()), 6, 9)
    padded = torch.nn.functional.pad(x, (0, 3, 0, 2))
    out = windowed(x)
    for i in range(0, 6, 4):
        for j in range(0, 9, 4):
            expected = whole(padded[..., i : i + 4, j : j + 4])
            region = (..., slice(i, min(i + 4, 6)), slice(j, min(j + 4, 9)))
            torch.testing.assert_close(out[region], expected[..., : 6 - i, : 9 - j])


def test_sinusoid_table_by_its_formula() -> None:
    table = sinusoid_table(4, 6)
    for pos in range(4):
        for j in range(6):
            angle = pos / 10000 ** (2 * (j // 2) / 6)
            assert table[pos, j].item() == pytest.approx(math.sin(angle) if j % 2 == 0 else math.cos(angle), abs=1e-6)
