"""Folders, files and repositories of Stable Video Diffusion, and folders that are something else."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import reducio_fast
from reducio_fast import ReducioError
from reducio_fast.cli.main import main
from reducio_fast.media.video_files import read_video
from reducio_fast.pipelines import registry
from reducio_fast.pipelines.svd.pipeline import SVDPipeline
from tiny_svd import CALL, QUIET, same, seeded

pytestmark = pytest.mark.slow


def test_the_folder_goes_round(pipe: SVDPipeline, picture: Image.Image, tmp_path: Path):
    """Both diffusers and our pipeline load the folder that we write, and make the same clip."""
    pipe.save_pretrained(tmp_path / "again")
    again = SVDPipeline.from_pretrained(tmp_path / "again", device="cpu", dtype="float32", backend="reference")
    expected = pipe(picture, **CALL, **QUIET, seed=5).frames
    assert np.array_equal(again(picture, **CALL, **QUIET, seed=5).frames, expected)
    peer = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "again")
    peer.set_progress_bar_config(disable=True)
    same(expected, peer(picture, **CALL, generator=seeded(5), output_type="np").frames[0])


def test_every_name_leads_to_our_pipeline(
    folder: Path, pipe: SVDPipeline, picture: Image.Image, capsys, tmp_path: Path
):
    expected = pipe(picture, **CALL, **QUIET, seed=0).frames
    for name in (str(folder), f"svd:{folder}", folder):
        out = reducio_fast.generate(model=name, image=picture, device="cpu", backend="reference", **CALL, **QUIET)
        assert np.array_equal(out.frames, expected), name
    picture.save(tmp_path / "photo.png")
    argv = ["generate", "--model", str(folder), "--image", str(tmp_path / "photo.png"), "-o", str(tmp_path / "c.mp4")]
    sizes = ["--height", "32", "--width", "32", "--num-frames", "4", "--num-inference-steps", "3", "--fps", "12"]
    assert main([*argv, *sizes, "--guidance-scale", "2", "--backend", "reference", "--device", "cpu"]) == 0
    frames, fps = read_video(tmp_path / "c.mp4")
    assert frames.shape == (4, 32, 32, 3) and fps == 12


def test_the_half_precision_files(pipe: SVDPipeline, folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "both")
    for part in ("unet", "vae"):
        file = tmp_path / "both" / part / "diffusion_pytorch_model.safetensors"
        halves = {n: t.half() for n, t in load_file(file).items()}
        save_file(halves, file.with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"})
        file.unlink()
    for part in ("image_encoder",):
        file = tmp_path / "both" / part / "model.safetensors"
        save_file(
            {n: t.half() for n, t in load_file(file).items()},
            file.with_name("model.fp16.safetensors"),
            {"format": "pt"},
        )
        file.unlink()
    half = SVDPipeline.from_pretrained(tmp_path / "both", variant="fp16", dtype="float32", device="cpu")
    for name, tensor in half.unet.state_dict().items():
        assert torch.equal(tensor, pipe.unet.state_dict()[name].half().float()), name
    with pytest.raises(ReducioError, match="holds no bf16 weights"):
        SVDPipeline.from_pretrained(tmp_path / "both", variant="bf16", device="cpu")


def test_the_half_precision_shards(pipe: SVDPipeline, copied: Path):
    """Of which the index alone is also there for the plain weights, as from the hub."""
    tensors = load_file(copied / "unet" / "diffusion_pytorch_model.safetensors")
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model.fp16-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, copied / "unet" / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = copied / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    plain = {name: file.replace(".fp16", "") for name, file in weight_map.items()}
    index.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": plain}))

    def load() -> SVDPipeline:
        parts = {name: getattr(pipe, name) for name in pipe.layout.names if name != "unet"}
        return SVDPipeline.from_pretrained(copied, variant="fp16", dtype="float32", device="cpu", **parts)

    for name, tensor in load().unet.state_dict().items():
        assert torch.equal(tensor, pipe.unet.state_dict()[name]), name
    for wrong in ({}, {"weight_map": None}, ["a"], {"x": 5}, {"weight_map": {"conv_in.bias": "../x"}}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(ReducioError, match="index.fp16.json"):
            load()


def test_decode_reads_kept_latents(
    pipe: SVDPipeline, folder: Path, picture: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The autoencoder alone decodes: the folder has no other part."""
    from reducio_fast.checkpoints import saved_latents

    latents = pipe(picture, **CALL, **QUIET, seed=6, output_type="latent").frames
    content = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    file = tmp_path / "kept.safetensors"
    about = ("StableVideoDiffusionPipeline", "some/model", saved_latents.marks(pipe.vae), {"decode_chunk_size": 2})
    saved_latents.save(file, saved_latents.Latents(latents[None], content, 7, [6], *about))
    alone = tmp_path / "alone"
    shutil.copytree(folder / "vae", alone / "vae")
    expected = pipe.decode(latents, decode_chunk_size=2)
    for backend in ("reference", "fast"):
        out = tmp_path / backend
        argv = ["decode", str(file), "--model", f"svd:{alone}", "--out", str(out), "--device", "cpu"]
        assert main([*argv, "--dtype", "float32", "--backend", backend]) == 0
        frames = np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))])
        assert np.abs(frames.astype(int) - expected).max() <= 1
    capsys.readouterr()
    assert main(["decode", str(file), "--out", str(tmp_path / "none.mp4")]) == 2
    assert "holds latents of Stable Video Diffusion; name some/model (--model)" in capsys.readouterr().err


def test_folders_that_are_something_else(folder: Path, bundle: Path, tmp_path: Path):
    with pytest.raises(ReducioError, match="is of a ReducioPipeline, not of a StableVideoDiffusionPipeline"):
        SVDPipeline.from_pretrained(bundle, device="cpu")
    shutil.copytree(folder, tmp_path / "broken")
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "broken" / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ReducioError, match="is of a FluxPipeline; known are ReducioPipeline, StableVideoDiffusionPip"):
        reducio_fast.generate(model=tmp_path / "broken", image=np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "broken" / "model_index.json").write_text(json.dumps(index))
    file = tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.bias"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ReducioError, match="missing: conv_in.bias"):
        SVDPipeline.from_pretrained(tmp_path / "broken", device="cpu")
    shutil.rmtree(tmp_path / "broken" / "image_encoder")
    (file.parent / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ReducioError, match="describes a UNet2DConditionModel, not a UNetSpatioTemporalConditionModel"):
        SVDPipeline.from_pretrained(tmp_path / "broken", device="cpu")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the model folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("value", [None, "64", -8, [64], 63])
def test_sizes_of_a_folder_are_checked_by_name(copied: Path, value: Any):
    change(copied / "model_index.json", sample_height=value)
    with pytest.raises(ReducioError, match="sample_height: .*(must be|not a) "):
        SVDPipeline.from_pretrained(copied, device="cpu")
    with pytest.raises(ReducioError, match="sample_height: .*(must be|not a) "):
        registry.find(copied).checker()


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("image_encoder/config.json", {"hidden_size": "32"}),
        ("scheduler/scheduler_config.json", {"sigma_max": "700"}),
        ("scheduler/scheduler_config.json", {"sigma_min": 0}),
        ("scheduler/scheduler_config.json", {"steps_offset": None, "timestep_spacing": "leading"}),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "none"}),
        ("scheduler/scheduler_config.json", {"prediction_type": "none"}),
    ],
    ids=str,
)
def test_wrong_values_of_foreign_components_are_one_line(copied: Path, file: str, values: dict[str, Any]):
    change(copied / file, **values)
    for backend in ("reference", "auto"):
        with pytest.raises(ReducioError) as caught:
            SVDPipeline.from_pretrained(copied, device="cpu", backend=backend)
        assert str((copied / file).parent) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("component", "it holds one component, a UNetSpatioTemporalConditionModel"),
        ("single file", "it holds svd_xt.safetensors; `reducio-fast convert` makes a model of a single file"),
        ("empty", "it is empty"),
        ("something", "it has no model_index.json"),
        ("absent", "no such folder"),
    ],
)
def test_commands_say_what_a_folder_is(
    kind: str, reason: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = folder / "unet" if kind == "component" else tmp_path / "other"
    if kind not in ("component", "absent"):
        other.mkdir()
    if kind == "single file":
        save_file({"conv.weight": torch.zeros(1)}, other / "svd_xt.safetensors")
    if kind == "something":
        (other / "notes.txt").write_text("none")
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    generate = ["generate", "--image", f"{tmp_path}/p.png", "-o", f"{tmp_path}/c.gif", "--model"]
    commands = [[*generate, str(other)], [*generate, f"svd:{other}"], ["generate", "a cat", *generate[1:], str(other)]]
    commands += [["generate", "a cat", *generate[1:], f"ltx:{other}"], ["parity", "--model", str(other)]]
    if kind == "absent":  # hub.find_model refuses it
        commands = []
    commands.append(["calibrate", "--model", str(other)])
    commands.append(["evaluate", "autoencoder", "--model", str(other), "--videos", f"{tmp_path}/p.png"])
    for argv in commands:
        assert main(argv) == 2, argv
        errors = capsys.readouterr().err
        assert reason in errors and str(other) in errors and errors.count("\n") == 1, (argv, errors)
    if kind == "component":
        assert main(["encode", f"{tmp_path}/p.png", "--out", f"{tmp_path}/z.safetensors", "--model", str(other)]) == 2
        assert "describes a UNetSpatioTemporalConditionModel, not a ReducioVAE" in capsys.readouterr().err


@pytest.mark.parametrize("switch", ["enable_vae_tiling", "disable_vae_tiling"])
def test_no_tiles(pipe: SVDPipeline, switch: str):
    with pytest.raises(ReducioError, match="only Reducio decodes in tiles; to save memory pass decode_chunk_size"):
        getattr(pipe, switch)()
    pipe.vae_tiling = None
    assert copy.deepcopy(pipe).vae_tiling is None and pipe.for_thread().vae_tiling is None


def test_a_gated_repository_names_its_page(monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    class GatedRepoError(OSError):
        pass

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise GatedRepoError("403 Client Error.\nAccess to this repository is restricted")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    name = "stabilityai/stable-video-diffusion-img2vid-xt-1-1"
    with pytest.raises(
        ReducioError, match=rf"accept its licence on https://huggingface.co/{name}, then run `hf auth login`"
    ):
        reducio_fast.generate(model=name, image=np.zeros((8, 8, 3), np.uint8))


def test_of_a_repository_one_copy_of_the_weights_is_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: calls.append(kw) or str(folder))
    SVDPipeline.from_pretrained("stabilityai/stable-video-diffusion-img2vid", device="cpu")
    assert "*/*.safetensors" in calls[0]["allow_patterns"]
    assert calls[0]["ignore_patterns"] == ["*/*.fp16.*", "*/*.fp16-*"], "nor shards of the other copy"
    assert "*.safetensors" not in calls[0]["allow_patterns"], "not the single file beside the components"


@pytest.mark.parametrize(
    "model", ["svd", "svd:owner/name", "owner/name", "stabilityai/stable-video-diffusion-img2vid-xt"]
)
def test_a_hub_name_with_a_variant_fetches_its_files_alone(
    model: str, folder: Path, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import huggingface_hub

    shutil.copytree(folder, tmp_path / "half")
    for file in (tmp_path / "half").glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    fetched = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **kw: fetched.extend(kw["allow_patterns"]) or str(tmp_path / "half"),
    )
    picture.save("photo.png")
    argv = ["generate", "--model", model, "--variant", "fp16", "--image", "photo.png", "-o", "c.gif", "--no-progress"]
    sizes = ["--height", "64", "--width", "64", "--num-frames", "2", "--num-inference-steps", "1"]
    assert main([*argv, *sizes, "--backend", "reference", "--device", "cpu"]) == 0
    assert {n for n in fetched if n.endswith("safetensors")} == {"*/*.fp16.safetensors", "*/*.fp16-*.safetensors"}
