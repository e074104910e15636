"""The fast twins against the reference: every configuration of both networks, the sampler, and the pipeline on top.

The oracle is the reference in float64, eager is the reference in float32, the rule is that of `accuracy_rule`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from reducio_fast import reference as ref
from reducio_fast.fast import sampler as fast_sampler
from reducio_fast.fast.reducio.dit import FastReducioDiT
from reducio_fast.fast.reducio.vae import FastReducioVAE
from reducio_fast.reference import Condition, DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from reducio_fast.reference.sampler import StopSampling
from tiny_networks import DIT, VAE, assert_right, lively, plan

pytestmark = pytest.mark.slow

# ---- the transformer -------------------------------------------------------------------------------------------------


def dit_inputs(config: DiTConfig, batch: int = 2, grid: tuple[int, int, int] = (4, 4, 4)) -> dict:
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, config.caption_length, dtype=torch.int64)
    mask[1:, -2:] = 0
    return {
        "latent": torch.randn(batch, config.latent_channels, *grid, generator=g),
        "timestep": torch.tensor(400.0),
        "text": torch.randn(batch, config.caption_length, config.caption_channels, generator=g),
        "text_mask": mask,
        "semantic": torch.randn(batch, 6, config.semantic_channels, generator=g),
        "content": torch.randn(batch, config.content_channels, 4 * grid[1], 4 * grid[2], generator=g),
        "clip": torch.tensor([[12.0, 3.0]]).expand(batch, 2) if config.clip_conditioning else None,
    }


def double(values: dict) -> dict:
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in values.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learn_sigma": False},
        {"attention": "2d+1d"},
        {"content_groups": 4},
        {"patch_size": (1, 2, 2)},
        {"patch_size": (2, 1, 1), "depth": 1},
        {"size_conditioning": True},
        {"clip_conditioning": True},
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "default",
)
def test_transformer(changes: dict) -> None:
    config = DiTConfig(**(DIT | changes))
    model, given = lively(ReducioDiT(config)), dit_inputs(config)
    oracle = copy.deepcopy(model).double()(**double(given))[:, : config.latent_channels]
    eager = model(**given)[:, : config.latent_channels]
    assert_right(FastReducioDiT(model, plan())(**given), eager, oracle)
    if config.clip_conditioning:
        other = model(**given | {"clip": 2 * given["clip"]})[:, : config.latent_channels]
        assert (other - eager).abs().max() > 1e-2, "what it is told of the clip matters"
        with pytest.raises(ValueError, match="clip differs between the items"):
            FastReducioDiT(model, plan())(**given | {"clip": torch.tensor([[12.0, 3.0], [16.0, 3.0]])})


def test_transformer_hides_any_masked_token() -> None:
    """The mask becomes a count: hidden tokens in the middle, whose values must not matter, are moved to the end."""
    model = lively(ReducioDiT(DiTConfig(**DIT)))
    given = dit_inputs(model.config)
    given["text_mask"] = torch.tensor([[1, 0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 1, 0, 1]])
    fast = FastReducioDiT(model, plan())
    first = fast(**given)
    assert_right(first, model(**given)[:, :16], copy.deepcopy(model).double()(**double(given))[:, :16])
    given["text"][given["text_mask"] == 0] = 1e4
    assert torch.equal(fast(**given), first)


def test_transformer_without_mask_or_image() -> None:
    model = lively(ReducioDiT(DiTConfig(**DIT)))
    given = {k: v for k, v in dit_inputs(model.config).items() if k in ("latent", "timestep", "text")}
    oracle = copy.deepcopy(model).double()(**double(given))
    assert_right(FastReducioDiT(model, plan())(**given), model(**given)[:, :16], oracle[:, :16])


def test_positions_are_kept_of_the_last_sizes_alone() -> None:
    """One table per size takes 18.9 MB at 1024x1024: a server that sees many sizes keeps eight."""
    fast = FastReducioDiT(lively(ReducioDiT(DiTConfig(**DIT))), plan())
    timesteps = torch.tensor([400.0])
    first = fast.modulations(timesteps, (4, 1, 1)).position
    for width in range(1, 40):
        table = fast.modulations(timesteps, (4, 2, width)).position
        assert torch.equal(table, fast.pos_embed.position(4, 2, width, timesteps.device))
        again = fast.modulations(timesteps, (4, 2, width)).position
        assert again is table, "of a size that stays, the graph's copy stays too"
    assert len(fast.positions) == 8
    assert torch.equal(fast.modulations(timesteps, (4, 1, 1)).position, first)


def test_halves_of_guidance_share_their_start() -> None:
    """One latent for both halves gives what a doubled latent gives, within 1e-12 in float64."""
    model = lively(ReducioDiT(DiTConfig(**DIT))).double()
    fast, given = FastReducioDiT(model, plan(torch.float64)), double(dit_inputs(model.config))
    prepared = fast.prepare(*(given[k] for k in ("text", "text_mask", "semantic", "content")))
    modulation = fast.modulations(torch.tensor([400.0]).double(), given["latent"].shape[2:])
    half = given["latent"][:1]
    shared = fast.denoise(half, modulation, prepared)
    apart = fast.denoise(half.repeat(2, 1, 1, 1, 1), modulation, prepared)
    torch.testing.assert_close(shared, apart, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(shared[0], shared[1])


def test_transformer_refuses_what_a_table_cannot_hold() -> None:
    model = lively(ReducioDiT(DiTConfig(**DIT)))
    given = dit_inputs(model.config)
    with pytest.raises(ValueError, match="timestep differs between the items"):
        FastReducioDiT(model, plan())(**(given | {"timestep": torch.tensor([1.0, 2.0])}))
    with pytest.raises(ValueError, match="semantic has shape"):
        FastReducioDiT(model, plan())(**(given | {"semantic": given["semantic"][..., :5]}))


# ---- the autoencoder -------------------------------------------------------------------------------------------------

VAE_CASES = {
    "attn": {},
    "add": {"fusion": "add"},
    "linear": {"fusion": "linear"},
    "add+attn": {"fusion": "add+attn"},
    "causal": {"causal": True},
    "causal linear": {"causal": True, "fusion": "linear"},
    "ft2": {"temporal_factor": 2},
    "no blocks at full resolution": {
        "num_res_blocks": (0, 1, 1, 1, 1, 1),
        "fusion": ("attn", "add", "add", "add+attn", "attn", "attn"),
        "fusion_levels": (None, 1, 2, 3, None, None),
    },
    "windows": {"window_size": 8, "content_window_size": 4},
    "windows, padding masked": {"window_size": 5, "content_window_size": 3, "mask_window_padding": True},
    "sincos": {"fusion_position": "sincos"},
    "sincos, windows": {"fusion_position": "sincos", "window_size": 5, "mask_window_padding": True},
    "fused with the middle": {"fusion_levels": (None, None, 2, 4, None, None)},
    "warp": {"output": "warp"},
    "warp, causal, ft2": {"output": "warp", "causal": True, "temporal_factor": 2, "fusion": "add"},
}


def run_vae(vae: ReducioVAE | FastReducioVAE, clip: torch.Tensor, tiled: bool = False) -> list[torch.Tensor]:
    """Moments, and a decoded clip."""
    posterior = vae.encode(clip, tiled=tiled)
    content = vae.encode_content(clip[:, :, vae.config.content_frame], tiled=tiled)
    latent = vae.normalize_latent(posterior.mode())
    return [posterior.mean, posterior.logvar, vae.decode(latent, content, tiled=tiled)]


@pytest.mark.parametrize("case", VAE_CASES)
@torch.no_grad()
def test_autoencoder(case: str) -> None:
    model = lively(ReducioVAE(VAEConfig(**(VAE | VAE_CASES[case]))))
    clip = torch.rand(2 if case == "attn" else 1, 3, 16, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    oracle = run_vae(copy.deepcopy(model).double(), clip.double())
    fast, eager = run_vae(FastReducioVAE(model, plan()), clip), run_vae(model, clip)
    for one, two, three in zip(fast, eager, oracle, strict=True):
        assert_right(one, two, three)


@pytest.mark.parametrize(("size", "output"), [((96, 160), "warp"), ((128, 64), "rgb")], ids=str)
@torch.no_grad()
def test_tiled_autoencoder(size: tuple[int, int], output: str) -> None:
    """Border tiles of other sizes, blending, and content features cut to the latent's grid."""
    model = lively(ReducioVAE(VAEConfig(**VAE, tile_size=64, tile_overlap=0.5, output=output)))
    clip = torch.rand(1, 3, 16, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    oracle = run_vae(copy.deepcopy(model).double(), clip.double(), tiled=True)
    twin = FastReducioVAE(model, plan())
    fast, eager = run_vae(twin, clip, tiled=True), run_vae(model, clip, tiled=True)
    for one, two, three in zip(fast, eager, oracle, strict=True):
        assert_right(one, two, three)
    latent = model.normalize_latent(eager[0])
    frames = twin.decode(latent, twin.encode_content(clip[:, :, 7], tiled=True), tiled=True, as_uint8=True)
    expected = ((oracle[2] + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 4, 1)
    assert frames.dtype == torch.uint8 and frames.shape == (1, 16, *size, 3)
    assert (frames.double() - expected).abs().max() < 0.51


def test_tiles_of_one_shape_go_together() -> None:
    """A batch of tiles decodes to the same frames as one tile after the other."""
    model = lively(ReducioVAE(VAEConfig(**VAE, tile_size=64, tile_overlap=0.5)))
    clip = torch.rand(1, 3, 16, 128, 192, generator=torch.Generator().manual_seed(1)) * 2 - 1
    fast = FastReducioVAE(model, plan())
    latent, features = torch.randn(1, 16, 4, 4, 6), fast.encode_content(clip[:, :, 7], tiled=True)
    alone, batches = fast.decode(latent, features, tiled=True), []

    def counted(name: str, fn: Callable[..., Any], latent: Tensor, *args: Any, keep: bool = True) -> Any:
        batches.append(len(latent))
        return fn(latent, *args)

    fast.tile_batch, fast.graphs = 2, counted
    torch.testing.assert_close(fast.decode(latent, features, tiled=True), alone, rtol=1e-4, atol=1e-4)
    assert sum(batches) == 6 and max(batches) == 2


def test_autoencoder_refuses_what_the_reference_refuses() -> None:
    fast = FastReducioVAE(lively(ReducioVAE(VAEConfig(**VAE))), plan())
    with pytest.raises(ValueError, match="height 60 is not a multiple of 32"):
        fast.encode(torch.zeros(1, 3, 16, 60, 64))
    with pytest.raises(ValueError, match="needs the features of encode_content"):
        fast.decode(torch.zeros(1, 16, 4, 2, 2), fast.encode_content(torch.zeros(1, 3, 64, 64)), tiled=True)


def test_dead_weights_are_not_packed() -> None:
    fast = FastReducioVAE(lively(ReducioVAE(VAEConfig(**VAE))), plan())
    assert not any("encoder_2d.mid.block_2" in name or "encoder_2d.norm_out" in name for name in fast.state_dict())


# ---- the sampler -----------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "dpm++ 2m": DPMSolverMultistepScheduler,
    "dpm++ 2m, flow": lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    "flow euler": FlowMatchEulerDiscreteScheduler,
    "edm euler": EulerDiscreteScheduler,
}


def sample(model, scheduler, noise, cond, uncond=None, guidance_scale=4.5, num_inference_steps=20, callback=None):
    denoise = model.denoiser(cond, uncond, guidance_scale)
    return ref.sample(denoise, scheduler, noise, num_inference_steps, callback)


def fast_sample(model, scheduler, noise, cond, uncond=None, guidance_scale=4.5, num_inference_steps=20, callback=None):
    denoise = model.denoiser(cond, uncond, guidance_scale)
    return fast_sampler.sample(denoise, scheduler, noise, num_inference_steps, callback)


def sampling(steps: int = 4) -> tuple[ReducioDiT, torch.Tensor, Condition]:
    model = lively(ReducioDiT(DiTConfig(**DIT)))
    given = dit_inputs(model.config, batch=1)
    return model, given["latent"], Condition(*(given[k] for k in ("text", "text_mask", "semantic", "content")))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_sampler(name: str, guidance: float) -> None:
    model, noise, cond = sampling()
    exact = copy.deepcopy(model).double()
    wide = Condition(cond.text.double(), cond.text_mask, cond.semantic.double(), cond.content.double())
    oracle = sample(exact, SCHEDULERS[name](), noise.double(), wide, None, guidance, 4)
    eager = sample(model, SCHEDULERS[name](), noise, cond, None, guidance, 4)
    fast = fast_sample(FastReducioDiT(model, plan()), SCHEDULERS[name](), noise, cond, None, guidance, 4)
    assert_right(fast, eager, oracle)


def test_sampler_callbacks() -> None:
    model, noise, cond = sampling()
    fast, scheduler = FastReducioDiT(model, plan()), DPMSolverMultistepScheduler()
    seen = []
    fast_sample(fast, scheduler, noise, cond, None, 4.5, 3, lambda i, t, x: seen.append((i, float(t))))
    assert seen == [(i, float(t)) for i, t in enumerate(scheduler.timesteps)]

    def stop(i: int, t: torch.Tensor, x: torch.Tensor) -> None:
        if i == 1:
            raise StopSampling

    def halve(i: int, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x / 2

    exact = copy.deepcopy(model).double()
    wide = Condition(cond.text.double(), cond.text_mask, cond.semantic.double(), cond.content.double())
    for callback in (stop, halve):
        args = None, 4.5, 3, callback
        oracle = sample(exact, DPMSolverMultistepScheduler(), noise.double(), wide, *args)
        eager = sample(model, DPMSolverMultistepScheduler(), noise, cond, *args)
        assert_right(fast_sample(fast, DPMSolverMultistepScheduler(), noise, cond, *args), eager, oracle)


def test_sampler_errors() -> None:
    model, noise, cond = sampling()
    fast = FastReducioDiT(model, plan())
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        fast_sample(fast, DPMSolverMultistepScheduler(), noise, cond, num_inference_steps=0)
    with pytest.raises(ValueError, match="not finite .* from step 1 of 3"):
        fast_sample(fast, DPMSolverMultistepScheduler(), noise * torch.nan, cond, num_inference_steps=3)
    with pytest.raises(ValueError, match="EulerDiscrete"):
        fast_sample(fast, DDIMScheduler(), noise, cond, num_inference_steps=3)
