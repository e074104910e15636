"""The content frame: the image given, of any kind, or one drawn from the prompt."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from reducio_fast import ReducioPipeline
from reducio_fast.media.image_files import read_image
from reducio_fast.system.errors import ReducioError

PROMPT = "a red circle moving right"
FAST = {"num_inference_steps": 2, "progress": False}
SHAPE = (16, 4, 2, 2)  # motion latent of a 64x64 clip


@pytest.mark.slow
def test_the_content_frame_given_back_makes_the_same_clip(pipe: ReducioPipeline, clip, tmp_path: Path):
    Image.fromarray(clip.content).save(tmp_path / "content.png")
    for image in (clip.content, Image.fromarray(clip.content), tmp_path / "content.png", str(tmp_path / "content.png")):
        assert np.array_equal(pipe(PROMPT, image, seed=3, **FAST).frames, clip.frames)
    stacked = pipe([PROMPT, PROMPT], np.stack([clip.content] * 2), seed=3, **FAST)
    assert np.array_equal(stacked.frames[0], clip.frames)
    both = pipe([PROMPT, PROMPT], [clip.content, Image.new("L", (64, 64))], seed=3, **FAST)
    assert np.array_equal(both.frames[0], clip.frames) and both.content[1].max() == 0


MODES = [
    "1",
    "L",
    "LA",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "PA",
    "RGBX",
    "RGBa",
]


@pytest.mark.parametrize("mode", MODES)
def test_image_of_any_mode(pipe: ReducioPipeline, mode: str):
    grey = Image.linear_gradient("L").resize((96, 64))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(np.asarray(grey).astype(np.int32) * 257)
    elif mode == "LAB":
        image = Image.merge("LAB", [grey, *[Image.new("L", grey.size, 128)] * 2])
    elif mode in ("RGBa", "PA"):
        image = grey.convert({"RGBa": "RGBA", "PA": "P"}[mode]).convert(mode)
    else:
        image = grey.convert("RGB").convert(mode)
    out = pipe(PROMPT, image, output_type="latent", num_inference_steps=1, progress=False)
    assert image.mode == mode and out.content.shape == (64, 64, 3)
    assert out.content[:8].mean() < 60 and out.content[-8:].mean() > 195, "black above, white below"


def swapped_profile() -> bytes:
    """An ICC profile of sRGB whose red is green and whose green is red."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    places = {bytes(profile[i : i + 4]): i + 4 for i in range(132, 132 + 12 * profile[131], 12)}
    red, green = (slice(places[tag], places[tag] + 8) for tag in (b"rXYZ", b"gXYZ"))
    profile[red], profile[green] = profile[green], profile[red]
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_the_colours_of_a_profile_are_shown(mode: str, tmp_path: Path) -> None:
    image, profile = Image.new("RGBA", (4, 4), (255, 0, 0, 127)).convert(mode), swapped_profile()
    image.save(tmp_path / "plain.png")
    plain = read_image(tmp_path / "plain.png")
    assert plain[0, 0, 0] > plain[0, 0, 1] or mode == "L"
    shown = plain if mode == "L" else plain[..., [1, 0, 2]]  # grey has no colours that an RGB profile could speak of
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for each, expected in ((profile, shown), (srgb, plain), (profile[:200], plain), (b"damaged", plain)):
        image.save(tmp_path / "x.png", icc_profile=each)
        assert np.abs(read_image(tmp_path / "x.png").astype(int) - expected).max() <= 1


def test_the_profile_of_a_jpeg_and_of_a_webp_is_read() -> None:
    for kind in ("JPEG", "WebP"):
        with io.BytesIO() as buffer:
            Image.new("RGB", (16, 16), "red").save(buffer, kind, icc_profile=swapped_profile())
            red, green, blue = read_image(Image.open(buffer))[8, 8]
        assert green > 240 and red < 20 and blue < 20, kind


def test_image_is_scaled_to_cover_and_cropped(pipe: ReducioPipeline):
    wide = Image.new("RGB", (400, 100), "red")
    wide.paste("blue", (150, 0, 250, 100))  # the centre that remains after the crop, up to the filter's ringing
    out = pipe(PROMPT, wide, output_type="latent", **FAST)
    assert (np.abs(out.content[:, 1:-1].astype(int) - (0, 0, 255)) <= 1).all() and (out.content[:, 0, 0] < 20).all()
    small = pipe(PROMPT, Image.new("RGB", (3, 5), "green"), height=32, width=96, output_type="latent", **FAST)
    assert small.content.shape == (32, 96, 3) and small.frames.shape == (16, 4, 1, 3)


def test_broken_images_are_refused(pipe: ReducioPipeline, tmp_path: Path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.effect_noise((64, 64), 50).save(good)
    bad.write_bytes(good.read_bytes()[:700])
    for image, message in (
        (bad, "bad.png cannot be read"),
        (tmp_path / "none.png", "no such image file"),
        (7, "image must be a path, a PIL image, an array or a tensor"),
        ([good, good], "image: 2 given for 1 prompts"),
    ):
        with pytest.raises(ReducioError, match=message):
            pipe(PROMPT, image, **FAST)


class OtherDrawer:
    """A text-to-image pipeline with few arguments, as others in diffusers have."""

    components: dict = {}

    def __init__(self, value: float = 0.5):
        self.value, self.seen = value, []

    def set_progress_bar_config(self, **kwargs):
        pass

    def __call__(self, prompt, height, width, num_inference_steps, guidance_scale, generator, output_type):
        self.seen.append((prompt, height, width, num_inference_steps, guidance_scale, output_type))
        if width > 96:
            raise ValueError("width 128 is too wide for me")
        return type("Images", (), {"images": np.full((1, height, width, 3), self.value, np.float32)})


def test_any_text_to_image_pipeline_will_do(folder: Path):
    own = ReducioPipeline.from_pretrained(folder, text_to_image=OtherDrawer())
    out = own(PROMPT, width=96, output_type="latent", **FAST)
    assert own.text_to_image.seen == [(PROMPT, 64, 96, 20, 4.5, "np")]
    assert (out.content == 128).all() and out.content.shape == (64, 96, 3)
    with pytest.raises(ReducioError, match="content frame: OtherDrawer: width 128 is too wide for me"):
        own(PROMPT, width=128, **FAST)
    own.text_to_image.value = np.nan
    with pytest.raises(ReducioError, match="content frame of .*: the text-to-image stage returned values that are not"):
        own(PROMPT, **FAST)
