"""Metrics compared with scikit-image, the detector with clips of known content, and the report with both."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import binomtest
from skimage.measure import block_reduce
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from reducio_fast.cli import main
from reducio_fast.data import photos, toy_world
from reducio_fast.data.toy_detector import detect
from reducio_fast.data.toy_world import Scene
from reducio_fast.evaluation import reconstruction, toy_report
from reducio_fast.media.similarity import pooled_psnr, psnr, psnr_per_frame, ssim, ssim_per_frame
from reducio_fast.reference import VAEConfig
from reducio_fast.system.errors import ReducioError

# --- metrics ---------------------------------------------------------------------------------------------------------


def _pair(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A clip of a photograph and a blurred, noisy copy of it."""
    rng = np.random.default_rng(seed)
    clip = photos.render(rng, max(height, width), 3, held_out=True, name="coffee")[:, :height, :width]
    spoilt = gaussian_filter(clip.astype(float), (0, 1, 1, 0)) + rng.normal(0, 6, clip.shape)
    return clip, spoilt.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (47, 130), (512, 520)])
@pytest.mark.slow
def test_metrics_equal_scikit_image(height, width):
    a, b = _pair(height, width)
    expected = [peak_signal_noise_ratio(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr_per_frame(a, b), expected, rtol=1e-9)
    assert psnr(a, b) == pytest.approx(np.mean(expected))
    assert pooled_psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b))

    block = 2 if height == 512 else 1
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255.0}
    pooled = (block_reduce(clip.astype(float), (1, block, block, 1), np.mean) for clip in (a, b))
    expected = [structural_similarity(x, y, channel_axis=-1, **options) for x, y in zip(*pooled, strict=True)]
    np.testing.assert_allclose(ssim_per_frame(a, b), expected, rtol=1e-6)
    assert ssim(a, b) == pytest.approx(np.mean(expected))


def test_metrics_of_floats_equal_those_of_bytes():
    a, b = _pair(64, 64)
    assert psnr(a / np.float32(255), b) == pytest.approx(psnr(a, b), rel=1e-5)
    assert ssim(a, b / 255.0) == pytest.approx(ssim(a, b))
    assert psnr(a, a) == np.inf and ssim(a, a) == pytest.approx(1.0)
    broken = a / 255.0
    broken[1, 0, 0, 0] = np.nan
    assert np.isnan(psnr_per_frame(broken, b)).tolist() == [False, True, False] and np.isnan(ssim(broken, b))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((2, 16, 16, 3), np.uint8), np.zeros((3, 16, 16, 3), np.uint8)),
        (np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16, 3), np.uint8)),
        (np.zeros((2, 16, 16, 3), np.int32), np.zeros((2, 16, 16, 3), np.int32)),
    ],
    ids=["shapes", "no-time-axis", "integers"],
)
def test_metrics_refuse_clips_of_different_shape_or_type(a, b):
    for metric in (psnr, ssim, pooled_psnr):
        with pytest.raises(ValueError, match="shape|uint8"):
            metric(a, b)


def test_ssim_needs_room_for_its_window():
    with pytest.raises(ValueError, match="11x11"):
        ssim(np.zeros((1, 10, 32, 3), np.uint8), np.zeros((1, 10, 32, 3), np.uint8))


# --- detector --------------------------------------------------------------------------------------------------------


def _bytes(clip: np.ndarray) -> np.ndarray:
    return np.rint(clip).clip(0, 255).astype(np.uint8)


SPOIL = {
    "clean": (56, 0.98, lambda clip, rng: clip),
    "blurred": (24, 0.95, lambda clip, rng: _bytes(gaussian_filter(clip.astype(float), (0, 1.5, 1.5, 0)))),
    "noisy": (24, 0.95, lambda clip, rng: _bytes(clip + rng.normal(0, 20, clip.shape))),
    "smeared": (12, 0.95, lambda clip, rng: _bytes(gaussian_filter(clip.astype(float), (1.5, 1.5, 1.5, 0)))),
    "dim": (12, 0.95, lambda clip, rng: _bytes(0.8 * clip.astype(float) + 10)),
}


@pytest.mark.parametrize("kind", SPOIL)
@pytest.mark.slow
def test_detector_names_what_was_drawn(kind):
    count, least, spoil = SPOIL[kind]
    rng = np.random.default_rng(10)
    right = dict.fromkeys(toy_report.ATTRIBUTES, 0)
    for i in range(count):
        scene = toy_world.sample_scene(rng, held_out=i % 2 == 0)
        found = detect(spoil(toy_world.render(scene, rng), rng))
        for name, match in found.matches(scene).items():
            right[name] += match
    assert all(n >= least * count for n in right.values()), right


@pytest.mark.slow
def test_detector_measures_where_the_object_is():
    rng = np.random.default_rng(11)
    for motion in toy_world.MOTIONS:
        clip, truth = toy_world.render_with_truth(Scene("cyan", "star", motion, "", "striped"), rng)
        found = detect(clip)
        np.testing.assert_allclose(found.centres, truth.centres, atol=0.01)
        np.testing.assert_allclose(found.areas, truth.alpha.mean((1, 2)), rtol=0.12)
        np.testing.assert_allclose(found.travel, truth.centres[-1] - truth.centres[0], atol=0.02)
        assert found.growth == pytest.approx(np.log(truth.radii[-1] / truth.radii[0]), abs=0.06)
        assert 0.0 < found.confidence <= 1.0 and found.area == pytest.approx(np.mean(found.areas))


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.slow
def test_detector_works_at_other_sizes(size):
    rng = np.random.default_rng(12)
    for _ in range(8):
        scene = toy_world.sample_scene(rng)
        assert all(detect(toy_world.render(scene, rng, size)).matches(scene).values()), scene


@pytest.mark.parametrize("background", toy_world.BACKGROUNDS)
@pytest.mark.slow
def test_detector_finds_nothing_on_an_empty_background(background):
    rng = np.random.default_rng(13)
    still = np.repeat(toy_world.background_image(background, rng)[None], 16, 0)
    for clip in (still, still + rng.normal(0, 20, still.shape)):
        found = detect(_bytes(clip))
        assert not found.found and found.area == 0.0 and found.confidence == 0.0
        assert (found.colour, found.shape, found.motion) == (None, None, None)


def test_detector_finds_nothing_in_noise_or_in_a_flash():
    rng = np.random.default_rng(14)
    assert not detect(rng.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)).found
    clip = toy_world.render(Scene("red", "circle", "up", "", "black"), rng, 64)
    clip[4:] = clip[0, 0, 0]  # the object is visible in a quarter of the frames
    assert not detect(clip).found


@pytest.mark.slow
def test_detector_distinguishes_still_and_moving_objects():
    rng = np.random.default_rng(15)
    clip = toy_world.render(Scene("red", "star", "right", "", "noisy"), rng)
    still = detect(np.repeat(clip[7:8], 16, 0))
    assert (still.colour, still.shape, still.motion) == ("red", "star", None)
    assert detect(clip[::-1]).motion == "left"
    assert detect(clip.swapaxes(1, 2)).motion == "down"
    growing = toy_world.render(Scene("red", "circle", "growing", "slowly", "noisy"), rng)
    assert detect(growing).motion == "growing" and detect(growing[::-1]).motion == "shrinking"


def test_detector_does_not_name_a_diagonal_move():
    centres = np.linspace(0.3, 0.6, 16)[:, None].repeat(2, 1)
    alpha = toy_world.silhouette("square", centres, np.full(16, 0.15), 64)[..., None]
    found = detect(_bytes(100 + alpha * (np.array(toy_world.COLOURS["green"]) - 100)))
    assert (found.colour, found.shape, found.motion) == ("green", "square", None)


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((150, 20, 20), "red"),
        ((255, 255, 255), "white"),
        ((128, 128, 128), None),
        ((255, 170, 190), None),
        ((110, 70, 40), None),
        ((128, 0, 220), None),
    ],
    ids=["dark-red", "pure-white", "gray", "pink", "brown", "violet"],
)
def test_detector_names_only_the_colours_of_the_world(rgb, name):
    centres = np.stack([np.linspace(0.3, 0.6, 16), np.full(16, 0.5)], 1)
    alpha = toy_world.silhouette("circle", centres, np.full(16, 0.18), 64)
    found = detect(_bytes(alpha[..., None] * np.array(rgb)))
    assert (found.colour, found.shape, found.motion) == (name, "circle", "right")


def test_detector_does_not_name_a_shape_the_world_lacks():
    # Two crossing bars form an X.
    clip = np.zeros((16, 64, 64, 3), np.uint8)
    rows, columns = np.mgrid[:64, :64]
    for t in range(16):
        x, y = columns - 20 - t, rows - 32
        cross = (np.minimum(np.abs(x - y), np.abs(x + y)) < 4) & (np.maximum(np.abs(x), np.abs(y)) < 14)
        clip[t, cross] = toy_world.COLOURS["blue"]
    found = detect(clip)
    assert (found.colour, found.shape, found.motion) == ("blue", None, "right")


def test_detector_refuses_other_arrays():
    for clip in (np.zeros((16, 64, 64, 3)), np.zeros((64, 64, 3), np.uint8), np.zeros((1, 64, 64, 3), np.uint8)):
        with pytest.raises(ValueError, match="frames must be"):
            detect(clip)


# --- report ----------------------------------------------------------------------------------------------------------


class StillVAE:
    """An autoencoder that repeats the content frame: the baseline of a reconstruction."""

    config = VAEConfig()

    def parameters(self):
        yield torch.zeros(1)

    def encode(self, video, tiled):
        self.length = video.shape[2]
        return SimpleNamespace(mode=lambda: video[:, :1, :1])

    def normalize_latent(self, z):
        return z

    def encode_content(self, image, tiled):
        return [image]

    def decode(self, latent, features, tiled):
        return features[0][:, :, None].repeat(1, 1, self.length, 1, 1)


class PerfectVAE(StillVAE):
    """An autoencoder that reproduces the clip with a constant error of one level in 255."""

    def encode(self, video, tiled):
        return SimpleNamespace(mode=lambda: video)

    def decode(self, latent, features, tiled):
        return torch.where(latent > 0, latent - 2 / 255, latent + 2 / 255)


class DrawnPipeline:
    """Draws the prompt's scene, but every fourth clip in another colour and every eighth clip backwards."""

    sample_height = sample_width = 64

    def __init__(self, vae):
        self.vae, self.seeds = vae, []

    def __call__(self, prompt, seed, progress):
        scene = toy_world.parse_caption(prompt)
        assert toy_world.is_held_out(scene) and progress is False
        clip = toy_world.render(scene, np.random.default_rng(seed), 64)
        i = len(self.seeds)
        self.seeds.append(seed)
        if i % 4 == 0:
            other = "red" if scene.colour == "green" else "green"
            clip = toy_world.render(dataclasses.replace(scene, colour=other), np.random.default_rng(seed), 64)
        return SimpleNamespace(frames=clip[::-1].copy() if i % 8 == 1 else clip)


@pytest.mark.slow
def test_report_counts_what_the_clips_show():
    pipe = DrawnPipeline(PerfectVAE())
    scores = toy_report.evaluate(pipe, num_prompts=16, seed=3, progress=False, num_clips=4)
    assert pipe.seeds == list(range(3, 19))
    assert [scores[name]["right"] for name in ("colour", "motion", "shape", "all")] == [12, 14, 16, 10]
    assert scores["colour"]["share"] == 0.75 and len(scores["failures"]) == 6
    assert "(seed 3): colour green" in scores["failures"][0] or "(seed 3): colour red" in scores["failures"][0]
    assert "motion" in scores["failures"][1] and "colour" not in scores["failures"][1]
    for kind in ("scenes", "photos"):
        assert scores["vae"][kind]["clips"] == 4
        assert scores["vae"][kind]["psnr"] == pytest.approx(48.13, abs=0.01)
        assert scores["vae"][kind]["gain_db"] > 5 and scores["vae"][kind]["ssim"] > scores["vae"][kind]["repeat_ssim"]
    assert json.loads(json.dumps(scores, allow_nan=False))["prompts"] == 16


def test_repeating_the_content_frame_gains_nothing():
    rng = np.random.default_rng(16)
    clips = [toy_world.render(toy_world.sample_scene(rng), rng, 64) for _ in range(3)]
    scores = reconstruction.reconstruction_scores(StillVAE(), clips)
    for name in ("gain_db", "pooled_gain_db", "worst_gain_db"):
        assert scores[name] == pytest.approx(0.0, abs=1e-9)
    assert scores["ssim"] == pytest.approx(scores["repeat_ssim"]) and 5 < scores["pooled_psnr"] < 40


def test_a_clip_that_stands_still_counts_60_db():
    """Its repeated content frame is exact: infinite figures would hide those of all other clips."""
    rng = np.random.default_rng(16)
    clips = [np.zeros((16, 64, 64, 3), np.uint8), toy_world.render(toy_world.sample_scene(rng), rng, 64)]
    scores = reconstruction.reconstruction_scores(StillVAE(), clips)
    assert all(np.isfinite(value) for value in scores.values()) and scores["pooled_gain_db"] == pytest.approx(0)
    moved = reconstruction.reconstruction_scores(PerfectVAE(), clips[:1])
    assert moved["repeat_pooled_psnr"] == 60 and moved["worst_gain_db"] == pytest.approx(48.13 - 60, abs=0.01)


def test_report_says_why_photographs_were_skipped(monkeypatch):
    photos.pyramid.cache_clear()
    monkeypatch.setattr(photos.importlib.util, "find_spec", lambda name: None)
    scores = toy_report.evaluate(DrawnPipeline(PerfectVAE()), num_prompts=1, progress=False, num_clips=1)
    assert "reducio-fast[train]" in scores["vae"]["photos"]["skipped"]
    assert scores["vae"]["scenes"]["clips"] == 1


def test_intervals_equal_scipy():
    for right, trials in ((0, 64), (1, 64), (58, 64), (64, 64), (3, 7)):
        expected = binomtest(right, trials).proportion_ci(method="wilson")
        assert toy_report.wilson_interval(right, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_report_refuses_empty_samples():
    with pytest.raises(ReducioError, match="num_prompts=0"):
        toy_report.evaluate(DrawnPipeline(StillVAE()), num_prompts=0)
    with pytest.raises(ReducioError, match="none given"):
        reconstruction.reconstruction_scores(StillVAE(), [])


@pytest.mark.slow
def test_the_embedded_model_can_be_scored(capsys, monkeypatch):
    """By the command, which prints the scores; with one clip of each kind, since the usual 32 take a minute."""
    evaluate, kept = toy_report.evaluate, []
    monkeypatch.setattr(
        toy_report, "evaluate", lambda *args, **kwargs: kept.append(evaluate(*args, **kwargs, num_clips=1)) or kept[0]
    )
    assert main.main(["evaluate", "--prompts", "1", "--no-progress"]) == 0
    text = capsys.readouterr().out
    for word in ("colour", "motion", "shape", "95% interval", "/1 ", "scenes", "photos"):
        assert word in text
    (scores,) = kept
    assert scores["prompts"] == 1 and 0 <= scores["all"]["right"] <= 1
    assert len(scores["failures"]) == 1 - scores["all"]["right"]
    for kind in ("scenes", "photos"):
        assert np.isfinite(scores["vae"][kind]["gain_db"]) and 0 < scores["vae"][kind]["ssim"] <= 1
