"""The video stages of the recipe: phases train what they say, the sketch is local, pool files can come in any order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from safetensors.torch import load_file
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from reducio_fast.checkpoints.networks import load_model, save_model
from reducio_fast.data import photos, toy_world
from reducio_fast.pipelines.reducio.encoders import SemanticEncoder
from reducio_fast.reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from reducio_fast.training.loop import LoopConfig
from reducio_fast.training.recipe import Context
from reducio_fast.training.tiny import motion, video_autoencoder

pytestmark = pytest.mark.slow

VAE = replace(
    video_autoencoder.TINY_VAE,
    base_channels=4,
    channel_multipliers=(1, 1, 2, 2, 2, 2),
    content_base_channels=4,
    content_channel_multipliers=(1, 1, 2, 2),
    fusion_head_dim=4,
    num_heads=2,
)
LOOP = LoopConfig(steps=2, learning_rate=1e-3, warmup_steps=1, ema_decay=0.0, log_every=1)


def phase(trains: str, **changes) -> video_autoencoder.VAESettings:
    settings = video_autoencoder.VAESettings(loop=LOOP, trains=trains, size=32, batch=1, config=VAE)
    return replace(settings, **changes)


def test_each_phase_changes_only_what_it_trains(tmp_path: Path) -> None:
    context = Context(out=tmp_path, progress=False)
    weights = {}
    words = {"carriage": {"carriage_weight": 1.0, "latent_noise": 0.2, "moving_weight": 2.0, "level_weights": True}}
    for stage, after in (("encoder", None), ("all", "encoder"), ("decoder", "all"), ("carriage", "decoder")):
        figures = video_autoencoder.train_vae(context, phase(stage, after=after, **words.get(stage, {})), stage)
        assert figures["steps"] == 2 and np.isfinite(figures["loss"])
        weights[stage] = load_file(context.run_folder(stage) / "diffusion_pytorch_model.safetensors")
    torch.manual_seed(LOOP.seed)
    start = video_autoencoder.Trained(VAE).state_dict()

    def changed(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
        return {".".join(name.split(".")[:2]) for name in a if not torch.equal(a[name], b[name])}

    encoder = {"vae.encoder_3d", "vae.quant_conv", "sketch.hidden", "sketch.out"}
    decoder = {"vae.encoder_2d", "vae.decoder", "vae.post_quant_conv"}
    assert changed(start, weights["encoder"]) == encoder
    assert changed(weights["encoder"], weights["all"]) == encoder | decoder
    assert changed(weights["all"], weights["decoder"]) == decoder
    head = {"carriage.norm", "carriage.hidden", "carriage.out"}
    assert changed(weights["decoder"], weights["carriage"]) == decoder | head
    level = video_autoencoder.Carriage(VAE).level
    above = tuple(f"vae.decoder.up.{i}." for i in range(level)) + ("vae.decoder.norm_out.", "vae.decoder.conv_out.")
    untouched = [name for name in weights["decoder"] if name.startswith(above)]
    assert untouched and all(torch.equal(weights["decoder"][name], weights["carriage"][name]) for name in untouched)
    saved = load_model(ReducioVAE, VAEConfig, tmp_path / "vae").state_dict()
    assert all(torch.equal(saved[name], weights["carriage"][f"vae.{name}"]) for name in saved)


@torch.no_grad()
def test_sketch_draws_each_cell_where_it_is() -> None:
    """One changed latent cell changes the pixels of its own and the neighbouring cells, and of no others."""
    sketch = video_autoencoder.Sketch(VAE)
    z = torch.randn(1, 16, 4, 5, 6)
    before = sketch(z)
    assert before.shape == (1, 3, 16, 40, 48)
    z[0, :, 3, 1, 4] += 1
    changed = (sketch(z) != before).any(1)[0]
    assert changed[8:16, 0:24, 24:48].all()
    changed[8:16, 0:24, 24:48] = False
    assert not changed.any()


@torch.no_grad()
def test_carriage_draws_each_cell_where_it_is() -> None:
    """A feature cell is a square of pixels in its own frame: the head must not mix rows, columns or frames up."""
    head = video_autoencoder.Carriage(VAE)
    head.norm, head.out.weight[:] = torch.nn.Identity(), torch.randn_like(head.out.weight)
    x = torch.randn(1, head.hidden.in_channels, 16, 5, 6)
    before, n = head(x), head.cells
    assert before.shape == (1, 3, 16, 5 * n, 6 * n)
    x[0, :, 3, 1, 4] += 1
    changed = (head(x) != before).any(1)[0]
    assert changed[3, n : 2 * n, 4 * n : 5 * n].all()
    changed[3, n : 2 * n, 4 * n : 5 * n] = False
    assert not changed.any()


def test_clips_are_crops_of_the_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(
        photos, "render", lambda rng, size: sizes.append(size) or np.zeros((16, size, size, 3), np.uint8)
    )
    monkeypatch.setattr(
        toy_world,
        "render",
        lambda scene, rng, size, portrait: sizes.append(size) or np.ones((16, size, size, 3), np.uint8),
    )
    clips = [video_autoencoder.draw_clip(np.random.default_rng(i), 64, photo_share=0.3) for i in range(200)]
    assert {clip.shape for clip in clips} == {(16, 64, 64, 3)} and set(sizes) == {128}
    assert 0.2 < np.mean([clip.max() == 0 for clip in clips]) < 0.4


@pytest.fixture
def components(tmp_path: Path) -> Path:
    """The encoders a motion stage needs, random and narrow, in their own formats."""
    torch.manual_seed(0)
    save_model(ReducioVAE(VAE), tmp_path / "vae")
    AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        latent_channels=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(tmp_path / "content_encoder")
    tower = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    SemanticEncoder({"model_cfg": {"embed_dim": 8, "vision_cfg": tower}, "preprocess_cfg": half}).save_pretrained(
        tmp_path / "image_encoder"
    )
    text = T5Config(vocab_size=384, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16)
    T5EncoderModel(text).save_pretrained(tmp_path / "text_encoder")
    ByT5Tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def motion_settings(**changes) -> motion.MotionSettings:
    dit = DiTConfig(
        hidden_size=24,
        depth=1,
        num_heads=2,
        caption_channels=16,
        semantic_channels=16,
        learn_sigma=False,
        position_base_size=2,
    )
    settings = motion.MotionSettings(
        loop=LOOP, pool=16, held_out_pool=8, shard=8, batch=4, size=64, config=dit, decoded_share=0.5
    )
    return replace(settings, **changes)


def test_motion_stage_leaves_a_transformer_and_its_scheduler(components: Path) -> None:
    figures = motion.train_motion(Context(out=components, progress=False), motion_settings())
    assert figures["steps"] == 2 and all(np.isfinite(v) for v in figures.values())
    model = load_model(ReducioDiT, DiTConfig, components / "transformer")
    scheduler = DPMSolverMultistepScheduler.from_pretrained(components / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.solver_order == 2
    assert model.config.hidden_size == 24


def test_pool_files_do_not_depend_on_the_order_they_are_made_in(components: Path) -> None:
    encoders, settings = motion.Encoders(components), motion_settings()
    for folder, order in ((components / "a", (0, 1)), (components / "b", (1, 0))):
        for shard in order:
            motion.encode_shard(encoders, settings, False, shard, folder)
    for shard in (0, 1):
        a, b = (load_file(motion.shard_path(components / name, False, shard)) for name in ("a", "b"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    pool = motion.Pool(components / "a", settings, False, encoders)
    rows = pool.batch(torch.tensor([3, 11]), "cpu")
    assert rows["mean"].shape == (2, 16, 4, 2, 2) and rows["content"].shape == (2, 4, 8, 8)
    rng = np.random.default_rng((settings.loop.seed, 0, 11))
    text, mask = encoders.text([toy_world.sample_scene(rng).caption()])
    length = int(mask.sum())
    torch.testing.assert_close(rows["text"][1, :length], text[0, :length], atol=2e-3, rtol=2e-3)
    assert rows["text_mask"][1].sum() == length
