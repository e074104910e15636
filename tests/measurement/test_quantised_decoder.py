"""Clips whose decoder computes in 8-bit numbers, as contenders of `bench`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from reducio_fast.cli import bench as cli_bench
from reducio_fast.cli import main
from reducio_fast.measurement import bench, contenders, instruments, parity
from reducio_fast.measurement.accuracy_rule import EIGHT_BIT_TIMES
from reducio_fast.measurement.names import QUANTISED
from reducio_fast.reference import ReducioVAE
from reducio_fast.system.errors import ReducioError
from reducio_fast.triton_kernels import tables

pytestmark = pytest.mark.slow


def test_a_clip_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated here. The decoder's twin quantises, its parity row comes first, and `balanced` takes fewer steps."""
    monkeypatch.setattr(contenders, "NARROW_STEPS", 12)
    roof = {"dtype": "float32", "matmul_tflops": 1.0, "copy_gbs": 1.0}
    monkeypatch.setattr(instruments, "roof", lambda device, dtype: roof)
    row = bench.bench("narrow", device="cpu", contenders=QUANTISED, pairs=1, cold=False)
    found = {r["what"]: r for r in row["parity"]}
    for word in ("fp8", "int8"):
        verdict = found[f"narrow: vae.decode, {word}"]
        assert verdict["limit"] == EIGHT_BIT_TIMES * verdict["eager"] and verdict["error"] > verdict["eager"]
    flops = row["flops"]
    steps = flops["folded"]["dit.step"]  # two of 12 fewer; keys and values are computed once
    assert steps * 10 / 12 < flops["folded balanced"]["dit.step"] < steps
    for name in QUANTISED:
        figures = row["contenders"][name]
        assert "FP8, with ranges measured on noise" in figures["what"] and figures["dtype"] == "float8_e4m3fn"
        assert figures["share_of_roof"] == {}
    assert row["contenders"][QUANTISED[1]]["what"].endswith(", 10 steps")
    assert "float8_e4m3fn" in "\n".join(cli_bench.lines(row | {"note": None}))


def test_a_gpu_without_fp8_refuses_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "workload", None)
    monkeypatch.setattr(bench, "resolve_device", lambda device: torch.device("cuda", 0))
    with tables.pretend("sm_80"), pytest.raises(ReducioError, match="'fp8' does not run on sm_80.*int8 runs here"):
        bench.bench("1024", contenders=["fast-fp8"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "bench svd-narrow --device cpu --contenders fast-fp8",
            "fast-fp8 needs a decoder of Reducio, the workload svd",
        ),
        ("bench tile --device cpu --contenders fast-fp8-balanced", "needs steps, the workload tile has none"),
        ("profile svd-narrow --device cpu --contender fast-fp8", "fast-fp8 needs a decoder of Reducio"),
        ("profile tile --device cpu --contender fast-fp8-balanced", "the workload tile has none; fast-fp8 runs"),
    ],
)
def test_other_workloads_are_refused(argv: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(argv.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


def test_a_model_without_ranges_is_refused(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(bundle, tmp_path / "model")
    (folder / "calibration.safetensors").unlink()
    assert main.main(f"bench --model {folder} --device cpu --contenders fast-fp8".split()) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "make it by: reducio-fast calibrate" in captured.err


def test_full_size_parity_decodes_in_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a narrow network in its place, with the other comparisons left out."""
    torch.manual_seed(0)
    vae = ReducioVAE(contenders.NARROW[1]).eval().requires_grad_(False)
    parity.liven(vae)
    monkeypatch.setattr(parity, "_full_size", lambda kind, device: (None, vae if kind is ReducioVAE else None))
    monkeypatch.setattr(parity, "compare_networks", lambda *args, **kwargs: iter(()))
    flushed: list[int] = []
    rows = parity.compare(device="cpu", full_size=True, flush=lambda rows: flushed.append(len(rows)))
    assert [row["what"] for row in rows] == ["full size: vae.decode, fp8", "full size: vae.decode, int8"]
    assert flushed == [1, 2] and all(row["right"] for row in rows)
