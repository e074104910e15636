"""SV3D: Stability's single files, the numbers of its own classes, camera paths, guidance, and the call."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from stability_svd import FRAMES, GOLDEN, TINY_CONFIG, draw, tiny_file

import reducio_fast
from published_weights import json_file
from reducio_fast import ReducioError
from reducio_fast.cli.main import main
from reducio_fast.fast.svd.vae import FastFrameVAE
from reducio_fast.pipelines.svd.orbit import SV3DPipeline, camera_path, triangle
from reducio_fast.reference.svd.config import FrameVAEConfig, VideoUNetConfig
from reducio_fast.reference.svd.unet import VideoUNet
from reducio_fast.reference.svd.vae import FrameVAE
from tiny_networks import plan
from tiny_svd import QUIET, lively_svd, vae_config

pytestmark = pytest.mark.slow

CALL = {"height": 16, "width": 16, "num_frames": 3, "num_inference_steps": 2, **QUIET}
STABILITY_EPS = {"attention_down_eps": 1e-5, "up_eps": 1e-5}  # where diffusers has 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("sv3d")
    save_file(tiny_file("sv3d_tiny"), work / "sv3d_p.safetensors")
    unet = TINY_CONFIG["unet"] | {"addition_time_embed_dim": [32, 64, 64]}
    config = json_file(work / "config.json", TINY_CONFIG | {"unet": unet})
    assert main(["convert", str(work / "sv3d_p.safetensors"), "--out", str(work / "model"), "--config", config]) == 0
    return work / "model"


@pytest.fixture(scope="module")
def pipe(folder: Path) -> SV3DPipeline:
    return SV3DPipeline.from_pretrained(folder, device="cpu", dtype="float32", backend="reference")


def test_the_numbers_of_stabilitys_classes(folder: Path):
    """One embedding per frame, from numbers embedded at different widths, and the decoder of images."""
    golden = load_file(GOLDEN / "svd_stability.safetensors")
    config = json.loads((folder / "unet" / "config.json").read_text())
    unet = VideoUNet(VideoUNetConfig.from_dict(config | STABILITY_EPS))
    unet.load_state_dict(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    vae = FrameVAE(FrameVAEConfig.from_dict(json.loads((folder / "vae" / "config.json").read_text())))
    vae.load_state_dict(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    ids = [torch.full((6,), 1e-5), torch.linspace(0.2, 1.7, 6), torch.linspace(0, 6, 6)]
    with torch.no_grad():
        sample = draw("sample", 2 * FRAMES, 8, 8, 8).unflatten(0, (2, FRAMES))
        time_ids = torch.stack(ids, dim=1).unflatten(0, (2, FRAMES))
        v = unet(sample, torch.tensor(0.7), draw("context", 2, 1, 24), time_ids).flatten(0, 1)
        frames = vae.decode(draw("latents", FRAMES, 4, 6, 8)[None])[0]
    torch.testing.assert_close(v, golden["orbit_unet"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(frames, golden["frame_decoder"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("post_quant_conv", [False, True], ids=["sv3d", "stable-diffusion"])
def test_the_autoencoder_is_diffusers(post_quant_conv: bool):
    config = vae_config(32, 64, up_block_types=("UpDecoderBlock2D",) * 2, use_post_quant_conv=post_quant_conv)
    theirs = lively_svd(AutoencoderKL(**config))
    ours = FrameVAE(FrameVAEConfig.from_dict(json.loads(theirs.to_json_string())))
    ours.load_state_dict(theirs.state_dict())
    images, latents = draw("a", 2, 3, 12, 16), draw("b", 3, 4, 6, 8)
    fast = FastFrameVAE(ours.eval(), plan())
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(images), theirs.encode(images).latent_dist.mode(), rtol=1e-5, atol=1e-5)
        expected = theirs.decode(latents).sample
        for network in (ours, fast):
            for chunk in (None, 2):
                torch.testing.assert_close(network.decode(latents[None], chunk)[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="norm_num_groups is 4, must be 32"):
        FrameVAEConfig(norm_num_groups=4)


def test_cameras_and_guidance_are_those_of_stabilitys_script():
    """One turn in equal steps from the picture's view, which is the last frame; guidance is highest at the back."""
    path = camera_path(21, 10.0, None)
    np.testing.assert_allclose(path[:, 0], np.deg2rad(80))
    np.testing.assert_allclose(np.rad2deg(path[:, 1].numpy()), [*(np.arange(1, 21) * 360 / 21), 0.0], atol=1e-9)
    own = camera_path(3, [0.0, 45.0, -10.0], [350.0, 20.0, 30.0])
    np.testing.assert_allclose(np.rad2deg(own.numpy()), [[90, 320], [45, 350], [100, 0]], atol=1e-9)
    assert triangle(5, 1.0, 2.5).tolist() == pytest.approx([1.0, 1.75, 2.5, 1.75, 1.0])
    scale = triangle(21, 1.0, 2.5)
    assert scale[10] == 2.5 and scale[0] == 1 and (scale - scale.flip(0)).abs().max() < 1e-6


def test_the_call(folder: Path, pipe: SV3DPipeline, tmp_path: Path):
    """The backends agree; the camera path changes the clip; the last view is the picture."""
    picture = Image.fromarray((draw("p", 20, 20, 3).sigmoid() * 255).byte().numpy())
    assert pipe.usual_size == (576, 576) and pipe.unet.config.num_frames == 21
    fast = SV3DPipeline.from_pretrained(folder, device="cpu", dtype="float32", backend="fast")
    assert fast.report["unet"].startswith("fast") and fast.report["vae"].startswith("fast")
    clips = [p(picture, **CALL, seed=1).frames for p in (pipe, fast)]
    assert clips[0].shape == (3, 16, 16, 3) and np.abs(clips[0].astype(int) - clips[1]).max() <= 2
    assert np.array_equal(clips[0][-1], np.asarray(picture.resize((16, 16), Image.Resampling.LANCZOS)))
    assert all(p.forecast(16, 16).peak() > 0 for p in (pipe, fast))
    latents = CALL | {"output_type": "latent", "seed": 1}
    views = [pipe(picture, **latents, elevations=e, azimuths=a).frames for e, a in ((None, None), (10.0, None))]
    assert torch.equal(*views), "10 degrees is the default"
    assert not torch.equal(views[0], pipe(picture, **latents, elevations=[0.0, 30.0, 10.0]).frames)
    assert not torch.equal(views[0], pipe(picture, **latents, azimuths=[10.0, 200.0, 0.0]).frames)
    out = reducio_fast.generate(model=folder, image=picture, device="cpu", backend="reference", dtype="float32", **CALL)
    assert np.array_equal(out.frames, pipe(picture, **CALL).frames)
    pipe.save_pretrained(tmp_path / "again")
    again = SV3DPipeline.from_pretrained(tmp_path / "again", device="cpu", dtype="float32", backend="reference")
    assert np.array_equal(again(picture, **CALL, seed=1).frames, clips[0])


def test_a_path_has_the_frames_of_the_call(pipe: SV3DPipeline):
    call = CALL | {"image": np.zeros((8, 8, 3), np.uint8), "num_frames": np.int64(10)}
    assert pipe.check_inputs(**call).time_ids.shape == (10, 3)
    with pytest.raises(ReducioError, match="num_frames: must be a whole number from 1 to 100000, is 1000000000000"):
        pipe.check_inputs(**call | {"num_frames": 10**12})


def test_weights_without_a_path(pipe: SV3DPipeline):
    """SV3D_u's U-Net takes the noise augmentation alone, and no camera path."""
    config = VideoUNetConfig.from_dict(
        pipe.unet.config.to_dict() | {"addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 32}
    )
    unet = lively_svd(VideoUNet(config))
    flat = SV3DPipeline(**pipe.components | {"unet": unet}, backend="reference")
    assert flat(np.zeros((8, 8, 3), np.uint8), **CALL).frames.shape == (3, 16, 16, 3)
    with pytest.raises(ReducioError, match=r"azimuths: these weights \(SV3D_u\) stay at the picture's height"):
        flat(np.zeros((8, 8, 3), np.uint8), **CALL, azimuths=[0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"elevations": [1.0]}, "elevations: must be 3 finite numbers, one a frame"),
        ({"azimuths": [1.0, float("nan"), 2.0]}, "azimuths: must be 3 finite numbers"),
        ({"elevations": 10**400}, "elevations: must be degrees, are "),
        ({"elevations": 1e39}, "elevations: must be 3 finite numbers"),
        ({"azimuths": "round"}, "azimuths: must be degrees, are 'round'"),
        ({"motion_bucket_id": 1}, "motion_bucket_id"),
        ({"height": 15}, "height: 15 is not a multiple"),
    ],
)
def test_calls_that_do_not_fit(folder: Path, arguments: dict, message: str):
    with pytest.raises(ReducioError, match=message):
        reducio_fast.generate(
            model=folder, image=np.zeros((8, 8, 3), np.uint8), device="cpu", backend="reference", **CALL | arguments
        )


def test_models_of_the_other_kind(folder: Path, tmp_path: Path):
    from reducio_fast import SVDPipeline

    with pytest.raises(ReducioError, match="is of a StableVideo3DDiffusionPipeline, not of a StableVideoDiffusionPipe"):
        SVDPipeline.from_pretrained(folder, device="cpu")
    file = folder.parent / "sv3d_p.safetensors"
    from reducio_fast.checkpoints.convert import convert

    with pytest.raises(ReducioError, match="preset: .* is an SV3D, whose tensors say all; 'svd-xt' given"):
        convert(file, tmp_path / "out", preset="svd-xt")
