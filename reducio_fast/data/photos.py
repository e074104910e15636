"""Clips of photographs under camera moves: natural textures for the video autoencoder.

The pictures are part of the scikit-image and scikit-learn wheels, whose documentation states these licences:

    training   astronaut          public domain (NASA)
               chelsea            CC0 (Stefan van der Walt)
               camera             CC0 (Lav Varshney)
               flower             CC BY 2.0 (vultilion, flickr.com/photos/vultilion/6056698931)
               hubble_deep_field  public domain (NASA)
               retina             CC0 (Mikael Haggstrom)
               ihc                no known copyright restrictions (Center for Microscopy and Molecular Imaging)
               brick, gravel      CC0 (CC0Textures)
               grass              CC0 (linolafett)
    held out   coffee             CC0 (Rachel Michetti)
               china              CC BY 2.0 (danielbuechele, flickr.com/photos/danielbuechele/6061409035)
               rocket             public domain (SpaceX)

Pictures without a stated licence (moon, the stereo motorcycle) are left out. The split is by picture, so training never
uses a texture of a held-out picture. If the user names a folder with the unpacked Debian package
lomiri-wallpapers-16.04, training adds ten of its landscapes and still lifes (CC BY 4.0, one CC0; the package's file
`copyright` names each author):
`apt-get download lomiri-wallpapers-16.04 && dpkg-deb -x lomiri-wallpapers-16.04_*.deb FOLDER`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..system.errors import ReducioError

_SKIMAGE, _SKLEARN = ("skimage", "data"), ("sklearn", "datasets/images")
_FILES: dict[str, tuple[tuple[str, str], str]] = {
    "astronaut": (_SKIMAGE, "astronaut.png"),
    "chelsea": (_SKIMAGE, "chelsea.png"),
    "camera": (_SKIMAGE, "camera.png"),
    "flower": (_SKLEARN, "flower.jpg"),
    "hubble_deep_field": (_SKIMAGE, "hubble_deep_field.jpg"),
    "retina": (_SKIMAGE, "retina.jpg"),
    "ihc": (_SKIMAGE, "ihc.png"),
    "brick": (_SKIMAGE, "brick.png"),
    "gravel": (_SKIMAGE, "gravel.png"),
    "grass": (_SKIMAGE, "grass.png"),
    "coffee": (_SKIMAGE, "coffee.png"),
    "china": (_SKLEARN, "china.jpg"),
    "rocket": (_SKIMAGE, "rocket.jpg"),
}
HELD_OUT_PHOTOS: tuple[str, ...] = ("coffee", "china", "rocket")
TRAINING_PHOTOS: tuple[str, ...] = tuple(name for name in _FILES if name not in HELD_OUT_PHOTOS)
# The file names contain the author. Wallpapers under CC BY-SA are left out: the weights cannot be put under CC BY-SA.
WALLPAPERS: dict[str, str] = {
    "aitzgorri": "aitzgorri_by_Aitzol_Berasategi.jpg",
    "friends": "friends_by_Aitzol_Berasategi.jpg",
    "life": "life_by_Aitzol_Berasategi.jpg",
    "picosdeeuropa": "picosdeeuropa_by_Aitzol_Berasategi.jpg",
    "sunset": "sunset_by_Aitzol_Berasategi.jpg",
    "picture_0b": "Picture_0B_by_freespace.jpg",
    "picture_1a": "Picture_1A_by_freespace.jpg",
    "seeding": "seeding_by_Clements_Engelhardt.jpg",
    "umang": "umang_by_Abhishek_Mudgal.jpg",
    "wine": "Wine_by_Jakkub_Mede.jpg",
}
_PACKAGE, _WALLPAPER_FOLDER = "lomiri-wallpapers-16.04", "usr/share/backgrounds"
_LONGEST_SIDE = 1280  # pixels to which a wallpaper is reduced: half of it still exceeds two widths of a 256-pixel clip

# Scale factor between neighbouring levels of a picture's pyramid. `_moved` chooses the level in which an output pixel
# spans 0.84 to 1.19 pixels: close enough to 1 that bicubic sampling neither aliases nor blurs visibly.
_PYRAMID_STEP = math.sqrt(2.0)


def require_wallpapers(folder: str) -> None:
    """Raise `ReducioError`, with the command that downloads them, if a file of `WALLPAPERS` is not in `folder`."""
    for file in WALLPAPERS.values():
        if not (Path(folder) / _WALLPAPER_FOLDER / file).is_file():
            raise ReducioError(
                f"{folder} has no {_WALLPAPER_FOLDER}/{file}; on Debian or Ubuntu: apt-get download {_PACKAGE} && "
                f"dpkg-deb -x {_PACKAGE}_*.deb {folder}"
            )


@functools.lru_cache(maxsize=len(_FILES) + len(WALLPAPERS))
def pyramid(name: str, wallpapers: str | None = None) -> list[torch.Tensor]:
    """A picture and its anti-aliased reductions by powers of `_PYRAMID_STEP`, float32 [1, 3, H, W] in 0..255."""
    with Image.open(_picture_file(name, wallpapers)) as opened:
        if name in WALLPAPERS:
            opened.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
        picture = opened.convert("RGB")
    levels = [picture]
    while min(picture.size) / _PYRAMID_STEP ** len(levels) >= 64:
        scale = _PYRAMID_STEP ** -len(levels)
        shape = (round(picture.width * scale), round(picture.height * scale))
        levels.append(picture.resize(shape, Image.Resampling.LANCZOS))
    return [torch.from_numpy(np.array(level, np.float32)).permute(2, 0, 1)[None].contiguous() for level in levels]


def _picture_file(name: str, wallpapers: str | None) -> Path:
    if wallpapers is not None and name in WALLPAPERS:
        return Path(wallpapers) / _WALLPAPER_FOLDER / WALLPAPERS[name]
    (package, folder), file = _FILES[name]
    spec = importlib.util.find_spec(package)
    root = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if root is None or not (root / folder / file).is_file():
        raise ReducioError(
            f"the photograph {name!r} comes with {package}, which is not installed or lacks {folder}/{file}; "
            'pip install "reducio-fast[train]"'
        )
    return root / folder / file


def load_photo(name: str) -> np.ndarray:
    """One picture, uint8 [H, W, 3]. Raises `ReducioError` if the package that contains it is not installed."""
    if name not in _FILES:
        raise ReducioError(f"photo name={name!r} is unknown; known: {', '.join(_FILES)}")
    return pyramid(name)[0][0].permute(1, 2, 0).numpy().astype(np.uint8)


def _camera_move(rng: np.random.Generator, num_frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets [T, 2] in view widths, zooms [T] (view width relative to the start or end) and angles [T] in radians."""
    time = np.linspace(0.0, 1.0, num_frames) if num_frames > 1 else np.zeros(1)
    ease = rng.uniform(0.0, 1.0)  # from constant speed to a soft start and stop
    time = (1.0 - ease) * time + ease * time * time * (3.0 - 2.0 * time)
    # One main move of 8-25% of the frame plus small amounts of the other two, as with a hand-held camera.
    main = rng.choice(3, p=(0.5, 0.35, 0.15))
    pan = rng.uniform(0.08, 0.25) if main == 0 else rng.uniform(0.0, 0.05)
    heading = rng.uniform(0.0, 2.0 * np.pi)
    # The frame's edge lies half a width from the centre, so a zoom by exp(2 d) moves it by about d widths.
    zoom = rng.choice([-1.0, 1.0]) * 2.0 * (rng.uniform(0.08, 0.2) if main == 1 else rng.uniform(0.0, 0.03))
    angle = rng.choice([-1.0, 1.0]) * (rng.uniform(0.15, 0.3) if main == 2 else rng.uniform(0.0, 0.03))
    offsets = pan * time[:, None] * np.array([np.cos(heading), np.sin(heading)])
    return offsets, np.exp(-abs(zoom) * (time if zoom < 0 else 1.0 - time)), angle * (time - 0.5)


def render(
    rng: np.random.Generator,
    size: int = 128,
    num_frames: int = 16,
    held_out: bool = False,
    name: str | None = None,
    wallpapers: str | None = None,
    parallax_share: float = 0.0,
) -> np.ndarray:
    """One picture under one smooth camera move (pan, zoom in or out, slight rotation), uint8 [T, size, size, 3].

    The view moves by 8-25% of the frame over the clip. `held_out` selects the side of the split, `name` one picture.
    Training clips are mirrored and tinted at random, held-out clips are not. The view is narrowed to fit into the
    picture, so above a size of about 250 the smallest pictures are enlarged. `wallpapers` is a folder with more
    training pictures. In a share `parallax_share` of the clips a second picture, cut to a random outline, moves
    independently in front of the first one and uncovers areas that no warp of the content frame can produce. Raises
    `ReducioError` for a size below 16, for no frames, or if the picture's package is not installed.
    """
    if size < 16 or num_frames < 1:
        raise ReducioError(f"a clip needs size >= 16 and num_frames >= 1, got size={size}, num_frames={num_frames}")
    names = HELD_OUT_PHOTOS if held_out else (*TRAINING_PHOTOS, *(WALLPAPERS if wallpapers else ()))
    if name is None:
        name = names[rng.integers(len(names))]
    elif name not in _FILES:
        raise ReducioError(f"photo name={name!r} is unknown; known: {', '.join(_FILES)}")
    clip = _moved(rng, name, size, num_frames, held_out, wallpapers)[0]
    if parallax_share and rng.random() < parallax_share:
        other = names[rng.integers(len(names))]
        near, grid = _moved(rng, other, size, num_frames, held_out, wallpapers)
        clip = torch.lerp(clip, near, _outline(rng, grid, size))
    frames = clip.permute(0, 2, 3, 1).numpy()
    if not held_out:
        frames = frames * rng.uniform(0.8, 1.15, 3).astype(np.float32)
    return np.rint(frames).clip(0.0, 255.0).astype(np.uint8)


def _outline(rng: np.random.Generator, grid: torch.Tensor, size: int) -> torch.Tensor:
    """A random blob that moves with the picture sampled at `grid` [T, H, W, 2]: coverage [T, 1, H, W] in 0..1."""
    middle = grid[len(grid) // 2]  # the blob is drawn in the coordinates of the middle frame's view
    low, high = middle.amin((0, 1)), middle.amax((0, 1))
    view = (grid - low) / (high - low) * 2 - 1
    cells = int(rng.integers(3, 7))
    noise = torch.from_numpy(rng.uniform(-1, 1, (1, 1, cells, cells)).astype(np.float32))
    height = F.interpolate(noise, (2 * size, 2 * size), mode="bicubic", align_corners=True)
    covered = height > torch.quantile(height, float(rng.uniform(0.4, 0.8)))
    source = covered.float().expand(len(grid), -1, -1, -1)
    return F.grid_sample(source, view, mode="bilinear", padding_mode="border", align_corners=False)


def _moved(
    rng: np.random.Generator, name: str, size: int, num_frames: int, held_out: bool, wallpapers: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture under one camera move, float32 [T, 3, size, size] in about 0..255, and its grid [T, size, size, 2]."""
    levels = pyramid(name, wallpapers)
    height, width = levels[0].shape[-2:]
    offsets, zooms, angles = _camera_move(rng, num_frames)

    # The widest view that fits: the extent of the moving, rotating square must stay inside the picture. The view is
    # then drawn log-uniformly between the narrowest (one source pixel per output pixel) and this one.
    turned = 0.5 * zooms * (np.abs(np.cos(angles)) + np.abs(np.sin(angles)))
    low, high = (offsets - turned[:, None]).min(0), (offsets + turned[:, None]).max(0)
    widest = 0.98 * float((np.array([width, height]) / (high - low)).min())
    narrowest = min(size / float(zooms.min()), widest)
    view = narrowest * (widest / narrowest) ** rng.random()  # source pixels across the widest frame
    corner = rng.uniform(-low * view, np.array([width, height]) - high * view)
    centres = corner + offsets * view

    # The view's square in grid_sample's normalised coordinates (align_corners=False), one matrix per frame.
    flip = -1.0 if not held_out and rng.random() < 0.5 else 1.0
    cos, sin = np.cos(angles) * zooms * view, np.sin(angles) * zooms * view
    theta = np.empty((num_frames, 2, 3), np.float32)
    theta[:, 0] = np.stack([flip * cos / width, -sin / width, 2.0 * centres[:, 0] / width - 1.0], -1)
    theta[:, 1] = np.stack([flip * sin / height, cos / height, 2.0 * centres[:, 1] / height - 1.0], -1)
    shrink = max(view * float(np.exp(np.log(zooms).mean())) / size, 1.0)
    level = levels[min(round(math.log(shrink, _PYRAMID_STEP)), len(levels) - 1)]
    grid = F.affine_grid(torch.from_numpy(theta), [num_frames, 3, size, size], align_corners=False)
    source = level.expand(num_frames, -1, -1, -1)
    clip = F.grid_sample(source, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return clip, grid
