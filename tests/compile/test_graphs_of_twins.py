"""The fast twins through graphs, recorded on a CPU and captured on a GPU."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from recorded_graphs import Recorder
from reducio_fast.checkpoints.published_svd import SCHEDULER
from reducio_fast.compile.graphs import Graphs
from reducio_fast.fast import sampler
from reducio_fast.fast.engine import Engine
from reducio_fast.reference import Condition, DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from reducio_fast.reference.sampler import StopSampling
from reducio_fast.reference.svd.sampler import EndConditions, ImageCondition
from tiny_svd import unets


def networks(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[ReducioDiT, ReducioVAE]:
    """Narrow networks with every branch active and with head sizes that the kernels support."""
    dit = ReducioDiT(
        DiTConfig(
            hidden_size=128,
            depth=3,
            num_heads=2,
            caption_channels=20,
            caption_length=7,
            semantic_channels=24,
            position_base_size=4,
        )
    )
    vae = ReducioVAE(
        VAEConfig(
            base_channels=16, channel_multipliers=(1, 1, 1, 1, 2, 2), content_base_channels=16,
            content_channel_multipliers=(1, 1, 1, 2), norm_groups=4, num_heads=1, fusion_head_dim=16, num_res_blocks=1,
            tile_size=64, tile_overlap=0.5,
        )
    )  # fmt: skip
    for network in (dit, vae):
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.data.normal_().div_(fan_in**0.5).add_(1.0 if parameter.ndim == 1 else 0.0)
        network.requires_grad_(False).eval().to(device, dtype)
    return dit, vae


def condition(device: str = "cpu", dtype: torch.dtype = torch.float32, cells: int = 4) -> tuple[Tensor, Condition]:
    """Noise of one clip, and its conditioning inputs."""
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]], device=device)
    text, semantic, content = draw(1, 7, 20), draw(1, 6, 24), draw(1, 4, 4 * cells, 4 * cells)
    return draw(1, 16, 4, cells, cells), Condition(text.to(dtype), mask, semantic.to(dtype), content.to(dtype))


class Twins(NamedTuple):
    transformer: Any
    vae: Any


def twins_of(engine: Engine, dit: ReducioDiT, vae: ReducioVAE) -> Twins:
    return Twins(engine.twin(dit), engine.twin(vae))


def sample(model, scheduler, noise, cond, uncond=None, guidance_scale=4.5, num_inference_steps=20, callback=None):
    denoise = model.denoiser(cond, uncond, guidance_scale)
    return sampler.sample(denoise, scheduler, noise, num_inference_steps, callback)


def pairs(device: str, dtype: torch.dtype, graphs: Graphs | None) -> tuple[Twins, Twins]:
    """The same twins twice: eager, and through graphs."""
    parts = networks(device, dtype)
    eager, graphed = twins_of(Engine(), *parts), twins_of(Engine(graphs=graphs), *parts)
    eager.transformer.graphs = eager.vae.graphs = None
    return eager, graphed


def walk(eager: Twins, graphed: Twins, device: str, dtype: torch.dtype) -> None:
    """Change everything that may change between clips and steps; results with and without graphs are bit-equal."""

    def stop(step: int, timestep: Tensor, latent: Tensor) -> None:
        if step == 2:
            raise StopSampling

    def replace(step: int, timestep: Tensor, latent: Tensor) -> Tensor | None:
        return latent.flip(-1) if step == 1 else None

    seen: list[Tensor] = []
    for callback, guidance, cells in (
        (None, 4.5, 4),
        (None, 4.5, 2),
        (stop, 7.0, 4),
        (None, 1.0, 2),
        (replace, 1.5, 4),
        (lambda step, timestep, latent: seen.append(latent), 4.5, 4),
    ):
        noise, cond = condition(device, dtype, cells)
        expected, actual = (
            sample(twins.transformer, DPMSolverMultistepScheduler(), noise, cond, None, guidance, 4, callback)
            for twins in (eager, graphed)
        )
        assert torch.equal(actual, expected)
    # Every latent that a callback received still has its value.
    assert all(torch.equal(one, other) for one, other in zip(seen[:4], seen[4:], strict=True))
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        image = torch.rand(1, 3, 64, 96, generator=g).to(device, dtype)
        latent = torch.randn(1, 16, 4, 2, 3, generator=g).to(device, dtype)
        expected, actual = (
            twins.vae.decode(latent, twins.vae.encode_content(image, tiled=True), tiled=True)
            for twins in (eager, graphed)
        )
        assert torch.equal(actual, expected)


@pytest.mark.slow
def test_sampler_and_decoder_through_graphs(graphs: Graphs, recorder: Recorder) -> None:
    eager, graphed = pairs("cpu", torch.float32, graphs)
    walk(eager, graphed, "cpu", torch.float32)
    description = graphs.describe()
    names = [graph["name"] for graph in description["graphs"]]
    assert names.count("dit.step") == 3  # guided in two sizes and not guided in one; the scale is not part of the key
    assert names.count("vae.decode") == 2 and names.count("vae.encode_content") == 2  # tiles of 64x96 and 64x32
    assert description["misses"] == {"first sight": 7}
    # Steps: 4 + 4 + 3 + 4 + 4 + 4, less three first sights. Tiles: those of two of the three clips.
    assert {name: sum(g["hits"] for g in description["graphs"] if g["name"] == name) for name in names} == {
        "dit.step": 20,
        "vae.encode_content": 4,
        "vae.decode": 4,
    }


def svd_condition(seed: int, device: str) -> ImageCondition:
    g = torch.Generator().manual_seed(seed)
    embeds, latents = torch.randn(1, 1, 24, generator=g), torch.randn(1, 4, 8, 8, generator=g)
    return ImageCondition(embeds.to(device), latents.to(device), torch.tensor([[6.0, 127.0, 0.02]], device=device))


def walk_svd(graphs: Graphs, device: str, dtype: torch.dtype) -> None:
    """Clips of SVD with other images and scales of guidance, alone and with a last image, bit-equal to eager ones."""
    model = unets(32, 64)[0].to(device, dtype)
    eager, graphed = Engine().twin(model), Engine(graphs=graphs).twin(model)
    eager.graphs = None
    per_frame = torch.linspace(1, 3, 5)
    for seed, scale in enumerate((per_frame, 2 * per_frame, 3.0, 6.0, 1.0, per_frame + 1)):
        conditions = [svd_condition(seed + i, device) for i in range(2)]
        noise = torch.randn(1, 5, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)
        for cond in (conditions[0], EndConditions(*conditions)):
            expected, actual = (
                sample(unet, EulerDiscreteScheduler(**SCHEDULER), noise, cond, None, scale, 3)
                for unet in (eager, graphed)
            )
            assert torch.equal(actual, expected), (seed, type(cond).__name__)


def test_svd_through_graphs(graphs: Graphs, recorder: Recorder) -> None:
    walk_svd(graphs, "cpu", torch.float32)
    # With a scale per frame, with one for all, and without guidance; each for one image and for two.
    assert recorder.captures == 6 and graphs.describe()["hits"] == 30


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_real_graphs_of_svd_equal_eager(dtype: torch.dtype) -> None:
    walk_svd(Graphs(), "cuda", dtype)


@pytest.mark.slow
def test_bytes_through_graphs(graphs: Graphs) -> None:
    eager, graphed = pairs("cpu", torch.float32, graphs)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        image, latent = torch.rand(1, 3, 64, 64, generator=g), torch.randn(1, 16, 4, 2, 2, generator=g)
        expected, actual = (
            twins.vae.decode(latent, twins.vae.encode_content(image), as_uint8=True) for twins in (eager, graphed)
        )
        assert torch.equal(actual, expected)
    assert graphs.describe()["hits"] == 4


def test_changed_weights_end_their_graphs(graphs: Graphs) -> None:
    dit, vae = networks()
    engine = Engine(graphs=graphs)
    noise, cond = condition()
    args = (DPMSolverMultistepScheduler(), noise, cond, None, 4.5, 3)
    first = sample(twins_of(engine, dit, vae).transformer, *args)
    assert len(graphs.describe()["graphs"]) == 1
    with torch.no_grad():
        dit.transformer_blocks[0].ff.net[2].weight.mul_(2)
    second = sample(twins_of(engine, dit, vae).transformer, *args)
    assert not torch.equal(first, second)
    assert torch.equal(second, sample(twins_of(Engine(), dit, vae).transformer, *args))
    assert engine.describe()["graphs"]["resets"] == 1
    json.dumps(engine.describe())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_real_graphs_equal_eager(dtype: torch.dtype) -> None:
    """A denoising step and tiles, captured and replayed on a GPU: the same kernels, hence the same bytes."""
    graphs = Graphs()
    eager, graphed = pairs("cuda", dtype, graphs)
    walk(eager, graphed, "cuda", dtype)
    description = graphs.describe()
    assert description["failures"] == [] and set(description["misses"]) == {"first sight"}
    names = [graph["name"] for graph in description["graphs"]]
    assert names.count("dit.step") == 3 and "vae.decode" in names and "vae.encode_content" in names
    assert description["pool_bytes"] > 0
    held = torch.cuda.memory_allocated()
    graphs.reset()
    assert torch.cuda.memory_allocated() < held and graphs.describe()["pool_bytes"] == 0


@pytest.mark.gpu
def test_a_capture_that_the_device_forbids_leaves_it_usable() -> None:
    graphs, x = Graphs(), torch.ones(4, device="cuda")

    def reads_back(x: Tensor) -> Tensor:
        return x * float(x.sum())

    stream = torch.cuda.current_stream()
    for _ in range(3):
        assert graphs("reads back", reads_back, x).tolist() == [4.0] * 4
    assert torch.cuda.current_stream() == stream
    assert graphs.describe()["misses"] == {"first sight": 1, "capture failed": 2}
    for _ in range(3):
        assert graphs("double", lambda x: 2 * x, x).tolist() == [2.0] * 4
    assert graphs.describe()["hits"] == 2


@pytest.mark.gpu
def test_streams_do_not_share_buffers() -> None:
    graphs = Graphs()
    other = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), other):
        with torch.cuda.stream(stream):
            for i in range(3):
                x = torch.full((1 << 20,), float(i), device="cuda")
                assert torch.equal(graphs("double", lambda x: 2 * x, x), 2 * x)
    assert len(graphs.describe()["graphs"]) == 2
