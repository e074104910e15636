"""The toy world of the default model: one coloured shape that moves on a plain or textured background.

numpy draws every clip on the fly from a `numpy.random.Generator`, so a seed defines a data set. A `Scene` holds the
attributes that a caption names; `render` draws one clip of it with a random size, position, exact tint and texture.
Shapes are upright and drawn from signed distances with one pixel of anti-aliasing, so a clip shows the same scene at
every resolution.

Coordinates are fractions of the frame: x to the right, y down; (0, 0) is the upper left corner of the upper left pixel.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..system.errors import ReducioError

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (228, 36, 36),
    "green": (40, 184, 60),
    "blue": (44, 84, 240),
    "yellow": (246, 222, 44),
    "cyan": (48, 216, 232),
    "magenta": (224, 52, 208),
    "orange": (250, 136, 24),
    "white": (245, 245, 245),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star")
MOTIONS: tuple[str, ...] = ("left", "right", "up", "down", "growing", "shrinking")
SPEEDS: tuple[str, ...] = ("", "slowly", "fast")
PLAIN_BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (6, 6, 6),
    "gray": (110, 110, 110),
    "navy": (12, 20, 66),
    "brown": (82, 54, 34),
    "purple": (58, 28, 84),
    "white": (236, 236, 236),
}
TEXTURED_BACKGROUNDS: tuple[str, ...] = ("noisy", "striped", "checkered")
BACKGROUNDS: tuple[str, ...] = (*PLAIN_BACKGROUNDS, *TEXTURED_BACKGROUNDS)

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_PACE = {"": 1.0, "slowly": 0.5, "fast": 1.5}
_TEXTURED_SHARE = 0.4
_PORTRAIT_CENTRE, _PORTRAIT_RADIUS = (0.48, 0.52), (0.15, 0.18)
_MARGIN = 0.03  # distance of the shape from the frame's edge, so that no silhouette is cut


@dataclass(frozen=True, slots=True)
class Scene:
    """The attributes of a clip that a caption names. Raises `ReducioError` for a value that is not in `ATTRIBUTES`."""

    colour: str
    shape: str
    motion: str
    speed: str = ""
    background: str = "black"

    def __post_init__(self) -> None:
        for name, known in ATTRIBUTES.items():
            if (value := getattr(self, name)) not in known:
                raise ReducioError(f"{name}={value!r} is not in the world; known: {', '.join(map(repr, known))}")
        if self.colour == "white" and self.background == "white":
            raise ReducioError("colour='white' cannot be seen on background='white'; change one of the two")

    def caption(self) -> str:
        """The scene as a caption, e.g. "a red circle moving right fast on a black background"."""
        article = "an" if self.colour[0] in "aeiou" else "a"
        action = f"moving {self.motion}" if self.motion in DIRECTIONS else self.motion
        pace = f" {self.speed}" if self.speed else ""
        return f"{article} {self.colour} {self.shape} {action}{pace} on a {self.background} background"

    def labels(self) -> dict[str, int]:
        """Class index of every attribute, in the order of `ATTRIBUTES`: targets for pre-training the encoders."""
        return {name: known.index(getattr(self, name)) for name, known in ATTRIBUTES.items()}


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "speed": SPEEDS,
    "background": BACKGROUNDS,
}


@dataclass(frozen=True, slots=True)
class Truth:
    """The shape's `centres` [T, 2] (x, y) and `radii` [T] in fractions of the frame, and `alpha` [T, H, W] in 0..1.

    `radii` is the nominal size: the circle's radius; the other shapes are scaled to about the same visual weight.
    The centre is the centre of the circle or square and the centroid of the triangle or star.
    """

    centres: np.ndarray
    radii: np.ndarray
    alpha: np.ndarray


def is_held_out(scene: Scene) -> bool:
    """Whether training excludes this (colour, shape, motion): one in eight, independent of pace and background."""
    return _combination_held_out(scene.colour, scene.shape, scene.motion)


def _combination_held_out(colour: str, shape: str, motion: str) -> bool:
    # Chosen by index in the tables, so that the held-out set is balanced: 3 of every colour, 6 of every shape, 4 of
    # every motion, and no two combinations share two attributes. A random hash that picks 24 of 192 is not balanced.
    # New names must be appended at the end of their table.
    place = tuple(COLOURS).index(colour) + 6 * SHAPES.index(shape) + 5 * MOTIONS.index(motion)
    return place % 8 == 7


_COMBINATIONS: dict[bool, list[tuple[str, str, str]]] = {
    held_out: [
        (c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS if _combination_held_out(c, s, m) is held_out
    ]
    for held_out in (False, True)
}


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draw a scene, uniformly over the training (or held-out) combinations; 40% have a textured background."""
    combinations = _COMBINATIONS[held_out]
    colour, shape, motion = combinations[rng.integers(len(combinations))]
    speed = SPEEDS[rng.integers(len(SPEEDS))]
    if rng.random() < _TEXTURED_SHARE:
        choices = TEXTURED_BACKGROUNDS
    else:
        choices = tuple(name for name in PLAIN_BACKGROUNDS if name != colour)
    return Scene(colour, shape, motion, speed, choices[rng.integers(len(choices))])


_CAPTION = re.compile(
    r"(?:an? )?(?P<colour>\w+) (?P<shape>\w+) (?:moving )?(?P<motion>\w+)(?: (?P<speed>\w+))?"
    r" on an? (?P<background>\w+) background"
)


def parse_caption(caption: str) -> Scene:
    """The scene that a caption describes; case and spacing do not matter.

    Raises `ReducioError` if the caption has another form or names an unknown attribute.
    """
    text = " ".join(caption.lower().split()).rstrip(".")
    match = _CAPTION.fullmatch(text)
    if match is None:
        raise ReducioError(
            f"caption={caption!r} is not of the world; expected the form {Scene('red', 'circle', 'right').caption()!r}"
        )
    attributes = match.groupdict(default="")
    if ("moving" in text.split()) != (attributes["motion"] in DIRECTIONS):
        raise ReducioError(f"caption={caption!r}: 'moving' goes with a direction, one of {', '.join(DIRECTIONS)}")
    return Scene(**attributes)


# --- shapes: signed distance in the units of x, y and r, negative inside; y points down, r broadcasts against x and y


def _circle(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - r


def _square(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.9 * r


def _triangle(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    # Equilateral, circumradius 1.25 r: the largest distance to the three sides, which is exact except near the corners.
    return np.maximum(0.8660254 * np.abs(x) - 0.5 * y, y) - 0.625 * r


def _star(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    # Five points at 1.2 r, inner corners at 0.45 of that. Fold the plane onto half a point, then measure the distance
    # to one edge.
    outer = 1.2 * r
    cos36, sin36 = 0.80901699, 0.58778525
    x, y = np.abs(x), -y
    for kx, ky in ((cos36, -sin36), (-cos36, -sin36)):
        reach = 2.0 * np.maximum(kx * x + ky * y, 0.0)
        x, y = x - reach * kx, y - reach * ky
    x, y = np.abs(x), y - outer
    ex, ey = 0.45 * sin36, 0.45 * cos36 - 1.0
    along = np.clip((x * ex + y * ey) / (ex * ex + ey * ey), 0.0, outer)
    return np.hypot(x - along * ex, y - along * ey) * np.sign(y * ex - x * ey)


_DISTANCE: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
}
# Extent of each shape from its centre, in radii: to either side, upwards, downwards.
_REACH: dict[str, tuple[float, float, float]] = {
    "circle": (1.0, 1.0, 1.0),
    "square": (0.9, 0.9, 0.9),
    "triangle": (1.25 * 0.8660254, 1.25, 0.625),
    "star": (1.2 * 0.9510565, 1.2, 1.2 * 0.8090170),
}


def silhouette(shape: str, centres: np.ndarray, radii: np.ndarray, size: int) -> np.ndarray:
    """Coverage of a shape, float32 [T, size, size] in 0..1; centres [T, 2] and radii [T] in fractions of the frame."""
    grid = np.arange(size, dtype=np.float32) + 0.5
    radii = np.asarray(radii, np.float32) * size
    centres = np.asarray(centres, np.float32) * size
    alpha = np.zeros((len(radii), size, size), np.float32)
    # Only the square around the shape is computed: a third of the frame or less.
    side = min(size, int(np.ceil(2.0 * max(_REACH[shape]) * radii.max())) + 6)
    corners = np.clip(np.floor(centres - side / 2.0).astype(int), 0, size - side)
    x = np.stack([grid[left : left + side] for left, _ in corners]) - centres[:, :1]
    y = np.stack([grid[top : top + side] for _, top in corners]) - centres[:, 1:]
    distance = _DISTANCE[shape](x[:, None, :], y[:, :, None], radii[:, None, None])
    coverage = np.clip(0.5 - distance, 0.0, 1.0)
    for frame, (left, top) in enumerate(corners):
        alpha[frame, top : top + side, left : left + side] = coverage[frame]
    return alpha


# --- backgrounds -----------------------------------------------------------------------------------------------------


def _muted(rng: np.random.Generator) -> np.ndarray:
    """A dull, dark colour [3], far from the eight colours of the shapes."""
    value, saturation, hue = rng.uniform(60.0, 125.0), rng.uniform(0.05, 0.3), rng.uniform(0.0, 2.0 * np.pi)
    wave = 0.5 + 0.5 * np.cos(hue + np.array([0.0, 2.0, 4.0]) * np.pi / 3.0)
    return value * (1.0 - saturation * wave)


def _upsample(coarse: np.ndarray, size: int) -> np.ndarray:
    """Bilinear enlargement of [n, n] to [size, size], by two small matrix products."""
    n = coarse.shape[0]
    place = (np.arange(size) + 0.5) / size * (n - 1)
    weights = np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(n)[None, :]))
    return weights @ coarse @ weights.T


def _texture(texture: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """A pattern [size, size] in about -1..1 that looks the same at every size."""
    if texture == "noisy":
        octaves = ((5, 0.6), (9, 0.5), (17, 0.4), (33, 0.3))
        layers = [weight * _upsample(rng.uniform(-1.0, 1.0, (n, n)), size) for n, weight in octaves]
        return sum(layers[1:], layers[0])
    grid = (np.arange(size) + 0.5) / size
    if texture == "striped":
        period, phase = rng.uniform(0.12, 0.24), rng.uniform(0.0, 1.0)
        angle = rng.choice([0.0, 0.25, 0.5, 0.75]) * np.pi
        place = (np.cos(angle) * grid[None, :] + np.sin(angle) * grid[:, None]) / period + phase
        return _square_wave(place, 1.0 / (period * size))
    period = rng.uniform(0.2, 0.36)
    shift_x, shift_y = rng.uniform(0.0, 1.0, 2)
    edge = 1.0 / (period * size)
    return _square_wave(grid / period + shift_x, edge)[None, :] * _square_wave(grid / period + shift_y, edge)[:, None]


def _square_wave(place: np.ndarray, edge: float) -> np.ndarray:
    """+1 for one half of every unit, -1 for the other, with ramps one pixel (`edge` units) wide between them."""
    triangle = np.abs((place + 0.25) % 1.0 - 0.5) * 4.0 - 1.0
    return np.clip(-triangle / (2.0 * edge), -1.0, 1.0)


def background_image(name: str, rng: np.random.Generator, size: int = 128) -> np.ndarray:
    """One background, float32 [size, size, 3] in 0..255: a flat tint, or a low-contrast muted texture."""
    if name in PLAIN_BACKGROUNDS:
        tint = np.asarray(PLAIN_BACKGROUNDS[name]) + rng.uniform(-5.0, 5.0)
        return np.broadcast_to(np.clip(tint, 0.0, 255.0), (size, size, 3)).astype(np.float32)
    if name not in TEXTURED_BACKGROUNDS:
        raise ReducioError(f"background={name!r} is not in the world; known: {', '.join(BACKGROUNDS)}")
    base, contrast = _muted(rng), rng.uniform(10.0, 22.0)
    tones = 1.0 + rng.uniform(-0.25, 0.25, 3)  # the two tones differ a little in hue, too
    pattern = _texture(name, rng, size)
    return (base + contrast * tones * pattern[:, :, None]).clip(0.0, 255.0).astype(np.float32)


# --- clips -----------------------------------------------------------------------------------------------------------


def _trajectory(
    scene: Scene, rng: np.random.Generator, num_frames: int, portrait: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Centres [T, 2] and radii [T] at constant velocity or relative growth; the whole shape is always in the frame."""
    # Time is 0 at the centre frame, for which the radius is drawn, and advances by 1 over the clip.
    time = (np.arange(num_frames) - (num_frames - 1) // 2) / max(num_frames - 1, 1)
    side, above, below = _REACH[scene.shape]
    pace = _PACE[scene.speed]
    travel = np.zeros(2)
    log_growth = 0.0
    if scene.motion in DIRECTIONS:
        travel = np.asarray(DIRECTIONS[scene.motion]) * rng.uniform(0.26, 0.32) * pace
        radius = rng.uniform(0.11, 0.2)
    else:
        log_growth = np.log(rng.uniform(1.9, 2.2)) * pace * (1.0 if scene.motion == "growing" else -1.0)
        radius = rng.uniform(0.13, 0.225)
    if portrait:
        radius = rng.uniform(*_PORTRAIT_RADIUS)
    radii = np.exp(log_growth * time)
    room = 1.0 - 2.0 * _MARGIN - np.abs(travel)
    largest = min(room[0] / (2.0 * side), room[1] / (above + below)) / radii.max()
    radii = radii * min(radius, largest)
    drift = travel * time[:, None]
    # Bounds of the centre at time 0 (left/top, right/bottom) that keep the shape inside the frame at all times.
    reach_low = np.array([side, above]) * radii[:, None] - drift
    reach_high = np.array([side, below]) * radii[:, None] + drift
    low, high = _MARGIN + reach_low.max(0), 1.0 - _MARGIN - reach_high.max(0)
    high = np.maximum(low, high)
    if portrait:
        low, high = (np.clip(edge, low, high) for edge in _PORTRAIT_CENTRE)
    return rng.uniform(low, high) + drift, radii


def render_with_truth(
    scene: Scene, rng: np.random.Generator, size: int = 128, num_frames: int = 16, portrait: bool = False
) -> tuple[np.ndarray, Truth]:
    """The clip of `render`, uint8 [T, size, size, 3], and the `Truth` about its shape."""
    if size < 16 or num_frames < 1:
        raise ReducioError(f"a clip needs size >= 16 and num_frames >= 1, got size={size}, num_frames={num_frames}")
    background = background_image(scene.background, rng, size)
    tint = _tint(scene.colour, rng)
    centres, radii = _trajectory(scene, rng, num_frames, portrait)
    alpha = silhouette(scene.shape, centres, radii, size)
    return _paint(background, tint, alpha), Truth(centres, radii, alpha)


def _tint(colour: str, rng: np.random.Generator) -> np.ndarray:
    """A random RGB colour [3] near the named one; each clip draws its own."""
    return np.asarray(COLOURS[colour], np.float32) + rng.uniform(-6.0, 6.0, 3).astype(np.float32)


def _paint(background: np.ndarray, tint: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Blend the colour `tint` over a background [H, W, 3] by `alpha` [T, H, W]: uint8 [T, H, W, 3]."""
    frames = np.repeat(np.rint(background).astype(np.uint8)[None], len(alpha), axis=0)
    covered = np.nonzero(alpha)
    mix = alpha[covered][:, None]
    under = background[covered[1], covered[2]]
    frames[covered] = np.rint(under + mix * (tint.clip(0.0, 255.0) - under)).astype(np.uint8)
    return frames


def portrait(scene: Scene, rng: np.random.Generator, size: int = 128) -> np.ndarray:
    """A still image of the scene, uint8 [size, size, 3], with the shape of medium size near the middle.

    From this position every motion, at any pace, stays inside the frame before and after the centre frame.
    """
    background = background_image(scene.background, rng, size)
    tint = _tint(scene.colour, rng)
    centre, radius = rng.uniform(*_PORTRAIT_CENTRE, (1, 2)), rng.uniform(*_PORTRAIT_RADIUS, 1)
    return _paint(background, tint, silhouette(scene.shape, centre, radius, size))[0]


def render(
    scene: Scene, rng: np.random.Generator, size: int = 128, num_frames: int = 16, portrait: bool = False
) -> np.ndarray:
    """Draw one clip of a scene, uint8 [T, size, size, 3].

    At the default pace a move covers 26-32% of the frame and growth is about twofold over the clip; "slowly" is 0.5
    times and "fast" 1.5 times that (for growth, of its logarithm). The shape never leaves the frame. `portrait` draws
    size and position as the function `portrait` does. Raises `ReducioError` for a size below 16 and for no frames.
    """
    return render_with_truth(scene, rng, size, num_frames, portrait)[0]
