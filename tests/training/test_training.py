"""The training loop and stage one of the recipe: exact resumption, error messages, folders that libraries can read."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import numpy as np
import open_clip
import pytest
import torch
import transformers
from open_clip.model import _build_vision_tower
from safetensors.torch import load_file
from torch import nn

from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints.networks import save_model
from reducio_fast.data import toy_world
from reducio_fast.reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from reducio_fast.system.atomic_files import written_whole
from reducio_fast.system.errors import ReducioError
from reducio_fast.training.loop import LoopConfig, run
from reducio_fast.training.recipe import Context
from reducio_fast.training.tiny import bundle, recipe
from reducio_fast.training.tiny.content_autoencoder import ContentSettings, encode, normalize_latents, start_as_identity
from reducio_fast.training.tiny.image_encoder import draw_still
from reducio_fast.training.tiny.text_encoder import reword, tokenize
from reducio_fast.training.tiny.text_to_image import draw

pytestmark = pytest.mark.slow

CONFIG = LoopConfig(steps=60, learning_rate=2e-2, warmup_steps=10, log_every=7, checkpoint_every=25, seed=3)


class Regression:
    """A small problem with all state that exact resumption must restore: dropout, buffers, an average, log sums."""

    def __init__(self, fail_at: int | None = None, bad: tuple[int, ...] = ()) -> None:
        torch.manual_seed(0)
        layers = (nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))
        self.model, self.fail_at, self.bad = nn.Sequential(*layers), fail_at, bad

    def loss(self, step: int, micro: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        if step == self.fail_at:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.normal(size=(32, 4)).astype(np.float32))
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        return loss * float("nan") if step in self.bad else loss, {"batch_mean": float(x.mean())}

    def run(self, folder: Path, config: LoopConfig = CONFIG, **kwargs):
        return run("regression", self.model, self.loss, config, folder, progress=False, **kwargs)


def rows(folder: Path) -> list[dict[str, str]]:
    """The log without its wall-clock column."""
    with (folder / "log.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_the_loss_falls_and_is_logged(tmp_path: Path) -> None:
    outcome = Regression().run(tmp_path)
    log = rows(tmp_path)
    assert outcome.finished and outcome.step == 60
    assert [int(row["step"]) for row in log] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert float(log[-1]["loss"]) < 0.5 * float(log[0]["loss"])
    assert set(log[0]) == {"step", "loss", "batch_mean", "gradient", "rate"}


@pytest.mark.parametrize("stop", ["killed", "timed_out"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, stop: str) -> None:
    whole = Regression()
    expected = whole.run(tmp_path / "whole")
    if stop == "killed":  # killed at step 40, resumed from step 25: the log rows of steps 28 to 35 must be removed
        with pytest.raises(KeyboardInterrupt):
            Regression(fail_at=40).run(tmp_path / "parts")
        assert int(rows(tmp_path / "parts")[-1]["step"]) == 35
    else:
        assert not Regression().run(tmp_path / "parts", replace(CONFIG, max_seconds=0.0)).finished
    parts = Regression()
    outcome = parts.run(tmp_path / "parts")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], value), name
        assert torch.equal(outcome.averaged[name], expected.averaged[name]), name


def test_averages_differ_from_the_weights_only_with_a_decay(tmp_path: Path) -> None:
    for decay, same in ((0.0, True), (0.9, False)):
        problem = Regression()
        outcome = problem.run(tmp_path / str(decay), replace(CONFIG, ema_decay=decay))
        assert torch.equal(outcome.averaged["0.weight"], problem.model[0].weight) is same


def test_the_rate_warms_up_and_decays() -> None:
    config = LoopConfig(steps=100, learning_rate=1.0, warmup_steps=10, final_rate=0.1)
    assert [config.rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert config.rate(10) == pytest.approx(1.0)
    assert config.rate(55) == pytest.approx(0.55)
    assert config.rate(100) == pytest.approx(0.1)


def test_one_bad_step_is_skipped_and_many_end_the_run(tmp_path: Path) -> None:
    problem = Regression(bad=(20, 21))
    assert problem.run(tmp_path / "skipped").finished
    assert all(torch.isfinite(value).all() for value in problem.model.state_dict().values())
    problem = Regression(bad=tuple(range(30, 60)))
    with pytest.raises(ReducioError, match="train regression: loss nan .* at step 39, 10 non-finite steps in a row"):
        problem.run(tmp_path / "ended")
    assert (tmp_path / "ended" / "checkpoints" / "latest").read_text().strip() == "step-00000025"


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    Regression().run(tmp_path)
    with pytest.raises(ReducioError, match=r"learning_rate=0.02, this run has learning_rate=0.001"):
        Regression().run(tmp_path, replace(CONFIG, learning_rate=1e-3))
    assert Regression().run(tmp_path, replace(CONFIG, log_every=1)).finished
    other = Regression()
    other.model = nn.Linear(4, 1)
    with pytest.raises(ReducioError, match="belongs to another model"):
        other.run(tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000060"
    for file in newest.glob("*.distcp"):
        file.write_bytes(b"half a checkpoint")
    with pytest.raises(ReducioError, match="cannot read checkpoint .*step-00000060.*; write one of step-00000050"):
        Regression().run(tmp_path)
    (newest / ".metadata").unlink()
    (newest.parent / "latest").write_bytes(b"step-\xff")
    with pytest.raises(ReducioError, match="which is not whole; write one of step-00000050"):
        Regression().run(tmp_path)
    (newest.parent / "latest").write_text("step-00000060")
    with pytest.raises(ReducioError, match="names step-00000060, which is not whole; write one of step-00000050 into"):
        Regression().run(tmp_path)
    (newest.parent / "latest").write_text("step-00000050")
    assert Regression().run(tmp_path).finished
    assert Regression().run(tmp_path, resume=False).finished


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: {**run, "state": {**run["state"], "later": 1}},
        lambda run: {**run, "state": None},
        lambda run: {**run, "config": 3},
        lambda run: [run],
        lambda run: {},
    ],
)
def test_a_damaged_run_file_is_named(damage: Callable[[dict], object], tmp_path: Path) -> None:
    Regression().run(tmp_path)
    path = tmp_path / "checkpoints" / "step-00000060" / "run.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ReducioError, match="cannot read .*run.json: .*; write one of step-00000050, step-0"):
        Regression().run(tmp_path)


def test_a_setting_newer_than_the_checkpoint_had_its_default(tmp_path: Path) -> None:
    """And an accepted change of it takes effect, although the checkpoint holds the optimizer's settings too."""
    short = replace(CONFIG, steps=4, checkpoint_every=2)
    Regression().run(tmp_path / "whole", replace(short, max_seconds=0.0))
    run_file = next((tmp_path / "whole").glob("checkpoints/step-*/run.json"))
    values = json.loads(run_file.read_text())
    assert values["config"].pop("eps") == 1e-8
    run_file.write_text(json.dumps(values))
    shutil.copytree(tmp_path / "whole", tmp_path / "changed")
    with pytest.raises(ReducioError, match="made with eps=1e-08, this run has eps=1.0; .*--accept-changes"):
        Regression().run(tmp_path / "changed", replace(short, eps=1.0))
    problems = [Regression(), Regression()]
    problems[0].run(tmp_path / "whole", short)
    problems[1].run(tmp_path / "changed", replace(short, eps=1.0), accept_changes=True)
    assert not torch.equal(problems[0].model[0].weight, problems[1].model[0].weight)
    with pytest.raises(ReducioError, match="eps must be finite and above 0, got 0.0"):
        replace(CONFIG, eps=0.0)


@dataclass(frozen=True)
class Settings:
    loop: LoopConfig
    batch: int = 4
    evaluated: int = 8


def test_a_resumed_stage_has_the_same_settings(tmp_path: Path) -> None:
    context = Context(out=tmp_path, data=tmp_path, progress=False)

    def train(context: Context = context, encoded: str = "a", **changes) -> int:
        problem = Regression()
        return context.train("stage", problem.model, problem.loss, Settings(CONFIG, **changes), encoded=encoded).step

    train()
    with pytest.raises(ReducioError, match="made with encoded=a, this run has encoded=b; .*--no-resume starts anew"):
        train(encoded="b")
    with pytest.raises(ReducioError, match="made with batch=4, this run has batch=5; .*--accept-changes"):
        train(batch=5)
    assert train(evaluated=2) == train(replace(context, accept_changes=True), batch=5) == CONFIG.steps


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")

    with pytest.raises(OSError, match="disk full"), written_whole(path) as temporary:
        temporary.write_text("ne")
        raise OSError("disk full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_reworded_captions_say_what_their_labels_say() -> None:
    rng = np.random.default_rng(0)
    silent = dict.fromkeys(toy_world.ATTRIBUTES, 0)
    for _ in range(500):
        scene = toy_world.sample_scene(rng)
        text, labels = reword(scene, rng)
        words = text.lower().rstrip(".").split()
        for name, known in toy_world.ATTRIBUTES.items():
            if labels[name] == len(known):
                silent[name] += 1
                # The text may still contain "white", as the colour or as the background.
                assert getattr(scene, name) not in words or getattr(scene, name) == "white"
            else:
                assert known[labels[name]] == getattr(scene, name)
    assert min(silent[name] for name in ("colour", "motion", "speed", "background")) > 20 and silent["shape"] == 0


def test_a_still_is_the_content_frame_with_its_truth() -> None:
    scene, frame, truth = draw_still(np.random.default_rng(1))
    assert frame.shape == (128, 128, 3) and frame.dtype == np.uint8 and truth.alpha.shape == (1, 128, 128)
    x, y = (truth.centres[0] * 128).astype(int)
    assert np.abs(frame[y, x].astype(int) - toy_world.COLOURS[scene.colour]).max() <= 7


def test_normalised_latents_decode_to_the_same_image() -> None:
    model = diffusers.AutoencoderKL(**ContentSettings(loop=CONFIG).model).eval()
    start_as_identity(model)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = encode(model, images)
        deviation, expected = before.std((0, 2, 3)), model.decode(before).sample
        spread = model.encode(images).latent_dist.std / deviation[:, None, None]
        normalize_latents(model, before.mean((0, 2, 3)), deviation)
        after = encode(model, images)
        torch.testing.assert_close(after.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(after.std((0, 2, 3)), torch.ones(4))
        torch.testing.assert_close(model.encode(images).latent_dist.std, spread, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.decode(after).sample, expected, atol=1e-5, rtol=1e-4)


# --- the stages, one or two steps each, and the bundle ----------------------------------------------------------------

STAGE_ONE = ("text", "semantic", "content", "text_to_image")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage one trained for a thousandth of the recipe's steps, and a video model with random weights."""
    out = tmp_path_factory.mktemp("tiny")
    figures = recipe.train(out, STAGE_ONE, scale=0.001, progress=False)
    assert list(figures) == list(STAGE_ONE)
    torch.manual_seed(0)
    vae = VAEConfig(
        base_channels=8,
        channel_multipliers=(1,) * 6,
        content_base_channels=8,
        content_channel_multipliers=(1,) * 4,
        fusion="add",
        fusion_head_dim=8,
        num_heads=1,
        num_res_blocks=1,
        norm_groups=4,
    )
    save_model(ReducioVAE(vae), out / "vae")
    preview = recipe.train(out, ["preview"], scale=0.001, progress=False)["preview"]
    assert preview["psnr"] > preview["psnr_still"]  # the decoder starts as the repeated content frame
    dit = DiTConfig(
        hidden_size=32, depth=1, num_heads=2, caption_channels=128, semantic_channels=128, learn_sigma=False
    )
    save_model(ReducioDiT(dit), out / "transformer")
    diffusers.DPMSolverMultistepScheduler().save_pretrained(out / "scheduler")
    return out


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    figures = recipe.train(trained, ["export"], progress=False)
    assert figures["export"]["bytes"] == bundle.folder_bytes(trained / "bundle")
    return trained / "bundle"


def test_every_component_opens_in_its_own_library(exported: Path) -> None:
    text = transformers.T5EncoderModel.from_pretrained(exported / "text_encoder", dtype=torch.float32)
    tokenizer = transformers.ByT5Tokenizer.from_pretrained(exported / "tokenizer")
    assert text(**tokenizer("a red circle", return_tensors="pt")).last_hidden_state.shape == (1, 13, 128)
    vae = diffusers.AutoencoderKL.from_pretrained(exported / "content_encoder").float()
    assert vae.config.scaling_factor == 1.0 and encode(vae, torch.zeros(1, 3, 128, 128)).shape == (1, 4, 16, 16)
    diffusers.PixArtTransformer2DModel.from_pretrained(exported / "text_to_image" / "transformer")
    config = json.loads((exported / "image_encoder" / "open_clip_config.json").read_text())["model_cfg"]
    tower = _build_vision_tower(config["embed_dim"], open_clip.CLIPVisionCfg(**config["vision_cfg"]))
    weights = load_file(exported / "image_encoder" / "open_clip_model.safetensors")
    tower.load_state_dict({name.removeprefix("visual."): value for name, value in weights.items()})
    assert tower(torch.zeros(1, 3, 64, 64))[1].shape == (1, 64, 128)


def test_the_bundle_is_small_without_duplicates(exported: Path) -> None:
    files = sorted(str(path.relative_to(exported).parent) for path in exported.rglob("*.safetensors"))
    assert files == [
        "content_encoder",
        "image_encoder",
        "preview_decoder",
        "text_encoder",
        "text_to_image/transformer",
        "transformer",
        "vae",
    ]
    for path in exported.rglob("*.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o644, path
        # The content encoder's second middle block never runs. It, and the matrices of two small networks, are stored
        # in one byte per weight.
        small = path.parent.name in ("preview_decoder", "image_encoder")
        for name, value in load_file(path).items():
            one_byte = name.startswith("encoder_2d.mid.block_2.") or (small and value.ndim > 1)
            assert value.dtype == (torch.float8_e4m3fn if one_byte else torch.float16), (path, name)


def test_the_pipeline_draws_from_the_bundle(exported: Path) -> None:
    pipe = ReducioPipeline.from_pretrained(exported, device="cpu")
    assert (
        isinstance(pipe.text_to_image, diffusers.PixArtAlphaPipeline) and pipe.text_to_image.vae is pipe.content_encoder
    )
    frames = draw(pipe.text_to_image, ["a red circle moving right on a black background"] * 2, range(2))
    assert frames.shape == (2, 128, 128, 3) and frames.dtype == np.uint8 and (frames[0] != frames[1]).any()


def test_training_and_pipeline_use_the_same_text_condition(exported: Path) -> None:
    """Embeddings cut to the caption's length give the same output as the pipeline's, which are padded to 120."""
    pixart = ReducioPipeline.from_pretrained(exported, device="cpu").text_to_image
    caption = "a green star growing on a striped background"
    padded, mask, silent, silent_mask = pixart.encode_prompt(caption, clean_caption=False, device="cpu")
    ids, short_mask = tokenize(pixart.tokenizer, [caption])
    assert padded.shape[1] == 120 and int(mask.sum()) == ids.shape[1] and int(silent_mask.sum()) == 1
    short = pixart.text_encoder(input_ids=ids, attention_mask=short_mask)[0]
    noisy, time = torch.randn(1, 4, 16, 16), torch.tensor([500])
    added = {"resolution": None, "aspect_ratio": None}
    outputs = [
        pixart.transformer(noisy, text, time, added, encoder_attention_mask=m).sample
        for text, m in ((padded, mask), (short, short_mask), (silent, silent_mask))
    ]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-4)
    assert (outputs[2] - outputs[0]).abs().max() > 1e-5


def test_a_bundle_that_is_too_large_is_removed(trained: Path, exported: Path, tmp_path: Path) -> None:
    for component in trained.iterdir():
        if component.name not in ("bundle", "runs"):
            (tmp_path / component.name).symlink_to(component)
    with pytest.raises(ReducioError, match=r"bundle has [\d,]+ bytes, 100,000 are allowed"):
        bundle.export(Context(out=tmp_path, data=tmp_path), bundle.BundleSettings(max_bytes=100_000))
    assert not (tmp_path / "bundle").exists()


def test_a_weight_beyond_float16_is_named(trained: Path, tmp_path: Path) -> None:
    for component in trained.iterdir():
        if component.name not in ("bundle", "runs", "vae"):
            (tmp_path / component.name).symlink_to(component)
    vae = bundle.load_model(ReducioVAE, VAEConfig, trained / "vae")
    vae.quant_conv.weight[0, 0] = 1e6
    save_model(vae, tmp_path / "vae")
    with pytest.raises(ReducioError, match=r"vae has values that do not fit torch.float16 in quant_conv.weight"):
        bundle.export(Context(out=tmp_path, data=tmp_path), bundle.BundleSettings())


def test_invalid_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ReducioError, match="stages='txt' is not in the recipe; known: text, semantic, content"):
        recipe.train(tmp_path, ["txt"])
    with pytest.raises(ReducioError, match="scale=0 must be above 0"):
        recipe.train(tmp_path, scale=0)
    with pytest.raises(ReducioError, match="'text_to_image' needs .*text_encoder, which stage 'text' makes"):
        recipe.train(tmp_path, ["text_to_image"])


def test_a_finished_stage_is_not_trained_again(trained: Path) -> None:
    path = trained / "text_encoder" / "model.safetensors"
    before = path.read_bytes()
    recipe.train(trained, ["text"], scale=0.001, progress=False)
    assert path.read_bytes() == before
    assert len(rows(trained / "runs" / "text")) == 1
