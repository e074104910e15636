"""One clip by several processes, on gloo: tiles bit-equal, halves and heads within rounding, and all end together.

Each case runs in its own processes. The model is small and random, and its frames are larger than a tile reads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reducio_fast.cli import main
from reducio_fast.fast.parallel import shares
from reducio_fast.media.video_files import read_video
from reducio_fast.pipelines import generate

pytestmark = pytest.mark.slow

# By name: case and number of processes.
RUNS = {"alone": "truth,1", "clips-2": "clips,2", "clips-3": "clips,3",
        "failed": "different+callback+decode+attention,2", "gone": "killed,2"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs, with their results."""
    folder = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo",
                   "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name("parallel_process.py")), str(folder)]
    command += [f"{name},{case}" for name, case in RUNS.items()]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=290, check=True)
    (folder / "results.json").write_text(done.stdout.splitlines()[-1])
    return folder


def results(folder: Path, name: str) -> dict[str, Any]:
    """Of a run: what each process printed, its status, and the seconds until the last one ended."""
    found = json.loads((folder / "results.json").read_text())[name]
    assert name == "gone" or not any(found["statuses"]), "\n".join(found["printed"])
    return found


def load(folder: Path, name: str, rank: int) -> dict[str, Any]:
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What one process makes, and its latents in float64 by the reference."""
    results(folder, "alone")
    return load(folder / "alone", "clips", 0)


def close(value: Tensor, alone: Tensor, truth: Tensor) -> bool:
    value, alone, truth = value.double(), alone.double(), truth.double()
    error = (alone - truth).abs().max().item()
    return (value - truth).abs().max().item() <= 2 * error + 1e-6 * truth.abs().max().item()


@pytest.mark.parametrize("processes", [2, 3])
def test_every_process_has_the_clip_of_one(alone: dict[str, Any], folder: Path, processes: int) -> None:
    """Tiles are bit-equal. Halves and heads are equal up to rounding: two processes take one half each, or three heads
    each without guidance; of three, two take one half each and one waits, or all take two heads each."""
    results(folder, f"clips-{processes}")
    ranks = [load(folder / f"clips-{processes}", "clips", rank) for rank in range(processes)]
    first = ranks[0]
    for own in ranks:
        assert torch.equal(own["decoded"], alone["decoded"])
        assert own["drawn"][0] == first["drawn"][0] and torch.equal(own["drawn"][1], first["drawn"][1])
        for name in ("guided", "unguided", "long", "stopped", "after"):
            assert torch.equal(own[name], first[name]), name
    assert alone["decoded"].shape == (16, 128, 192, 3) and first["long"].shape == (24, 128, 192, 3)
    for name in ("guided", "unguided"):
        assert close(first[name], alone[name], alone["truth"][name])
    assert torch.equal(first["after"], first["guided"]), "the clip before left nothing behind"
    # Rank 0's callback replaced the latents and stopped the clip for all.
    torch.testing.assert_close(first["stopped"], alone["stopped"], rtol=1e-3, atol=1e-4)


def test_all_processes_end_together(alone: dict[str, Any], folder: Path) -> None:
    """When a process fails, the others raise too, and all make the next clip together, unless it failed between two
    exchanges or is gone."""
    failures = results(folder, "failed"), results(folder, "gone")
    text = "\n".join(line for run in failures for line in run["printed"])
    failed = "RankFailed: parallel: another process of this clip has failed"
    for line in (
        "different, rank 1: ReducioError: parallelize: the processes were given different calls",
        f"different, rank 0: {failed}",
        "callback, rank 0: RuntimeError: the caller's own",
        f"callback, rank 1: {failed}",
        "decode, rank 1: ReducioError: vae.decode: out of memory",
        "decode, rank 0: ReducioError: vae.decode: parallel: another process of this clip has failed",
        "attention, rank 1: MemoryError: no room",
        "attention, rank 0: RankFailed: parallel: another process",
        "killed, rank 0: RankFailed: parallel: another process of this clip is gone",
    ):
        assert line in text, (line, text)
    assert "NO ERROR" not in text
    for rank in range(2):
        after = load(folder / "failed", "after", rank)["after"]
        assert close(after, alone["guided"], alone["truth"]["guided"])
    assert sum(run["seconds"] for run in failures) < 90, "before the exchange's own timeout of 100 s"


def test_the_longest_tiles_first() -> None:
    assert shares([4, 4, 4, 4], 3) == [0, 1, 2, 0]
    costs = [100] * 9 + [80] * 6 + [64]  # the tiles of 1024x1024, in latent cells
    for size, gain in ((2, 1.99), (4, 3.97), (8, 7.22)):
        owners = shares(costs, size)
        longest = max(sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(size))
        assert sum(costs) / longest == pytest.approx(gain, abs=0.01)


def test_the_command_under_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes, one file and one report."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    args = ["generate", "a red circle moving right on a black background", "--out", "clip.mp4", "--height", "64",
            "--width", "64", "--num-inference-steps", "2", "--seed", "3", "--backend", "fast", "--json",
            "--no-progress"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "reducio_fast", *args], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"path": "clip.mp4"') == 1
    assert read_video("clip.mp4")[0].shape == (16, 64, 64, 3)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):  # as torchrun sets them
        monkeypatch.setenv(name, value)
    try:
        assert main.main([*args, "--device", "cpu", "--compile"]) == 2
        assert "parallelize: compile=True was chosen" in capsys.readouterr().err
    finally:
        generate.forget()
