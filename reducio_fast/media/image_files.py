"""Images as uint8 [H, W, 3] in RGB: reading, conversion, scaling and cropping."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from ..system.atomic_files import written_whole
from ..system.errors import ReducioError, first_line
from ..system.paths import is_file, printable

T = TypeVar("T")


def read_images(image: Any, count: int) -> list[np.ndarray | None]:
    """Content frames, uint8 [h, w, 3], one per clip; None for frames that the first stage must generate.

    Raises ReducioError if the number of images differs from `count`, and as `read_image` does.
    """
    if image is None:
        return [None] * count
    if getattr(image, "ndim", None) == 4:  # an array, or diffusers' tensor of images
        image = list(image)  # `out.content` of a call with a list of prompts
    if not isinstance(image, list | tuple):
        return [read_image(image)] * count
    if len(image) != count:
        raise ReducioError(f"image: {len(image)} given for {count} prompts; give one for all or one a prompt")
    return [read_image(each) for each in image]


def fit_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale an image, uint8 [h, w, 3], with antialiasing until it covers height x width, then crop the centre."""
    return cover_crop(image[None], height, width)[0]


# 33.5 million pixels, a square of 5792: decoding a 420 kB PNG of 12000x12000 takes 1.9 GB, and a clip has at most 16384
# pixels a side.
MAX_PIXELS = 2**25
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def cover_crop(
    frames: np.ndarray, height: int, width: int, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> np.ndarray:
    """Scale uint8 [T, H, W, 3] with antialiasing until it covers height x width, keep the aspect, crop the centre."""
    h, w = frames.shape[1:3]
    if (h, w) == (height, width):
        return frames
    fit = [ImageOps.fit(Image.fromarray(f), (width, height), resample) for f in frames]
    return np.stack([np.asarray(image) for image in fit])


def read_image(image: Any) -> np.ndarray:
    """An image file, PIL image, array or tensor as RGB uint8 [H, W, 3].

    Any PIL mode is converted: transparency is composited on white, 16-bit values are scaled to 8 bits, the camera's
    rotation tag is applied, and the colours of an ICC profile become those of sRGB (a damaged profile is ignored).
    Arrays are uint8, uint16, bool, or floats in [0, 1], of shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; tensors are
    as diffusers takes them, floats in [0, 1] of shape [3, H, W]. Raises
    ReducioError for anything else, for a missing or broken file, for values whose scale is ambiguous, and for 8-bit
    images that hold only 0 and 1.
    """
    if isinstance(image, np.ndarray):
        return to_rgb(_image_from_array(image))
    if isinstance(image, Image.Image):
        return decode_image(lambda: to_rgb(image), "the image")
    if hasattr(image, "is_floating_point"):  # a torch.Tensor, without importing torch
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ReducioError(f"an image tensor must be floats [3, H, W]; it is {image.dtype} {list(image.shape)}")
        if image.is_meta or str(image.layout) != "torch.strided":
            raise ReducioError(f"an image tensor must hold its values; it is {image.layout} on {image.device}")
        return read_image(image.detach().permute(1, 2, 0).float().cpu().numpy())
    if not isinstance(image, (str, os.PathLike)):
        raise ReducioError(f"image must be a path, a PIL image, an array or a tensor; it is a {type(image).__name__}")
    if not is_file(image, "image"):
        raise ReducioError(f"no such image file: {printable(image)}")

    def load() -> np.ndarray:
        with Image.open(image) as opened:
            return to_rgb(opened)

    return decode_image(load, f"the image {printable(image)}")


def write_image(image: np.ndarray, path: str | os.PathLike[str]) -> None:
    """uint8 [H, W, 3] into a file whose suffix Pillow knows, whole or not at all. Raises ReducioError."""
    try:
        with written_whole(path) as temporary:
            Image.fromarray(image).save(temporary)
    except (OSError, ValueError, KeyError) as error:  # Pillow: ValueError for a suffix that it does not know
        raise ReducioError(f"cannot write {printable(path)}: {first_line(error)}") from error


def decode_image(load: Callable[[], T], source: str) -> T:
    try:
        return load()
    except ReducioError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more on broken bytes
        raise ReducioError(f"{source} cannot be read: {first_line(error)}") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a PIL image of any mode to RGB uint8 [H, W, 3].

    Raises ReducioError for an image that is empty, has more than MAX_PIXELS or has values of ambiguous scale.
    """
    if 0 in image.size:
        raise ReducioError(f"the image is empty, of {image.width}x{image.height} pixels")
    if image.format == "JPEG" and image.width * image.height > MAX_PIXELS:
        # The JPEG decoder can reduce the image by 2, 4 or 8 while it decodes, before the pixels take memory.
        shares = (n for n in (2, 4, 8) if image.width * image.height <= n * n * MAX_PIXELS)
        share = next(shares, 8)
        image.draft(None, (image.width // share, image.height // share))
    if image.width * image.height > MAX_PIXELS:
        raise ReducioError(
            f"the image has {image.width}x{image.height} pixels, {MAX_PIXELS / 1e6:.1f} million are the most; scale it"
        )
    if image.mode == "La":
        image = image.convert("LA")  # the only mode that Pillow converts it to
    image, profile = ImageOps.exif_transpose(image), image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_bytes(np.asarray(image), sixteen_bits=image.mode.startswith("I;16")))
    elif image.mode == "L" and image.format != "JPEG":  # other formats may hold a mask of 0 and 1
        _check_scale(np.asarray(image))
    elif image.mode == "LAB":
        from PIL import ImageCms  # Pillow's only conversion of Lab

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image  # None only if inPlace
        profile = None
    if profile:
        image = _to_srgb(image, profile)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _to_srgb(image: Image.Image, icc_profile: bytes) -> Image.Image:
    """Convert from the colours of an ICC profile to those of sRGB. The image is returned as it is if its profile is
    damaged or of another kind of image."""
    from PIL import ImageCms  # only here: few pictures have a profile

    mode = "CMYK" if image.mode == "CMYK" else "L" if Image.getmodebase(image.mode) == "L" else "RGB"
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        if profile.profile.xcolor_space != {"CMYK": "CMYK", "L": "GRAY", "RGB": "RGB "}[mode]:
            return image
        rgba = image.convert("RGBA") if image.has_transparency_data else None
        colours = (image if rgba is None else rgba).convert(mode)
        converted = ImageCms.profileToProfile(colours, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, ImportError, OSError, TypeError):  # ImportError: a Pillow without LittleCMS
        return image
    if converted is None or rgba is None:  # None only if inPlace
        return converted or image
    converted.putalpha(rgba.getchannel("A"))
    return converted


def _to_bytes(values: np.ndarray, sixteen_bits: bool) -> np.ndarray:
    """Convert gray values of a mode that Pillow would clip at 255 to bytes; mode and values determine the scale.

    Floats are in [0, 1] or [0, 255]. Integers count as 16-bit if the largest is at least 2^12, and as 8-bit if it is at
    most 255 and the mode is not a 16-bit one. Raises ReducioError for values between, which would be nearly black on
    one of the two scales.
    """
    floats = np.issubdtype(values.dtype, np.floating)
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ReducioError("the image holds values that are not finite")
    least, most = float(values.min()), float(values.max())
    if least >= 0 and most == 0:
        factor = 1.0
    elif least >= 0 and floats and most <= 1:
        factor = 255.0
    elif least >= 0 and 1 < most <= 255 and not sixteen_bits:
        factor = 1.0
    elif least >= 0 and not floats and 2**12 <= most < 2**16:
        factor = 1 / 257
    else:
        raise ReducioError(
            f"the image's values span {least:g} to {most:g}, whose scale cannot be told: save it with 8 bits"
        )
    return (values * factor).round().astype(np.uint8)


def _check_scale(values: np.ndarray) -> None:
    if values.max() == 1:
        raise ReducioError("the image's values are 0 and 1, of 255: scale them, or the clip is black")


def _image_from_array(array: np.ndarray) -> Image.Image:
    if array.ndim not in (2, 3) or array.size == 0 or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ReducioError(f"an image array must be [H, W] or [H, W, 1 or 3 or 4]; it is {list(array.shape)}")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)  # big-endian numbers are other dtypes to NumPy
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ReducioError(f"a float image must lie in [0, 1]; it spans {array.min():g} to {array.max():g}")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = _to_bytes(array, sixteen_bits=True)
    elif array.dtype == np.uint8:
        _check_scale(array[..., :3] if array.ndim == 3 else array)
    if array.dtype != np.uint8:
        raise ReducioError(f"an image array must be uint8, uint16 or floating point; it is {array.dtype}")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
