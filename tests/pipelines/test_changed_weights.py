"""A clip uses the current weights, however they were written; a twin packs only the modules that it supports."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from reducio_fast import ReducioError, ReducioPipeline, generate
from reducio_fast.fast.twins import TWINS
from reducio_fast.reference import ReducioDiT
from reducio_fast.system.checksum import checksums

PROMPT = "a red circle moving right on a black background"
KWARGS: dict[str, Any] = {"num_inference_steps": 1, "progress": False, "seed": 0}
IMAGE = np.full((64, 64, 3), 90, np.uint8)


def latent(pipe: ReducioPipeline) -> torch.Tensor:
    return pipe(PROMPT, IMAGE, height=64, width=64, output_type="latent", **KWARGS).frames


@pytest.fixture
def pipe(bundle: Path) -> ReducioPipeline:
    # float32, since a CPU with AMX otherwise runs the twin in bfloat16, whose rounding hides the differences tested.
    return ReducioPipeline.from_pretrained(bundle, text_to_image=None, dtype="float32")


def through_data(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.data.mul_(0.5)


def through_numpy(network: nn.Module) -> None:
    weight = next(p for p in network.parameters() if p.ndim > 1)
    weight.detach().numpy()[...] *= 0.5


def through_one_value(network: nn.Module) -> None:
    weight = next(p for n, p in network.named_parameters() if n.endswith("attn1.to_q.weight"))
    weight.data.view(-1)[17] += 1.0


def through_foreach(network: nn.Module) -> None:
    torch._foreach_mul_([p.data for p in network.parameters()], 0.5)


def through_ema(network: nn.Module) -> None:
    average = EMAModel(network.parameters())
    average.shadow_params = [p * 0.5 for p in average.shadow_params]
    average.copy_to(network.parameters())


def through_fused_adamw(network: nn.Module) -> None:
    network.requires_grad_(True)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True).step()
    network.requires_grad_(False)


def through_exchanged_rows(network: nn.Module) -> None:
    weight = next(p for n, p in network.named_parameters() if n.endswith("attn1.to_q.weight"))
    weight.data.copy_(weight.data.flip(0))


WRITES = (
    through_data, through_numpy, through_one_value, through_foreach, through_ema, through_fused_adamw,
    through_exchanged_rows,
)  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.slow
def test_a_write_to_weights_is_seen(pipe: ReducioPipeline, write: Callable[[nn.Module], None]) -> None:
    before = latent(pipe)
    write(pipe.transformer)
    reference = ReducioPipeline(**pipe.components, backend="reference")
    after, expected = latent(pipe), latent(reference)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_a_write_to_the_decoder_is_seen(pipe: ReducioPipeline) -> None:
    # Not a flat picture, which a decoder that warps shows unchanged with any weights.
    picture = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)

    def frames() -> np.ndarray:
        return pipe(PROMPT, picture, height=64, width=64, **KWARGS).frames

    before = frames()
    through_data(pipe.vae.decoder)
    assert (frames() != before).any()


def test_unchanged_weights_are_packed_once(pipe: ReducioPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    class Counted(TWINS[ReducioDiT]):  # type: ignore[misc]
        def __init__(self, *args: Any) -> None:
            built.append(args)
            super().__init__(*args)

    monkeypatch.setitem(TWINS, ReducioDiT, Counted)
    first = latent(pipe)
    assert torch.equal(latent(pipe), first)
    assert len(built) == 1


def test_checksums_tell_contents_of_every_layout_and_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool):
        x = torch.randn(7, 33).to(dtype)
        same = [x, x.clone(), x.t().contiguous().t()]
        assert len(set(checksums(same))) == 1
        changed = x.clone()
        changed[3, 5] = (~x[3, 5]) if dtype == torch.bool else x[3, 5] + 1
        assert checksums([changed]) != checksums([x])
    assert checksums([torch.empty(3, device="meta"), torch.tensor(1.5)])[0] == 0


def test_lora_guard_sees_a_write_that_counts_no_version(pipe: ReducioPipeline) -> None:
    path = "transformer_blocks.0.attn1.to_q"
    out, width = pipe.transformer.get_submodule(path).weight.shape
    pipe.load_lora_weights({f"{path}.lora_A.weight": torch.ones(2, width), f"{path}.lora_B.weight": torch.ones(out, 2)})
    pipe.to(torch.float32)  # no change
    pipe.transformer.get_submodule(path).weight.data.mul_(2)
    with pytest.raises(ReducioError, match="was changed by others"):
        pipe.unload_lora_weights()


@pytest.mark.slow
def test_a_replaced_model_folder_is_loaded_anew(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bundle, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"

    def clip() -> torch.Tensor:
        """The latent: in float32 the frames of a grey picture are all grey, whatever the weights."""
        return generate(PROMPT, IMAGE, folder, height=64, width=64, output_type="latent", **KWARGS).frames

    before, times = clip(), os.stat(weights)
    assert (clip() == before).all()
    tensors = {name: tensor * 0.5 for name, tensor in load_file(weights).items()}
    save_file(tensors, tmp_path / "new.safetensors", metadata={"format": "pt"})
    os.replace(tmp_path / "new.safetensors", weights)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` and archives leave it
    assert (clip() != before).any()


# ---- a network that a twin does not support runs as it is ----


def hook(network: nn.Module) -> None:
    network.transformer_blocks[0].attn1.register_forward_hook(lambda module, inputs, output: output * 0)


def pre_hook(network: nn.Module) -> None:
    network.register_forward_pre_hook(lambda module, inputs: None)


def subclass(network: nn.Module) -> None:
    attention = network.transformer_blocks[0].attn1
    attention.__class__ = type("Mine", (type(attention),), {})


def own_forward(network: nn.Module) -> None:
    block = network.transformer_blocks[0]
    forward = block.forward
    block.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def parametrisation(network: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(network.transformer_blocks[0].attn1.to_q)


def injected_adapter(network: nn.Module) -> None:
    network.transformer_blocks[0].attn1.adapter = nn.Linear(2, 2)


def tensor_subclass(network: nn.Module) -> None:
    class Quantised(torch.Tensor):
        pass

    layer = network.transformer_blocks[0].attn1.to_q
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Quantised), requires_grad=False)


def fewer_weights(network: nn.Module) -> None:
    network.transformer_blocks[0].attn1.to_q.bias = None


def half_of_it_in_float16(network: nn.Module) -> None:
    network.transformer_blocks[0].attn1.to_q.half()


CHANGES = (
    hook, pre_hook, subclass, own_forward, parametrisation, injected_adapter, tensor_subclass, fewer_weights,
    half_of_it_in_float16,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.slow
def test_a_changed_network_runs_as_it_is(pipe: ReducioPipeline, change: Callable[[nn.Module], None]) -> None:
    first = latent(pipe)
    assert pipe.backend == "fast"
    original = copy.deepcopy(pipe.transformer)
    change(pipe.transformer)
    assert pipe.backend == "reference" and pipe.report["transformer"].startswith("reference: transformer ")
    assert pipe.report["vae"].startswith("fast: ")
    if change not in (half_of_it_in_float16,):  # no layer can multiply its mixed dtypes
        expected = latent(ReducioPipeline(**pipe.components, backend="reference"))
        assert torch.equal(latent(pipe), expected)
    pipe.transformer = original
    assert pipe.backend == "fast" and torch.equal(latent(pipe), first)


def test_fast_is_refused_where_it_would_be_wrong(bundle: Path) -> None:
    pipe = ReducioPipeline.from_pretrained(bundle, text_to_image=None, backend="fast")
    hook(pipe.transformer)
    with pytest.raises(ReducioError, match=r"'fast' cannot run this model: transformer transformer_blocks.0.attn1 has"):
        latent(pipe)


def test_a_patched_class_is_noticed(pipe: ReducioPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = type(pipe.transformer.transformer_blocks[0].attn1)
    monkeypatch.setattr(attention, "forward", lambda self, x, *args, **kwargs: x)
    assert "forward" in pipe.report["transformer"] and pipe.backend == "reference"


def test_auto_follows_the_scheduler(pipe: ReducioPipeline) -> None:
    original = pipe.scheduler
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(original.config)
    assert "EulerAncestral" in pipe.report["transformer"]
    latent(pipe)
    pipe.scheduler = original
    assert pipe.backend == "fast"


def test_a_step_set_on_the_scheduler_is_called(pipe: ReducioPipeline) -> None:
    steps: list[int] = []
    step = pipe.scheduler.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return step(*args, **kwargs)

    pipe.scheduler.step = counted
    latent(pipe)
    assert steps == [1] and "the reference's sampler steps: the DPMSolver" in pipe.report["transformer"]
    assert "has a step of its own" in pipe.report["transformer"]
    del pipe.scheduler.step
    latent(pipe)
    assert steps == [1] and "of its own" not in pipe.report["transformer"]


def test_what_packing_raises_is_survived(pipe: ReducioPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(TWINS[ReducioDiT]):  # type: ignore[misc]
        def __init__(self, *args: object) -> None:
            raise NotImplementedError("aten::what.is_this")

    monkeypatch.setitem(TWINS, ReducioDiT, Fails)
    expected = latent(ReducioPipeline(**pipe.components, backend="reference"))
    assert torch.equal(latent(pipe), expected)
