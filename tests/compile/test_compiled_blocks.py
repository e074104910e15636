"""Regional compilation: its bookkeeping, no graph breaks, no recompiles over all sizes, and one real compilation.

Tests of breaks and recompiles really trace the blocks. They count the graphs and run them as they are, since C++ code
for each of a hundred shapes would take an hour.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reducio_fast import ReducioPipeline
from reducio_fast.compile import artifacts, compiled_blocks
from reducio_fast.compile.compiled_blocks import Regions, connect
from reducio_fast.fast.packed_layers import Activation, Padding
from reducio_fast.fast.plan import Plan
from reducio_fast.fast.reducio.dit import FastReducioDiT
from reducio_fast.fast.reducio.vae import FastReducioVAE
from reducio_fast.measurement.accuracy_rule import judge
from reducio_fast.media.aspect_buckets import BASES, buckets
from reducio_fast.memory.dry_run import DryRun
from reducio_fast.reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from reducio_fast.reference.reducio.tiling import tile_grid
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow

DIT = dict(
    hidden_size=32,
    depth=3,
    num_heads=2,
    caption_channels=8,
    caption_length=5,
    semantic_channels=8,
    position_base_size=4,
)
VAE = dict(
    base_channels=8, channel_multipliers=(1, 1, 1, 1, 2, 2), content_base_channels=8,
    content_channel_multipliers=(1, 1, 1, 2), norm_groups=4, num_heads=1, fusion_head_dim=8, num_res_blocks=1,
    tile_size=64, tile_overlap=0.5,
)  # fmt: skip
SIZES = [size for base in BASES for size in buckets(base, 32)]


class Counting:
    """A stand-in for the compiler: `made` counts its functions, `traced` its graphs, each of a whole function."""

    def __init__(self, trace: bool = True) -> None:
        self.trace, self.made, self.traced = trace, 0, 0

    def __call__(self, fn: Callable[..., Any], tensors: Sequence[Tensor], free: Collection[int]) -> Callable[..., Any]:
        self.made += 1
        if not self.trace:
            return fn
        graph = artifacts.trace(fn, tensors, free)
        self.traced += 1
        return graph


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """Compiled code is for inference: with gradients blocks run as they are, which another test checks."""
    with torch.no_grad():
        yield


def lively(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.copy_(torch.randn(parameter.shape) / fan_in**0.5 + (1.0 if parameter.ndim == 1 else 0.0))
    return network.requires_grad_(False).eval()


def step(dit: FastReducioDiT, cells: tuple[int, int] = (2, 2), device: str = "cpu") -> Tensor:
    """One guided denoising step of a clip of `cells` (height, width) latent cells."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]]).to(device)
    h, w = cells
    prepared = dit.prepare(draw(2, 5, 8), mask, draw(2, 4, 8), draw(2, 4, 4 * h, 4 * w))
    modulation = dit.modulations(draw(1), (4, h, w))
    with torch.no_grad():
        return dit.denoise(draw(1, 16, 4, h, w), modulation, prepared)


def clip(vae: FastReducioVAE, size: tuple[int, int] = (64, 64), device: str = "cpu") -> Tensor:
    """A decoded clip."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
    h, w = size
    return vae.decode(draw(1, 16, 4, h // 32, w // 32), vae.encode_content(draw(1, 3, h, w)))


# ---- bookkeeping -----------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor, self.weight = factor, nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        return self.factor * x * self.weight + shift


def test_siblings_share_what_is_compiled() -> None:
    compiler = Counting()
    regions, first, second = Regions(compiler), Scale(), Scale()
    second.weight.data += 1
    x = torch.randn(2, 3)
    for module in (first, second, first):
        assert torch.equal(regions("scale", module, x), module(x))
    assert (compiler.made, compiler.traced) == (1, 1)
    assert torch.equal(regions("scale", Scale(3.0), x), 3 * x)
    assert torch.equal(regions("scale", first, x, shift=1.0), 2 * x + 1)
    assert torch.equal(regions("scale", first, x[:1]), 2 * x[:1])
    assert torch.equal(regions("scale", first, x.double()), 2 * x.double())
    assert (compiler.made, compiler.traced) == (5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(regions("scale", first, x.double()), 2 * x.double())
    assert torch.equal(regions("scale", first, x.double()), 2 * x.double())
    assert (compiler.made, compiler.traced) == (6, 6)
    description = regions.describe()
    assert description["regions"]["scale"]["compiled"] == 6 and description["regions"]["scale"]["calls"] == 9
    assert description["misses"] == {} and description["failures"] == []
    json.dumps(description)


def test_beyond_the_limit_or_the_deadline_blocks_run_as_they_are() -> None:
    compiler = Counting(trace=False)
    regions, module = Regions(compiler, limit=2), Scale()
    for n in (1, 2, 3, 3, 1):
        assert torch.equal(regions("scale", module, torch.ones(n, 3)), torch.full((n, 3), 2.0))
    assert compiler.made == 2 and regions.describe()["misses"] == {"limit": 2}
    regions.limit, regions.open = 9, False
    regions("scale", module, torch.ones(4, 3)), regions("scale", module, torch.ones(1, 3))
    assert compiler.made == 2 and regions.describe()["misses"] == {"limit": 2, "not compiled in time": 1}


def test_what_cannot_be_compiled_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    class Breaks(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.sum()) if bool(x.sum() > 0) else x

    regions, module = Regions(Counting()), Breaks()
    for _ in range(3):
        assert torch.equal(regions("breaks", module, torch.ones(3)), torch.full((3,), 3.0))
    description = regions.describe()
    assert description["misses"] == {"compilation failed": 3} and len(description["failures"]) == 1
    assert [r.levelno for r in caplog.records if r.name == "reducio_fast"] == [logging.WARNING]
    assert torch.equal(regions("scale", Scale(), torch.ones(3)), torch.full((3,), 2.0))


def test_errors_of_a_block_reach_the_caller() -> None:
    with pytest.raises(RuntimeError, match="size"):
        Regions(Counting())("scale", Scale(), torch.ones(2, 4))


def test_without_a_compiler_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    import torch._inductor.config as config

    with config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        regions = Regions()
    for _ in range(3):
        assert torch.equal(regions("scale", Scale(), torch.ones(3)), torch.full((3,), 2.0))
    assert [r.getMessage() for r in caplog.records if "compiler" in r.getMessage()] == [caplog.records[0].getMessage()]
    assert "no C++ compiler" in caplog.text and regions.describe()["misses"] == {"no compiler": 3}


# ---- breaks and recompiles -------------------------------------------------------------------------------------------


def plan(monkeypatch: pytest.MonkeyPatch, kernels: bool) -> Plan:
    """As on a CPU, or with the registered ops, which stand for our kernels in a GPU's graph."""
    if kernels:
        monkeypatch.setattr(Plan, "_decide", lambda self, op, shape: ("kernel", "as on a GPU"))
    return Plan(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("attention", "kernels"), [("3d", False), ("3d", True), ("2d+1d", False)], ids=["3d", "3d, kernels", "2d+1d"]
)
def test_transformer_blocks_have_no_breaks(attention: str, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(ReducioDiT(DiTConfig(**DIT, attention=attention)))
    dit = FastReducioDiT(model, plan(monkeypatch, kernels))
    expected, compiler = step(dit), Counting()
    connect(dit, regions := Regions(compiler))
    assert torch.equal(step(dit), expected) and torch.equal(step(dit), expected)
    assert (compiler.made, compiler.traced) == (1, 1)  # one for all blocks
    assert regions.describe()["misses"] == {} and regions.describe()["regions"]["dit.block"]["calls"] == 6


EVERY_FUSION = {
    "fusion": ("attn", "add", "linear", "add+attn", "attn", "attn"),
    "fusion_levels": (None, 1, 2, 3, None, None),
}
WINDOWS = {"causal": True, "window_size": 8, "content_window_size": 4}


@pytest.mark.parametrize(
    ("changes", "kernels"), [(EVERY_FUSION, True), (WINDOWS, False)], ids=["every fusion, kernels", "causal, windows"]
)
def test_levels_have_no_breaks(changes: dict[str, Any], kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = FastReducioVAE(lively(ReducioVAE(VAEConfig(**VAE | changes))), plan(monkeypatch, kernels))
    expected, compiler = clip(vae, (32, 64)), Counting()
    connect(vae, regions := Regions(compiler))
    actual = clip(vae, (32, 64))
    assert judge(actual, expected, expected).right and torch.equal(clip(vae, (32, 64)), actual)
    description = regions.describe()
    assert description["misses"] == {}
    assert compiler.traced == compiler.made == sum(region["compiled"] for region in description["regions"].values())
    assert {name: region["calls"] for name, region in description["regions"].items()} == {
        "vae.encoder_level": 8,
        "vae.middle": 4,
        "vae.decoder_level": 12,
        "vae.norm_out": 2,
    }


def test_walking_through_sizes_recompiles_nothing() -> None:
    """One graph per number of latent cells, and no further graph on the second walk."""
    dit = FastReducioDiT(lively(ReducioDiT(DiTConfig(**DIT))), Plan(torch.device("cpu"), torch.float32))
    compiler = Counting()
    connect(dit, Regions(compiler))
    sizes = [(h // 32, w // 32) for h, w in buckets(256, 32)]
    for cells in sizes:
        step(dit, cells)
    once = compiler.traced
    assert once == compiler.made == len({h * w for h, w in sizes})
    for cells in sizes:
        step(dit, cells)
    assert compiler.traced == once


def test_every_bucket_has_its_code_after_one_walk() -> None:
    """All sizes at 256, 512 and 1024, with their tiles, on the meta device: keys without arithmetic. `DryRun` computes
    the form of each result once."""
    meta, compiler = torch.device("meta"), Counting(trace=False)
    assert len(SIZES) == 91
    # One width and no residual blocks: only the shapes matter.
    narrow = VAE | {
        "channel_multipliers": (1,) * 6,
        "content_channel_multipliers": (1,) * 4,
        "num_res_blocks": 0,
        "tile_size": 256,
        "tile_overlap": 0.25,
    }
    with meta:
        dit = FastReducioDiT(ReducioDiT(DiTConfig(**DIT | {"depth": 1})), Plan(meta, torch.float32))
        vae = FastReducioVAE(ReducioVAE(VAEConfig(**narrow)), Plan(meta, torch.float32))
    for network in (dit, vae):
        connect(network, Regions(compiler))
    tiles = set()
    for h, w in SIZES:
        tiled = max(h, w) > 320
        grid = tile_grid(torch.empty(h, w, device=meta), 256, 320) if tiled else [[torch.empty(h, w, device=meta)]]
        tiles |= {tuple(tile.shape) for row in grid for tile in row}

    def walk() -> None:
        for h, w in SIZES:
            step(dit, (h // 32, w // 32), "meta")
        for size in sorted(tiles):
            clip(vae, size, "meta")

    with DryRun():
        walk()
        once = compiler.made
        walk()
    assert compiler.made == once
    # Levels of one width share code where half the size of one tile is the full size of another.
    most = len({h * w for h, w in SIZES}) + regions_of(vae) * len(tiles)
    assert most / 2 < once <= most < compiled_blocks.LIMIT


def regions_of(vae: FastReducioVAE) -> int:
    """Regions of one tile: the levels and the middle of both networks, and the last norm."""
    return len(vae.encoder_2d.down) + 1 + len(vae.decoder.up) + 1 + 1


# ---- for real --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(artifacts.obstacle() is not None, reason="needs a C++ compiler")
def test_compiled_code_equals_eager() -> None:
    """Norm, activation and padding in Inductor's own loops, compiled only once."""
    vae = FastReducioVAE(lively(ReducioVAE(VAEConfig(**VAE))), Plan(torch.device("cpu"), torch.float32))
    norm, regions, given = (
        vae.decoder.norm_out,
        Regions(),
        (Activation(torch.randn(1, 4, 6, 5, 8)), Padding(1, 1, True)),
    )
    with torch.no_grad():
        eager, oracle = norm(*given), copy.deepcopy(norm).double()(Activation(given[0].x.double()), given[1])
        for _ in range(2):
            verdict = judge(regions("vae.norm_out", norm, *given), eager, oracle)
            assert verdict.right, str(verdict)
    description = regions.describe()
    assert description["misses"] == {} and description["regions"]["vae.norm_out"]["calls"] == 2


def test_pipelines_compile_by_choice(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Counting(trace=False)
    monkeypatch.setattr(artifacts, "compile_function", compiler)
    kwargs = {"device": "cpu", "dtype": "float32", "backend": "fast"}
    call = {"num_inference_steps": 1, "progress": False}
    plain = ReducioPipeline.from_pretrained(bundle, **kwargs)
    expected = plain("a red circle", **call)
    assert compiler.made == 0
    pipe = ReducioPipeline.from_pretrained(bundle, compile=True, **kwargs)
    actual = pipe("a red circle", **call)
    # Both run the same operations, but in the uncompiled transformer the halves of guidance part later.
    assert np.abs(actual.frames.astype(int) - expected.frames).max() <= 1
    assert np.array_equal(actual.content, expected.content)
    made = compiler.made
    regions = {"dit.block", "content.block", "content.middle", "content.level"}
    assert set(pipe.describe()["regions"]["regions"]) == regions
    pipe("a blue square", **call)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.add_(0.5)
    pipe("a red circle", **call)
    assert compiler.made == made  # neither another prompt nor other weights need other code
    stages = [stage.stage for stage in pipe.forecast(64, 64).stages if stage.activations]
    assert {"content.generate", "dit.step"} <= set(stages) and compiler.made == made  # a dry run compiles nothing
    assert plain.describe()["regions"] is None and plain.describe()["plan"] and plain.describe()["backend"] == "fast"


def test_a_size_outside_the_buckets_says_once_that_it_compiles(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(artifacts, "compile_function", Counting(trace=False))
    pipe = ReducioPipeline.from_pretrained(bundle, device="cpu", dtype="float32", backend="fast", compile=True)
    call = {"image": np.zeros((64, 64, 3), np.uint8), "num_inference_steps": 1, "output_type": "latent"}

    def messages(**size: int) -> list[str]:
        caplog.clear()
        pipe("a red circle", progress=False, **call, **size)
        return [r.getMessage() for r in caplog.records if r.name == "reducio_fast"]

    line = "compile: 96x160 is in no bucket, its blocks are compiled for this size alone"
    assert messages(height=96, width=160) == [line] and messages(height=96, width=160) == []
    assert messages() == messages(height=256, width=256) == messages(height=192, width=320) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"compile": "max-autotune"}, "compile: must be True, False or None, is 'max-autotune'"),
        ({"compile": True, "backend": "reference"}, "compile: True needs the fast path, but backend is reference"),
    ],
)
def test_choices_that_are_none(words: dict[str, Any], message: str, bundle: Path) -> None:
    with pytest.raises(ReducioError, match=message):
        ReducioPipeline.from_pretrained(bundle, device="cpu", **words)
