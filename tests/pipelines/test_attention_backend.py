"""The options for attention backends: what the plan picks for each, and where an option is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reducio_fast import ReducioPipeline
from reducio_fast.fast import plan
from reducio_fast.fast.plan import Plan, check_attention
from reducio_fast.system.errors import ReducioError
from reducio_fast.triton_kernels import attention

CUDA, CPU = torch.device("cuda"), torch.device("cpu")  # a plan decides without touching its device
KWARGS = {"num_inference_steps": 1, "progress": False, "output_type": "latent"}


@pytest.mark.parametrize(
    ("word", "implementation"), [("native", "vendor"), ("flash", "flash-attn"), ("reducio", "kernel")]
)
def test_a_word_decides_attention_and_nothing_else(word: str, implementation: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    on_gpu = Plan(CUDA, torch.float16, attention=word)
    run = on_gpu.pick("transformer_blocks.0.attn1", "attention", "self 72")
    expected = {"native": attention.twin, "flash": plan.flash_attention, "reducio": torch.ops.reducio_fast.attention}
    assert run is expected[word]
    (choice,) = on_gpu.choices
    assert (choice.implementation, choice.why) == (implementation, f"asked for: {word}")
    on_cpu = Plan(CPU, torch.float32, attention=word)
    assert on_cpu.pick("x", "attention", "self 72") is attention.twin and on_cpu.choices[0].implementation == "torch"


def test_flash_leaves_masked_keys_to_our_kernel(monkeypatch: pytest.MonkeyPatch):
    """flash-attn takes no key count per item and no mask by frames; our kernel does, and the plan picks it there."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    on_gpu = Plan(CUDA, torch.float16, attention="flash")
    for shape, why in (("cross 72", "no count of keys an item"), ("self 64 frames", "no mask by frames")):
        assert on_gpu.pick("x", "attention", shape) is torch.ops.reducio_fast.attention
        assert on_gpu.choices[-1].implementation == "kernel" and why in on_gpu.choices[-1].why
    q, k, v = torch.randn(3, 1, 5, 2, 16).unbind(0)
    with pytest.raises(ValueError, match="flash-attn takes no key_count"):
        plan.flash_attention(q, k, v, torch.tensor([3], dtype=torch.int32))


@pytest.mark.parametrize(
    ("word", "device", "dtype", "message"),
    [
        ("aiter", CUDA, torch.float16, "'aiter' is not known; known are auto, native, flash, reducio"),
        ("reducio", CPU, torch.float32, "'reducio' needs a GPU, the pipeline is on cpu; auto and native run here"),
        ("flash", CUDA, torch.float16, "'flash' needs the package flash-attn, which is not here"),
        ("reducio", CUDA, torch.float64, "'reducio' does not take torch.float64; auto and native do"),
    ],
)
def test_a_word_that_cannot_be_followed(word: str, device, dtype, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        check_attention(word, device, dtype)


def test_flash_takes_half_precision_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    check_attention("flash", CUDA, torch.bfloat16)
    with pytest.raises(ValueError, match="'flash' does not take torch.float32"):
        check_attention("flash", CUDA, torch.float32)


@pytest.mark.slow
def test_the_pipeline_takes_the_words(folder):
    pipe = ReducioPipeline.from_pretrained(folder, device="cpu", text_to_image=None)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    before = pipe("a star", image, **KWARGS).frames
    twin = pipe.executor.network("transformer")

    def plan() -> Plan:
        return pipe.executor.network("transformer").plan

    with pipe.attention_backend("native"):
        assert torch.equal(pipe("a star", image, **KWARGS).frames, before)
        assert pipe.executor.network("transformer") is not twin and plan().attention == "native"
    assert plan().attention == "auto"
    pipe.set_attention_backend("native")
    with pytest.raises(ReducioError, match="attention backend: 'sage' is not known; known are auto, native, flash"):
        pipe.set_attention_backend("sage")
    assert plan().attention == "native", "a refused word changes nothing"
    pipe.reset_attention_backend()
    assert plan().attention == "auto"
    reference = ReducioPipeline.from_pretrained(folder, device="cpu", text_to_image=None, backend="reference")
    reference.set_attention_backend("native")
    for word in ("reducio", "sage"):
        with pytest.raises(ReducioError, match=f"'{word}' given; the reference knows auto and native"):
            reference.set_attention_backend(word)
