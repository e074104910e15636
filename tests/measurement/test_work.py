"""The counted work of Stable Video Diffusion: the reference takes as much as diffusers, the fast twins take less."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNetSpatioTemporalConditionModel

from reducio_fast.cli.main import main
from reducio_fast.measurement.svd_clip import FULL, SVDClip, svd_work
from reducio_fast.measurement.work import WorkCounter, count
from reducio_fast.reference.svd.config import TemporalVAEConfig, VideoUNetConfig

META = {"device": "meta", "dtype": torch.float16}


def test_a_product_an_addition_and_a_view() -> None:
    def run(counter: WorkCounter) -> Callable[[], Any]:
        x, w, b = torch.empty(8, 16, **META), torch.empty(32, 16, **META), torch.empty(32, **META)
        return lambda: F.linear(x, w, b).view(4, 64).add_(1).transpose(0, 1)

    work = count(run)
    assert work.flops == 2 * 8 * 16 * 32 and work.kernels == 2
    read, written = 8 * 16 + 32 * 16 + 32, 8 * 32
    assert work.moved == 2 * (read + written + 2 * written) and set(work.operators) == {"addmm", "add_"}
    assert work.live == 2 * written


def test_attention_in_place_products_and_spread_tensors() -> None:
    def run(counter: WorkCounter) -> Callable[[], Any]:
        q, k = torch.empty(1, 2, 5, 8, **META), torch.empty(1, 2, 7, 8, **META)
        y, a, w = torch.empty(5, 8, **META), torch.empty(5, 3, **META), torch.empty(3, 8, **META)
        spread = torch.empty(1, 8, **META).expand(5, 8)
        return lambda: (F.scaled_dot_product_attention(q, k, k), y.addmm_(a, w), y.add_(spread), y.copy_(spread))

    work = count(run)
    assert work.flops == 2 * 2 * 2 * 5 * 7 * 8 + 2 * 5 * 3 * 8 and work.kernels == 4
    attention, product = (2 * 5 + 2 * 7) * 8 + 2 * 5 * 8, 5 * 8 + 5 * 3 + 3 * 8 + 5 * 8
    assert work.moved == 2 * (attention + product + (2 * 40 + 8) + (8 + 40))


def test_a_kernel_of_ours_is_one() -> None:
    def run(counter: WorkCounter) -> Callable[[], Any]:
        kernel = counter.opaque(lambda x: (x * 2 + 1).relu())
        x = torch.empty(10, **META)
        return lambda: kernel(x)

    work = count(run)
    assert work.kernels == 1 and work.moved == 2 * 20 and work.live == 20


def test_neighbours_in_one_buffer_are_read_once() -> None:
    """Views that overlap, and views side by side that do not."""

    def run(counter: WorkCounter) -> Callable[[], Any]:
        join = counter.opaque(lambda *parts: parts[0] + 0)
        rows, wide = torch.empty(7, 10, **META), torch.empty(6, 30, **META)
        before, frame, after = (rows[start : start + 5] for start in range(3))
        return lambda: (join(before, frame, after), join(*wide.chunk(3, 1)), join(before, torch.empty(5, 10, **META)))

    assert count(run).moved == 2 * ((70 + 50) + (180 + 60) + (100 + 50))


@pytest.fixture(scope="module")
def work() -> dict[str, Any]:
    unet, vae, height, width, _ = FULL
    return svd_work(unet, vae, 25, height // 8, width // 8)


@pytest.mark.slow
def test_a_step_of_svd_xt(work: dict[str, Any]) -> None:
    """25 frames of 576x1024, float16; the twin's is the sampler's whole step: scaling, guidance and Euler included."""
    plain, fast = work["unet"], work["fast unet"]
    assert plain.flops == pytest.approx(159.9e12, rel=1e-3) and fast.flops <= 149.7e12
    assert plain.moved == pytest.approx(691e9, rel=0.1) and fast.moved <= 267e9
    assert fast.kernels <= 539 < plain.kernels and fast.operators["guidance_dpm_step"] > 0


@pytest.mark.slow
def test_the_reference_is_diffusers(work: dict[str, Any]) -> None:
    def run(counter: WorkCounter) -> Callable[[], Any]:
        with torch.device("meta"):
            unet = UNetSpatioTemporalConditionModel(num_attention_heads=(5, 10, 20, 20)).half().eval().to("meta")
        counter.given(unet)
        sample, context = torch.empty(2, 25, 8, 72, 128, **META), torch.empty(2, 1, 1024, **META)
        return lambda: unet(sample, torch.empty((), **META), context, torch.empty(2, 3, **META))

    theirs = count(run)
    assert theirs.flops == pytest.approx(work["unet"].flops, rel=1e-9)
    assert theirs.moved >= 0.9 * work["unet"].moved


@pytest.mark.slow
def test_a_decode_of_svd_xt(work: dict[str, Any]) -> None:
    plain, fast = work["decoder"], work["fast decoder"]
    assert plain.flops == pytest.approx(173.6e12, rel=1e-3) and fast.flops <= 151.7e12
    assert plain.live > 30e9 and fast.live < 9e9
    assert fast.moved < 570e9


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The workload svd-narrow at a tiny size; torch.compile, which takes minutes, only notes the classes it gets."""
    unet = VideoUNetConfig(block_out_channels=(32, 32, 64, 64), num_attention_heads=1, layers_per_block=1, num_frames=3)
    vae = TemporalVAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    monkeypatch.setattr("reducio_fast.measurement.svd_clip.NARROW", (unet, vae, 64, 64, 2))
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    return compiled


def test_the_baseline_is_diffusers_own_classes(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager and compiled, on the weights of the twins; where diffusers is not installed it is our reference."""
    measured = SVDClip("svd-narrow", torch.float32, torch.device("cpu"))
    theirs = [measured.contender(name) for name in ("reference", "compiled")]
    assert [c.what.partition(",")[0] for c in theirs] == ["diffusers' classes"] * 2
    assert tiny == ["UNetSpatioTemporalConditionModel", "TemporalDecoder"]
    monkeypatch.setitem(sys.modules, "diffusers", None)
    ours = [measured.contender(name) for name in ("reference", "compiled")]
    assert all("diffusers is not installed" in c.what for c in ours) and tiny[2] == "VideoUNet"
    frames = [contender.run()[0].astype(int) for contender in (*theirs, ours[0])]
    assert frames[0].shape == (3, 64, 64, 3) and frames[0].std() > 1
    assert all(abs(other - frames[0]).max() <= 1 for other in frames)


@pytest.mark.slow
def test_bench(capsys: pytest.CaptureFixture[str], tiny: list[str]) -> None:
    ways = "reference,compiled,fast"
    command = f"bench svd-narrow --contenders {ways} --pairs 1 --ladder --no-cold --no-progress --device cpu"
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    assert "parity: 2 of 2 right" in out and "decoder" in out and all(name in out for name in ways.split(","))
    assert main("bench svd --device cpu".split()) == 2
    assert "workload: svd is full-size" in capsys.readouterr().err
