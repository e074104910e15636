"""Quality presets, and the settings they consist of, as arguments of a call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from reducio_fast import ReducioError, ReducioPipeline
from reducio_fast.checkpoints.strict_files import embedded_model

PROMPT, IMAGE = "a red circle moving right on a black background", np.full((64, 64, 3), 90, np.uint8)
LATENT = {"image": IMAGE, "output_type": "latent", "progress": False, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def pipe(folder: Path) -> ReducioPipeline:
    return ReducioPipeline.from_pretrained(folder, dtype="float32", backend="fast")


@pytest.fixture(scope="module")
def plain(folder: Path) -> ReducioPipeline:
    return ReducioPipeline.from_pretrained(folder, dtype="float32", backend="reference")


def latent(pipe: ReducioPipeline, **kwargs: Any) -> torch.Tensor:
    return pipe(PROMPT, **(LATENT | kwargs)).frames


@pytest.mark.parametrize(
    "words",
    [
        {"quality": "balanced"},
        {"quality": "draft"},
        {"schedule": "lu", "num_inference_steps": 8},
        {"schedule": "exponential", "num_inference_steps": 8},
        {"guidance_interval": (0.25, 1.0), "guidance_reuse": 2},
    ],
    ids=str,
)
@pytest.mark.slow
def test_both_backends_follow(pipe: ReducioPipeline, plain: ReducioPipeline, words: dict[str, Any]) -> None:
    fast = latent(pipe, **words)
    torch.testing.assert_close(fast, latent(plain, **words), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(fast, latent(pipe), rtol=1e-3, atol=1e-3)


def test_exact_is_what_a_call_does(pipe: ReducioPipeline) -> None:
    expected = latent(pipe)
    assert torch.equal(latent(pipe, quality="exact"), expected)
    assert torch.equal(latent(pipe, guidance_interval=[0.0, 1.0], guidance_reuse=1, cache_threshold=0), expected)
    assert torch.equal(latent(pipe, quality="balanced", num_inference_steps=20, schedule="own"), expected)
    never = latent(pipe, guidance_interval=(1.0, 1.0))
    torch.testing.assert_close(never, latent(pipe, guidance_scale=1.0), rtol=1e-3, atol=1e-3)


def test_both_stages_take_fewer_steps(pipe: ReducioPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    sample = pipe.executor.sample

    def counted(denoise: Any, *args: Any, **kwargs: Any) -> Any:
        seen[type(denoise.model).__name__] = args[2]
        return sample(denoise, *args, **kwargs)

    monkeypatch.setattr(pipe.executor, "sample", counted)
    for kwargs, expected in (
        ({}, (20, 20)),
        ({"quality": "balanced"}, (10, 10)),
        ({"quality": "balanced", "guidance_scale": 7.5}, (10, 12)),
        ({"quality": "draft", "content_kwargs": {"num_inference_steps": 3}, "num_inference_steps": 4}, (3, 4)),
    ):
        latent(pipe, image=None, **kwargs)
        assert (seen["FastPixArt"], seen["FastReducioDiT"]) == expected


@pytest.mark.slow
def test_a_model_says_its_own(folder: Path, pipe: ReducioPipeline, tmp_path: Path) -> None:
    own = ReducioPipeline.from_pretrained(
        folder, dtype="float32", text_to_image=None, sampling={"quality": "balanced", "guidance_reuse": 2}
    )
    own.save_pretrained(tmp_path / "model")
    again = ReducioPipeline.from_pretrained(tmp_path / "model", dtype="float32", backend="fast")
    assert again.sampling == {"quality": "balanced", "guidance_reuse": 2}
    assert torch.equal(latent(again), latent(pipe, quality="balanced", guidance_reuse=2))
    assert torch.equal(latent(again, quality="exact"), latent(pipe)), "a call's preset is whole"
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    shutil.copytree(tmp_path / "model", tmp_path / "bad")
    (tmp_path / "bad" / "model_index.json").write_text(json.dumps(index | {"sampling": {"speed": 2}}))
    with pytest.raises(ReducioError, match="sampling: unknown speed; known are quality, num_inference_steps, schedule"):
        ReducioPipeline.from_pretrained(tmp_path / "bad")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"quality": "best"}, "quality: must be one of exact, balanced, draft, is 'best'"),
        ({"schedule": "karras"}, "schedule: must be one of own, quadratic, lu, exponential, is 'karras'"),
        ({"guidance_interval": (0.5, 0.2)}, r"guidance_interval: must be two shares .* is \(0.5, 0.2\)"),
        ({"guidance_interval": 0.5}, "guidance_interval: must be two shares"),
        ({"guidance_reuse": 0}, "guidance_reuse: must be a whole number of at least 1, is 0"),
        ({"cache_threshold": float("nan")}, "cache_threshold: must be a number of at least 0, is nan"),
        ({"num_inference_steps": 900, "schedule": "quadratic"}, "900 is too many .*: two of the steps share a time"),
    ],
)
def test_bad_words(pipe: ReducioPipeline, words: dict[str, Any], line: str) -> None:
    with pytest.raises(ReducioError, match=line):
        latent(pipe, **words)


def test_what_a_model_cannot_follow(folder: Path, plain: ReducioPipeline) -> None:
    with pytest.raises(ReducioError, match="cache_threshold: 0.1 needs the fast path; reference: asked for"):
        latent(plain, cache_threshold=0.1)
    flow = ReducioPipeline.from_pretrained(folder, text_to_image=None, scheduler=FlowMatchEulerDiscreteScheduler())
    line = "schedule: a FlowMatchEulerDiscreteScheduler cannot follow 'quadratic'; it can own, exponential$"
    with pytest.raises(ReducioError, match=line):
        latent(flow, quality="balanced")


@pytest.mark.slow
def test_the_default_model_is_no_farther_at_balanced() -> None:
    """From the solution of many steps, on one prompt; figures for more: benchmarks/quality_presets.py."""
    pipe = ReducioPipeline.from_pretrained(embedded_model(), dtype="float32", text_to_image=None, backend="fast")
    frame = np.full((128, 128, 3), (40, 90, 60), np.uint8)
    frame[40:80, 50:90] = (200, 40, 40)
    kwargs = {"progress": False, "output_type": "latent", "image": frame}
    solution = pipe(PROMPT, num_inference_steps=200, **kwargs).frames
    distances = {
        name: float((pipe(PROMPT, quality=name, **kwargs).frames - solution).norm() / solution.norm())
        for name in ("exact", "balanced")
    }
    assert distances["balanced"] < distances["exact"], distances
