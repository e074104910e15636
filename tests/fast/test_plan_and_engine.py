"""The plan, the engine and the pipelines that run on the fast path."""

from __future__ import annotations

import importlib.machinery
import json
import subprocess
import sys
import textwrap
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from reducio_fast import ReducioPipeline
from reducio_fast.evaluation.toy_report import held_out_scenes
from reducio_fast.fast import cpu_products
from reducio_fast.fast.plan import Plan
from reducio_fast.fast.reducio.dit import FastReducioDiT
from reducio_fast.fast.reducio.vae import FastReducioVAE
from reducio_fast.measurement.accuracy_rule import relative_error
from reducio_fast.reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from reducio_fast.system import cores, torch_state
from tiny_networks import DIT, VAE, assert_right, lively, plan

pytestmark = pytest.mark.slow


def test_plan_lists_every_module() -> None:
    chosen = plan()
    FastReducioDiT(lively(ReducioDiT(DiTConfig(**DIT))), chosen)
    FastReducioVAE(lively(ReducioVAE(VAEConfig(**VAE))), chosen)
    assert {c.implementation for c in chosen.choices} == {"torch"}
    lines = {(c.path, c.op) for c in chosen.choices}
    assert ("transformer_blocks.2.attn1", "attention self 12") in lines
    assert ("decoder.up.2.upsample", "upsample_conv3d 16->16") in lines
    assert len(lines) == len(chosen.choices)


def test_flash_attention_where_it_can_say_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan picks it when the model is built, if the table names it; key counts and frame masks keep our kernel."""
    from reducio_fast.fast import plan as planning

    calls, library = [], types.ModuleType("flash_attn")
    library.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    library.flash_attn_func = lambda q, k, v, softmax_scale: calls.append(q.shape) or v
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    monkeypatch.setattr(planning, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(planning, "table", lambda arch: {"plan": {"attention": "flash-attn"}})
    on_gpu = Plan(torch.device("cuda"), torch.bfloat16)
    # An op, since torch keeps an entry for each launch outside of one.
    assert on_gpu.clip_statistics() is torch.ops.reducio_fast.clip_statistics
    for shape in ("cross 72", "self 64 frames"):
        assert on_gpu.pick("a", "attention", shape) is torch.ops.reducio_fast.attention
    attend, x = on_gpu.pick("b", "attention", "self 72"), torch.ones(1, 2, 3, 4)
    assert attend(x, x, x, None, None, 0) is x and calls == [x.shape]
    with pytest.raises(ValueError, match=r"no frame \(2\)"):
        attend(x, x, x, frame=2)
    assert [c.implementation for c in on_gpu.choices] == ["kernel", "kernel", "flash-attn"]
    # Measured in bfloat16, or asked for before the pipeline was cast: float32 keeps our kernel.
    for word in ("auto", "flash"):
        wide = Plan(torch.device("cuda"), torch.float32, attention=word)
        assert wide.pick("c", "attention", "self 72") is torch.ops.reducio_fast.attention
        assert wide.choices[0].why == "flash-attn does not take float32"


@pytest.mark.parametrize("seed", range(16))
def test_default_clip_equals_the_reference(seed: int, pipes: tuple[ReducioPipeline, ReducioPipeline]) -> None:
    """At least 50 dB on each of 16 prompts, in float32, from one content frame and one noise."""
    reference, fast = pipes
    prompt = held_out_scenes(16)[seed].caption()
    expected = reference(prompt, seed=seed, progress=False)
    actual = fast(prompt, image=expected.content, seed=seed, progress=False)
    error = np.square(expected.frames.astype(np.float64) - actual.frames).mean()
    assert error == 0 or 10 * np.log10(255**2 / error) >= 50
    assert fast.backend == "fast" and np.array_equal(actual.content, expected.content)


@pytest.fixture(scope="module")
def pipes(bundle: Path) -> tuple[ReducioPipeline, ReducioPipeline]:
    return tuple(
        ReducioPipeline.from_pretrained(bundle, dtype="float32", device="cpu", backend=backend)
        for backend in ("reference", "fast")
    )


def test_changed_weights_are_packed_again(bundle: Path) -> None:
    pipe = ReducioPipeline.from_pretrained(bundle, device="cpu", dtype="float32", backend="fast")
    image, kwargs = np.full((128, 128, 3), 90, np.uint8), {"num_inference_steps": 1, "progress": False}
    first = pipe("a red circle", image, **kwargs).frames
    assert np.array_equal(pipe("a red circle", image, **kwargs).frames, first)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.add_(0.5)
    second = pipe("a red circle", image, **kwargs).frames
    assert not np.array_equal(second, first)
    same = {name: getattr(pipe, name) for name in ("sample_height", "sample_width")}
    reference = ReducioPipeline(**pipe.components, **same, backend="reference")
    assert np.abs(reference("a red circle", image, **kwargs).frames.astype(int) - second).max() <= 1


def test_a_cpu_that_multiplies_bfloat16_faster_computes_in_it(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the twins do, and only if no dtype is named; a named dtype holds everywhere."""
    monkeypatch.setenv("REDUCIO_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True, "avx512_bf16": True}, raising=False)
    monkeypatch.setattr(cpu_products, "_time", lambda name, timer: {"float32": 2.0, "bfloat16": 1.0})
    image, kwargs = np.full((128, 128, 3), 90, np.uint8), {"num_inference_steps": 2, "progress": False}
    prompt, load = "a red circle moving right", partial(ReducioPipeline.from_pretrained, bundle, device="cpu")

    def dtypes(pipe: ReducioPipeline) -> tuple[torch.dtype, ...]:
        twins = (pipe.executor.network(name) for name in ("transformer", "vae"))
        return pipe.dtype, pipe.vae.quant_conv.weight.dtype, *(twin.dtype for twin in twins)

    pipe, wide, half = load(), [torch.float32] * 2, [torch.bfloat16] * 2
    assert dtypes(pipe) == (*wide, *half) and "in bfloat16: its products take 0.50" in pipe.report["vae"]
    latent = pipe(prompt, image, output_type="latent", **kwargs).frames
    named, reference = load(dtype="float32"), load(backend="reference")
    assert dtypes(named) == (*wide, *wide) and named.report["vae"].endswith("in float32: asked for")
    assert reference.executor.network("vae") is reference.vae and reference.dtype == torch.float32
    pipes = reference, named, load(dtype="bfloat16", backend="reference")
    oracle, float32, rounded = (p(prompt, image, output_type="latent", **kwargs).frames for p in pipes)
    assert latent.dtype == torch.float32 and relative_error(float32, oracle) < 1e-4
    assert_right(latent, rounded, oracle)
    assert dtypes(pipe.to("cpu")) == (*wide, *half) and dtypes(pipe.to(dtype="float32")) == (*wide, *wide)
    assert torch.equal(pipe(prompt, image, output_type="latent", **kwargs).frames, float32)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True}, raising=False)
    assert dtypes(load()) == (*wide, *wide)


def test_the_table_of_dtypes_is_measured_once_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product is timed in both dtypes, and the next process reads the times."""
    monkeypatch.setenv("REDUCIO_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    network = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(64, 32), torch.nn.Conv3d(16, 16, 3))
    network.append(torch.nn.Conv2d(4, 8, 3)).append(torch.nn.Conv2d(8, 8, 1))
    assert cpu_products.products_of(network) == {"linear 64->32": 2, "conv3d 16->16": 1, "conv2d 4->8": 1}

    def timed(slow: torch.dtype) -> Any:
        """A clock on which products in that dtype take three times as long."""

        def seconds(run: Any) -> float:
            return 3.0 if run().dtype == slow else 1.0

        return seconds

    assert cpu_products.choose(network, timed(torch.float32))[0] == torch.bfloat16
    dtype, why = cpu_products.choose(network, timed(torch.bfloat16))
    assert dtype == torch.float32 and why == "its products take 3.00 of float32's time in bfloat16 on this CPU"
    assert not list(tmp_path.rglob("*.json")), "a clock of one's own keeps nothing"

    chosen = cpu_products.choose(network)
    (file,) = tmp_path.rglob("*.json")
    table = json.loads(file.read_text())
    assert sorted(table) == ["conv2d 4->8", "conv3d 16->16", "linear 64->32"]
    assert all(0 < seconds < 10 for row in table.values() for seconds in row.values())
    cpu_products._tables.clear()  # as in another process
    monkeypatch.setattr(cpu_products, "_time", None)
    assert cpu_products.choose(network) == chosen
    cpu_products._tables.clear()
    file.write_text("{")
    monkeypatch.setattr(cpu_products, "_time", lambda name, timer: {"float32": 1.0, "bfloat16": 0.95})
    assert cpu_products.choose(network)[0] == torch.float32, "a damaged table is measured again; 5% gains too little"
    assert sorted(json.loads(file.read_text())) == sorted(table)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True}, raising=False)
    assert cpu_products.choose(network) == (torch.float32, "this CPU has no bfloat16")


def test_a_product_counts_by_its_work_in_a_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many linears outweigh no convolution of 27 taps, and what a clip does not run counts nothing."""
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    gains = {"linear": 2.0, "conv2d": 2.0, "conv3d": 0.5}
    monkeypatch.setattr(
        cpu_products, "_time", lambda name, timer: {"float32": 1.0, "bfloat16": gains[name.partition(" ")[0]]}
    )
    decoder = torch.nn.Sequential(torch.nn.Conv3d(16, 16, 3), *(torch.nn.Linear(16, 16) for _ in range(5)))
    autoencoder = torch.nn.ModuleDict({"encoder_2d": torch.nn.Conv2d(3, 8, 3), "decoder": decoder})
    assert cpu_products.products_of(autoencoder) == {"conv3d 16->16": 1, "linear 16->16": 5}
    assert cpu_products.choose(autoencoder, lambda run: 1.0)[0] == torch.bfloat16
    assert cpu_products.work_of("linear 16->64") == 4, "of the same positions"


def test_the_table_is_that_of_the_threads_of_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pipe.report` reads it outside of a call, where torch may have more threads than the process has cores."""
    monkeypatch.setenv("REDUCIO_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    for name in cores.COUNTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "usable", lambda: 1)
    threads: list[int] = []

    def seconds(name: str, timer: Any) -> dict[str, float]:
        threads.append(torch.get_num_threads())
        return {"float32": 1.0, "bfloat16": 0.5}

    monkeypatch.setattr(cpu_products, "_time", seconds)
    network, before = torch.nn.Linear(8, 8), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        outside = cpu_products.choose(network)
        with torch_state.inference():
            assert cpu_products.choose(network) == outside
        assert threads == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_bytes_and_values_are_one_clip(bundle: Path) -> None:
    """The fast path's bytes are its rounded values, and a value that is not finite is refused."""
    pipe = ReducioPipeline.from_pretrained(bundle, device="cpu", dtype="float32", backend="fast")
    latents = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    frames, values = (pipe.decode(latents, image, output_type=kind) for kind in ("np", "pt"))
    assert np.array_equal(frames, (values * 255).round().byte().permute(0, 2, 3, 1).numpy())
    vae = pipe.executor.network("vae")
    with pytest.raises(ValueError, match="not finite"):
        vae.decode(latents[None] * torch.nan, vae.encode_content(torch.zeros(1, 3, 128, 128)), as_uint8=True)


def test_any_scheduler_steps_the_fast_network(bundle: Path) -> None:
    """The reference's sampler steps a scheduler that the fast sampler does not support, with one line of report."""
    load = partial(ReducioPipeline.from_pretrained, bundle, device="cpu", dtype="float32", scheduler=DDIMScheduler())
    image, kwargs = np.full((128, 128, 3), 90, np.uint8), {"num_inference_steps": 3, "progress": False}
    fast, plain = load(backend="fast"), load(backend="reference")
    latents = [p("a red circle", image, output_type="latent", **kwargs).frames for p in (fast, plain)]
    assert relative_error(*latents) < 1e-4 and not torch.equal(*latents)
    assert "the reference's sampler steps: DDIMScheduler has no table" in fast.report["transformer"]
    assert fast.backend == "fast" and "\n" not in fast.report["transformer"]


def test_a_bare_gpu_machine_can_import_the_fast_path() -> None:
    """torch, Triton, numpy and safetensors are enough for the modules that a GPU machine runs."""
    code = textwrap.dedent("""
        import sys

        for name in ("diffusers", "transformers", "open_clip", "imageio", "PIL", "tqdm", "scipy"):
            sys.modules[name] = None  # an import of it raises ImportError
        import reducio_fast.reference, reducio_fast.compile.aot, reducio_fast.memory.dry_run
        import reducio_fast.measurement.accuracy_rule, reducio_fast.measurement.parity
        import reducio_fast.fast.engine, reducio_fast.fast.sampler
    """)
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
