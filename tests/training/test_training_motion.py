"""The video stages of the recipe: each phase trains its networks, flows are correct, pools may be made in any order."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from safetensors.torch import load_file
from scipy import ndimage
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from reducio_fast.checkpoints.networks import load_model, save_model
from reducio_fast.checkpoints.strict_files import save_tensors
from reducio_fast.data import photos, real_video, toy_world
from reducio_fast.pipelines.reducio.encoders import SemanticEncoder
from reducio_fast.reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from reducio_fast.system.errors import ReducioError
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


def vae_settings(*phases: video_autoencoder.Phase, steps: int = 2, **changes) -> video_autoencoder.VAESettings:
    return video_autoencoder.VAESettings(
        loop=replace(LOOP, steps=steps), phases=phases or (PHASE,), config=VAE, **changes
    )


PHASE = video_autoencoder.Phase(until=1.0, size=32, batch=1, video_share=0.0)


@pytest.fixture
def no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use only photographs of installed packages, and a film of noise with one shot."""
    film = np.random.default_rng(0).integers(0, 256, (40, *real_video.KEPT_SIZE, 3), np.uint8)
    monkeypatch.setattr(real_video, "footage", lambda folder: film)
    monkeypatch.setattr(real_video, "SHOTS", ((2, 36),))
    monkeypatch.setattr(photos, "require_wallpapers", lambda folder: None)
    monkeypatch.setattr(photos, "WALLPAPERS", {})


def test_the_encoder_trains_alone_and_then_with_the_decoder(tmp_path: Path, no_downloads: None) -> None:
    weights = {}
    torch.manual_seed(LOOP.seed)
    start = {f"vae.{k}": v for k, v in video_autoencoder.Trained(VAE).vae.state_dict().items()}
    alone = replace(PHASE, decodes=False, flow_weight=1.0)
    for name, phases in {"alone": (alone,), "both": (replace(alone, until=0.5), PHASE)}.items():
        context = Context(out=tmp_path / name, data=tmp_path, progress=False)
        figures = video_autoencoder.train_vae(context, vae_settings(*phases))
        assert figures["steps"] == 2 and np.isfinite(figures["loss"]) and figures["flow_wanted"] >= 0
        assert ("psnr" in figures) == (name == "both")
        saved = load_model(ReducioVAE, VAEConfig, context.out / "vae").state_dict()
        weights[name] = {f"vae.{k}": v for k, v in saved.items()}

    def changed(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
        return {name.split(".")[1] for name in a if not torch.equal(a[name], b[name])}

    assert changed(start, weights["alone"]) == {"encoder_3d", "quant_conv", "warp"}
    assert changed(start, weights["both"]) == {n.split(".")[1] for n in start}


def test_the_encoder_then_trains_alone_against_the_finished_decoder(tmp_path: Path, no_downloads: None) -> None:
    batches = replace(PHASE, flow_weight=0.0), replace(PHASE, flow_weight=0.0, size=64)

    def train(name: str, *, alone: bool = True, seed: int = 0, **changes) -> tuple[dict, dict[str, torch.Tensor]]:
        context = Context(out=tmp_path / name, data=tmp_path, progress=False)
        encoder = video_autoencoder.EncoderSettings(loop=replace(LOOP, **changes), batches=batches)
        settings = vae_settings(encoder=encoder if alone else None)
        figures = video_autoencoder.train_vae(context, replace(settings, loop=replace(settings.loop, seed=seed)))
        return figures, load_model(ReducioVAE, VAEConfig, context.out / "vae").state_dict()

    both, joint = train("joint", alone=False)
    figures, trained = train("alone")
    assert "encoder_steps" not in both and figures["encoder_steps"] == 2
    assert all(np.isfinite(figures[f"encoder_{name}"]) for name in ("loss", "gain", "worst"))
    changed = {name.split(".")[0] for name in joint if not torch.equal(joint[name], trained[name])}
    assert changed == {"encoder_3d", "quant_conv"}

    first, _ = train("joint", max_seconds=0.0)  # goes on after the joint training, and is stopped
    again, resumed = train("joint")
    assert first["encoder_steps"] == 1 and again["encoder_steps"] == 2
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)

    shutil.copytree(tmp_path / "alone" / "runs" / "encoder", tmp_path / "other" / "runs" / "encoder")
    with pytest.raises(ReducioError, match="train encoder: .* was made with decoder="):
        train("other", seed=7)


def test_a_decoder_starts_by_repeating_the_content_frame() -> None:
    vae = video_autoencoder.Trained(VAE).vae.eval()
    with torch.no_grad():
        vae.warp.flow.weight.zero_()
        image = torch.rand(1, 3, 64, 64) * 2 - 1
        frames = vae.decode(torch.randn(1, 16, 4, 2, 2), vae.encode_content(image))
    torch.testing.assert_close(frames, image[:, :, None].expand_as(frames), atol=1e-5, rtol=0)


def test_flows_of_a_batch_point_to_the_content_frame(no_downloads: None) -> None:
    """A photograph under a camera move: the content frame, sampled at p + flow, reproduces each frame."""
    phase = replace(PHASE, size=128, batch=2, photo_share=1.0)
    settings = vae_settings(phase, parallax_share=0.0)
    batch = video_autoencoder.draw_batch(np.random.default_rng(4), settings, phase, "")
    assert batch.video.shape == (2, 3, 16, 128, 128) and batch.to_content.shape == batch.to_next.shape == (
        2,
        2,
        16,
        128,
        128,
    )
    assert not batch.to_content[:, :, 7].any() and not batch.to_next[:, :, 15].any()
    rows, columns = np.meshgrid(np.arange(128), np.arange(128), indexing="ij")
    for item in range(2):
        content, repeated, moved = batch.video[item, :, 7].numpy(), 0.0, 0.0
        for t in (2, 5, 9, 12):
            x, y = batch.to_content[item, :, t].numpy()
            for c in range(3):
                guess = ndimage.map_coordinates(content[c], [rows + y, columns + x], order=1, mode="nearest")
                frame = batch.video[item, c, t].numpy()
                moved += np.square(guess - frame)[16:-16, 16:-16].mean()
                repeated += np.square(content[c] - frame)[16:-16, 16:-16].mean()
        assert moved < 0.4 * repeated


def test_clips_are_of_three_kinds_and_crops_of_the_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def flat(value: int):
        return lambda *arguments, **kwargs: (
            sizes.append(next(a for a in arguments if isinstance(a, int)))
            or np.full((16, 128, 128, 3), value, np.uint8)
        )

    monkeypatch.setattr(photos, "render", flat(0))
    monkeypatch.setattr(real_video, "render", flat(1))
    monkeypatch.setattr(toy_world, "render", flat(2))
    phase = video_autoencoder.Phase(until=1.0, size=64, batch=1, video_share=0.2, photo_share=0.3, flow_weight=0.0)
    settings, kinds = vae_settings(phase), []
    for i in range(600):
        video = video_autoencoder.draw_batch(np.random.default_rng((1, i)), settings, phase, "").video
        assert video.shape == (1, 3, 16, 64, 64)
        kinds.append(round(float(video.mean() + 1) * 127.5))
    assert set(sizes) == {128}
    for kind, share in ((1, 0.2), (0, 0.3), (2, 0.5)):
        assert abs(np.mean([k == kind for k in kinds]) - share) < 0.06


def test_clips_of_the_film_stay_inside_a_shot(no_downloads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    film = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None, None] * 5, (40, *real_video.KEPT_SIZE, 3))
    monkeypatch.setattr(real_video, "footage", lambda folder: film)
    strides = set()
    for i in range(60):
        clip = real_video.render(np.random.default_rng(i), "", 64)
        assert clip.shape == (16, 64, 64, 3) and (clip == clip[:, :1, :1]).all()
        tone = clip[:, 0, 0].astype(float) / np.maximum(clip[:, 0, 0].max(0), 1)
        steps = np.diff(tone, axis=0) * clip[:, 0, 0].max(0)
        strides.add(int(round(float(np.abs(steps).mean()) / 5)))
        assert (steps > 0).all() or (steps < 0).all()
    assert strides == {1, 2}


def test_a_film_with_another_checksum_is_refused(tmp_path: Path) -> None:
    (tmp_path / real_video.TRAILER).write_bytes(b"another film")
    with pytest.raises(
        ReducioError, match=r"is not the trailer of moviepy==2.2.1 \(SHA-256 [0-9a-f]{12}...\); remove it"
    ):
        real_video.fetch(tmp_path)
    with pytest.raises(ReducioError, match=r"apt-get download lomiri-wallpapers-16.04 && dpkg-deb -x"):
        photos.require_wallpapers(str(tmp_path))


@pytest.fixture
def components(tmp_path: Path) -> Path:
    """The components that the motion stage needs, narrow and with random weights, in their own formats."""
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


def test_motion_stage_saves_a_transformer_and_its_scheduler(components: Path) -> None:
    figures = motion.train_motion(Context(out=components, data=components, progress=False), motion_settings())
    assert figures["steps"] == 2 and all(np.isfinite(v) for v in figures.values())
    model = load_model(ReducioDiT, DiTConfig, components / "transformer")
    scheduler = DPMSolverMultistepScheduler.from_pretrained(components / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.solver_order == 2
    assert model.config.hidden_size == 24


def test_pool_files_do_not_depend_on_their_order(components: Path) -> None:
    encoders, settings = motion.Encoders(components), motion_settings()
    for folder, order in ((components / "a", (0, 1)), (components / "b", (1, 0))):
        for shard in order:
            motion.encode_shard(encoders, settings, False, shard, folder, key="")
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


def test_a_pool_of_other_encoders_or_settings_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run uses the files of its own encoders and settings; one that starts anew makes every file again."""
    made: list[tuple[bool, int]] = []

    def encode_shard(_: object, settings: object, held_out: bool, shard: int, folder: Path, key: str) -> None:
        made.append((held_out, shard))
        save_tensors({"mean": torch.zeros(1)}, motion.shard_path(folder, held_out, shard), key=key)

    def encoded(settings: motion.MotionSettings, **options: bool) -> list[tuple[bool, int]]:
        made.clear()
        motion.encode_pools(Context(out=tmp_path, data=tmp_path, **options), settings, None, tmp_path)
        return list(made)

    monkeypatch.setattr(motion, "encode_shard", encode_shard)
    settings, every = motion_settings(), [(True, 0), (False, 0), (False, 1)]
    assert encoded(settings) == every and encoded(settings) == []
    assert encoded(replace(settings, pool=24)) == [(False, 2)]
    assert encoded(settings, resume=False) == every
    for changes in ({"portrait_share": 0.5}, {"decoded_share": 0.1}, {"size": 32}, {"loop": replace(LOOP, seed=4)}):
        assert encoded(replace(settings, **changes)) == every and encoded(replace(settings, **changes)) == []
    assert encoded(settings) == every
    motion.shard_path(tmp_path, False, 1).write_bytes(b"half")
    assert encoded(settings) == [(False, 1)]
    for name in motion.ENCODERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        assert encoded(settings) == every and encoded(settings) == []
