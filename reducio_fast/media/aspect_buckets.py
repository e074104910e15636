"""Aspect buckets: the 40 frame sizes of Reducio's clips around each of 256, 512 and 1024 pixels.

The tables are PixArt-alpha's. As in the latent extraction of the Reducio-VAE release, an image goes to the next bucket
towards the square, so that the crop removes a strip of its longer side and nothing of its shorter side.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from ..system.errors import ReducioError

Size = tuple[int, int]  # height, width

BASES = (256, 512, 1024)
# The wide half of the table at 1024, widest first. The tall half is its transpose, without that of 704x1344.
_WIDE_1024: tuple[Size, ...] = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
    (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024),
)  # fmt: skip
_TALL_1024 = tuple((w, h) for h, w in reversed(_WIDE_1024) if (h, w) != (704, 1344))
_TABLE_1024: tuple[Size, ...] = (*_WIDE_1024, (1024, 1024), *_TALL_1024)


def buckets(base: int, factor: int = 1) -> list[Size]:
    """The (height, width) pairs of a table, widest first: those of the 40 whose sides are multiples of `factor`.

    `factor` is the VAE's spatial factor, 32 in the release. At 1024 and 512 all 40 remain, at 256 eleven. The other 29
    have sides that are multiples of 16 only, and the release rounds them down (a clip of 144x448 becomes 128x448).
    Raises ReducioError for another base.
    """
    if base not in BASES:
        raise ReducioError(f"size: must be one of {', '.join(map(str, BASES))}, is {base!r}")
    shrink = 1024 // base
    table = [(h // shrink, w // shrink) for h, w in _TABLE_1024]
    return [(h, w) for h, w in table if h % factor == 0 and w % factor == 0]


def is_bucket(height: int, width: int) -> bool:
    """Whether a size is in one of the tables."""
    return any((height, width) in buckets(base) for base in BASES)


def towards_square(height: int, width: int, table: Sequence[Size]) -> Size:
    """The bucket of `table` with the image's H / W, else the next one nearer to the square (the release's rule)."""
    ratios = [h / w for h, w in table]
    ratio = height / width
    # An image wider or taller than all buckets goes to the last bucket of that end.
    index = bisect_left(ratios, ratio) if ratio <= 1 else bisect_right(ratios, ratio) - 1
    return table[index]


def nearest(height: int, width: int, table: Sequence[Size]) -> Size:
    """The bucket of `table` whose H / W is nearest to the image's (the rule of PixArt's loader and of diffusers)."""
    return min(table, key=lambda bucket: abs(bucket[0] / bucket[1] - height / width))


def choose_size(
    height: int | None, width: int | None, model_size: Size, pictures: Sequence[Size] = (), factor: int = 32
) -> Size:
    """(height, width) of a call's clips: the requested size, else the bucket of the pictures, else `model_size`.

    `pictures` are the sizes of the user's content frames. The buckets are those of the model's size; a model whose size
    is not a square of 256, 512 or 1024 always uses its own size. Raises ReducioError if the pictures of one call belong
    to different buckets.
    """
    if (
        height is not None
        or width is not None
        or not pictures
        or model_size[0] != model_size[1]
        or model_size[0] not in BASES
    ):
        return model_size[0] if height is None else height, model_size[1] if width is None else width
    table = buckets(model_size[0], factor)
    chosen = [towards_square(*picture, table) for picture in pictures]
    for number, size in enumerate(chosen):
        if size != chosen[0]:
            first, other = ("{}x{}".format(*s) for s in (chosen[0], size))
            raise ReducioError(
                f"image: the aspect ratio of number 0 asks for clips of {first}, that of number {number} for {other}; "
                "give height and width, or one call each"
            )
    return chosen[0]
