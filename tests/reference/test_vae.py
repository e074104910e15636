"""The reference VAE against the released architecture and diffusers' encoder, and its properties."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file
from scipy import ndimage
from torch.nn import functional as F

from reducio_fast.reference import VAE_PRESETS, DiagonalGaussian, ReducioVAE, VAEConfig
from reducio_fast.reference.reducio.fusion import (
    place_table,
)

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden"
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


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def small_vae(**changes) -> ReducioVAE:
    torch.manual_seed(0)
    return ReducioVAE(VAEConfig(**(SMALL | changes))).eval()


def clip(size: tuple[int, int] = (64, 64), batch: int = 1, frames: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, frames, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def fill_by_recipe(model: ReducioVAE) -> None:
    """The weights behind the golden files: noise seeded by each name (see golden/README.md)."""
    for name, tensor in model.state_dict().items():
        if name.endswith("pos_embed"):
            continue
        shape = tuple(tensor.shape)
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        if name.endswith(".bias"):
            noise = 0.1 * noise
        elif len(shape) == 1:
            noise = 1 + 0.1 * noise
        else:
            noise = noise / np.sqrt(math.prod(shape[1:]))
        tensor.copy_(torch.from_numpy(noise))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("ft4_*.safetensors")), ids=lambda p: p.stem)
@torch.no_grad()
def test_golden_outputs_of_the_release(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
    want = load_file(path)
    model = ReducioVAE(
        VAEConfig(
            temporal_factor=2 ** int(meta["f_t"]),
            fusion=json.loads(meta["fusion"]),
            tile_overlap=float(meta["tile_overlap"]),
            **{k: int(meta[k]) for k in ("base_channels", "content_base_channels", "latent_channels")},
            **{k: int(meta[k]) for k in ("window_size", "tile_size")},
            **{k: tuple(map(int, meta[k].split(","))) for k in ("channel_multipliers", "content_channel_multipliers")},
        )
    ).eval()
    fill_by_recipe(model)
    shape = (1, 3, int(meta["frames"]), int(meta["height"]), int(meta["width"]))
    noise = np.random.RandomState(zlib.crc32(meta["input_tensor"].encode())).uniform(-1, 1, shape)
    video, tiled = torch.from_numpy(noise.astype(np.float32)), meta["tiled"] == "true"
    posterior = model.encode(video, tiled=tiled)
    features = model.encode_content(video[:, :, int(meta["content_frame"])], tiled=tiled)
    z = model.normalize_latent(posterior.mode())
    got = {
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "z": z,
        "reconstruction": model.decode(z, features, tiled),
    }
    if not tiled:
        got |= {f"content_features.{i}": feature for i, feature in enumerate(features)}
    assert got.keys() == want.keys()
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("name", ["ft4", "ft2"])
def test_state_dict_equals_the_published_manifest(name: str) -> None:
    with torch.device("meta"):
        model = ReducioVAE(VAE_PRESETS[f"reducio-{name}"])
    manifest = json.loads((GOLDEN / f"reducio_vae_{name}_state_dict.json").read_text())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == manifest


@torch.no_grad()
def test_content_encoder_equals_diffusers_encoder() -> None:
    """With one head, as diffusers has, the two structures coincide up to the middle attention."""
    model = small_vae(num_heads=1, num_res_blocks=2).encoder_2d
    theirs = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).encoder.eval()

    def copy(source: torch.nn.Module, target: torch.nn.Module) -> None:
        target.load_state_dict({k: v.reshape(target.state_dict()[k].shape) for k, v in source.state_dict().items()})

    def copy_block(source, target) -> None:
        for name in ("norm1", "conv1", "norm2", "conv2"):
            copy(getattr(source, name), getattr(target, name))
        if hasattr(source, "nin_shortcut"):
            copy(source.nin_shortcut, target.conv_shortcut)

    copy(model.conv_in, theirs.conv_in)
    for level, block in zip(model.down, theirs.down_blocks, strict=True):
        for a, b in zip(level.block, block.resnets, strict=True):
            copy_block(a, b)
        if hasattr(level, "downsample"):
            copy(level.downsample.conv, block.downsamplers[0].conv)
    copy_block(model.mid.block_1, theirs.mid_block.resnets[0])
    attention = theirs.mid_block.attentions[0]
    for ours, their in (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v")):
        copy(getattr(model.mid.attn_1, ours), getattr(attention, their))
    copy(model.mid.attn_1.proj_out, attention.to_out[0])

    seen: list[torch.Tensor] = []
    for block in theirs.down_blocks:  # our features are taken before the down-sampling, theirs leave a block after it
        block.resnets[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    attention.register_forward_hook(lambda _m, _i, out: seen.append(out))
    image = clip((64, 96))[:, :, 0]
    theirs(image)
    ours = model(image)
    assert len(ours) == len(seen) == 5
    for mine, peer in zip(ours, seen, strict=True):
        assert relative_error(mine, peer) < 1e-5


@pytest.mark.parametrize("fusion", ["attn", "add", "linear", "add+attn"])
@torch.no_grad()
def test_causal_output_never_sees_a_later_frame(fusion: str) -> None:
    model = small_vae(causal=True, fusion=fusion, temporal_factor=4)
    video, content = clip(), clip(seed=2)[:, :, 0]
    features = model.encode_content(content)

    def run(video: torch.Tensor) -> torch.Tensor:
        return model.decode(model.normalize_latent(model.encode(video).mode()), features)

    before = run(video)
    for frame in (0, 3, 4, 9, 12, 13, 15):
        changed = video.clone()
        changed[:, :, frame] = clip(seed=3)[:, :, frame]
        difference = (run(changed) - before).abs().amax((0, 1, 3, 4))
        assert not difference[:frame].any(), (frame, difference)
        # Latent step i sees frames up to 4i; the last three frames come after the last step and reach nothing.
        assert bool(difference.any()) == (frame <= 12), (frame, difference)


@torch.no_grad()
def test_ordinary_model_does_see_later_frames() -> None:
    """The perturbation test can fail: without `causal`, the last frame changes the first."""
    model, video = small_vae(), clip()
    features = model.encode_content(video[:, :, 7])
    changed = video.clone()
    changed[:, :, 15] = -changed[:, :, 15]
    a, b = (model.decode(model.normalize_latent(model.encode(v).mode()), features) for v in (video, changed))
    assert (a - b)[:, :, 0].abs().max() > 1e-3


@pytest.mark.parametrize("fusion", ["add", "linear", "add+attn", ("attn", "attn", "add", "linear", "attn", "attn")])
@pytest.mark.parametrize("temporal_factor", [4, 2])
def test_every_parameter_of_a_fusion_learns(fusion, temporal_factor: int) -> None:
    """In the release add and linear fusion start dead (all-zero convolutions behind an all-zero norm)."""
    model = small_vae(fusion=fusion, temporal_factor=temporal_factor).train()
    video = clip()
    latent = model.normalize_latent(model.encode(video).sample())
    assert latent.shape == (1, 16, 16 // temporal_factor, 2, 2)
    output = model.decode(latent, model.encode_content(video[:, :, 7]))
    F.mse_loss(output, video).backward()
    fusions = {n: p for n, p in model.decoder.named_parameters() if ".fuse." in n}
    assert fusions
    dead = [name for name, p in fusions.items() if p.grad is None or p.grad.norm() == 0]
    assert not dead


def test_posterior() -> None:
    moments = torch.randn(2, 32, 4, 2, 2, generator=torch.Generator().manual_seed(0)) * 3
    moments[0, 20] = 100.0
    posterior = DiagonalGaussian(moments)
    assert posterior.logvar.max() == 20.0
    peer = torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
    prior = torch.distributions.Normal(torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean))
    torch.testing.assert_close(posterior.kl(), torch.distributions.kl_divergence(peer, prior).flatten(1).sum(1))
    a, b = (posterior.sample(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, posterior.mode())
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(a, posterior.mean + posterior.logvar.mul(0.5).exp() * noise)


def test_latent_normalisation_covers_the_whole_sample() -> None:
    z = (
        torch.randn(3, 16, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.1, 1, 10]).view(3, 1, 1, 1, 1)
        + 2
    )
    out = small_vae().normalize_latent(z).flatten(1)
    torch.testing.assert_close(out.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(1, unbiased=False), torch.ones(3), atol=1e-3, rtol=0)


@torch.no_grad()
def test_tiled_equals_untiled_when_one_tile_suffices() -> None:
    model, video = small_vae(tile_size=64), clip((64, 64))
    image = video[:, :, 7]
    assert torch.equal(model.encode(video, tiled=True).mean, model.encode(video).mean)
    z = model.normalize_latent(model.encode(video).mode())
    tiled = model.decode(z, model.encode_content(image, tiled=True), tiled=True)
    assert torch.equal(tiled, model.decode(z, model.encode_content(image)))


@torch.no_grad()
def test_tiles_see_only_their_extent() -> None:
    """Changing the last tile's private rows leaves everything beyond the blend untouched."""
    model, video = small_vae(tile_size=64), clip((192, 64))
    changed = video.clone()
    changed[..., 150:, :] = 0
    a, b = (model.encode(v, tiled=True).mean for v in (video, changed))
    # Tiles start at 0, 64, 128 and read 80 rows: rows 150.. belong to the last tile alone, latent rows 4 and 5.
    assert torch.equal(a[..., :4, :], b[..., :4, :]) and not torch.allclose(a[..., 4:, :], b[..., 4:, :])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.encode(clip((80, 64))), ("height 80", "64 or 96")),
        (lambda m: m.encode(clip((64, 20))), ("width 20", "32")),
        (lambda m: m.encode(clip(frames=12)), ("12 frames", "num_frames=16")),
        (lambda m: m.encode(clip()[:, :1]), ("[1, 1, 16, 64, 64]",)),
        (lambda m: m.encode_content(clip((64, 48))[:, :, 0]), ("width 48", "32 or 64")),
        (lambda m: m.decode(torch.zeros(1, 16, 3, 2, 2), []), ("[B, 16, 4, h, w]", "[1, 16, 3, 2, 2]")),
        (lambda m: m.decode(torch.zeros(1, 16, 4, 2, 2), [torch.zeros(1)], tiled=True), ("tiled=True",)),
        (lambda m: VAEConfig(temporal_factor=3), ("temporal_factor=3",)),
        (lambda m: VAEConfig(num_frames=10), ("num_frames=10", "temporal_factor=4")),
        (lambda m: VAEConfig(fusion="mean"), ("fusion='mean'", "add+attn")),
        (lambda m: VAEConfig(fusion=("attn",) * 5), ("5 entries", "6")),
        (lambda m: VAEConfig(fusion="add", fusion_levels=(None, 3, *[None] * 4)), ("fusion_levels[1]=3", "level 1")),
        (lambda m: VAEConfig(base_channels=100), ("width 100", "norm_groups=32")),
        (lambda m: VAEConfig(tile_size=100), ("tile_size=100", "32")),
        (lambda m: VAEConfig.from_dict({"base_chanels": 3}), ("base_chanels", "base_channels")),
    ],
)
def test_errors_name_both_values(call, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        call(small_vae())
    for word in words:
        assert word in str(error.value)


def test_config_round_trip() -> None:
    config = VAEConfig(**SMALL, fusion=("attn", "attn", "add", "add+attn", "attn", "attn"))
    assert VAEConfig.from_dict(json.loads(json.dumps({"_class_name": "ReducioVAE"} | config.to_dict()))) == config


# ---- a decoder that moves the content image (this project's own; off in the released weights) ------------------------


def still_warp(**changes) -> ReducioVAE:
    """A decoder whose refinement and residual are zero: what it returns is the image moved by the coarse flow."""
    model = small_vae(output="warp", **changes)
    with torch.no_grad():
        for parameter in (*model.decoder.conv_out.parameters(), *model.warp.flow.parameters()):
            parameter.zero_()
    return model.double()


@torch.no_grad()
def test_warp_without_flow_repeats_the_content_image() -> None:
    model, image = still_warp(), clip().double()[:, :, 7]
    frames = model.decode(torch.randn(1, 16, 4, 2, 2).double(), model.encode_content(image))
    torch.testing.assert_close(frames, image[:, :, None].expand_as(frames), rtol=0, atol=1e-12)


@torch.no_grad()
def test_warp_samples_as_scipy_does() -> None:
    """One flow per frame: bicubic interpolation of equal cells is that value, so scipy can move the image itself."""
    model, image = still_warp(), clip((64, 96)).double()[:, :, 7]
    flow = torch.randn(2, model.config.temporal_factor).double() * 0.4
    model.warp.flow.bias.copy_(flow.flatten())
    frames = model.decode(torch.randn(1, 16, 4, 2, 3).double(), model.encode_content(image))
    rows, columns = np.meshgrid(np.arange(64), np.arange(96), indexing="ij")
    for t in range(16):
        x, y = (flow[:, t % model.config.temporal_factor] * 32).tolist()
        for c in range(3):
            moved = ndimage.map_coordinates(image[0, c].numpy(), [rows + y, columns + x], order=1, mode="nearest")
            np.testing.assert_allclose(frames[0, c, t].numpy(), moved, atol=1e-9)


@torch.no_grad()
def test_warp_in_tiles_is_the_warp_of_the_whole() -> None:
    """A tile reads its own part of the image: except for pixels whose flow leaves the tile, tiles leave no trace."""
    model, image = still_warp(tile_size=64, tile_overlap=0.5), clip((128, 96)).double()[:, :, 7]
    model.warp.flow.bias.fill_(0.1)
    z = torch.zeros(1, 16, 4, 4, 3).double()
    whole, tiles = (model.decode(z, model.encode_content(image, tiled), tiled) for tiled in (False, True))
    # A flow of 3.2 pixels leaves the first tile, of 96, in its last 4 rows and columns, which have faded to 1/8.
    inside = torch.ones(128, 96, dtype=torch.bool)
    inside[92:96] = inside[:, 92:96] = False
    torch.testing.assert_close(tiles[..., inside], whole[..., inside], rtol=0, atol=1e-12)
    assert (tiles - whole).abs().max() < 2 / 8


@torch.no_grad()
def test_places_are_equal_on_every_grid() -> None:
    """Cell 2i + 1/2 of a grid of half the cell size lies where cell i of the coarse one does."""
    one = torch.zeros((), dtype=torch.float64)
    fine, coarse = place_table(6, 8, 16, 4, one), place_table(3, 4, 16, 8, one)
    assert fine.shape == (16, 6, 8) and fine.abs().max() <= 1
    finest = place_table(9, 12, 16, 2, one)  # cells of 2 pixels: number 1, 4, 7 are the middles of 6-pixel cells
    torch.testing.assert_close(finest[:, 1::3, 1::3], place_table(3, 4, 16, 6, one))
    assert not torch.allclose(fine[:, ::2, ::2], coarse)


@pytest.mark.parametrize("changes", [{"output": "warp"}, {"fusion_position": "sincos"}], ids=str)
def test_what_is_ours_learns_and_is_off_by_default(changes: dict) -> None:
    plain, model = small_vae(), small_vae(**changes).train()
    assert VAEConfig().output == "rgb" and VAEConfig().fusion_position == "none"
    added = set(model.state_dict()) - set(plain.state_dict())
    assert added == ({f"warp.{a}.{b}" for a in ("hidden", "flow") for b in ("weight", "bias")} if model.warp else set())
    video = clip()
    z = model.normalize_latent(model.encode(video).mean)
    model.decode(z, model.encode_content(video[:, :, 7])).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("warp.", "decoder.conv_out", "encoder_3d.conv_in")) or ".attn.to_" in name:
            assert parameter.grad is not None and parameter.grad.norm() > 0, name
    with pytest.raises(ValueError, match="must be one of"):
        VAEConfig(**{name: "other" for name in changes})
