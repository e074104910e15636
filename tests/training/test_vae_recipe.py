"""The autoencoder's recipe: the release's losses, a discriminator that starts on schedule, exact resumption."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from torch import nn

from reducio_fast.checkpoints.networks import load_model
from reducio_fast.cli.main import main
from reducio_fast.data import clip_files, photos
from reducio_fast.data.curation import manifest
from reducio_fast.media.video_files import read_video, write_video
from reducio_fast.reference import ReducioVAE, VAEConfig
from reducio_fast.system.errors import ReducioError
from reducio_fast.training import recipe_file
from reducio_fast.training.loop import LoopConfig
from reducio_fast.training.reducio import vae
from reducio_fast.training.reducio.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from tiny_networks import VAE

pytestmark = pytest.mark.slow

CONFIG = dict(VAE)
LOOP = LoopConfig(
    steps=4, learning_rate=1e-3, warmup_steps=1, checkpoint_every=2, log_every=1, autocast=False, micro_batches=2
)


def recipe(**changes) -> vae.VAERecipe:
    made = vae.VAERecipe(
        loop=LOOP,
        batch=2,
        size=32,
        model="reducio-ft4",
        config=CONFIG,
        discriminator_start=2,
        discriminator_norm="group",
        discriminator_width=8,
        threads=1,
    )
    return replace(made, **changes)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rows = tmp_path_factory.mktemp("clips"), []
    for name in ("astronaut", "flower"):
        write_video(photos.render(np.random.default_rng(2), 96, 40, name=name), folder / f"{name}.mp4", 16)
        row = dict.fromkeys(manifest.COLUMNS) | {"id": name, "video": str(folder / f"{name}.mp4"), "fps": 16.0}
        rows.append(row | {"start": 3, "end": 37, "height": 96, "width": 96})
    manifest.write(rows, folder / "clips.parquet")
    return folder / "clips.parquet"


def test_frames_are_those_of_the_whole_video(clips: Path) -> None:
    row = manifest.read(clips)[0]
    whole = read_video(row["video"])[0]
    for first, step, count in ((0, 1, 5), (7, 2, 6), (23, 1, 16), (24, 3, 5)):
        assert (clip_files.read_frames(row["video"], first, step, count) == whole[first::step][:count]).all()
    assert len(clip_files.read_frames(row["video"], 30, 1, 16)) == 10


def test_clips_are_random_crops_within_their_shot(clips: Path, tmp_path: Path) -> None:
    files = clip_files.ClipFiles(clips, 16, 16.0)
    drawn = [files.draw(np.random.default_rng(i), 64, 0.5).clip for i in (0, 0, 1)]
    assert drawn[0].shape == (3, 16, 64, 64) and drawn[0].abs().max() <= 1
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    frames = np.zeros((1, 64, 64, 3), np.uint8)
    frames[:, :, :32] = 255  # the release mirrors no crop
    cut = [clip_files.crop(frames, np.random.default_rng(i), 16, 0.9) for i in range(8)]
    assert all((clip[..., 0] > clip[..., -1]).all() for clip in cut)


def test_clips_that_are_too_short_are_never_drawn(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a training does not depend on how many there are in a row. A drawn clip tells its own frame rate."""
    whole = manifest.read(clips)
    path = tmp_path / "clips.parquet"
    manifest.write([{**whole[0], "id": f"{i}", "end": whole[0]["start"] + 15} for i in range(99)] + whole[1:], path)
    files = clip_files.ClipFiles(path, 16, 16.0)
    assert [row["id"] for row in files.rows] == ["flower"]
    assert files.draw(np.random.default_rng(0), 32, 0.5).fps == 16
    assert files.checksum() != clip_files.ClipFiles(clips, 16, 16.0).checksum()
    manifest.write([{**row, "fps": 30.0, "end": row["start"] + 31} for row in whole], path)
    files = clip_files.ClipFiles(path, 16, 16.0)  # every second frame of 31
    monkeypatch.setattr(clip_files, "read_frames", lambda *_: np.zeros((16, 32, 32, 3), np.uint8))
    assert len(files.rows) == 2 and files.draw(np.random.default_rng(0), 32, 0.5).fps == 15
    manifest.write([{**row, "fps": 30.0, "end": row["start"] + 30} for row in whole], path)
    with pytest.raises(ReducioError, match="none of its 2 clips has 16 frames at 16 a second, which takes 1 seconds"):
        clip_files.ClipFiles(path, 16, 16.0)

    monkeypatch.setattr(clip_files, "read_frames", lambda *_: np.zeros((15, 32, 32, 3), np.uint8))
    message = (
        "8 clips in a row gave no 16 frames; the last one: .*mp4 ends before the clip does; run reducio-fast curate"
    )
    with pytest.raises(ReducioError, match=message):
        files.draw(np.random.default_rng(0), 32, 0.5)
    manifest.write([], path)
    with pytest.raises(ReducioError, match="holds no clip that could be read: its selection is empty"):
        clip_files.ClipFiles(path, 16, 16.0)


def test_the_discriminator_has_the_published_layers() -> None:
    """Kernels, strides and widths equal the release's; all layers except the first and last are normalised."""
    discriminator = PatchDiscriminator()
    convolutions = [m for m in discriminator.modules() if isinstance(m, nn.Conv3d)]
    assert [tuple(c.kernel_size) for c in convolutions] == [(4, 4, 4), (4, 4, 4), (3, 4, 4), (1, 4, 4), (1, 4, 4)]
    assert [c.stride[0] for c in convolutions] == [2, 2, 2, 1, 1]
    assert [c.out_channels for c in convolutions] == [64, 128, 256, 512, 1]
    assert sum(isinstance(m, nn.BatchNorm3d) for m in discriminator.modules()) == 3
    logits = PatchDiscriminator(8, "group")(torch.randn(2, 3, 16, 64, 64))
    assert logits.shape == (2, 1, 2, 6, 6)
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert hinge_loss(real, fake) == pytest.approx(0.5 * (0.5 + 1.0))


def test_the_adaptive_weight_balances_gradients() -> None:
    layer = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    pixels, adversarial = layer(x).abs().mean(), 7 * layer(x).mean()
    weight = adaptive_weight(pixels, adversarial, layer.weight)
    gradients = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in (pixels, adversarial)]
    torch.testing.assert_close(weight * gradients[1], gradients[0], rtol=1e-3, atol=0)


def test_each_loss_reaches_its_own_network(clips: Path) -> None:
    torch.manual_seed(0)
    chosen = recipe(discriminator_start=0)
    model = vae.Trained(vae.build_vae(chosen), chosen)
    files = clip_files.ClipFiles(clips, model.vae.config.num_frames, chosen.rate)
    own = {}
    for weight in (0.05, 0.0):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        changed = replace(chosen, discriminator_weight=weight)
        vae.Losses(model, changed, files, None)(0, 0, np.random.default_rng(0))[0].backward()
        own[weight] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in own[0.0].items():
        same = torch.equal(gradient, own[0.05][name])
        # The adversarial loss has no gradient for the discriminator, only for the autoencoder.
        assert same or not name.startswith("discriminator."), name
    assert any(not torch.equal(g, own[0.05][n]) for n, g in own[0.0].items() if n.startswith("vae.decoder"))
    assert all(own[0.0][n].norm() > 0 for n in own[0.0] if n.startswith("discriminator.") and n.endswith("weight"))
    dots = torch.zeros(1, 3, 2, 16, 16)
    assert vae.outlier_loss(dots) == 0
    dots[..., 5, 5] = 1.0
    assert vae.outlier_loss(dots) > 0 and vae.outlier_loss(-dots) == 0


def test_the_discriminators_rate_warms_up_as_published(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth until batch 5000, then linear to the whole over 1000 batches; the autoencoder's rate does not change."""
    for name in ("vae-ft2", "vae-ft4"):
        factors = [recipe_file.load(vae.VAERecipe, name).discriminator_factor(n) for n in (0, 5000, 5500, 6000, 9999)]
        assert factors == pytest.approx([0.01, 0.01, 0.055, 0.1, 0.1])
    rates: list[set[float]] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: (rates.append({round(g["lr"], 9) for g in self.param_groups}), step(self))[1],
    )
    loop = replace(LOOP, steps=3, micro_batches=1, learning_rate=1.0, final_rate=1.0)
    chosen = recipe(loop=loop, batch=1, discriminator_start=0, discriminator_warmup=2, discriminator_weight=0.0)
    monkeypatch.setattr(vae.Losses, "__call__", lambda self, *_: (self.model.vae.decoder.conv_out.bias.sum(), {}))
    vae.train_vae(clips, tmp_path, chosen, progress=False)
    assert rates == [{0.0}, {1.0, 0.01}, {1.0, 0.055}, {1.0, 0.1}]  # the first allocates the optimizer's state


def test_it_resumes_to_the_byte_with_a_discriminator_on_schedule(clips: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    trunk = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).net.state_dict()
    torch.save({"features." + k.split(".", 1)[1]: v for k, v in trunk.items()}, tmp_path / "alexnet.pth")
    kwargs = {"lpips": tmp_path / "alexnet.pth", "progress": False}
    whole = vae.train_vae(clips, tmp_path / "whole", recipe(), **kwargs)
    assert whole["steps"] == 4 and all(np.isfinite(v) for v in whole.values())
    assert {"lpips", "adversarial", "discriminator", "adaptive"} <= set(whole)
    header, *lines = (tmp_path / "whole" / "runs" / "vae" / "log.csv").read_text().splitlines()
    place = header.split(",").index("discriminator")
    assert [bool(row.split(",")[place]) for row in lines] == [False] * 2 + [True] * 2
    vae.train_vae(clips, tmp_path / "parts", recipe(loop=replace(LOOP, max_seconds=0.0)), **kwargs)
    figures = vae.train_vae(clips, tmp_path / "parts", recipe(), **kwargs)
    for name, value in whole.items():
        assert "second" in name or figures[name] == value, name
    files = [tmp_path / n / "vae" / "diffusion_pytorch_model.safetensors" for n in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert load_model(ReducioVAE, VAEConfig, tmp_path / "whole" / "vae").config.base_channels == CONFIG["base_channels"]
    for changes, data, field in (
        ({"kl_weight": 1.0}, kwargs, "kl_weight=1e-06, this run has kl_weight=1.0"),
        ({}, {"progress": False}, "lpips="),
    ):
        with pytest.raises(ReducioError, match=f"was made with {field}"):
            vae.train_vae(clips, tmp_path / "parts", recipe(**changes), **data)
    rows = manifest.read(clips)
    manifest.write(rows[:1], tmp_path / "fewer.parquet")
    with pytest.raises(ReducioError, match="was made with clips="):
        vae.train_vae(tmp_path / "fewer.parquet", tmp_path / "parts", recipe(), **kwargs)
    # A later stage can start from these weights; another width is an error.
    again = vae.build_vae(recipe(model=None, config={}, start=str(tmp_path / "whole")))
    assert again.config == load_model(ReducioVAE, VAEConfig, tmp_path / "whole" / "vae").config
    with pytest.raises(ReducioError, match="has other weights than the recipe's"):
        vae.build_vae(recipe(config=CONFIG | {"norm_groups": 4, "base_channels": 16}, start=str(tmp_path / "whole")))
    shutil.rmtree(tmp_path / "parts")


@pytest.mark.parametrize(("fusion", "factor"), [("attn", 2), ("add", 4), ("linear", 2)])
def test_every_fusion_and_factor_trains(clips: Path, tmp_path: Path, fusion: str, factor: int) -> None:
    config = CONFIG | {"fusion": fusion, "temporal_factor": factor}
    chosen = recipe(config=config, loop=replace(LOOP, steps=1), discriminator_start=0)
    before = vae.build_vae(chosen).state_dict()
    vae.train_vae(clips, tmp_path, chosen, progress=False)
    after = load_model(ReducioVAE, VAEConfig, tmp_path / "vae").state_dict()
    fused = [name for name in after if ".fuse." in name and "pos_embed" not in name]
    torch.manual_seed(LOOP.seed)
    before = vae.build_vae(chosen).state_dict()
    assert fused and all(not torch.equal(before[name], after[name]) for name in fused)


def test_recipes_and_the_command(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = [recipe_file.load(vae.VAERecipe, f"vae-ft{n}") for n in (4, 2)]
    assert [
        vae.build_vae(replace(r, config=CONFIG | {"temporal_factor": t})).config.temporal_factor
        for r, t in zip(shipped, (4, 2), strict=True)
    ] == [4, 2]
    assert shipped[0].loop.betas == (0.5, 0.9) and shipped[0].loop.rate(500_000) == pytest.approx(
        2e-5 * 0.505, rel=1e-3
    )
    (tmp_path / "recipe.toml").write_text(
        'batch = 1\nsize = 64\nmodel = "reducio-ft4"\ndiscriminator_width = 8\n'
        "[config]\n"
        + "".join(f"{k} = {json.dumps(v)}\n" for k, v in CONFIG.items())
        + "[loop]\nsteps = 2\nlearning_rate = 1e-4\nautocast = false\n"
    )
    argv = [
        "train",
        "vae",
        "--recipe",
        str(tmp_path / "recipe.toml"),
        "--clips",
        str(clips),
        "-o",
        str(tmp_path / "out"),
    ]
    assert main([*argv, "--no-progress", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2 and (tmp_path / "out" / "vae" / "config.json").is_file()
    assert main([*argv, "--latents", "x"]) == 2 and "train vae takes no --latents" in capsys.readouterr().err
    with pytest.raises(ReducioError, match="size: 100 is not a multiple of 32"):
        vae.train_vae(clips, tmp_path / "odd", recipe(size=100), progress=False)
    with pytest.raises(ReducioError, match="the adaptive weight needs the whole last layer"):
        recipe(loop=replace(LOOP, parallel="fsdp"))


def test_an_ablation_trains_each_variant_and_compares_held_out_clips(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runs differ in one setting; a second call trains nothing and returns the same table."""
    sizes = [
        "channel_multipliers=[1, 1, 1, 1, 1, 1]",
        "base_channels=8",
        "content_base_channels=8",
        "fusion_head_dim=8",
    ]
    changes = [f"config.{change}" for change in sizes] + ["loop.steps=2", "loop.checkpoint_every=2", "held_out=1"]
    changes += ["batch=1", "size=32"]
    argv = ["train", "vae", "--recipe", "ablation-vae", "--clips", str(clips), "--no-progress"]
    argv += [word for change in changes for word in ("--set", change)]
    command = [*argv, "--ablation", "latent-channels", "--seeds", "2", "-o", str(tmp_path)]
    assert main(command) == 0
    assert "latent-channels, held_out_psnr" in capsys.readouterr().out
    with (tmp_path / "ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["variant"], r["seed"]) for r in rows] == [(n, s) for s in "01" for n in ("4", "8", "16", "32")]
    assert len({r["held_out_psnr"] for r in rows}) == 8 and all(float(r["held_out_psnr"]) > 5 for r in rows)
    for row in rows:
        folder = tmp_path / row["variant"] / f"seed-{row['seed']}"
        saved = load_model(ReducioVAE, VAEConfig, folder / "vae")
        assert saved.config.latent_channels == int(row["variant"])
    before = (tmp_path / "ablation.csv").read_text()
    assert main(command) == 0
    assert (tmp_path / "ablation.csv").read_text() == before
    capsys.readouterr()
    for options, message in (
        (["--ablation", "attention"], "--ablation attention is of train dit, not of train vae"),
        (["--seeds", "2"], "--seeds belongs to --ablation"),
        (["--ablation", "fusion", "--set", "held_out=0"], "the recipe needs held_out"),
        (["--ablation", "fusion", "--set", "held_out=2"], "held_out=2: .* holds 2 clips"),
    ):
        assert main([*argv, "-o", str(tmp_path / "other"), *options]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "other").exists()


def test_an_ablation_is_refused_before_any_work(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*options: str) -> str:
        argv = ["train", "vae", "--recipe", "ablation-vae", "--clips", str(clips), "--ablation", "fusion"]
        assert main([*argv, "-o", str(tmp_path / "out"), "--no-progress", *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "out").exists()
        return line

    assert "the recipe needs held_out, the number of clips to compare on" in refused("--set", "held_out=0")
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    assert refused().endswith("WORLD_SIZE=2: --ablation fusion is trained by one process, without torchrun")
