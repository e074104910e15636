"""Extraction, latents on disk and the transformer's recipe: no lost or stale clips, reproducible random draws."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_dit import LOOP, small_recipe

from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints.networks import read_config
from reducio_fast.checkpoints.strict_files import embedded_model
from reducio_fast.cli.main import main
from reducio_fast.data import latent_shards, photos
from reducio_fast.data.curation import manifest
from reducio_fast.data.latent_shards import LatentDataset
from reducio_fast.media.video_files import read_video, write_video
from reducio_fast.reference import DiTConfig, ReducioDiT, VAEConfig
from reducio_fast.system.errors import ReducioError
from reducio_fast.training.reducio import dit, extract

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of two videos at 24 frames a second, square and wide, and of one whose file has been deleted."""
    folder = tmp_path_factory.mktemp("clips")
    rng, rows = np.random.default_rng(1), []
    for name, caption in (("square", "a cat"), ("wide", "a flower"), ("gone", "a cat")):
        frames = photos.render(rng, 128, 72, name="chelsea")
        write_video(frames if name != "wide" else frames[:, 32:96], folder / f"{name}.mp4", 24)
        height, width = (64, 128) if name == "wide" else (128, 128)
        row = dict.fromkeys(manifest.COLUMNS) | {"id": name, "video": str(folder / f"{name}.mp4"), "caption": caption}
        rows.append(row | {"start": 2, "end": 72, "fps": 24.0, "height": height, "width": width, "motion": 1.0})
    (folder / "gone.mp4").unlink()
    manifest.write(
        [*rows, dict.fromkeys(manifest.COLUMNS) | {"id": "x", "video": "x", "error": "broken"}],
        folder / "clips.parquet",
    )
    return folder / "clips.parquet"


@pytest.fixture(scope="module")
def latents(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latents") / "latents"
    done = extract.extract(clips, out, size=128, shard_size=2, progress=False)
    assert done == {"clips": 6, "errors": 2, "shards": 3}
    return out


def test_every_chunk_is_extracted(clips: Path, latents: Path) -> None:
    """Each complete chunk of 16 frames has the encoder's latent and a valid checksum; other clips have an error."""
    dataset = LatentDataset(latents, extract.encoder_checksums(embedded_model()))
    assert len(dataset) == 4 and dataset.counts == {"128x128": 4} and dataset.about.captions == 2
    pipe = ReducioPipeline.from_pretrained(embedded_model(), device="cpu", dtype="float32")
    for i in range(4):
        row, sample = dataset.row("128x128", i), dataset.sample("128x128", i)
        assert row["step"] == 2 and row["fps"] == 12  # the release's round(24 / 16)
        assert sample["latent"].shape == (16, 4, 4, 4) and sample["content"].shape == (4, 16, 16)
        text, mask = pipe.encode_prompt({"square": "a cat", "wide": "a flower"}[row["id"].split("-")[0]])[:2]
        torch.testing.assert_close(sample["text"], text[0, mask[0].bool()].float(), atol=2e-3, rtol=2e-3)
    row = dataset.row("128x128", 0)
    frames = read_video(row["video"])[0][row["start"] :: row["step"]][:16]
    encoders = extract.Encoders(extract.ExtractSettings(str(embedded_model()), "", size=128), pipe.vae.config)
    expected = encoders.encode(frames, row["id"])
    assert latent_shards.sample_checksum(expected) == row["sha256"]
    torch.testing.assert_close(expected["semantic"].float(), dataset.sample("128x128", 0)["semantic"])
    errors = [r for r in latent_shards._read_parquet(latents / "index.parquet").to_pylist() if r["error"]]
    assert {r["id"].split("-")[0] for r in errors} == {"gone"} and all("gone.mp4" in r["error"] for r in errors)


def test_a_stopped_extraction_gives_the_same_bytes(clips: Path, latents: Path, tmp_path: Path) -> None:
    again = tmp_path / "latents"
    shutil.copytree(latents, again)
    (again / "index.parquet").unlink()
    (again / "128x128" / "shard-00001.parquet").unlink()  # as if killed while it wrote the second shard
    (again / "128x128" / "shard-00001.safetensors").write_bytes(b"half")
    with pytest.raises(ReducioError, match="has no index.parquet: the extraction was stopped; run it again"):
        LatentDataset(again)
    assert extract.extract(clips, again, size=128, shard_size=2, progress=False)["shards"] == 1
    for path in latents.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(latents)).read_bytes(), path


def test_stale_and_damaged_latents_are_refused(clips: Path, latents: Path, tmp_path: Path) -> None:
    encoders = extract.encoder_checksums(embedded_model())
    with pytest.raises(ReducioError, match="holds latents that another vae made .*run reducio-fast extract again"):
        LatentDataset(latents, encoders | {"vae": "0" * 64})
    with pytest.raises(ReducioError, match="was begun with another seed; extract into another folder"):
        extract.extract(clips, latents, size=128, shard_size=2, seed=1, progress=False)
    with pytest.raises(
        ReducioError, match=r"holds no latents \(no latents.json\); make them with: reducio-fast extract"
    ):
        LatentDataset(tmp_path)
    broken = tmp_path / "latents"
    shutil.copytree(latents, broken)
    about = json.loads((broken / "latents.json").read_text())
    (broken / "latents.json").write_text(json.dumps(about | {"version": 9}))
    with pytest.raises(ReducioError, match="has version 9, this reads 1; run reducio-fast extract again"):
        LatentDataset(broken)
    (broken / "latents.json").write_text(json.dumps(about))
    shard = broken / "128x128" / "shard-00001.safetensors"  # the first has no tensors: its video is deleted
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    dataset = LatentDataset(broken)
    rows = range(dataset.counts["128x128"])
    with pytest.raises(ReducioError, match=r"is damaged; remove it and its .parquet, extract again"):
        for i in rows:
            dataset.sample("128x128", i)
    with pytest.raises(ReducioError, match="size=100: must be a multiple of 32"):
        extract.extract(clips, tmp_path / "other", size=100, progress=False)


def model_with(folder: Path, **changes) -> Path:
    """The embedded model with other entries in its index; None removes an entry."""
    folder.mkdir()
    for part in embedded_model().iterdir():
        if part.name != "model_index.json":
            (folder / part.name).symlink_to(part)
    index = json.loads((embedded_model() / "model_index.json").read_text()) | changes
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if v is not None}))
    return folder


def test_the_encoders_have_the_settings_of_the_model(clips: Path, latents: Path, tmp_path: Path) -> None:
    """Extraction encodes as inference does, and latents of other settings are refused; older folders stay readable."""
    model = model_with(tmp_path / "model", clean_caption=True, content_scaling_factor=0.5)
    frames = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8)
    made = {}
    for folder in (embedded_model(), model):
        settings = extract.ExtractSettings(str(folder), "", size=64)
        encoders = extract.Encoders(settings, read_config(VAEConfig, folder / "vae"))
        made[folder] = encoders.encode(frames, "x"), encoders.text(["A <b>Cat</b>"])[0], encoders.text(["a cat"])[0]
    (plain, raw, _), (scaled, cleaned, expected) = made.values()
    torch.testing.assert_close(scaled["content"], plain["content"] * 0.5, rtol=2e-3, atol=2e-3)
    assert torch.equal(cleaned, expected) and not torch.equal(cleaned, raw)
    with pytest.raises(ReducioError, match="was begun with another clean_caption; extract into another folder"):
        extract.extract(clips, latents, model, size=128, shard_size=2, progress=False)
    with pytest.raises(ReducioError, match="was begun with another encoder_dtype; extract into another folder"):
        extract.extract(clips, latents, size=128, shard_size=2, dtype="bfloat16", progress=False)
    with pytest.raises(ReducioError, match="made with clean_caption=False, the model has clean_caption=True; run redu"):
        dit.train_dit(latents, tmp_path / "out", small_recipe(), model, progress=False)
    old = tmp_path / "latents"
    shutil.copytree(latents, old)
    about = json.loads((old / "latents.json").read_text())
    for name in ("clean_caption", "content_scaling_factor", "encoder_dtype", "caption_length"):
        del about[name]
    (old / "latents.json").write_text(json.dumps(about))
    assert extract.extract(clips, old, size=128, shard_size=2, progress=False)["shards"] == 0


# ---- the recipe ------------------------------------------------------------------------------------------------------


def test_a_batch_does_not_depend_on_its_micro_batches(latents: Path) -> None:
    torch.manual_seed(0)
    network = ReducioDiT(DiTConfig(**small_recipe().config))
    batches, names = [], ("latent", "noise", "time", "content", "clip")
    for parts in (1, 2):
        loop = replace(LOOP, micro_batches=parts)
        recipe = small_recipe(loop=loop, condition_drop=0.5, image_drop=0.3, clip_drop=0.3)
        trainer = dit.Trainer(network, LatentDataset(latents), recipe, torch.device("cpu"))
        drawn = [trainer.draw(step, micro) for step in range(6) for micro in range(parts)]
        batches.append({k: torch.cat([getattr(b, k) for b in drawn]) for k in names})
        dropped = [
            torch.equal(b.text[0, : int(b.mask[0].sum())], network.null_text[: int(b.mask[0].sum())]) for b in drawn
        ]
        assert 0 < sum(dropped) < len(dropped)
        without_image: list[bool] = []
        for b in drawn:
            assert all(m.any() for m in b.mask)
            none = (b.content.flatten(1) == 0).all(1)  # rows without their content frame
            assert torch.equal(none, (b.semantic.flatten(1) == 0).all(1))
            for text, mask in zip(b.text[none], b.mask[none], strict=True):
                assert torch.equal(text[mask], network.null_text[: int(mask.sum())])
            without_image += none.tolist()
        assert 0 < sum(without_image) < len(without_image) == 12
    for name, value in batches[0].items():
        torch.testing.assert_close(value, batches[1][name], rtol=0, atol=0, equal_nan=True, msg=name)
    rates, motions = batches[0]["clip"].unbind(1)
    for values, known in ((rates, 12.0), (motions, 1.0)):
        assert 0 < values.isnan().sum() < len(values) and (values[~values.isnan()] == known).all()


@pytest.mark.parametrize("objective", ["epsilon", "rectified-flow"])
def test_a_trained_transformer_generates(latents: Path, tmp_path: Path, objective: str) -> None:
    recipe = small_recipe(objective=objective, held_out=1, gradient_checkpointing=objective == "epsilon")
    changes = {"learn_sigma": objective == "epsilon", "clip_conditioning": objective == "epsilon"}
    recipe = replace(recipe, config=recipe.config | changes)
    figures = dit.train_dit(latents, tmp_path, recipe, progress=False)
    assert figures["steps"] == 4 and np.isfinite(figures["loss"]) and figures["held_out_error"] > 0
    pipe = ReducioPipeline.from_pretrained(tmp_path / "model", device="cpu")
    wanted = {"epsilon": "DPMSolverMultistepScheduler", "rectified-flow": "FlowMatchEulerDiscreteScheduler"}
    assert type(pipe.scheduler).__name__ == wanted[objective] and pipe.transformer.config.hidden_size == 48
    clip = [pipe("a cat", seed=1, num_inference_steps=2, progress=False).frames for _ in range(2)]
    assert clip[0].shape == (16, 128, 128, 3) and (clip[0] == clip[1]).all()
    if not pipe.transformer.config.clip_conditioning:
        with pytest.raises(ReducioError, match="motion_score: this model was trained without it"):
            pipe("a cat", motion_score=3.0)
        return
    with torch.no_grad():
        pipe.transformer.adaln_single.emb.motion_embedder.linear_2.weight.normal_(generator=torch.Generator())
    kwargs = {"seed": 1, "num_inference_steps": 2, "progress": False, "output_type": "latent"}
    scores = (None, 1.0, 30.0)
    latents = {backend: [] for backend in ("fast", "reference")}
    for backend, samples in latents.items():
        rebuilt = ReducioPipeline(**pipe.components, backend=backend)
        samples += [rebuilt("a cat", motion_score=score, **kwargs).frames for score in scores]
        assert not torch.equal(samples[0], samples[1]) and not torch.equal(samples[1], samples[2])
    for one, other in zip(*latents.values(), strict=True):
        assert (one - other).norm() < 0.05 * other.norm()
    with pytest.raises(ReducioError, match="motion_score: must be a number of at least 0, is -1"):
        pipe("a cat", motion_score=-1)


def test_what_the_export_needs_is_checked_first(latents: Path, tmp_path: Path) -> None:
    """The old transformer is not needed; other things that are missing are named before the first step."""
    model = model_with(tmp_path / "model", transformer=None, scheduler=None)
    (model / "transformer").unlink()
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    (out / "model" / "diary.txt").write_text("mine")
    with pytest.raises(ReducioError, match=r"out/model exists and is no model folder"):
        dit.train_dit(latents, out, small_recipe(), model, progress=False)
    (out / "model" / "diary.txt").unlink()
    for index in ({"text_to_image": ["a"]}, {"fps": -1}, {"_class_name": "Other"}):
        bad = model_with(tmp_path / f"bad {next(iter(index))}", transformer=None, scheduler=None, **index)
        with pytest.raises(ReducioError, match=next(iter(index)).replace("_class_name", "is of a Other")):
            dit.train_dit(latents, out, small_recipe(), bad, progress=False)
    assert not (out / "runs").exists()
    dit.train_dit(latents, out, small_recipe(loop=replace(LOOP, steps=1)), model, progress=False)
    pipe = ReducioPipeline.from_pretrained(out / "model", device="cpu")
    assert pipe.transformer.config.hidden_size == 48 and pipe.scheduler is not None


def test_a_resumed_run_has_the_same_recipe_and_latents(latents: Path, tmp_path: Path) -> None:
    def train(latents: Path = latents, accept: bool = False, **changes) -> float:
        recipe = small_recipe(loop=replace(LOOP, steps=1), **changes)
        return dit.train_dit(latents, tmp_path / "out", recipe, accept_changes=accept, progress=False)["steps"]

    train()
    with pytest.raises(
        ReducioError, match=r"made with condition_drop=0.1, this run has condition_drop=0.2; .*--accept"
    ):
        train(condition_drop=0.2)
    other = tmp_path / "latents"
    shutil.copytree(latents, other)
    about = json.loads((other / "latents.json").read_text())
    (other / "latents.json").write_text(json.dumps(about | {"clips": "0" * 64}))
    with pytest.raises(ReducioError, match="made with latents="):
        train(other)
    assert train(condition_drop=0.2, accept=True) == train(gradient_checkpointing=True) == 1
    state = next((tmp_path / "out" / "runs" / "dit" / "checkpoints").glob("step-*/run.json"))
    values = json.loads(state.read_text())
    assert values.pop("recorded")["batch"] == 2
    state.write_text(json.dumps(values))  # as an earlier version wrote it
    assert train(condition_drop=0.2) == 1


@pytest.mark.parametrize(
    ("buckets", "size"),
    [(["256x256"], 256), (["192x320", "256x256"], 256), (["384x672"], 512), (["704x1408"], 1024), (["96x96"], 96)],
)
def test_the_size_of_latents(buckets: list[str], size: int) -> None:
    assert dit.square_of(buckets) == size


def test_the_saved_model_makes_clips_of_the_latents_size(clips: Path, tmp_path: Path) -> None:
    """Those of the model that the latents come from are of 128 pixels."""
    extract.extract(clips, tmp_path / "latents", size=64, progress=False)
    dit.train_dit(tmp_path / "latents", tmp_path, small_recipe(loop=replace(LOOP, steps=1)), progress=False)
    pipe = ReducioPipeline.from_pretrained(tmp_path / "model", device="cpu")
    assert pipe("a cat", seed=1, num_inference_steps=1, progress=False).frames.shape == (16, 64, 64, 3)
    with pytest.raises(ReducioError, match="was begun with other clips or another --size; extract into another folder"):
        extract.extract(clips, tmp_path / "latents", size=96, progress=False)


def test_a_transformer_of_one_image_condition(latents: Path, tmp_path: Path) -> None:
    """It is saved without the encoder of the other condition, and the layers of that condition keep their weights."""
    recipe = small_recipe(image_conditions=("semantic",), held_out=1)
    figures = dit.train_dit(latents, tmp_path, recipe, progress=False)
    assert figures["held_out_error"] > 0
    pipe = ReducioPipeline.from_pretrained(tmp_path / "model", device="cpu")
    assert pipe.content_encoder is None and pipe.image_encoder is not None
    torch.manual_seed(recipe.loop.seed)
    start, end = dit.build_network(recipe).state_dict(), pipe.transformer.state_dict()
    moved = {name.split(".")[0] for name, value in start.items() if not torch.equal(value, end[name].float())}
    assert "semantic_projection" in moved and "content_embedding" not in moved
    assert pipe("a cat", seed=1, num_inference_steps=2, progress=False).frames.shape == (16, 128, 128, 3)
    with pytest.raises(ReducioError, match=r"image_conditions=\['sound'\]: must be one or both of semantic, content"):
        small_recipe(image_conditions=("sound",))


RECIPE = """
batch = 2
model = "reducio-256"
objective = "v_prediction"
threads = 1
[config]
hidden_size = 48
depth = 2
num_heads = 2
caption_channels = 128
semantic_channels = 128
learn_sigma = false
[loop]
steps = 4
learning_rate = 1e-4
warmup_steps = 1
micro_batches = 2
checkpoint_every = 2
autocast = false
"""


def test_training_on_a_damaged_shard_ends_in_one_line(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    argv = ["train", "dit", "--recipe", str(tmp_path / "recipe.toml"), "--no-progress", "-o", str(tmp_path / "out")]
    for folder, file in (("128x128", "shard-00002"), ("text", "shard-00000")):
        broken = tmp_path / folder
        shutil.copytree(latents, broken)
        path = broken / folder / f"{file}.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert main([*argv, "--latents", str(broken)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{path}" in line and "damaged" in line and line.endswith("extract again")


def test_the_command_alone_and_under_torchrun(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes, and one process that accumulates, write the same bytes into the model folder."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    argv = ["train", "dit", "--recipe", str(tmp_path / "recipe.toml"), "--latents", str(latents), "--no-progress"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29741"]
    two = [*torchrun, "-m", "reducio_fast", *argv, "-o", str(tmp_path / "two"), "--json"]
    printed = subprocess.run(two, check=True, capture_output=True, text=True).stdout
    assert json.loads(printed)["steps"] > 0  # one object, of the first process
    assert main([*argv, "-o", str(tmp_path / "one"), "--json", "--price", "2.5"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["price_a_step"] == pytest.approx(result["process_seconds_a_step"] / 3600 * 2.5)
    files = [tmp_path / n / "model" / "transformer" / "diffusion_pytorch_model.safetensors" for n in ("one", "two")]
    assert hashlib.sha256(files[0].read_bytes()).digest() == hashlib.sha256(files[1].read_bytes()).digest()
    assert load_file(files[0])["proj_out.weight"].abs().sum() > 0
    assert main([*argv[:2], "-o", str(tmp_path)]) == 2
    assert "train dit needs --recipe" in capsys.readouterr().err
    assert main(["train", "tiny", "-o", str(tmp_path), "--latents", "x"]) == 2
    assert "takes no --latents, which is of train dit" in capsys.readouterr().err
