"""Files that are refused: pickles with code, damaged and other files."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from published_weights import json_file
from reducio_fast.checkpoints import saved_latents
from reducio_fast.checkpoints.convert import convert, export
from reducio_fast.checkpoints.foreign_files import read_weights
from reducio_fast.cli.main import main
from reducio_fast.system.errors import ReducioError


class Touch:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_pickle_that_runs_code_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trap, file = tmp_path / "trap", tmp_path / "model.ckpt"
    payload = {"state_dict": {"encoder_3d.conv_in.bias": torch.zeros(1)}, "callbacks": Touch(trap)}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(payload["callbacks"], protocol=4))
    else:
        torch.save(payload, file, _use_new_zipfile_serialization=kind == "zip")
    assert main(["convert", str(file), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    reason = "cannot be read without running what it says" if kind == "pickle" else "asks for posix.mkdir"
    assert f"{file}: refused, a pickle of more than tensors: it {reason}\n" in message
    assert message.count("\n") == 1 and "weights_only" not in message
    assert [p.name for p in tmp_path.iterdir()] == ["model.ckpt"]
    pickle.loads(pickle.dumps(Touch(trap)))
    assert trap.is_dir(), "the trap works"


def test_a_pipeline_folder_is_read_by_component(bundle: Path, tmp_path: Path):
    weights = "diffusion_pytorch_model.safetensors"
    stored = {name: load_file(bundle / name / weights).keys() for name in ("transformer", "vae", "content_encoder")}
    for component, folder in ((None, "transformer"), *((name, name) for name in stored)):
        assert read_weights(bundle, component)[0].keys() == stored[folder]
    for name in ("transformer", "vae"):  # diffusers' own names: the content encoder of a pipeline is its vae
        shutil.copytree(bundle / ("content_encoder" if name == "vae" else name), tmp_path / name)
    json_file(tmp_path / "model_index.json", {"transformer": [None, None], "vae": [None, None]})
    for component, folder in (
        ("content_encoder", "content_encoder"),
        ("vae", "content_encoder"),
        (None, "transformer"),
    ):
        assert read_weights(tmp_path, component)[0].keys() == stored[folder]


def test_other_files_are_refused_by_name(tmp_path: Path):
    out = tmp_path / "out"
    for content, message in (
        ([1, 2], "holds a list, must hold tensors by name"),
        ({"state_dict": {"a": 3}}, "entry 'a' is a int, must be a tensor"),
        ({"a.b": torch.zeros(1)}, "neither a Reducio-VAE nor a PixArt transformer nor an image VAE; .* a.b"),
    ):
        torch.save(content, tmp_path / "a.ckpt")
        with pytest.raises(ReducioError, match=message):
            convert(tmp_path / "a.ckpt", out)
    (tmp_path / "a.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:-100])
    with pytest.raises(ReducioError, match="a.ckpt: damaged"):
        convert(tmp_path / "a.ckpt", out)
    with pytest.raises(ReducioError, match="no such file or folder"):
        convert(tmp_path / "none.ckpt", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReducioError, match="must hold one file of weights, holds none"):
        convert(tmp_path / "empty", out)
    with pytest.raises(ReducioError, match="give out or into, not both"):
        convert(tmp_path / "a.ckpt", out, out)
    with pytest.raises(ReducioError, match="must end in .ckpt, .pt, .pth or .safetensors, is 'x.bin'"):
        export(tmp_path, "x.bin")
    assert not out.exists()


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """{suffix: one small file of that kind}. The tensors have a VAE's names, but its size is unknown."""
    folder = tmp_path_factory.mktemp("honest")
    state = {"encoder_3d.conv_in.weight": torch.arange(6.0).view(2, 3), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": state}, folder / "a.ckpt")
    torch.save(state, folder / "a.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "a.safetensors")
    return {file.suffix: file.read_bytes() for file in folder.iterdir()}


@given(data=st.data(), ending=st.sampled_from([".ckpt", ".pth", ".safetensors"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.slow
def test_damaged_files_end_in_our_own_error(data: st.DataObject, ending: str, honest: dict[str, bytes], tmp_path: Path):
    """Whatever bytes are changed, cut off or inserted: a ReducioError of one line, and nothing is written."""
    content = bytearray(honest[ending])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["change", "cut", "insert"]))
        if kind == "change":
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "cut" and place:
            del content[place:]
        else:
            content[place:place] = data.draw(st.binary(max_size=9))
    file = tmp_path / f"file{ending}"
    file.write_bytes(content)
    with pytest.raises(ReducioError) as caught:
        convert(file, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "metadata", "named"),
    [
        ({"content": torch.zeros(1, 8, 8, 3, dtype=torch.bfloat16)}, {}, "content"),
        ({"content": torch.zeros(1, dtype=torch.uint8)}, {}, "content"),
        ({"content": torch.zeros(2, 8, 8, 3, dtype=torch.uint8)}, {}, "latents"),
        ({"latents": torch.tensor(1.0)}, {}, "latents"),
        ({"latents": torch.zeros(1, 4, dtype=torch.int64)}, {}, "latents"),
        ({}, {"seeds": "5"}, "seeds"),
        ({}, {"seeds": '["a"]'}, "seeds"),
        ({}, {"fps": "null"}, "fps"),
        ({}, {"fps": "NaN"}, "fps"),
        ({}, {"fps": "0"}, "fps"),
    ],
    ids=["bfloat16", "1-d", "two-frames", "0-d", "integers", "seed", "seed-names", "null", "nan", "zero"],
)
def test_damaged_files_of_latents(
    changes: dict, metadata: dict, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tensors = {"latents": torch.zeros(1, 4, 4, 1, 1), "content": torch.zeros(1, 8, 8, 3, dtype=torch.uint8)}
    about = {"format": saved_latents.FORMAT, "fps": "16", "seeds": "[5]"}
    file = tmp_path / "latents.safetensors"
    save_file(tensors, file, about)
    assert saved_latents.load(file).seeds == [5], "it is refused for the change alone"
    save_file(tensors | changes, file, about | metadata)
    assert main(["decode", str(file), "--out", str(tmp_path / "clip.gif")]) == 2
    error = capsys.readouterr().err
    assert f"{file}: is no file of latents ({named} not as `encode` writes them)" in error and error.count("\n") == 1
