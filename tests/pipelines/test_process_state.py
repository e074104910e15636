"""The caller's process settings change no clip, and we change none of them; a copy is a pipeline of its own."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import export_to_video

from reducio_fast import ReducioError, ReducioPipeline
from reducio_fast.media.video_files import read_video

pytestmark = pytest.mark.slow

PROMPT = "a red circle moving right on a black background"
KWARGS: dict[str, Any] = {"num_inference_steps": 2, "progress": False, "seed": 0}


@contextmanager
def setting(change: Callable[[], None], back: Callable[[], None]) -> Iterator[None]:
    change()
    try:
        yield
    finally:
        back()


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "default dtype": lambda: setting(
        lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)
    ),
    "half as default": lambda: setting(
        lambda: torch.set_default_dtype(torch.float16), lambda: torch.set_default_dtype(torch.float32)
    ),
    "default device": lambda: setting(lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: setting(
        lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)
    ),
}


@pytest.fixture(scope="module")
def expected(bundle: Path) -> np.ndarray:
    return ReducioPipeline.from_pretrained(bundle)(PROMPT, **KWARGS).frames


@pytest.mark.parametrize("state", STATES)
def test_a_callers_torch_changes_no_clip(bundle: Path, expected: np.ndarray, state: str) -> None:
    with STATES[state]():
        pipe = ReducioPipeline.from_pretrained(bundle)
        out = pipe(PROMPT, **KWARGS)
        np.testing.assert_array_equal(out.frames, expected)
        np.testing.assert_array_equal(pipe(PROMPT, out.content, **KWARGS).frames, expected)
    assert not any(p.is_inference() for p in pipe.transformer.parameters())  # a LoRA could not be merged into them


def test_within_a_device_context_the_clip_is_the_same_to_rounding(bundle: Path) -> None:
    """In the context torch uses no fused multi-head attention, so the last bits differ (docs/troubleshooting.md).

    In float32: on a CPU that multiplies bfloat16 faster, the twin would use bfloat16, whose last bits weigh more.
    """
    pipe = ReducioPipeline.from_pretrained(bundle, dtype="float32")
    expected = pipe(PROMPT, **KWARGS).frames
    with torch.device("meta"):
        frames = pipe(PROMPT, **KWARGS).frames
    assert np.abs(frames.astype(int) - expected).max() <= 2


def test_loading_and_a_clip_change_nothing_of_the_process(bundle: Path) -> None:
    """In a process of its own: environment, torch's settings, umask, random states, signal handlers."""
    script = f"""
import os, random, signal, sys
import numpy, torch, diffusers, transformers  # what these change themselves is theirs
def state():
    mask = os.umask(0); os.umask(mask)
    return [dict(os.environ), str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(), mask, os.getcwd(), sys.path[:], torch.random.get_rng_state().tolist(),
            str(random.getstate()), str(numpy.random.get_state()), str(signal.getsignal(signal.SIGTERM)),
            torch.are_deterministic_algorithms_enabled(), sys.getrecursionlimit()]
before = state()
from reducio_fast import ReducioPipeline
pipe = ReducioPipeline.from_pretrained({str(bundle)!r})
pipe({PROMPT!r}, num_inference_steps=1, progress=False)
after = state()
print([i for i, (a, b) in enumerate(zip(before, after)) if a != b])
"""
    env = {name: value for name, value in os.environ.items() if name != "REDUCIO_CACHE_DIR"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", env=env)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_is_a_pipeline_of_its_own(
    bundle: Path, expected: np.ndarray, duplicate: Callable[[ReducioPipeline], ReducioPipeline]
) -> None:
    pipe = ReducioPipeline.from_pretrained(bundle)
    pipe(PROMPT, **KWARGS)
    pipe.vae_tiling = False
    other = duplicate(pipe)
    assert other.motion.decoder is other.decoder and other.motion.executor is other.executor
    np.testing.assert_array_equal(other(PROMPT, **KWARGS).frames, expected)
    assert other.report == pipe.report and other.vae_tiling is False and other.fps == pipe.fps
    for parameter in other.transformer.parameters():
        parameter.data.mul_(0.5)
    assert (other(PROMPT, **KWARGS).frames != expected).any()
    np.testing.assert_array_equal(pipe(PROMPT, **KWARGS).frames, expected)


def test_a_copy_keeps_its_adapters(bundle: Path) -> None:
    pipe = ReducioPipeline.from_pretrained(bundle)
    path = "transformer_blocks.0.attn1.to_q"
    out, width = pipe.transformer.get_submodule(path).weight.shape
    original = pipe.transformer.get_submodule(path).weight.clone()
    pipe.load_lora_weights({f"{path}.lora_A.weight": torch.ones(1, width), f"{path}.lora_B.weight": torch.ones(out, 1)})
    other = copy.deepcopy(pipe)
    assert other.get_active_adapters() == ["default_0"]
    other.unload_lora_weights()
    assert torch.equal(other.transformer.get_submodule(path).weight, original)
    assert pipe.get_active_adapters() == ["default_0"]


def test_a_child_that_is_forked_during_a_clip_can_make_clips(bundle: Path) -> None:
    """In a separate process in which torch has one thread: OpenMP's threads do not survive a fork."""
    script = f"""
import os, threading, torch
torch.set_num_threads(1)
from reducio_fast import ReducioPipeline
pipe = ReducioPipeline.from_pretrained({str(bundle)!r})
reached, go_on = threading.Event(), threading.Event()
def pause(*args):
    reached.set(); go_on.wait()
kwargs = dict(num_inference_steps=1, progress=False, output_type="latent")
thread = threading.Thread(target=lambda: pipe({PROMPT!r}, callback_on_step_end=pause, **kwargs))
thread.start(); reached.wait()
child = os.fork()
if child == 0:
    pipe({PROMPT!r}, **kwargs)
    os._exit(7)
status = os.waitpid(child, 0)[1]
go_on.set(); thread.join()
print(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", timeout=120)
    assert done.stdout.strip() == "7", done.stdout + done.stderr


def test_the_first_line_that_users_of_diffusers_write(bundle: Path, tmp_path: Path) -> None:
    pipe = ReducioPipeline.from_pretrained(bundle)
    out = pipe(PROMPT, **KWARGS)
    listed = pipe([PROMPT], **KWARGS)
    images = pipe(PROMPT, output_type="pil", **KWARGS)
    path = str(tmp_path / "clip.mp4")
    for wrong in (out.frames[0], out.frames, listed.frames[0], images.frames[0]):
        with pytest.raises(ReducioError, match=r"write export_to_video\(out.as_float\(\), path\), or out.save\(path\)"):
            export_to_video(wrong, path, fps=16)
    for right in (out.as_float(), images.frames, listed.as_float()[0]):
        export_to_video(list(right), path, fps=16)
        clip, _ = read_video(path)
        assert np.abs(clip.astype(int) - out.frames).mean() < 6
    # Every other use still sees uint8.
    assert (out.frames * 2).dtype == np.uint8 and torch.from_numpy(out.frames).dtype == torch.uint8
    np.testing.assert_array_equal((out.frames > 300) * 255, np.zeros(out.frames.shape))
