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

from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints.strict_files import embedded_model
from reducio_fast.cli.main import main
from reducio_fast.data import latent_shards, photos
from reducio_fast.data.curation import manifest
from reducio_fast.data.latent_shards import Clip, EpochOrder, LatentDataset, plan
from reducio_fast.media.video_files import read_video, write_video
from reducio_fast.reference import DiTConfig, ReducioDiT
from reducio_fast.system.errors import ReducioError
from reducio_fast.training import recipe_file
from reducio_fast.training.loop import LoopConfig
from reducio_fast.training.reducio import dit, extract

pytestmark = pytest.mark.slow

LOOP = LoopConfig(steps=4, learning_rate=1e-4, warmup_steps=1, log_every=2, checkpoint_every=2, autocast=False)


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
        row, sample = dataset.row("128x128", i), dataset.sample("128x128", i, check=True)
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
            dataset.sample("128x128", i, check=True)
    with pytest.raises(ReducioError, match="size=100: must be a multiple of 32"):
        extract.extract(clips, tmp_path / "other", size=100, progress=False)


def test_clips_go_to_buckets_and_files_by_their_ids() -> None:
    def clip(number: int, bucket: tuple[int, int]) -> Clip:
        return Clip(f"{number:03d}", "v", 0, 1, 16.0, bucket, 0)

    made = [clip(i, (256, 256) if i % 3 else (192, 320)) for i in range(10)]
    shards = plan(made[::-1], 3)
    assert shards == plan(made, 3)
    assert [(s.bucket, s.number, [c.id for c in s.clips]) for s in shards] == [
        ((192, 320), 0, ["000", "003", "006"]),
        ((192, 320), 1, ["009"]),
        ((256, 256), 0, ["001", "002", "004"]),
        ((256, 256), 1, ["005", "007", "008"]),
    ]


def test_an_epoch_visits_every_clip_in_batches_of_one_bucket() -> None:
    order = EpochOrder({"a": 5, "b": 4, "c": 1}, batch=2, seed=3)
    assert order.length == 3 + 2 + 1
    for epoch in range(2):
        seen: dict[str, list[int]] = {}
        for step in range(epoch * 6, epoch * 6 + 6):
            bucket, rows = order.rows(step)
            assert len(rows) == 2
            seen.setdefault(bucket, []).extend(rows)
        assert {k: sorted(set(v)) for k, v in seen.items()} == {"a": [0, 1, 2, 3, 4], "b": [0, 1, 2, 3], "c": [0]}
    first = [order.rows(step) for step in range(6)]
    assert first != [order.rows(step) for step in range(6, 12)]
    assert first == [EpochOrder({"c": 1, "b": 4, "a": 5}, 2, 3).rows(step) for step in range(6)]


# ---- the recipe ------------------------------------------------------------------------------------------------------


def small_recipe(**changes) -> dit.DiTRecipe:
    recipe = dit.DiTRecipe(
        loop=LOOP,
        batch=2,
        model="reducio-256",
        config=dict(
            hidden_size=48, depth=2, num_heads=2, caption_channels=128, semantic_channels=128, learn_sigma=False
        ),
        objective="v_prediction",
        threads=1,
    )
    return replace(recipe, **changes)


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
        for b in drawn:
            assert all(m.any() for m in b.mask) and ((b.content.flatten(1) == 0).all(1) <= 1).all()
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
    with pytest.raises(ReducioError, match=r"image_conditions=\['sound'\]: must be some of semantic, content"):
        small_recipe(image_conditions=("sound",))


def test_recomputed_activations_give_the_same_gradients() -> None:
    torch.manual_seed(0)
    networks = [ReducioDiT(DiTConfig(**small_recipe().config)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    dit.recompute(networks[1].transformer_blocks)
    x, text = torch.randn(1, 16, 4, 2, 2), torch.randn(1, 5, 128)
    for network in networks:
        with torch.no_grad():
            network.proj_out.weight.normal_(generator=torch.Generator().manual_seed(1))
        network(x, torch.tensor([3.0]), text).square().mean().backward()
    for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))


def test_the_next_stage_starts_from_the_last(tmp_path: Path) -> None:
    """From 256 to 1024: all weights are loaded, new size embeddings start at 0, and another width is an error."""
    from reducio_fast.checkpoints.networks import save_model

    torch.manual_seed(0)
    first = ReducioDiT(DiTConfig(**small_recipe().config))
    save_model(first, tmp_path / "transformer")
    config = {**small_recipe().config, "size_conditioning": True, "content_groups": 4}
    network = dit.build_network(small_recipe(model="reducio-1024", config=config, start=str(tmp_path)))
    state = network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in first.state_dict().items())
    embedding = network.adaln_single.emb
    size = embedding(torch.tensor([5.0]), torch.tensor([[1024.0, 512.0]]))
    torch.testing.assert_close(size, embedding.timestep_embedder(torch.tensor([5.0])))
    with pytest.raises(ReducioError, match="has other weights than the recipe's"):
        dit.build_network(small_recipe(config={**small_recipe().config, "depth": 3}, start=str(tmp_path)))


def test_recipes_as_files(tmp_path: Path) -> None:
    shipped = {name: recipe_file.load(dit.DiTRecipe, name) for name in recipe_file.shipped() if name.startswith("dit-")}
    assert set(shipped) == {"dit-256", "dit-512", "dit-1024"}
    assert [shipped[f"dit-{n}"].batch for n in (256, 512, 1024)] == [512, 512, 768]
    assert all(
        r.objective == "epsilon" and r.condition_drop == 0.1 and r.loop.parallel == "fsdp" for r in shipped.values()
    )
    changed = recipe_file.load(dit.DiTRecipe, "dit-256", ["loop.steps=7", "batch=64", 'start="somewhere"'])
    assert (
        changed.loop.steps == 7
        and changed.batch == 64
        and changed.loop.learning_rate == shipped["dit-256"].loop.learning_rate
    )
    path = tmp_path / "mine.toml"
    for text, message in (
        ("bach = 4", "unknown key 'bach'; known are loop, batch"),
        ("batch = 'four'\n[loop]\nsteps = 1\nlearning_rate = 1", "batch='four' must be of type int"),
        (
            "batch = 4\nmodel = 'reducio-256'\n[loop]\nsteps = 1\nlearning_rate = 1\nrate = 3",
            "loop: unknown key 'rate'",
        ),
        ("batch = 4\n[loop]\nsteps = 1\nlearning_rate = 1", "a recipe needs `model` .* or `start`"),
        (
            "batch = 5\nmodel = 'reducio-256'\n[loop]\nsteps = 1\nlearning_rate = 1\nmicro_batches = 2",
            "must be a multiple of",
        ),
        ("model = 'big'\nbatch = 1\n[loop]\nsteps = 1\nlearning_rate = 1", "model='big': must be one of"),
        ("not toml", "mine.toml: "),
        ("batch = 1", "loop"),
    ):
        path.write_text(text)
        with pytest.raises(ReducioError, match=message):
            recipe_file.load(dit.DiTRecipe, str(path))
    with pytest.raises(ReducioError, match="no such file, and none of ablation-dit, ablation-vae, dit-1024, dit-256"):
        recipe_file.load(dit.DiTRecipe, "dit-128")
    with pytest.raises(ReducioError, match="must be KEY=VALUE in TOML's notation"):
        recipe_file.load(dit.DiTRecipe, "dit-256", ["loop.steps"])


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


def test_the_command_alone_and_under_torchrun(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes, and one process that accumulates, write the same bytes into the model folder."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    argv = ["train", "dit", "--recipe", str(tmp_path / "recipe.toml"), "--latents", str(latents), "--no-progress"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29741"]
    subprocess.run(
        [*torchrun, "-m", "reducio_fast", *argv, "-o", str(tmp_path / "two")], check=True, capture_output=True
    )
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
