"""Detects colour, shape and motion of the one moving object in a clip of the toy world, by classical image analysis.

No part of it is trained, so its errors are independent of those of the model that it measures. The steps: estimate the
background from the frame's border, mark the pixels that differ from it, keep one connected blob per frame, and derive
the colour from the blob's inside, the motion from its path and area, and the shape from its average silhouette. A step
without a clear answer returns None.

Letters in shapes: T frames, H W pixels. Positions are fractions of the frame, x to the right, y down.
"""

from __future__ import annotations

import colorsys
import functools
from dataclasses import dataclass

import numpy as np

from .toy_world import COLOURS, DIRECTIONS, SHAPES, Scene, silhouette

# An object's colour must differ from the background's mean by this much (RGB units) and by this many standard
# deviations of the background in that direction; smaller differences are texture or noise.
_MIN_CONTRAST, _MIN_DEVIATIONS = 55.0, 3.5
_MIN_AREA, _MAX_AREA = 0.004, 0.6  # limits of the object's area, as shares of the frame
_MIN_PRESENCE = 0.7  # share of the frames in which the object must be visible
# Half of the motion in the slowest clips: they move by 13% of the frame or change the radius by 0.32 in its logarithm.
_MIN_TRAVEL, _MIN_GROWTH = 0.06, 0.15
_MAX_OFF_AXIS = np.tan(np.radians(35.0))
_HUE_TOLERANCE = 24.0  # degrees; the widest gap between two named hues is 80
_MIN_SHAPE_MATCH = 0.8  # correlation with the best template
_CANVAS = 40  # pixels per side of the normalised silhouette
_CANVAS_REACH = 1.8  # its half-width in units of sqrt(area / pi)


@dataclass(frozen=True, slots=True)
class Detection:
    """The detected attributes: None where there is no clear answer; all three are None if there is no object.

    `confidence` in 0..1 is the lowest of the three attributes' confidences. `areas` [T] (shares of the frame) and
    `centres` [T, 2] are NaN in frames without the object. `travel` (dx, dy), in fractions of the frame, and `growth`,
    the logarithm of the last radius over the first, are fitted over the clip.
    """

    colour: str | None
    shape: str | None
    motion: str | None
    confidence: float
    areas: np.ndarray
    centres: np.ndarray
    travel: tuple[float, float] = (0.0, 0.0)
    growth: float = 0.0

    @property
    def found(self) -> bool:
        """Whether the object is visible in at least one frame."""
        return bool(np.isfinite(self.areas).any())

    @property
    def area(self) -> float:
        """Mean share of the frame that the object covers; 0 if there is none."""
        return float(np.nanmean(self.areas)) if self.found else 0.0

    def matches(self, scene: Scene) -> dict[str, bool]:
        """For colour, motion and shape: whether the detected value equals the scene's."""
        return {name: getattr(self, name) == getattr(scene, name) for name in ("colour", "motion", "shape")}


def detect(frames: np.ndarray) -> Detection:
    """Find the object in a clip, uint8 [T, H, W, 3] with T >= 2 and sides of at least 32 pixels.

    Raises ValueError for another shape or type.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    if len(frames) < 2 or min(frames.shape[1:3]) < 32:
        raise ValueError(f"frames must be at least 2 of 32x32, got {frames.shape[0]} of {frames.shape[1:3]}")
    pixels = _smooth(_shrink(frames.astype(np.float32)))
    nothing = Detection(None, None, None, 0.0, np.full(len(frames), np.nan), np.full((len(frames), 2), np.nan))

    mean, precision = _background_statistics(pixels)
    away = pixels - mean
    deviations = np.einsum("...i,...i", away @ precision, away)
    distinct = (deviations > _MIN_DEVIATIONS**2) & (np.einsum("...i,...i", away, away) > _MIN_CONTRAST**2)
    blob = _main_component(distinct)
    if not _present(blob).any():
        return nothing
    # Two rounds: the first blob yields the object's colour and the background behind it, which yield a sharper blob.
    for _ in range(2):
        inside = pixels[_core(blob)]
        colour = np.median(inside, axis=0)
        alpha = _opacity(pixels, _background_image(pixels, blob, mean), colour)
        blob = _main_component(alpha > 0.5)
        present = _present(blob)
        if present.mean() < _MIN_PRESENCE:
            return nothing
    alpha = np.where(_dilate(blob, 2), alpha, 0.0)

    areas, centres = _moments(alpha, present)
    motion, motion_confidence, travel, growth = _motion(areas, centres)
    name, colour_confidence = _name_colour(np.median(pixels[_core(blob)], axis=0))
    shape, shape_confidence = _name_shape(alpha, areas, centres)
    confidence = min(motion_confidence, colour_confidence, shape_confidence)
    return Detection(name, shape, motion, confidence, areas, centres, travel, growth)


# --- the object's pixels ---------------------------------------------------------------------------------------------


def _shrink(clip: np.ndarray) -> np.ndarray:
    """Average whole blocks of pixels so that the shorter side is below 256, enough for all measurements here."""
    block = max(1, min(clip.shape[1:3]) // 128)
    frames, height, width = clip.shape[0], clip.shape[1] // block, clip.shape[2] // block
    clip = clip[:, : height * block, : width * block]
    return clip.reshape(frames, height, block, width, block, 3).mean((2, 4))


def _smooth(clip: np.ndarray) -> np.ndarray:
    """Suppress pixel noise with the binomial filter 1-2-1 over both axes of [T, H, W, ...]."""
    for axis in (1, 2):
        wide = np.pad(clip, [(1, 1) if i == axis else (0, 0) for i in range(clip.ndim)], mode="edge")
        first, second, third = (_shifted(wide, axis, i, clip.shape[axis]) for i in range(3))
        clip = 0.25 * (first + third) + 0.5 * second
    return clip


def _shifted(array: np.ndarray, axis: int, start: int, length: int) -> np.ndarray:
    return array[(slice(None),) * axis + (slice(start, start + length),)]


def _background_statistics(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean colour [3] and inverse covariance [3, 3] of the border, without the 20% of it furthest from its median.

    The covariance tolerates a two-tone texture, whose colours vary along one axis; 64 is added to its diagonal, a
    standard deviation of 8 RGB units in every direction.
    """
    ring = max(2, round(0.04 * min(pixels.shape[1:3])))
    edge = np.ones(pixels.shape[1:3], bool)
    edge[ring:-ring, ring:-ring] = False
    border = pixels[:, edge].reshape(-1, 3)
    distance = np.square(border - np.median(border, axis=0)).sum(-1)
    border = border[distance <= np.quantile(distance, 0.8)]
    covariance = np.cov(border.T.astype(np.float64)) * 1.5 + np.eye(3) * 64.0  # 1.5 compensates for the trimmed tail
    return border.mean(0), np.linalg.inv(covariance).astype(np.float32)


def _background_image(pixels: np.ndarray, blob: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """Mean of each pixel over the frames in which the object does not cover it, [1, H, W, 3].

    Pixels that the object covers in every frame get the colour `fallback`.
    """
    clear = ~_dilate(blob, 3)
    count = clear.sum(0)[..., None]
    total = np.einsum("thwc,thw->hwc", pixels, clear.astype(pixels.dtype))
    return np.where(count > 0, total / np.maximum(count, 1), fallback)[None]


def _opacity(pixels: np.ndarray, background: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Position of each pixel's colour on the line from the background to the object's colour, [T, H, W] in 0..1.

    A pixel whose colour lies off that line does not belong to the object: its distance from the line lowers the value.
    """
    way = colour - background
    length = np.maximum(np.einsum("...i,...i", way, way), 1.0)
    away = pixels - background
    along = np.einsum("...i,...i", away, way) / length
    across = np.sqrt(np.maximum(np.einsum("...i,...i", away, away) / length - along**2, 0.0))
    return np.clip(np.minimum(along, 1.0) - np.maximum(across - 0.25, 0.0), 0.0, 1.0)


def _box_sum(mask: np.ndarray, radius: int) -> np.ndarray:
    """Sum over the square of side 2 radius + 1 around every pixel, zero outside the frame."""
    out = mask.astype(np.int32)
    for axis in (1, 2):
        wide = np.pad(out, [(radius + 1, radius) if i == axis else (0, 0) for i in range(3)])
        total, length = np.cumsum(wide, axis=axis), mask.shape[axis]
        out = _shifted(total, axis, 2 * radius + 1, length) - _shifted(total, axis, 0, length)
    return out


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    return _box_sum(mask, radius) > 0


def _core(mask: np.ndarray) -> np.ndarray:
    """The part of a mask at least two pixels from its edge; the whole mask if that part is at most a tenth of it."""
    core = _box_sum(mask, 2) == 25
    return core if core.sum() > 0.1 * mask.sum() else mask


def _main_component(mask: np.ndarray) -> np.ndarray:
    """The connected component of every frame's mask [T, H, W] that contains the densest position of the mask."""
    frames, height, width = mask.shape
    density = _box_sum(mask, max(2, min(height, width) // 16)) * mask
    reached = np.zeros_like(mask)
    reached.reshape(frames, -1)[np.arange(frames), density.reshape(frames, -1).argmax(1)] = True
    reached &= mask
    while True:
        # Fill whole runs along rows, then along columns; a simple shape is complete after two or three rounds.
        grown = _fill_runs(reached, mask)
        grown = _fill_runs(grown.swapaxes(1, 2), mask.swapaxes(1, 2)).swapaxes(1, 2)
        if np.array_equal(grown, reached):
            return grown
        reached = grown


def _fill_runs(reached: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Extend `reached` to the whole of every horizontal run of the mask that it touches."""
    pad = ((0, 0), (0, 0), (1, 0))  # an empty column ends the runs at the end of each row
    padded = np.pad(mask, pad).reshape(-1)
    run = np.cumsum(~padded)
    touched = np.zeros(run[-1] + 1, bool)
    touched[run[np.pad(reached, pad).reshape(-1)]] = True
    frames, height, width = mask.shape
    return (touched[run] & padded).reshape(frames, height, width + 1)[:, :, 1:]


def _present(blob: np.ndarray) -> np.ndarray:
    """Frames [T], bool, in which the blob's area is within the limits of an object."""
    area = blob.mean((1, 2))
    return (area >= _MIN_AREA) & (area <= _MAX_AREA)


# --- motion, colour and shape ----------------------------------------------------------------------------------------


def _moments(alpha: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas [T] and centroids [T, 2], NaN where the object is not present."""
    height, width = alpha.shape[1:]
    total = np.where(present, alpha.sum((1, 2)), np.nan)
    x = (alpha.sum(1) * (np.arange(width) + 0.5)).sum(-1) / total / width
    y = (alpha.sum(2) * (np.arange(height) + 0.5)).sum(-1) / total / height
    return total / (height * width), np.stack([x, y], -1)


def _slope(values: np.ndarray) -> float:
    """Change over the whole clip: the median slope of all pairs of frames (Theil-Sen), robust to a few outliers."""
    frames = np.flatnonzero(np.isfinite(values))
    first, second = np.triu_indices(len(frames), 1)
    slopes = (values[frames[second]] - values[frames[first]]) / (frames[second] - frames[first])
    return float(np.median(slopes)) * (len(values) - 1)


def _motion(areas: np.ndarray, centres: np.ndarray) -> tuple[str | None, float, tuple[float, float], float]:
    travel = (_slope(centres[:, 0]), _slope(centres[:, 1]))
    growth = 0.5 * _slope(np.log(areas))
    # Both are in units of the smallest change that counts as motion.
    moved, grown = float(np.hypot(*travel)) / _MIN_TRAVEL, abs(growth) / _MIN_GROWTH
    confidence = abs(moved - grown) / max(moved, grown, 1e-6)
    if max(moved, grown) < 1.0:
        return None, 0.0, travel, growth
    if grown > moved:
        return ("growing" if growth > 0 else "shrinking"), confidence, travel, growth
    main, other = sorted((abs(travel[0]), abs(travel[1])), reverse=True)
    if other > main * _MAX_OFF_AXIS:
        return None, 0.0, travel, growth
    name = max(DIRECTIONS, key=lambda d: travel[0] * DIRECTIONS[d][0] + travel[1] * DIRECTIONS[d][1])
    return name, min(confidence, 1.0 - other / main), travel, growth


def _name_colour(rgb: np.ndarray) -> tuple[str | None, float]:
    """The named colour, by hue, which blur and a wrong brightness do not change; white by its low saturation."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(float(c) / 255.0 for c in rgb))
    if saturation <= 0.22:
        return ("white", 1.0 - saturation / 0.22) if value >= 0.62 else (None, 0.0)
    if saturation < 0.35 or value < 0.5:
        return None, 0.0
    off = {name: abs((hue - known + 0.5) % 1.0 - 0.5) * 360.0 for name, known in _hues().items()}
    first, second = sorted(off, key=off.__getitem__)[:2]
    if off[first] > _HUE_TOLERANCE:
        return None, 0.0
    return first, 1.0 - off[first] / off[second]


@functools.cache
def _hues() -> dict[str, float]:
    hsv = {name: colorsys.rgb_to_hsv(*(c / 255.0 for c in rgb)) for name, rgb in COLOURS.items()}
    return {name: hue for name, (hue, saturation, _) in hsv.items() if saturation > 0.3}


def _normalised(alpha: np.ndarray, area: float, centre: np.ndarray) -> np.ndarray:
    """A silhouette moved and scaled to a fixed centroid and area, [_CANVAS, _CANVAS], bilinear."""
    height, width = alpha.shape
    radius = np.sqrt(area * height * width / np.pi)
    place = (np.arange(_CANVAS) + 0.5) / _CANVAS * 2.0 - 1.0
    x = centre[0] * width + place * _CANVAS_REACH * radius - 0.5
    y = centre[1] * height + place * _CANVAS_REACH * radius - 0.5
    rows = np.maximum(0.0, 1.0 - np.abs(y[:, None] - np.arange(height)))
    columns = np.maximum(0.0, 1.0 - np.abs(x[:, None] - np.arange(width)))
    return rows @ alpha @ columns.T


@functools.cache
def _templates() -> dict[str, np.ndarray]:
    """Normalised silhouettes [blurs, _CANVAS, _CANVAS] of each shape, from sharp to a blur of a sixth of the radius."""
    out = {}
    for shape in SHAPES:
        alpha = silhouette(shape, np.array([[0.5, 0.5]]), np.array([0.2]), 160)
        versions = []
        # A binomial pass adds half a pixel of variance: sigma is 0, 2, 3.5 and 5.5 pixels, the radius 32.
        for passes in (0, 8, 24, 60):
            soft = alpha[..., None].repeat(3, -1)
            for _ in range(passes):
                soft = _smooth(soft)
            areas, centres = _moments(soft[..., 0], np.array([True]))
            versions.append(_normalised(soft[0, ..., 0], areas[0], centres[0]))
        out[shape] = np.stack(versions)
    return out


def _name_shape(alpha: np.ndarray, areas: np.ndarray, centres: np.ndarray) -> tuple[str | None, float]:
    """The shape whose silhouette correlates best with the clip's mean silhouette, weighted by the area per frame."""
    seen = np.flatnonzero(np.isfinite(areas))
    average = sum(areas[t] * _normalised(alpha[t], areas[t], centres[t]) for t in seen) / areas[seen].sum()
    score = {
        shape: max(float(np.corrcoef(average.ravel(), version.ravel())[0, 1]) for version in versions)
        for shape, versions in _templates().items()
    }
    first, second = sorted(score, key=score.__getitem__, reverse=True)[:2]
    if not score[first] >= _MIN_SHAPE_MATCH:
        return None, 0.0
    # Circle and square, the closest pair, correlate at 0.89: a lead of 0.07 is full confidence.
    return first, min(1.0, (score[first] - score[second]) / 0.07)
