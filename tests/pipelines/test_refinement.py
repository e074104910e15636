"""`refine`: the encoder's latent moved until the decoded clip is nearest to the given one."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints.vae_alone import load_vae
from reducio_fast.cli.main import main
from reducio_fast.evaluation.reconstruction import reconstruct, reconstruction_scores
from reducio_fast.media.similarity import psnr
from reducio_fast.media.video_files import write_video
from reducio_fast.pipelines.reducio import refinement
from reducio_fast.reference import ReducioVAE
from reducio_fast.reference.reducio import vae as vae_module
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vae(bundle: Path) -> ReducioVAE:
    """The embedded model's autoencoder, with quick gradients."""
    vae = load_vae(bundle, torch.float32, torch.device("cpu"))[0].eval()
    refinement.convolve_by_onednn(vae)
    return vae


def encoded(vae: ReducioVAE, clip: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The clip [1, 3, T, H, W] in [-1, 1] and the encoder's latent."""
    video = (torch.from_numpy(clip).float() / 127.5 - 1).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        return video, vae.normalize_latent(vae.encode(video).mode())


def error_of(vae: ReducioVAE, latent: torch.Tensor, video: torch.Tensor, tiled: bool = False) -> torch.Tensor:
    with torch.no_grad():
        features = vae.encode_content(video[:, :, vae.config.content_frame], tiled=tiled)
    return (vae.decode(latent, features, tiled=tiled) - video).square().sum()


def test_it_comes_as_near_as_scipy(vae: ReducioVAE, moving: np.ndarray):
    video, start = encoded(vae, moving)

    def error_and_gradient(numbers: np.ndarray) -> tuple[float, np.ndarray]:
        latent = torch.from_numpy(numbers).float().view_as(start).requires_grad_()
        error = error_of(vae, vae.normalize_latent(latent), video)
        (gradient,) = torch.autograd.grad(error, latent)
        return error.item(), gradient.double().numpy().ravel()

    first = error_of(vae, start, video).item()
    found = minimize(
        error_and_gradient, start.double().numpy().ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 8}
    )
    latent = refinement.refine(vae, start, moving, 8, tiled=False)
    ours = error_of(vae, latent, video).item()
    assert ours < 0.5 * first and abs(10 * np.log10(ours / found.fun)) < 0.4, (first, ours, found.fun)
    torch.testing.assert_close(vae.normalize_latent(latent), latent, rtol=1e-4, atol=1e-5)
    assert torch.equal(refinement.refine(vae, start, moving, 8, tiled=False), latent), "the same bytes again"


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_in_a_pipeline(folder: Path, moving: np.ndarray, backend: str):
    pipe = ReducioPipeline.from_pretrained(folder, device="cpu", dtype="float32", backend=backend)
    plain, refined = pipe.encode_motion(moving), pipe.encode_motion(moving, refine=6)
    assert refined.shape == plain.shape and refined.dtype == torch.float32 and not refined.requires_grad
    before, after = (psnr(pipe.decode(latent, moving[7]), moving) for latent in (plain, refined))
    assert after > before + 0.1, "random weights, so it is not much"
    assert torch.equal(pipe.encode_motion(moving, refine=0), plain)
    out = pipe(image=moving[7], motion_latents=refined, progress=False)
    assert np.array_equal(out.frames, pipe.decode(refined, moving[7]))


def test_half_precision_weights_stay_as_they_are(vae: ReducioVAE, moving: np.ndarray):
    half = copy.deepcopy(vae).to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in half.state_dict().items()}
    half.encoder_3d.conv_in.weight.requires_grad_(False)
    trainable = [weight.requires_grad for weight in half.parameters()]
    video, start = encoded(vae, moving)
    with torch.no_grad():
        latent = refinement.refine(half, start.bfloat16(), moving, 4, tiled=False)
    assert latent.dtype == torch.float32
    assert error_of(vae, latent, video) < 0.8 * error_of(vae, start, video)
    assert all(torch.equal(weight, before[name]) for name, weight in half.state_dict().items())
    assert [weight.requires_grad for weight in half.parameters()] == trainable
    assert all(weight.grad is None for weight in half.parameters())


def test_tiles_keep_one_tile_for_the_gradient(vae: ReducioVAE, moving: np.ndarray, monkeypatch):
    tiled = copy.copy(vae)
    tiled.config = dataclasses.replace(vae.config, tile_size=64, tile_overlap=0.5)
    clip = np.tile(moving, (1, 1, 2, 1))
    video, start = encoded(vae, clip)
    decodings = []
    decode = ReducioVAE._decode
    monkeypatch.setattr(ReducioVAE, "_decode", lambda *a: decodings.append(1) or decode(*a))

    def gradient() -> torch.Tensor:
        latent = start.clone().requires_grad_()
        return torch.autograd.grad(error_of(tiled, latent, video, tiled=True), latent)[0]

    ours = gradient()
    assert len(decodings) == 4, "two tiles, each decoded again for its gradient"
    monkeypatch.setattr(vae_module, "checkpoint", lambda function, *inputs, use_reentrant: function(*inputs))
    torch.testing.assert_close(ours, gradient(), rtol=1e-4, atol=1e-5 * ours.abs().max().item())
    monkeypatch.undo()
    refined = refinement.refine(tiled, start, clip, 2, tiled=True)
    assert error_of(tiled, refined, video, tiled=True) < 0.95 * error_of(tiled, start, video, tiled=True)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 5, 4, 7, 6), {"padding": 1}),
        ((2, 5, 5, 8, 8), {"kernel_size": (3, 1, 1)}),
        ((1, 5, 5, 8, 9), {"kernel_size": (1, 3, 3), "padding": (0, 2, 1), "bias": False}),
        ((1, 5, 6, 8, 8), {"padding": 1, "stride": 2}),
        ((1, 5, 6, 8, 8), {"padding": 1, "groups": 5, "out_channels": 10}),
        ((1, 5, 6, 8, 8), {"padding": 1, "padding_mode": "replicate"}),
        ((1, 5, 6, 8, 8), {"padding": "same", "dilation": 2}),
        ((1, 5, 6, 8, 8), {"padding": "same"}),
    ],
)
def test_convolutions_and_their_gradients_are_torch_s(shape: tuple, words: dict):
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(**{"in_channels": 5, "out_channels": 8, "kernel_size": 3} | words).requires_grad_(False)
    ours = copy.deepcopy(conv)
    refinement.convolve_by_onednn(ours)
    x = torch.randn(shape, requires_grad=True)
    expected, output = conv(x), ours(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    seed = torch.randn(expected.shape)
    gradients = [torch.autograd.grad(each, x, seed)[0] for each in (output, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_numbers_that_are_not_finite_stop_it(vae: ReducioVAE, moving: np.ndarray):
    broken = copy.deepcopy(vae)
    with torch.no_grad():
        broken.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ReducioError, match="refine: the decoder's output has values that are not finite"):
        refinement.refine(broken, encoded(vae, moving)[1], moving, 4, tiled=False)


@pytest.mark.parametrize("steps", [-1, 1.5, "2", True])
def test_steps_are_a_whole_number(pipe: ReducioPipeline, moving: np.ndarray, steps):
    with pytest.raises(ReducioError, match="refine: must be a whole number from 0 to 1000, is "):
        pipe.encode_motion(moving, refine=steps)


def test_scores(vae: ReducioVAE, moving: np.ndarray):
    plain, refined = (reconstruction_scores(vae, [moving], refine) for refine in (0, 6))
    assert refined["pooled_gain_db"] > plain["pooled_gain_db"] + 1
    assert refined["repeat_psnr_moving"] == plain["repeat_psnr_moving"]


def test_commands(vae: ReducioVAE, moving: np.ndarray, tmp_path: Path, capsys):
    from reducio_fast.checkpoints import saved_latents

    clip, size = tmp_path / "clip", ["--height", "64", "--width", "64", "--backend", "reference"]
    write_video(moving, clip, 16)  # a folder of PNGs, which loses nothing
    kept = tmp_path / "latents.safetensors"
    assert main(["encode", str(clip), *size, "--refine", "3", "-o", str(kept)]) == 0
    assert "refine: " in capsys.readouterr().err, "progress"
    expected = refinement.refine(vae, encoded(vae, moving)[1], moving, 3, tiled=False)
    torch.testing.assert_close(saved_latents.load(kept).latents, expected, rtol=1e-3, atol=1e-3)

    assert main(["reconstruct", str(clip), *size, "--refine", "3", "--no-progress", "-o", str(tmp_path / "both")]) == 0
    printed = capsys.readouterr()
    assert "refine: " not in printed.err
    assert f"PSNR {psnr(moving, reconstruct(vae, moving, 3)):.1f}" in printed.out
    moved = tmp_path / "moved"
    assert main(["transfer", "--motion", str(clip), *size, "--refine", "3", "--no-progress", "-o", str(moved)]) == 0
    assert main(["evaluate", "clips", "--refine", "1"]) == 2
    assert "evaluate clips takes no --refine" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["encode", str(clip), "-o", str(kept), "--refine", "-1"])
    assert "--refine: must not be negative, is -1" in capsys.readouterr().err
