"""Winograd's algorithm on a CPU: as right as the library's convolution, where a plan takes it, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from reducio_fast.fast import cpu_products
from reducio_fast.fast.plan import Plan
from reducio_fast.fast.reducio.vae import FastReducioVAE
from reducio_fast.measurement.accuracy_rule import EPS, relative_error
from reducio_fast.reference import ReducioVAE, VAEConfig
from reducio_fast.triton_kernels.cpu_convolution import convolve, cpu_convolution
from reducio_fast.triton_kernels.winograd import convolve_by_winograd, transforms
from tiny_networks import CPU, VAE, assert_right, lively


@pytest.mark.parametrize(
    ("shape", "channels_out", "time", "taps"),
    [
        ((1, 3, 12, 8, 32), 48, 3, 3),
        ((2, 4, 11, 9, 16), 24, 3, 3),
        ((2, 2, 5, 30, 128), 8, 1, 3),
        ((1, 1, 1, 1, 16), 16, 1, 3),
        ((1, 2, 9, 13, 40), 20, 2, 2),
        ((3, 1, 4, 4, 512), 16, 1, 2),
    ],
)
def test_it_is_as_right_as_the_library(shape: tuple[int, ...], channels_out: int, time: int, taps: int) -> None:
    N, T, H, W, C = shape
    x = torch.randn(N, T + time - 1, H + taps - 1, W + taps - 1, C) + 1  # activations seldom have a mean of zero
    kernel, bias = torch.randn(channels_out, time, taps, taps, C) / (C * time) ** 0.5, torch.randn(channels_out)

    def library(dtype: torch.dtype) -> torch.Tensor:
        first = [tensor.to(dtype).movedim(-1, 1) for tensor in (x, kernel)]
        return F.conv3d(*first, bias.to(dtype)).movedim(1, -1)

    assert_right(convolve_by_winograd(x, kernel, bias), library(torch.float32), library(torch.float64))
    assert_right(convolve_by_winograd(x, kernel) + bias, library(torch.float32), library(torch.float64))


@pytest.mark.parametrize("taps", [2, 3])
def test_few_chunks_and_many_give_the_same(taps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a window of a larger buffer, as an up-sampling has it."""
    window = torch.randn(2, 5, 40, 23, 32)[:, 1:, 2:, 1:]
    kernel = torch.randn(16, 3, taps, taps, 32)
    whole = convolve_by_winograd(window.contiguous(), kernel)
    for name in ("CHUNK", "ROWS"):
        monkeypatch.setattr(f"reducio_fast.triton_kernels.winograd.{name}", 1)
    assert relative_error(convolve_by_winograd(window, kernel), whole) < EPS[torch.float32]


def test_its_matrices_are_exact_up_to_rounding() -> None:
    """A convolution of integers by the matrices in float64 gives integers again."""
    tile, kernel, outputs = (matrix.double() for matrix in transforms(3))
    x, w = torch.randint(-9, 9, (6, 6)).double(), torch.randint(-9, 9, (3, 3)).double()
    found = outputs @ ((tile @ x.flatten()) * (kernel @ w.flatten()))
    torch.testing.assert_close(found.view(4, 4), F.conv2d(x[None, None], w[None, None])[0, 0], rtol=0, atol=1e-3)


def faster(share: float) -> Any:
    return lambda name, timer: {"library": 1.0, "winograd": share} if name == "winograd" else {}


def test_a_plan_takes_it_where_it_was_measured_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDUCIO_CACHE_DIR", str(tmp_path))

    def picked(dtype: torch.dtype, shape: str, op: str = "conv3d", device: str = "cpu") -> str:
        plan = Plan(torch.device(device), dtype)
        plan.pick("a", op, shape)
        return plan.choices[0].implementation

    monkeypatch.setattr(cpu_products, "_time", faster(0.6))
    wide = "128->256"
    assert picked(torch.float32, wide) == picked(torch.float32, wide, "upsample_conv3d") == "winograd"
    others = [(torch.bfloat16, wide), (torch.float32, "64->256"), (torch.float32, "128->3")]
    assert {picked(*other) for other in others} == {picked(torch.float32, wide, device="meta")} == {"torch"}
    plan = Plan(CPU, torch.float32)
    plan.pick("a", "conv3d", wide)
    assert plan.choices[0].why == "by Winograd's algorithm it takes 0.60 of the library's time on this CPU"
    monkeypatch.setenv("REDUCIO_CACHE_DIR", str(tmp_path / "slower"))
    monkeypatch.setattr(cpu_products, "_time", faster(0.95))
    assert picked(torch.float32, wide) == "torch"


def test_it_is_measured_once_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDUCIO_CACHE_DIR", str(tmp_path))
    turns = iter(range(99))
    assert not cpu_products.prefers_winograd(lambda call: 1.0 + next(turns) % 2)[0], (
        "the second way takes twice as long"
    )
    first = cpu_products.prefers_winograd()
    cpu_products._tables.clear()  # as in another process
    monkeypatch.setattr(cpu_products, "_time", None)
    assert cpu_products.prefers_winograd() == first
    for damaged in ('{"winograd": {"library": 0, "winograd": 0}}', '{"winograd": {"library": NaN, "winograd": 1}}',
                    '{"winograd": {"library": 1, "winograd": 1' + "0" * 400 + "}}", "[" * 100_000):  # fmt: skip
        cpu_products.table_path().write_text(damaged)
        assert cpu_products._read(cpu_products.table_path()) == {}
    assert {call().shape for call in cpu_products._convolutions().values()} == {(1, 256, 4, 32, 32)}


def test_a_wide_decoder_stays_within_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDUCIO_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpu_products, "_time", faster(0.5))
    levels = {"channel_multipliers": (1, 1, 1), "content_channel_multipliers": (1, 1), "fusion_levels": (None, 1, None)}
    settings = VAE | levels | {"base_channels": 128, "content_base_channels": 128}
    reference = lively(ReducioVAE(VAEConfig(**settings)))
    plan = Plan(CPU, torch.float32)
    twin = FastReducioVAE(reference, plan)
    assert sum(choice.implementation == "winograd" for choice in plan.choices) > 10
    config = reference.config
    z = torch.randn(1, config.latent_channels, 4, 4, 4)
    content = torch.rand(1, 3, 4 * config.spatial_factor, 4 * config.spatial_factor) * 2 - 1
    with torch.no_grad():
        eager, fast = (network.decode(z, network.encode_content(content)) for network in (reference, twin))
        wide = reference.double()
        oracle = wide.decode(z.double(), wide.encode_content(content.double()))
    assert_right(fast, eager, oracle)


def test_it_can_be_compiled() -> None:
    """torch.compile takes the convolution as one op, of which torch checks shapes, layout and dtype."""
    x = torch.randn(1, 128, 4, 20, 20).contiguous(memory_format=torch.channels_last_3d)
    kernel = torch.randn(128, 3, 3, 3, 128).permute(0, 4, 1, 2, 3) / 60
    for winograd in (False, True):
        torch.library.opcheck(cpu_convolution, (x, kernel, None, (1, 1, 1), winograd), atol=1e-4, rtol=1e-4)
    direct, fewer = (convolve(x, kernel, None, (1, 1, 1), winograd) for winograd in (False, True))
    assert not torch.equal(direct, fewer)
    torch.testing.assert_close(direct, fewer, rtol=1e-4, atol=1e-4)
