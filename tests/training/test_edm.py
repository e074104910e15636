"""EDM's objective: its identities, a network trained with it, and low-rank updates trained with it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from reducio_fast import ReducioError
from reducio_fast.checkpoints.published_svd import SCHEDULER
from reducio_fast.pipelines.svd.component_table import euler_scheduler
from reducio_fast.pipelines.svd.pipeline import SVDPipeline
from reducio_fast.reference.sampler import sample
from reducio_fast.reference.svd.sampler import ImageCondition
from reducio_fast.reference.svd.unet import VideoUNet
from reducio_fast.training import edm
from reducio_fast.training.loop import LoopConfig
from reducio_fast.training.svd import low_rank
from tiny_svd import seeded, unets

pytestmark = pytest.mark.slow

SIGMAS = torch.tensor([0.002, 0.05, 1.0, 20.0, 700.0], dtype=torch.float64)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def test_the_target_has_unit_variance_at_every_noise_level():
    target = edm.velocity(drawn(5, 200_000), drawn(5, 200_000, seed=1), SIGMAS)
    torch.testing.assert_close(target.var(1), torch.ones(5, dtype=torch.float64), rtol=0.01, atol=0)
    # The network's input has unit variance too: c_in times a noisy latent.
    inputs = (drawn(5, 200_000) + SIGMAS[:, None] * drawn(5, 200_000, seed=1)) / (SIGMAS[:, None] ** 2 + 1).sqrt()
    torch.testing.assert_close(inputs.var(1), torch.ones(5, dtype=torch.float64), rtol=0.01, atol=0)


def test_the_weighted_error_of_the_denoiser_is_that_of_the_network():
    clean, noise, prediction = drawn(5, 64), drawn(5, 64, seed=1), drawn(5, 64, seed=2)
    noisy = clean + SIGMAS[:, None] * noise
    error = (edm.denoised(noisy, prediction, SIGMAS) - clean).square().mean(1)
    plain = (prediction - edm.velocity(clean, noise, SIGMAS)).square().mean(1)
    torch.testing.assert_close(edm.loss_weight(SIGMAS) * error, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("index", [0, 12, 24])
def test_the_scheduler_takes_the_target_back_to_the_data(index: int):
    """diffusers' Euler scheduler with v-prediction: given our target, it predicts the clean latent."""
    scheduler = EulerDiscreteScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(25)
    sigma, timestep = scheduler.sigmas[index].double()[None], scheduler.timesteps[index]
    clean, noise = drawn(1, 64), drawn(1, 64, seed=1)
    target = edm.velocity(clean, noise, sigma)
    noisy = clean + sigma[:, None] * noise
    predicted = scheduler.step(target, timestep, noisy).pred_original_sample
    torch.testing.assert_close(predicted, clean, rtol=0, atol=1e-5 * float(sigma) + 1e-6)  # sigmas are float32 there
    assert float(timestep) == pytest.approx(float(sigma.log()) / 4, rel=1e-5)


def test_noise_levels_are_lognormal():
    for levels in (*edm.PUBLISHED_LEVELS.values(), edm.AUGMENTATION):
        logs = levels.draw(100_000, seeded()).log()
        assert logs.mean() == pytest.approx(levels.mean, abs=0.02) and logs.std() == pytest.approx(levels.std, abs=0.02)
    means = [edm.PUBLISHED_LEVELS[f"image-to-video-{size}"].mean for size in ("320x576", "576x1024")]
    assert edm.PUBLISHED_LEVELS["image"].mean < means[0] < means[1], "more noise for more pixels"
    with pytest.raises(ReducioError, match="std=-1"):
        edm.NoiseLevels(mean=0.0, std=-1)


def condition(batch: int, size: int = 4) -> ImageCondition:
    generator = seeded(5)
    return ImageCondition(
        torch.randn(batch, 1, 24, generator=generator),
        torch.randn(batch, 4, size, size, generator=generator),
        torch.tensor([[6.0, 127.0, 0.02]]).repeat(batch, 1),
    )


def test_dropped_conditions_lack_the_image_alone():
    cond = condition(3)
    some = edm.without_some(cond, torch.tensor([False, True, False]))
    assert torch.equal(some.embeds[::2], cond.embeds[::2]) and not some.embeds[1].any()
    assert torch.equal(some.latents[::2], cond.latents[::2]) and not some.latents[1].any()
    assert torch.equal(some.added_time_ids, cond.added_time_ids)


def test_the_error_of_a_batch_is_that_of_its_clips():
    """Noise levels of a batch differ; each clip is denoised at its own."""
    unet, _ = unets(32, 64)
    clean, noise, sigma = drawn(2, 3, 4, 4, 4).float(), drawn(2, 3, 4, 4, 4, seed=1).float(), torch.tensor([0.3, 9.0])
    cond = condition(2)
    both = edm.velocity_error(unet, clean, noise, sigma, cond)
    for i in range(2):
        own = ImageCondition(cond.embeds[i : i + 1], cond.latents[i : i + 1], cond.added_time_ids[i : i + 1])
        alone = edm.velocity_error(unet, clean[i : i + 1], noise[i : i + 1], sigma[i : i + 1], own)
        torch.testing.assert_close(alone[0], both[i], rtol=1e-4, atol=1e-6)


def fit(unet: VideoUNet, parameters: list[Tensor], clean: Tensor, cond: ImageCondition, steps: int) -> list[float]:
    optimizer, errors, generator = torch.optim.Adam(parameters, 3e-3), [], seeded(7)
    levels = edm.NoiseLevels(mean=0.0, std=1.6)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        sigma = levels.draw(len(clean), generator)
        error = edm.velocity_error(unet, clean, torch.randn(clean.shape, generator=generator), sigma, cond).mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    return errors


def test_two_clips_are_learnt_and_sampled():
    """After training with the objective alone, the sampler makes the right clip from each picture."""
    torch.manual_seed(0)
    unet = VideoUNet(unets(32, 32)[0].config)
    clean, cond = drawn(2, 2, 4, 4, 4, seed=3).float(), condition(2)
    errors = fit(unet, list(unet.parameters()), clean, cond, 250)
    assert sum(errors[-20:]) < 0.5 * sum(errors[:20]), (errors[:3], errors[-3:])
    noise = torch.randn(clean.shape, generator=seeded(11))
    made = sample(unet.denoiser(cond), euler_scheduler(), noise, 15)
    distance = (made[:, None] - clean[None]).square().flatten(2).mean(2)  # [made, clip]
    assert distance.diagonal().max() < 0.25 * distance.flip(1).diagonal().min(), distance


# ---- low-rank updates ------------------------------------------------------------------------------------------------


def test_an_update_starts_as_no_change_and_is_taken_off_again():
    unet, _ = unets(32, 64)
    before = copy.deepcopy(unet.state_dict())
    clean, cond = drawn(2, 3, 4, 4, 4).float(), condition(2)
    arguments = (clean, drawn(2, 3, 4, 4, 4, seed=1).float(), torch.tensor([0.5, 3.0]), cond)
    expected = edm.velocity_error(unet, *arguments)
    updates = low_rank.add_updates(unet, rank=2)
    layers = {key.replace("|", ".") for key in updates}
    # Two levels of one layer: one transformer down, one in the middle, two up; four products each.
    assert len(layers) == 16 and all(".temporal_transformer_blocks.0.attn1.to_" in path for path in layers)
    assert torch.equal(edm.velocity_error(unet, *arguments), expected)
    assert not any(p.requires_grad for n, p in unet.named_parameters() if ".parametrizations." not in n)
    low_rank.remove_updates(unet)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    for rank, pattern, message in ((0, ".+", "rank=0"), (2, "none", "no linear layer whose path matches none")):
        with pytest.raises(ReducioError, match=message):
            low_rank.add_updates(unet, rank, pattern)


def test_a_trained_update_is_loaded_as_pefts(tmp_path: Path):
    """It learns; its file gives the same output, merged by our pipeline or loaded into diffusers' U-Net by peft."""
    from diffusers import StableVideoDiffusionPipeline
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    from reducio_fast.pipelines.peers.models import PEERS, build_random

    theirs: StableVideoDiffusionPipeline = build_random(PEERS["svd"], True, torch.float32, torch.device("cpu"))
    pipe = SVDPipeline.from_diffusers(copy.deepcopy(theirs), backend="reference")
    unet = pipe.unet
    generator = seeded(5)
    cond = ImageCondition(
        torch.randn(2, 1, 32, generator=generator),
        torch.randn(2, 4, 4, 4, generator=generator),
        torch.tensor([[6.0, 127, 0.02]] * 2),
    )
    clean = drawn(2, 3, 4, 4, 4, seed=3).float()
    updates = low_rank.add_updates(unet, rank=4)
    before = {n: p.clone() for n, p in unet.named_parameters() if ".parametrizations.weight.0" not in n}
    errors = fit(unet, list(updates.parameters()), clean, cond, 25)
    assert sum(errors[-5:]) < sum(errors[:5])
    assert all(torch.equal(p, before[n]) for n, p in unet.named_parameters() if n in before), "the weights are frozen"
    file = low_rank.save_updates(updates, tmp_path)
    inputs = {
        "sample": drawn(1, 3, 8, 4, 4, seed=9).float(),
        "timestep": torch.tensor(0.4),
        "encoder_hidden_states": cond.embeds[:1],
        "added_time_ids": cond.added_time_ids[:1],
    }
    with torch.no_grad():
        trained = unet(**inputs)
        low_rank.remove_updates(unet)
        plain = unet(**inputs)
        pipe.load_lora_weights(file)
        merged = pipe.unet(**inputs)
        names = [key.replace("|", ".") for key in updates]
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=names), theirs.unet)
        from safetensors.torch import load_file

        state = {n.removeprefix("unet."): t for n, t in load_file(file).items()}
        assert not set_peft_model_state_dict(theirs.unet, state).unexpected_keys
        peft = theirs.unet(**inputs).sample
    assert (trained - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(peft, trained, rtol=1e-4, atol=1e-5)


def test_recomputed_activations_of_a_lora():
    """They give the same gradients, and less is kept for the backward pass: counted without contents."""
    from reducio_fast.memory.dry_run import DryRun
    from reducio_fast.training.svd.lora import LoRARecipe, add_trained

    def error(unet: VideoUNet, device: str, size: int) -> Tensor:
        cond, clean = condition(2, size), drawn(2, 3, 4, size, size).float()
        cond = cond.to(torch.device(device), torch.float32)
        sigma = torch.tensor([0.5, 3.0])
        return edm.velocity_error(unet, *(x.to(device) for x in (clean, clean.flip(1), sigma)), cond).mean()

    gradients, kept = [], []
    for checkpointing in (False, True):
        recipe = LoRARecipe(loop=LoopConfig(steps=1, learning_rate=1.0), batch=1, gradient_checkpointing=checkpointing)
        unet, _ = unets(32, 64)
        torch.manual_seed(0)
        updates = add_trained(unet, recipe)
        for update in updates.values():
            update.up.data.normal_()
        error(unet, "cpu", 4).backward()
        gradients.append([p.grad for p in updates.parameters()])
        empty = VideoUNet(unet.config).to("meta")
        add_trained(empty, recipe)
        with DryRun() as dry:
            _result = error(empty, "meta", 32)
        kept.append(dry.live)
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*gradients, strict=True))
    assert kept[1] < 0.25 * kept[0], kept


def test_convolutions_of_few_frames_are_in_float32_when_recomputed_too(monkeypatch: pytest.MonkeyPatch):
    """Recomputed in bfloat16, they would not fit what the backward pass expects."""
    from reducio_fast.training.mixed_precision import autocast
    from reducio_fast.training.recompute import recompute

    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True, "avx512_bf16": True}, raising=False)
    video, gradients = drawn(1, 2, 3, 64, 64).float(), []
    for recomputes in (False, True):
        torch.manual_seed(0)
        conv = torch.nn.Conv3d(2, 2, 3, padding=1)
        if recomputes:
            recompute([conv])
        with autocast(torch.device("cpu")):
            output = conv(video)
            assert (conv.weight[0, 0, 0] @ conv.weight[0, 0, 0]).dtype == torch.bfloat16
        output.square().mean().backward()
        assert output.dtype == torch.float32
        gradients.append(conv.weight.grad)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_the_recipe_of_a_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The command trains from videos and writes a file that the pipeline loads; stopped and resumed, it is the same."""
    import numpy as np
    from safetensors.torch import load_file

    from reducio_fast.cli.main import main
    from reducio_fast.data import toy_world
    from reducio_fast.data.curation import manifest
    from reducio_fast.media.video_files import write_video
    from reducio_fast.pipelines.peers.models import PEERS, build_random

    build_random(PEERS["svd"], True, torch.float32, torch.device("cpu")).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    write_video(toy_world.render(toy_world.sample_scene(rng), rng, 64, 12), tmp_path / "clip.mp4", 7)
    row = dict.fromkeys(manifest.COLUMNS) | {"id": "clip", "video": str(tmp_path / "clip.mp4"), "fps": 7.0}
    manifest.write([row | {"start": 0, "end": 12, "height": 64, "width": 64}], tmp_path / "clips.parquet")
    argv = [
        "train",
        "svd-lora",
        "--model",
        f"{tmp_path}/model",
        "--clips",
        f"{tmp_path}/clips.parquet",
        "--no-progress",
    ]
    argv += ["--recipe", "svd-lora"]
    changes = ("batch=2", "rank=2", "size=[16, 24]", "num_frames=3", "threads=1")
    changes += ("loop.steps=4", "loop.warmup_steps=1", "loop.micro_batches=2", "loop.log_every=1", "loop.ema_decay=0.0")
    argv += [w for change in changes for w in ("--set", change)]
    assert main([*argv, "--out", f"{tmp_path}/whole", "--set", "loop.checkpoint_every=4"]) == 0
    trained = load_file(tmp_path / "whole" / "lora" / "pytorch_lora_weights.safetensors")
    assert any(t.abs().max() > 0 for n, t in trained.items() if n.endswith("lora_B.weight"))
    for seconds in ("0.0001", "1000"):  # stopped after one step, then to the end
        stop = ["--set", "loop.checkpoint_every=1", "--set", f"loop.max_seconds={seconds}"]
        assert main([*argv, "--out", f"{tmp_path}/parts", *stop]) == 0
    again = load_file(tmp_path / "parts" / "lora" / "pytorch_lora_weights.safetensors")
    assert trained.keys() == again.keys() and all(torch.equal(t, again[n]) for n, t in trained.items())
    moved = [word.replace(f"{tmp_path}/model", f"{tmp_path}/parts/../model") for word in argv]
    assert main([*moved, "--out", f"{tmp_path}/parts"]) == 0  # the same weights by another path
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main([*argv, "--out", f"{tmp_path}/parts"]) == 2
    assert "made with model={" in capsys.readouterr().err
    weights.write_bytes(whole)
    for change, message in (
        ("mirror=true", "made with mirror=False, this run has mirror=True"),
        ("rate=8", "rate=7.0"),
    ):
        assert main([*argv, "--out", f"{tmp_path}/parts", "--set", change]) == 2
        assert message in capsys.readouterr().err
    pipe = SVDPipeline.from_pretrained(tmp_path / "model", device="cpu", backend="reference")
    pipe.load_lora_weights(tmp_path / "whole" / "lora")
    assert main([*argv, "--out", f"{tmp_path}/bad", "--set", "size=[15, 24]"]) == 2
