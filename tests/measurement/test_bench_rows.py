"""Rows of `bench`: what a fresh process makes, what a file holds, and peers that are checked before the work."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reducio_fast.cli import main
from reducio_fast.measurement import bench, compare_models, kernel_builds
from reducio_fast.measurement.contenders import GivenConditions, workload
from reducio_fast.pipelines.call.validation import check_multiple
from reducio_fast.pipelines.reducio.pipeline import ReducioPipeline
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow


def test_a_fresh_process_makes_the_first_clip_of_its_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing makes a clip before, such as the reference for the conditions of the other workloads."""
    monkeypatch.setattr(GivenConditions, "of_pipeline", lambda *_: pytest.fail("a clip was made"))
    measured = workload("default", None, "float32", torch.device("cpu"))
    contender = measured.contender("fast")
    frames, seconds = contender.run()
    assert frames.shape == (16, 128, 128, 3) and seconds["vae.decode"] > 0


def test_a_row_is_valid_json(tmp_path: Path) -> None:
    bench.write({"parity": [{"error": math.nan}], "psnr": (math.inf, 1.0)}, tmp_path / "row.json")
    row = json.loads((tmp_path / "row.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row == {"parity": [{"error": None}], "psnr": [None, 1.0]}


@pytest.mark.parametrize(
    ("peer", "message"),
    [("", "peer: '' is unknown"), ("svd:nothere", "nothere"), ("svd:random,bogus", "peer: 'bogus' is unknown")],
)
def test_peers_are_checked_before_the_work(
    peer: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "bench", lambda *_: pytest.fail("the bench ran"))
    assert main.main(["bench", "narrow", "--device", "cpu", "--peer", peer]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_peers_time_is_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((0.0, 5.0, 10.0, 11.0, 20.0, 23.0))  # start and end of a cold clip of 5 s, and of clips of 1 and 3 s
    monkeypatch.setattr(compare_models, "clock", lambda device: next(times))
    out = SimpleNamespace(frames=torch.zeros(16, 64, 64, 3), fps=16.0, timings={})

    class Pipe:
        parts = SimpleNamespace(networks=list)

        def __call__(self, *_: object, **__: object) -> SimpleNamespace:
            return out

    monkeypatch.setattr(ReducioPipeline, "from_pretrained", lambda *_, **__: Pipe())
    row = compare_models.bench_row(None, repeats=2, device="cpu")
    assert row["cold"] == 5 and row["seconds"] == 2


def test_names_that_match_no_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(kernel_builds, "check", lambda **given: asked.update(given) or iter(()))
    assert main.main(["compile-check", "--kernels", "", "--only", "zzzz"]) == 2
    assert asked["ops"] == [""] and asked["archs"] is None  # an empty name is unknown; it does not mean all
    assert "--only 'zzzz': no variant of these kernels and targets has it in its name" in capsys.readouterr().err


def test_a_trace_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace.json.gz").mkdir()
    assert main.main(["profile", "narrow", "--out", str(tmp_path / "trace.json.gz")]) == 2
    assert "trace.json.gz is a folder; name a file" in capsys.readouterr().err


def test_ports_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["demo", "--port", "70000"])
    assert "--port: '70000' is above 65535" in capsys.readouterr().err


def test_a_size_that_no_command_takes() -> None:
    with pytest.raises(ReducioError, match="--size: 16416 is above the largest side, 16384"):
        check_multiple("--size", 16416, 32)
