"""The training data: clips match their captions, held-out scenes are separate, and photographs move."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from skimage.draw import polygon2mask
from skimage.measure import block_reduce

from reducio_fast.data import photos, toy_world
from reducio_fast.data.toy_world import Scene
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow

EVERY_SCENE = [
    Scene(c, s, m, v, b)
    for c, s, m, v, b in itertools.product(*toy_world.ATTRIBUTES.values())
    if not (c == "white" and b == "white")
]


def test_the_world_has_the_documented_attributes():
    assert len(toy_world.COLOURS) >= 8 and len(toy_world.SHAPES) >= 4 and len(toy_world.MOTIONS) >= 6
    assert set(toy_world.SPEEDS) == {"", "slowly", "fast"}
    assert set(toy_world.TEXTURED_BACKGROUNDS) == {"noisy", "striped", "checkered"}
    assert {"black", "gray", "navy"} <= set(toy_world.PLAIN_BACKGROUNDS)


def test_captions_read_back_as_the_scene():
    assert Scene("red", "circle", "right", "fast", "black").caption() == (
        "a red circle moving right fast on a black background"
    )
    assert Scene("orange", "star", "growing", "", "striped").caption() == (
        "an orange star growing on a striped background"
    )
    captions = [scene.caption() for scene in EVERY_SCENE]
    assert len(set(captions)) == len(EVERY_SCENE)
    assert [toy_world.parse_caption(caption) for caption in captions] == EVERY_SCENE
    loose = toy_world.parse_caption(" A Red circle  moving UP on a navy background. ")
    assert loose == Scene("red", "circle", "up", "", "navy")


@pytest.mark.parametrize(
    ("caption", "hint"),
    [
        ("", "expected the form"),
        ("a dog on a beach", "expected the form"),
        ("a pink circle moving up on a black background", "colour='pink'"),
        ("a red cube moving up on a black background", "shape='cube'"),
        ("a red circle moving sideways on a black background", "moving"),
        ("a red circle moving growing on a black background", "moving"),
        ("a red circle up on a black background", "moving"),
        ("a red circle moving up quickly on a black background", "speed='quickly'"),
        ("a red circle moving up on a pink background", "background='pink'"),
        ("a white circle moving up on a white background", "cannot be seen"),
    ],
)
def test_captions_outside_the_world_are_refused(caption, hint):
    with pytest.raises(ReducioError, match=hint):
        toy_world.parse_caption(caption)


def test_held_out_scenes_stay_apart():
    combinations = {(s.colour, s.shape, s.motion): toy_world.is_held_out(s) for s in EVERY_SCENE}
    assert all(toy_world.is_held_out(s) == combinations[s.colour, s.shape, s.motion] for s in EVERY_SCENE)
    held_out = [c for c, kept in combinations.items() if kept]
    assert len(held_out) == len(combinations) // 8
    for position, names in enumerate((toy_world.COLOURS, toy_world.SHAPES, toy_world.MOTIONS)):
        counts = Counter(c[position] for c in held_out)
        assert set(counts) == set(names) and set(counts.values()) == {len(held_out) // len(names)}
    for pair in ((0, 1), (0, 2), (1, 2)):
        assert max(Counter(tuple(c[i] for i in pair) for c in held_out).values()) == 1
    # The split must not change: an older bundle would be tested on scenes that it was trained on.
    assert sorted(held_out)[:3] == [
        ("blue", "circle", "right"),
        ("blue", "square", "down"),
        ("blue", "triangle", "shrinking"),
    ]

    rng = np.random.default_rng(0)
    for kept in (False, True):
        drawn = [toy_world.sample_scene(rng, held_out=kept) for _ in range(2000)]
        assert all(toy_world.is_held_out(scene) is kept for scene in drawn)
        for name, known in toy_world.ATTRIBUTES.items():
            assert {getattr(scene, name) for scene in drawn} == set(known)
        textured = np.mean([scene.background in toy_world.TEXTURED_BACKGROUNDS for scene in drawn])
        assert 0.35 < textured < 0.45


def test_labels_index_the_attributes():
    scene = Scene("cyan", "star", "down", "fast", "noisy")
    assert {n: toy_world.ATTRIBUTES[n][i] for n, i in scene.labels().items()} == {
        "colour": "cyan",
        "shape": "star",
        "motion": "down",
        "speed": "fast",
        "background": "noisy",
    }


def _corners(shape: str, x: float, y: float, r: float) -> np.ndarray:
    """Corners (row, column) of the shape, computed without the signed distances."""
    if shape == "square":
        offsets = 0.9 * np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]])
    else:
        count, reach = {"circle": (360, [1.0]), "triangle": (3, [1.25]), "star": (10, [1.2, 0.54])}[shape]
        angle = np.arange(count) / count * 2 * np.pi - np.pi / 2  # the first corner points up
        offsets = np.resize(reach, count)[:, None] * np.stack([np.sin(angle), np.cos(angle)], 1)
    return np.array([y, x]) + r * offsets


@pytest.mark.parametrize("shape", toy_world.SHAPES)
def test_silhouettes_cover_what_a_polygon_fill_covers(shape):
    x, y, r, size, fine = 0.43, 0.55, 0.21, 96, 8
    alpha = toy_world.silhouette(shape, np.array([[x, y]]), np.array([r]), size)[0]
    # skimage samples at pixel corners; a shift by half a fine pixel moves the samples to pixel centres.
    filled = polygon2mask((size * fine, size * fine), _corners(shape, x, y, r) * size * fine - 0.5)
    expected = block_reduce(filled.astype(np.float32), (fine, fine), np.mean)
    assert np.abs(alpha - expected).max() < 0.3  # reached at a sharp corner; the error along edges is far smaller
    assert np.abs(alpha - expected).mean() < 0.002
    assert abs(alpha.sum() / expected.sum() - 1) < 0.02


@pytest.mark.parametrize("size", [64, 128, 96])
def test_clips_are_deterministic_and_keep_the_shape_in_the_frame(size):
    for seed in range(60):
        scene = toy_world.sample_scene(np.random.default_rng(seed))
        frames, truth = toy_world.render_with_truth(scene, np.random.default_rng(seed), size)
        assert frames.dtype == np.uint8 and frames.shape == (16, size, size, 3)
        assert np.array_equal(frames, toy_world.render(scene, np.random.default_rng(seed), size))
        outline = np.concatenate([truth.alpha[:, [0, -1]].ravel(), truth.alpha[:, :, [0, -1]].ravel()])
        assert not outline.any(), scene
        assert 0.22 <= 2 * truth.radii[7] <= 0.45


def test_a_clip_shows_the_colour_it_names_on_a_still_background():
    rng = np.random.default_rng(1)
    for _ in range(40):
        scene = toy_world.sample_scene(rng)
        frames, truth = toy_world.render_with_truth(scene, rng, 64)
        inside = frames[truth.alpha == 1.0].astype(float)
        assert np.abs(inside - toy_world.COLOURS[scene.colour]).max() <= 7.0
        outside = (truth.alpha == 0.0)[..., None]
        least, most = np.where(outside, frames, 255).min(0), np.where(outside, frames, 0).max(0)
        assert np.array_equal(least[outside.any(0)[..., 0]], most[outside.any(0)[..., 0]])


@pytest.mark.parametrize("motion", toy_world.MOTIONS)
@pytest.mark.parametrize(("speed", "pace"), [("", 1.0), ("slowly", 0.5), ("fast", 1.5)])
def test_motion_is_what_the_caption_says(motion, speed, pace):
    rng = np.random.default_rng(2)
    for shape in toy_world.SHAPES:
        _, truth = toy_world.render_with_truth(Scene("red", shape, motion, speed, "black"), rng, 64)
        # Measure area and centre on the pixels instead of reading the truth's radii and centres.
        area = truth.alpha.sum((1, 2))
        grid = np.arange(64) + 0.5
        x, y = (truth.alpha.sum(1) * grid).sum(1) / area / 64, (truth.alpha.sum(2) * grid).sum(1) / area / 64
        np.testing.assert_allclose(np.stack([x, y], 1), truth.centres, atol=0.01)
        travel = np.array([x[-1] - x[0], y[-1] - y[0]])
        if motion in toy_world.DIRECTIONS:
            along = travel @ np.array(toy_world.DIRECTIONS[motion])
            assert 0.25 * pace < along < 0.33 * pace
            assert np.abs(travel).sum() - along < 0.01
            steps = np.diff(truth.centres, axis=0)
            np.testing.assert_allclose(steps, np.broadcast_to(steps[0], steps.shape), atol=1e-6)
            assert area.std() < 0.01 * area.mean()
        else:
            ratio = np.sqrt(area[-1] / area[0])
            ratio = ratio if motion == "growing" else 1 / ratio
            assert 1.8**pace < ratio < 2.3**pace
            assert np.abs(travel).max() < 0.01


def test_sizes_show_the_same_picture():
    rng = np.random.default_rng(3)
    for seed in range(10):
        scene = toy_world.sample_scene(rng)
        small = toy_world.render(scene, np.random.default_rng(seed), 64).astype(float)
        large = toy_world.render(scene, np.random.default_rng(seed), 128)
        pooled = block_reduce(large.astype(float), (1, 2, 2, 1), np.mean)
        assert np.abs(small - pooled).mean() < 1.0, scene


@pytest.mark.parametrize("length", [1, 2, 9, 31])
def test_other_lengths_show_the_same_motion(length):
    scene = Scene("green", "square", "left", "", "gray")
    clip, truth = toy_world.render_with_truth(scene, np.random.default_rng(4), 64, num_frames=length)
    assert clip.shape == (length, 64, 64, 3) and truth.alpha.any((1, 2)).all()
    travel = truth.centres[0, 0] - truth.centres[-1, 0]
    assert travel == 0 if length == 1 else 0.26 <= travel <= 0.32


def test_impossible_clips_are_refused():
    scene = Scene("green", "square", "left", "", "gray")
    with pytest.raises(ReducioError, match="size=8"):
        toy_world.render(scene, np.random.default_rng(4), 8)
    with pytest.raises(ReducioError, match="num_frames=0"):
        toy_world.render(scene, np.random.default_rng(4), 64, num_frames=0)


# --- photographs -----------------------------------------------------------------------------------------------------


def test_photographs_split_by_picture_and_all_load():
    assert not set(photos.TRAINING_PHOTOS) & set(photos.HELD_OUT_PHOTOS)
    assert len(photos.TRAINING_PHOTOS) >= 8 and len(photos.HELD_OUT_PHOTOS) >= 3
    for name in (*photos.TRAINING_PHOTOS, *photos.HELD_OUT_PHOTOS):
        picture = photos.load_photo(name)
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
        assert min(picture.shape[:2]) >= 256 and picture.std() > 5


@pytest.mark.parametrize("size", [64, 128])
def test_photo_clips_are_deterministic(size):
    first, again, other = (photos.render(np.random.default_rng(seed), size) for seed in (5, 5, 6))
    assert first.dtype == np.uint8 and first.shape == (16, size, size, 3)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_camera_moves_are_smooth_visible_and_stay_inside(monkeypatch):
    # In this picture red is the x coordinate and green the y coordinate, so every frame shows the position of its view.
    side = 251
    ramp = torch.zeros(1, 3, side, side)
    ramp[0, 0], ramp[0, 1] = torch.arange(float(side)), torch.arange(float(side))[:, None]
    monkeypatch.setattr(photos, "pyramid", lambda name, wallpapers: [ramp])
    moves = []
    for seed in range(60):
        clip = photos.render(np.random.default_rng(seed), 64, held_out=True).astype(float)[..., :2]
        # Along a row x never decreases. It would if the view left the picture and showed its mirror image.
        assert np.diff(clip[..., 0], axis=2).min() >= 0 and np.diff(clip[..., 1], axis=1).min() >= 0
        view = np.linalg.norm(clip[:, 0, -1] - clip[:, 0, 0], axis=-1).max()
        corners = clip[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        step = np.linalg.norm(np.diff(corners, axis=0), axis=-1).max() / view
        moves.append(np.linalg.norm(corners[-1] - corners[0], axis=-1).max() / view)
        assert step < 0.06
    assert min(moves) > 0.06 and max(moves) < 0.45 and np.median(moves) > 0.12


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(photos.importlib.util, "find_spec", lambda name: None)
    photos.pyramid.cache_clear()
    with pytest.raises(ReducioError, match=r'skimage.*pip install "reducio-fast\[train\]"'):
        photos.render(np.random.default_rng(0), 64, name="coffee")
    with pytest.raises(ReducioError, match="unknown"):
        photos.load_photo("mona_lisa")


@pytest.mark.parametrize("motion", toy_world.MOTIONS)
def test_portraits_hold_the_shape_in_the_middle(motion: str) -> None:
    rng = np.random.default_rng(5)
    scene = toy_world.Scene("red", "star", motion, "fast", "black")
    still = toy_world.portrait(scene, rng, 64)
    assert still.shape == (64, 64, 3) and still.dtype == np.uint8
    rows, columns = np.nonzero(still[:, :, 0] > 128)
    assert abs(rows.mean() / 64 - 0.5) < 0.04 and abs(columns.mean() / 64 - 0.5) < 0.04
    _, truth = toy_world.render_with_truth(scene, rng, 64, portrait=True)
    np.testing.assert_allclose(truth.centres[7], 0.5, atol=0.021)
    assert not truth.alpha[:, [0, -1]].any() and not truth.alpha[:, :, [0, -1]].any()
