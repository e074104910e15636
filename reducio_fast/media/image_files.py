"""Images as uint8 [H, W, 3] in RGB: read, convert, scale and cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from ..system.errors import ReducioError

T = TypeVar("T")


def read_images(image: Any, count: int) -> list[np.ndarray | None]:
    """Content frames, uint8 [h, w, 3], one a clip: None for those to be drawn."""
    if image is None:
        return [None] * count
    if isinstance(image, np.ndarray) and image.ndim == 4:
        image = list(image)  # `out.content` of a list, given back
    if not isinstance(image, list | tuple):
        return [read_image(image)] * count
    if len(image) != count:
        raise ReducioError(f"image: {len(image)} given for {count} prompts; give one for all or one a prompt")
    return [read_image(each) for each in image]


def fit_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 3] scaled, anti-aliased, until it covers height x width, and its centre cut out."""
    return cover_crop(image[None], height, width)[0]


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def cover_crop(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale uint8 [T, H, W, 3] until it covers height x width, aspect kept, and cut the centre out."""
    h, w = frames.shape[1:3]
    if (h, w) == (height, width):
        return frames
    fit = [ImageOps.fit(Image.fromarray(f), (width, height), Image.Resampling.LANCZOS) for f in frames]
    return np.stack([np.asarray(image) for image in fit])


def read_image(image: str | os.PathLike | Image.Image | np.ndarray) -> np.ndarray:
    """An image file, PIL image or array as RGB uint8 [H, W, 3].

    Any PIL mode is converted: transparency is laid on white, 16-bit values are scaled to 8 bits, and the camera's
    rotation tag is applied. Arrays are uint8, or floats in [0, 1], of shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
    Raises ReducioError for anything else, and for a missing or broken file.
    """
    if isinstance(image, np.ndarray):
        return to_rgb(_image_from_array(image))
    if isinstance(image, Image.Image):
        return decode_image(lambda: to_rgb(image), "the image")
    if not isinstance(image, (str, os.PathLike)):
        raise ReducioError(f"image must be a path, a PIL image or a NumPy array; it is a {type(image).__name__}")
    if not os.path.isfile(image):
        raise ReducioError(f"no such image file: {os.fspath(image)}")

    def load() -> np.ndarray:
        with Image.open(image) as opened:
            return to_rgb(opened)

    return decode_image(load, f"the image {os.fspath(image)}")


def decode_image(load: Callable[[], T], source: str) -> T:
    try:
        return load()
    except ReducioError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more on broken bytes
        raise ReducioError(f"{source} cannot be read: {first_line(error)}") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    if 0 in image.size:
        raise ReducioError(f"the image is empty, of {image.width}x{image.height} pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit values at 255 instead of scaling them
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise ReducioError("the image holds values that are not finite")
    elif image.mode == "LAB":
        from PIL import ImageCms  # Pillow converts Lab in no other way

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image  # None: only of in-place work
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _image_from_array(array: np.ndarray) -> Image.Image:
    if array.ndim not in (2, 3) or array.size == 0 or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ReducioError(f"an image array must be [H, W] or [H, W, 1 or 3 or 4]; it is {list(array.shape)}")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ReducioError(f"a float image must lie in [0, 1]; it spans {array.min():g} to {array.max():g}")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ReducioError(f"an image array must be uint8 or floating point; it is {array.dtype}")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
