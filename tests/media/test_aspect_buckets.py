"""Aspect buckets: the tables compared with diffusers', the choice of a bucket, and sizes that the VAE cannot decode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import (
    ASPECT_RATIO_256_BIN,
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reducio_fast import ReducioPipeline
from reducio_fast.cli.main import main
from reducio_fast.media.aspect_buckets import BASES, buckets, choose_size, nearest, towards_square
from reducio_fast.media.image_files import cover_crop
from reducio_fast.pipelines.call.validation import check_size
from reducio_fast.reference import DIT_PRESETS, ReducioVAE, VAEConfig
from reducio_fast.system.errors import ReducioError

PEERS = {256: ASPECT_RATIO_256_BIN, 512: ASPECT_RATIO_512_BIN, 1024: ASPECT_RATIO_1024_BIN}
SIDES = st.integers(1, 5000)


@pytest.mark.parametrize("base", BASES)
def test_the_40_sizes_contain_those_of_diffusers(base: int):
    """diffusers' tables lack seven of PixArt's 40 sizes at both ends of the aspect ratio."""
    ours = buckets(base)
    assert len(ours) == len(set(ours)) == 40 and ours == sorted(ours, key=lambda s: s[0] / s[1])
    theirs = {(int(h), int(w)) for h, w in PEERS[base].values()}
    assert len(theirs) == 33 and theirs < set(ours)
    side = 1024 // base
    extra = {(512, 1984), (512, 1920), (1664, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512)}
    assert {(h * side, w * side) for h, w in set(ours) - theirs} == extra


def test_sizes_of_the_256_table_that_the_vae_cannot_represent_are_refused():
    assert buckets(512, 32) == buckets(512) and buckets(1024, 32) == buckets(1024)
    legal = buckets(256, 32)
    # The release's extraction script lists these, in a comment, as the sizes that its encoder does not round down.
    wide = [(128, 512), (128, 480), (160, 384), (192, 320), (224, 288)]
    assert legal == [*wide, (256, 256), *((w, h) for h, w in reversed(wide[2:])), (480, 128), (512, 128)]
    refused = [size for size in buckets(256) if size not in legal]
    assert len(refused) == 29
    for height, width in refused:
        name, value = ("height", height) if height % 32 else ("width", width)
        near = f"the two nearest legal sizes are {value - 16} and {value + 16}"
        with pytest.raises(ReducioError, match=f"{name}: {value} is not a multiple of 32; {near}"):
            check_size(VAEConfig(), height, width)
    for size in (*legal, *buckets(512), *buckets(1024)):
        check_size(VAEConfig(), *size)
    # The content tokens of the 1024 model come in groups, so the side of its SD latent (H/8) must also be divisible.
    config = DIT_PRESETS["reducio-1024"]
    cell = 8 * config.content_patch_size * config.content_stride
    assert all(h % cell == 0 and w % cell == 0 for h, w in buckets(1024))


@given(height=SIDES, width=SIDES, base=st.sampled_from(BASES))
@settings(max_examples=100, deadline=None)
def test_the_bucket_is_the_next_one_towards_the_square(height: int, width: int, base: int):
    table = buckets(base, 32)
    chosen = towards_square(height, width, table)
    h, w = chosen
    # Cross multiplication avoids rounding. The ends of the table are nearer to the square than any image beyond them.
    if height <= width:
        better = [b for b in table if b[0] * width >= height * b[1]]
        assert chosen == better[0] and h <= w
    else:
        better = [b for b in table if b[0] * width <= height * b[1]]
        assert chosen == better[-1] and h >= w
    assert towards_square(h, w, table) == chosen, "a frame of a bucket's size stays as it is"


@given(height=st.integers(100, 4000), width=st.integers(100, 4000), base=st.sampled_from(BASES))
@settings(max_examples=100, deadline=None)
def test_the_nearest_ratio_as_diffusers_chooses_it(height: int, width: int, base: int):
    """diffusers rounds ratios to two decimals, so its choice may differ near the middle between two buckets."""
    table = [(int(h), int(w)) for h, w in PEERS[base].values()]
    ours = nearest(height, width, table)
    theirs = PixArtImageProcessor.classify_height_width_bin(height, width, PEERS[base])
    distance = [abs(h / w - height / width) for h, w in (ours, theirs)]
    assert distance[0] <= distance[1] <= distance[0] + 0.01 + 1e-9


def test_a_picture_is_scaled_to_cover_its_bucket_and_cut_in_the_middle():
    """A picture three times as wide as high fits its bucket of 576x1728 exactly and is not cropped."""
    columns = np.broadcast_to(np.linspace(0, 255, 3000), (1000, 3000))
    picture = np.repeat(columns[..., None], 3, -1).round().astype(np.uint8)
    size = towards_square(1000, 3000, buckets(1024, 32))
    assert size == (576, 1728)
    whole = cover_crop(picture[None], *size)[0]
    assert whole[:, 0].max() <= 1 and whole[:, -1].min() >= 254
    # Wider than all buckets: 200x3000 becomes 512x2048, which keeps the middle 800 columns.
    ends = cover_crop(picture[None, :200], *towards_square(200, 3000, buckets(1024, 32)))[0]
    assert ends.shape == (512, 2048, 3)
    assert abs(int(ends[0, 0, 0]) - 255 * 1100 / 3000) < 2 and abs(int(ends[0, -1, 0]) - 255 * 1900 / 3000) < 2


def test_the_size_of_a_call():
    photo = (1080, 1920)
    assert choose_size(None, None, (1024, 1024), [photo]) == (768, 1344)
    assert choose_size(None, None, (512, 512), [photo, (2160, 3840)]) == (384, 672)
    assert choose_size(None, None, (1024, 1024), []) == (1024, 1024)
    assert choose_size(640, None, (1024, 1024), [photo]) == (640, 1024), "what is asked for is kept"
    assert choose_size(None, None, (128, 128), [photo]) == (128, 128), "no table for this model"
    assert choose_size(None, None, (512, 1024), [photo]) == (512, 1024)
    with pytest.raises(ReducioError, match="number 0 asks for clips of 768x1344, that of number 1 for 1024x1024"):
        choose_size(None, None, (1024, 1024), [photo, (9, 9)])
    with pytest.raises(ReducioError, match="size: must be one of 256, 512, 1024, is 300"):
        buckets(300)


@pytest.fixture(scope="module")
def pipe() -> ReducioPipeline:
    folder = Path(__file__).resolve().parents[2] / "reducio_fast" / "models" / "tiny"
    return ReducioPipeline.from_pretrained(folder, device="cpu", backend="reference")


def test_the_pipeline_takes_the_bucket_of_the_image(pipe: ReducioPipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipe, "sample_height", 256)
    monkeypatch.setattr(pipe, "sample_width", 256)
    image = np.full((90, 160, 3), 200, np.uint8)
    out = pipe("a circle", image, num_inference_steps=1, output_type="latent", progress=False)
    assert out.content.shape == (192, 320, 3) and out.frames.shape[-2:] == (6, 10)
    with pytest.raises(ReducioError, match="image: the aspect ratio of number 0 asks for clips of 192x320"):
        pipe(["a", "b"], [image, image[:, :90]], progress=False)


def test_whole_frames_or_tiles_as_asked(pipe: ReducioPipeline, monkeypatch: pytest.MonkeyPatch):
    """Frames up to the size that one tile reads are decoded whole, larger ones in tiles; one stride is one tile."""
    narrow = VAEConfig(  # three levels give 4 pixels per latent cell; a tile reads 20 pixels
        base_channels=8, channel_multipliers=(1, 1, 1), content_base_channels=8, content_channel_multipliers=(1, 1),
        fusion_levels=(None, 1, None), norm_groups=4, num_heads=2, fusion_head_dim=8, num_res_blocks=1, tile_size=16,
    )  # fmt: skip
    monkeypatch.setattr(pipe, "vae", ReducioVAE(narrow).eval())
    latents = torch.randn(16, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    for columns in (4, 5, 6):
        rule, tiles, whole = (
            [choose(), pipe.decode(latents[..., :columns], image[:, : columns * 4])][1]
            for choose in (lambda: None, pipe.enable_vae_tiling, pipe.disable_vae_tiling)
        )
        assert np.array_equal(rule, tiles if columns == 6 else whole)
        assert np.array_equal(tiles, whole) == (columns == 4)
        pipe.vae_tiling = None


def test_size_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    sizes = []

    def generate(**kwargs):
        sizes.append((kwargs["height"], kwargs["width"]))
        raise ReducioError("far enough")

    monkeypatch.setattr("reducio_fast.pipelines.generate.generate", generate)
    photo = tmp_path / "photo.png"
    Image.new("RGB", (160, 90)).save(photo)
    start = ["generate", "a red circle", "--out", str(tmp_path / "clip.mp4")]
    for options in (["--size", "256"], ["--size", "1024", "--image", str(photo)], ["--height", "64", "--width", "96"]):
        assert main([*start, *options]) == 2
    assert sizes == [(256, 256), (768, 1344), (64, 96)]
    capsys.readouterr()
    assert main([*start, "--size", "256", "--height", "128"]) == 2
    assert "--size 256 and --height 128 --width None: give one or the other" in capsys.readouterr().err
    assert main([*start, "--size", "300"]) == 2
    assert "size: must be one of 256, 512, 1024, is 300" in capsys.readouterr().err
