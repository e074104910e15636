"""`quantise=`: the type the decoder computes in, what the report says, and what is refused, in one line each."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints import calibration_file
from reducio_fast.cli import main
from reducio_fast.evaluation.calibration import calibrate, toy_clips
from reducio_fast.fast import quantisation
from reducio_fast.fast.packed_layers import Activation
from reducio_fast.fast.quantisation import eight_bit_type, quantisable
from reducio_fast.measurement.contenders import NARROW
from reducio_fast.media.similarity import pooled_psnr
from reducio_fast.pipelines.generate import generate
from reducio_fast.server.clips import Clips
from reducio_fast.system.errors import ReducioError
from reducio_fast.triton_kernels import tables
from reducio_fast.triton_kernels.registry import OPS

pytestmark = pytest.mark.slow

CUDA = torch.device("cuda", 0)


def load(folder: Path, **kwargs: Any) -> ReducioPipeline:
    return ReducioPipeline.from_pretrained(folder, device="cpu", dtype="float32", **kwargs)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return next(toy_clips(1, 128, 16))[8]


@pytest.mark.parametrize("word", ["fp8", "int8"])
def test_the_decoder_computes_in_eight_bits(word: str, bundle: Path, image: np.ndarray) -> None:
    plain, quantised = load(bundle), load(bundle, quantise=word)
    call = {"image": image, "num_inference_steps": 2, "progress": False}
    plain_frames, quantised_frames = plain("a red circle", **call).frames, quantised("a red circle", **call).frames
    # It changed, but little: the decoder adds small residuals to the warped content frame.
    assert not np.array_equal(plain_frames, quantised_frames) and pooled_psnr(plain_frames, quantised_frames) > 30
    line = quantised.report["vae"]
    assert "in float32" in line and f"24 of 34 convolutions of the decoder in {word}" in line and "emulated" in line
    assert word not in quantised.report["transformer"]
    picks = [c for c in quantised.describe()["plan"] if c["op"].startswith("quantised_conv3d")]
    assert {c["path"] for c in picks} == {path for path, _ in quantisable(quantised.vae)}
    assert word not in plain.report["vae"]


def test_kernels_in_the_interpreter_compute_the_same(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual block of the decoder, quantised, with both of its convolutions and norms run by Triton."""
    block = load(bundle, quantise="fp8").executor.network("vae").decoder.mid.block_1
    act = Activation(torch.randn(1, 2, 3, 5, block.conv1.bias.numel()))
    expected = block(act).x
    run = {op.twin: op.launch for op in (OPS["quantised_conv3d"], OPS["group_norm_silu"])}
    replaced = [module for module in block.modules() if getattr(module, "run", None) in run]
    assert len(replaced) == 4
    for module in replaced:
        monkeypatch.setattr(module, "run", run[module.run])
    out = block(act).x
    assert float((out - expected).norm() / expected.norm()) < 0.01  # ties that round the other way


def test_copies_and_saved_folders_keep_it(bundle: Path, tmp_path: Path) -> None:
    pipe = load(bundle, quantise="fp8")
    copied = pickle.loads(pickle.dumps(pipe))
    assert copied.report == pipe.report
    pipe.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved", quantise="fp8").report == pipe.report
    pipe.to(torch.bfloat16)
    assert "fp8" in pipe.report["vae"]


def test_a_saved_folder_keeps_the_calibration_of_its_weights(bundle: Path, tmp_path: Path) -> None:
    """Also if the pipeline was loaded without `quantise`, in another dtype, or replaces its own folder."""
    kept, own = calibration_file.read(bundle), tmp_path / "own"
    shutil.copytree(bundle, own)
    pipe = load(own)
    pipe.to(torch.bfloat16)
    for folder in (tmp_path / "new", own):
        pipe.save_pretrained(folder)
        again = calibration_file.read(folder)  # raises unless it is that of the folder's weights
        assert again.keys() == kept.keys() and all(torch.equal(again[path], kept[path]) for path in kept)
    assert "fp8" in load(own, quantise="fp8").report["vae"]
    changed = load(own, quantise="fp8")
    next(changed.vae.decoder.parameters()).data.mul_(2)
    changed.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed" / calibration_file.FILE).exists()


def test_calibration_is_that_of_the_embedded_model(bundle: Path) -> None:
    """The file in the package is what the command computes for the model, from its own clips."""
    vae = load(bundle).vae
    largest, count = calibrate(vae, toy_clips(2, 128, 16))
    kept = calibration_file.read(bundle)
    assert count == 2 and largest.keys() == kept.keys()
    for path, values in largest.items():
        assert (values <= kept[path] * 1.0001).all()  # the kept maxima are over eight clips, these two among them
        assert values.max() > 0.5 * kept[path].max()


def test_every_other_model_is_refused(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))] = tensors[next(iter(tensors))] + 1
    save_file(tensors, file)
    argv = [
        "generate",
        "a red circle",
        "--model",
        str(other),
        "--out",
        str(tmp_path / "clip.gif"),
        "--quantise",
        "fp8",
    ]
    assert main.main(argv) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "calibration of another model" in line and "reducio-fast calibrate" in line
    (other / calibration_file.FILE).unlink()
    with pytest.raises(ReducioError, match="has no calibration.safetensors"):
        load(other, quantise="fp8")
    assert main.main(["calibrate", "--model", str(other), "--clips", "1", "--device", "cpu"]) == 0
    assert "fp8" in load(other, quantise="fp8").report["vae"]
    kept = calibration_file.read(other)
    calibration_file.write(other, {path: values[:-1] for path, values in kept.items()})
    with pytest.raises(ReducioError, match="must be .* numbers"):
        load(other, quantise="fp8")
    calibration_file.write(other, dict(list(kept.items())[1:]))
    with pytest.raises(ReducioError, match="does not fit the model"):
        load(other, quantise="fp8")
    assert main.main(["calibrate", "--model", str(tmp_path)]) == 2
    assert "is no model folder" in capsys.readouterr().err


def test_a_wrong_size_in_the_index_is_refused(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = json.loads((bundle / "model_index.json").read_text())
    for value in ("128", None, 100, -32):
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"sample_height": value}))
        assert main.main(["calibrate", "--model", str(tmp_path), "--clips", "1", "--device", "cpu"]) == 2
        line = capsys.readouterr().err
        assert "sample_height: " in line and line.count("\n") == 1, line


def test_what_cannot_be_followed_is_refused(bundle: Path) -> None:
    for kwargs, message in (
        ({"quantise": "fp4"}, "'fp4' is not known; known are fp8, int8"),
        ({"quantise": "fp8", "backend": "reference"}, "needs the fast path"),
        ({"quantise": "fp8", "vae": load(bundle).vae}, "the model's own vae"),
    ):
        with pytest.raises(ReducioError, match=message):
            load(bundle, **kwargs)
    with pytest.raises(ReducioError, match="no argument of a Stable Video Diffusion model"):
        generate(image=np.zeros((64, 64, 3), np.uint8), model="svd:random", quantise="fp8")


COMMANDS = ["serve", "--port", "0", "--data", "OUT"], ["batch", "P.txt", "--out", "OUT"], ["warmup"]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_that_loads_a_model_has_it(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if command[0] == "serve":
        pytest.importorskip("fastapi")
    monkeypatch.chdir(tmp_path)
    Path("P.txt").write_text("a red circle\n")
    assert main.main([*command, "--device", "cpu", "--quantise", "fp4"]) == 2
    captured = capsys.readouterr()
    assert "quantise: 'fp4' is not known; known are fp8, int8" in captured.err and captured.err.count("\n") == 1
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.name != "P.txt"]


def test_a_worker_takes_it_or_refuses_it(tmp_path: Path) -> None:
    worker = Clips(device="cpu", dtype="float32", quantise="fp8", warm=False)
    assert "in fp8" in worker.describe()["report"]["vae"]
    with pytest.raises(ReducioError, match="quantise: no argument of a Stable Video Diffusion model"):
        Clips("svd:random", device="cpu", quantise="fp8", warm=False)


def test_each_gpu_has_what_it_multiplies() -> None:
    results = {}
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950", "sm_75"):
        with tables.pretend(arch):
            for option in ("fp8", "int8"):
                try:
                    results[arch, option] = eight_bit_type(option, CUDA)
                except ValueError as error:
                    results[arch, option] = str(error)
    assert results["sm_90", "fp8"] == results["sm_100", "fp8"] == results["gfx950", "fp8"] == torch.float8_e4m3fn
    assert results["gfx942", "fp8"] == torch.float8_e4m3fnuz and results["sm_80", "int8"] == torch.int8
    assert "does not run on sm_80" in results["sm_80", "fp8"] and "int8 runs here" in results["sm_80", "fp8"]
    assert "fp8 runs here" in results["sm_90", "int8"] and "nothing quantised runs here" in results["sm_75", "fp8"]


@pytest.mark.parametrize("ranges", ["measured", "far too small"])
def test_the_full_size_gate(
    ranges: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`quantised_quality.py --full-size` on narrow networks: every format passes, unless ranges clip most values."""
    spec = importlib.util.spec_from_file_location("quantised_quality", root / "benchmarks" / "quantised_quality.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    measure = quantisation.measure_largest
    if ranges == "far too small":
        monkeypatch.setattr(quantisation, "measure_largest", lambda *a: {k: x / 30 for k, x in measure(*a).items()})
    monkeypatch.setattr(script, "VAEConfig", lambda: NARROW[1])
    monkeypatch.setattr("sys.argv", ["quantised_quality.py", "--full-size", "32", "--out", str(tmp_path / "row.json")])
    if ranges == "measured":
        script.main()
    else:
        with pytest.raises(SystemExit, match="over the limit of 24.08 dB: e4m3fn, e4m3fnuz, int8$"):
            script.main()
    rows = json.loads((tmp_path / "row.json").read_text())["full_size"]
    assert {row["format"]: row["right"] for row in rows} == {
        "bfloat16": True,
        **dict.fromkeys(script.FORMATS, ranges == "measured"),
    }
    assert "full size at 32 pixels" in capsys.readouterr().out
