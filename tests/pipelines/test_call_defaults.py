"""`_call_defaults` of a text-to-image folder: the arguments with which its content frames are drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from reducio_fast import ReducioPipeline
from reducio_fast.pipelines.reducio import light
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow

PROMPT = "a red circle moving right on a black background"


def with_defaults(bundle: Path, folder: Path, defaults: object) -> Path:
    shutil.copytree(bundle, folder)
    path = folder / "text_to_image" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_call_defaults": defaults}))
    return folder


def frame(pipe: ReducioPipeline, **kwargs: object) -> np.ndarray:
    return pipe(PROMPT, seed=1, num_inference_steps=2, progress=False, content_kwargs=kwargs or None).content


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_a_folder_sets_them_and_a_call_replaces_them(bundle: Path, tmp_path: Path, backend: str) -> None:
    few = {"num_inference_steps": 3, "guidance_scale": 1.5}
    own = ReducioPipeline.from_pretrained(with_defaults(bundle, tmp_path / "own", few), device="cpu", backend=backend)
    plain = ReducioPipeline.from_pretrained(
        with_defaults(bundle, tmp_path / "plain", {}), device="cpu", backend=backend
    )
    assert np.array_equal(frame(own), frame(plain, **few))
    given = {"num_inference_steps": 2, "guidance_scale": 6.0}
    assert np.array_equal(frame(own, **given), frame(plain, **given))
    assert not np.array_equal(frame(own), frame(own, **given))
    own.save_pretrained(tmp_path / "saved")
    again = json.loads((tmp_path / "saved" / "text_to_image" / "model_index.json").read_text())
    assert again["_call_defaults"] == few


def test_a_clip_without_libraries_follows_them(bundle: Path, tmp_path: Path) -> None:
    import torch

    few = {"num_inference_steps": 3, "guidance_scale": 1.5}
    folder = with_defaults(bundle, tmp_path / "own", few)
    pipe = light.load(folder, torch.float32, torch.device("cpu"), False)
    assert pipe is not None and pipe.text_to_image.call_defaults == few
    full = ReducioPipeline.from_pretrained(folder, device="cpu", backend="fast", dtype="float32")
    assert np.array_equal(frame(pipe), frame(full))


@pytest.mark.parametrize(
    ("defaults", "reason"),
    [
        ({"guidance": 3}, "has no word 'guidance'"),
        ({"guidance_scale": "x"}, "must be a finite number"),
        ([3], "a dict"),
    ],
    ids=str,
)
def test_wrong_ones_are_refused_when_the_model_is_loaded(
    bundle: Path, tmp_path: Path, defaults: object, reason: str
) -> None:
    folder = with_defaults(bundle, tmp_path / "own", defaults)
    with pytest.raises(ReducioError, match=f"text_to_image/model_index.json: _call_defaults: .*{reason}"):
        ReducioPipeline.from_pretrained(folder, device="cpu")
