"""`accelerate`: a diffusers pipeline on the fast networks, and back."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image

from reducio_fast import ReducioError, accelerate
from reducio_fast.pipelines.peers.models import PEERS, build_random
from svd_derivatives import OrbitUNet, inputs_of, network
from tiny_pixart import pixart
from tiny_svd import lively_svd, unet_config, unet_inputs, vae_config

pytestmark = pytest.mark.slow

CALL = {"height": 64, "width": 64, "num_frames": 3, "num_inference_steps": 2, "output_type": "np"}


@pytest.fixture
def pipe() -> StableVideoDiffusionPipeline:
    pipe = build_random(PEERS["svd"], True, torch.float32, torch.device("cpu"))
    lively_svd(pipe.unet)
    lively_svd(pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(pipe: Any, seed: int = 0) -> np.ndarray:
    rows, columns = np.mgrid[0:64, 0:64]
    picture = Image.fromarray(np.stack([rows * 3, columns, rows * columns % 256], axis=-1).astype(np.uint8))
    return pipe(picture, **CALL, generator=torch.Generator().manual_seed(seed)).frames[0]


def test_the_clip_stays_and_undo_leaves_nothing(pipe: StableVideoDiffusionPipeline) -> None:
    attributes = {name: sorted(vars(getattr(pipe, name))) for name in ("unet", "vae")}
    grads = [p.requires_grad for p in pipe.unet.parameters()]
    before = clip(pipe)
    with accelerate(pipe) as acceleration:
        assert acceleration.report == {"unet": "fast", "vae": "fast"}
        fast = clip(pipe)
        assert np.abs(fast - before).max() <= 2 / 255 and not np.array_equal(fast, before), "the twins ran"
        assert pipe.unet.forward.__func__ is not UNetSpatioTemporalConditionModel.forward
    assert {name: sorted(vars(getattr(pipe, name))) for name in ("unet", "vae")} == attributes
    assert [p.requires_grad for p in pipe.unet.parameters()] == grads
    assert np.array_equal(clip(pipe), before)


def test_changed_moved_and_replaced_weights(pipe: StableVideoDiffusionPipeline) -> None:
    plain, acceleration = copy.deepcopy(pipe), accelerate(pipe)
    first = clip(pipe)
    assert np.array_equal(clip(copy.deepcopy(pipe)), first), "a copy is as fast"

    def same() -> bool:
        return bool(np.abs(clip(pipe) - clip(plain)).max() <= 2 / 255)

    for p in (pipe, plain):
        p.unet.conv_out.weight.data.mul_(-1)
    assert same() and np.abs(clip(pipe) - first).max() > 2 / 255
    for p in (pipe, plain):
        p.unet.conv_in.weight = torch.nn.Parameter(p.unet.conv_in.weight * 0.5)
    assert same() and acceleration.report["unet"] == "fast"
    pipe.unet.to(torch.float64)
    assert next(pipe.unet.parameters()).dtype == torch.float64
    inputs = {name: t.double() for name, t in unet_inputs(pipe.unet.config, 2, (8, 8)).items()}
    inputs["encoder_hidden_states"] = torch.randn(2, 1, pipe.unet.config.cross_attention_dim).double()
    out = pipe.unet(**inputs, return_dict=False)[0]
    plain.unet.to(torch.float64)
    torch.testing.assert_close(out, plain.unet(**inputs).sample, rtol=1e-9, atol=1e-9)


def test_what_the_twin_cannot_do_runs_as_before(pipe: StableVideoDiffusionPipeline) -> None:
    acceleration = accelerate(pipe)
    inputs = unet_inputs(pipe.unet.config, 2, (8, 8))
    inputs["encoder_hidden_states"] = torch.randn(2, 1, pipe.unet.config.cross_attention_dim)
    pipe.unet.requires_grad_(True)
    pipe.unet(**inputs).sample.sum().backward()
    assert pipe.unet.conv_in.weight.grad is not None
    assert acceleration.report["unet"] == "as before: gradients are recorded"
    with torch.no_grad():
        separate = inputs | {"timestep": torch.tensor([0.2, 0.7])}
        batch = pipe.unet(**separate).sample
        for item, timestep in enumerate((0.2, 0.7)):
            single = pipe.unet(**{k: v[item : item + 1] for k, v in inputs.items() if v.ndim} | {"timestep": timestep})
            torch.testing.assert_close(single.sample[0], batch[item], rtol=1e-4, atol=1e-4)
    acceleration.undo()


def with_leaf(name: str) -> tuple[dict[str, Any], Any, torch.Tensor]:
    """A network by its name in a pipeline, how to run it, and one of the tensors that it is given."""
    if name == "resolution":
        drawer, leaf = pixart(128).transformer, torch.tensor([[64.0, 64.0]])
        added = {"resolution": leaf, "aspect_ratio": torch.tensor([[1.0]])}
        given = (torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16), torch.tensor([7]), added)
        return {"transformer": drawer}, lambda: drawer(*given), leaf
    if name == "z":
        vae, leaf = networks().vae, torch.randn(2, 4, 8, 8)
        return {"vae": vae}, lambda: vae.decode(leaf, num_frames=2), leaf
    unet = network(OrbitUNet) if name == "camera" else networks().unet
    inputs = inputs_of(unet) if name == "camera" else unet_inputs(unet.config, 2, (4, 4))
    return {"unet": unet}, lambda: unet(**inputs), inputs["added_time_ids"][1] if name == "camera" else inputs[name]


@pytest.mark.parametrize("name", ["sample", "encoder_hidden_states", "z", "resolution", "camera"])
def test_gradients_pass_through_frozen_networks(name: str) -> None:
    """Whichever argument asks for them, also one in a dict or a list."""
    torch.manual_seed(0)
    components, run, leaf = with_leaf(name)
    leaf.requires_grad_(True)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(run().sample.square().sum(), leaf)[0]

    before = gradient()
    with accelerate(SimpleNamespace(components=components)) as acceleration:
        assert torch.equal(gradient(), before) and before.abs().max() > 0
        assert [*acceleration.report.values()] == ["as before: gradients are recorded"]
        with torch.no_grad():
            run()
        assert [*acceleration.report.values()] == ["fast"]


@pytest.mark.parametrize("name", ["unet", "vae", "transformer", "image vae"])
@torch.no_grad()
def test_under_autocast_a_network_runs_as_before(name: str) -> None:
    """Also in the middle of a clip, whose steps all get the same embeddings."""
    torch.manual_seed(0)
    if name in ("unet", "vae"):
        pipeline = build_random(PEERS["svd"], True, torch.float32, torch.device("cpu"))
        inputs = unet_inputs(pipeline.unet.config, 2, (8, 8))
        inputs["encoder_hidden_states"] = torch.randn(2, 1, pipeline.unet.config.cross_attention_dim)
        latent = torch.randn(2, 4, 4, 4)
        run = {"unet": lambda: pipeline.unet(**inputs), "vae": lambda: pipeline.vae.decode(latent, num_frames=2)}[name]
    else:
        pipeline = pixart(8)
        latent, text, time = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16), torch.tensor([7])
        run = {
            "transformer": lambda: pipeline.transformer(latent, text, time, {"resolution": None, "aspect_ratio": None}),
            "image vae": lambda: pipeline.vae.decode(latent),
        }[name]

    def result(autocast: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return run().sample

    expected = result(True)
    acceleration, reports = accelerate(pipeline), []
    for autocast in (False, True, False):
        out = result(autocast)
        assert torch.equal(out, expected) == autocast
        reports.append(acceleration.report[name.split()[-1]])
    assert reports == ["fast", "as before: runs under autocast", "fast"]


@torch.no_grad()
def test_an_empty_batch_runs_as_before() -> None:
    """Without attention, which takes no empty batch."""
    vae = AutoencoderKLTemporalDecoder(**vae_config(32, 32, layers_per_block=1))
    acceleration = accelerate(SimpleNamespace(components={"vae": vae}))
    assert vae.decode(torch.zeros(0, 4, 8, 8), num_frames=3).sample.shape == (0, 3, 16, 16)
    assert acceleration.report["vae"] == "as before: the batch is empty"


def doubled(module: torch.nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    return 2 * out


class Processor(AttnProcessor2_0):
    pass


def add_lora(unet: Any) -> None:
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), unet)
    unet.requires_grad_(False)


CHANGES: dict[str, tuple[Any, str]] = {
    "a module inside another": (
        lambda unet: setattr(unet, "conv_out", torch.nn.Sequential(unet.conv_out)),
        "conv_out is a Sequential instead of a Conv2d",
    ),
    "a hook": (lambda unet: unet.conv_in.register_forward_hook(doubled), "conv_in has forward hooks"),
    "a hook on the network": (lambda unet: unet.register_forward_pre_hook(lambda m, a: a), "has forward hooks"),
    "a forward": (
        lambda unet: setattr(unet.conv_in, "forward", lambda x: 0 * torch.nn.functional.conv2d(x, unet.conv_in.weight)),
        "conv_in has a forward of its own",
    ),
    "a processor": (lambda unet: unet.set_attn_processor(Processor()), "has a Processor"),
    "a parametrisation": (
        lambda unet: torch.nn.utils.parametrizations.weight_norm(unet.conv_in),
        "conv_in is a ParametrizedConv2d",
    ),
    "LoRA layers": (add_lora, "to_q is a peft.tuners.lora.layer.Linear instead of a torch.nn.modules.linear.Linear"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_runs_as_it_is(change: str) -> None:
    unet = lively_svd(UNetSpatioTemporalConditionModel(**unet_config(32, 64)))
    inputs = unet_inputs(unet.config, 2, (8, 8))

    def run() -> torch.Tensor:
        return unet(**{name: tensor.clone() for name, tensor in inputs.items()}).sample  # another clip each time

    acceleration = accelerate(SimpleNamespace(components={"unet": unet}))
    first = run()
    assert acceleration.report == {"unet": "fast"}
    apply, reason = CHANGES[change]
    apply(unet)
    fast, report = run(), acceleration.report["unet"]
    assert report.startswith("as before: ") and reason in report
    acceleration.undo()
    assert torch.equal(fast, run()) and fast.shape[:2] == first.shape[:2]


def networks() -> Any:
    unet = lively_svd(UNetSpatioTemporalConditionModel(**unet_config(32, 64)))
    vae = lively_svd(AutoencoderKLTemporalDecoder(**vae_config(32, 32)))
    return SimpleNamespace(unet=unet, vae=vae, components={"unet": unet, "vae": vae})


def results(pipeline: Any) -> dict[str, torch.Tensor]:
    """Of the unet and the vae on another clip each time."""
    inputs, latent = unet_inputs(pipeline.unet.config, 2, (4, 4)), torch.linspace(-1, 1, 512).view(2, 4, 8, 8)
    return {"unet": pipeline.unet(**inputs).sample, "vae": pipeline.vae.decode(latent, num_frames=2).sample}


def equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in some if torch.equal(some[name], others[name])]


BOTH, FAST = ["unet", "vae"], {"unet": "fast", "vae": "fast"}


@torch.no_grad()
def test_hooks_that_were_added_later() -> None:
    """`undo` takes nothing away from them, and nothing of ours comes back when they are removed."""
    pipeline = networks()
    before, acceleration = results(pipeline), accelerate(pipeline)
    assert not equal(results(pipeline), before), "the twins ran"
    hook = CpuOffload("cpu")
    for part in pipeline.components.values():
        add_hook_to_module(part, hook)
    assert equal(results(pipeline), before) == BOTH
    hooked = "as before: has hooks, such as those of enable_model_cpu_offload"
    assert acceleration.report == {"unet": hooked, "vae": hooked}
    for part in pipeline.components.values():
        remove_hook_from_module(part)
    assert not equal(results(pipeline), before) and acceleration.report == FAST
    add_hook_to_module(pipeline.unet, hook)
    forward = pipeline.unet.forward
    acceleration.undo()
    assert pipeline.unet.forward is forward and equal(results(pipeline), before) == BOTH
    remove_hook_from_module(pipeline.unet)
    assert equal(results(pipeline), before) == BOTH
    with accelerate(pipeline) as again:
        assert not equal(results(pipeline), before) and again.report == FAST
    assert equal(results(pipeline), before) == BOTH and "forward" not in vars(pipeline.unet)


@torch.no_grad()
def test_undo_leaves_what_others_set() -> None:
    pipeline = networks()
    before, acceleration = results(pipeline), accelerate(pipeline)
    ours = pipeline.unet.forward
    pipeline.unet.forward = wrapped = lambda *args, **kwargs: ours(*args, **kwargs)
    del pipeline.vae.decode
    assert equal(results(pipeline), before) == ["vae"]
    acceleration.undo()
    assert pipeline.unet.forward is wrapped and equal(results(pipeline), before) == BOTH


@torch.no_grad()
def test_a_network_that_is_compiled_later() -> None:
    """Tracing enters diffusers' network, not the packing of weights."""
    drawer, latent, time = pixart().transformer, torch.randn(1, 4, 8, 8), torch.tensor([7])
    text, added = torch.randn(1, 5, 16), {"resolution": None, "aspect_ratio": None}
    before = drawer(latent, text, time, added).sample
    acceleration = accelerate(SimpleNamespace(components={"transformer": drawer}))
    fast = drawer(latent, text, time, added).sample
    assert not torch.equal(fast, before), "the twin ran"
    compiled = torch.compile(drawer, backend="eager", fullgraph=True)
    for _ in range(2):  # the second run of a graph is not traced
        assert torch.equal(compiled(latent, text, time, added).sample, before)
        assert acceleration.report == {"transformer": "as before: it is compiled"}
        assert torch.equal(drawer(latent, text, time, added).sample, fast)
        assert acceleration.report == {"transformer": "fast"}
    acceleration.undo()
    assert torch.equal(compiled(latent, text, time, added).sample, before)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_network_that_was_compiled_before(in_place: bool) -> None:
    pipeline = networks()
    if in_place:
        pipeline.unet.compile(backend="eager")
    else:
        pipeline.components["unet"] = torch.compile(pipeline.unet, backend="eager")
    assert accelerate(pipeline).report == {"unet": "as before: it is compiled", "vae": "fast"}


@torch.no_grad()
def test_a_copy_can_be_taken_over() -> None:
    pipeline = networks()
    before, acceleration = results(pipeline), accelerate(pipeline)
    fast, copied = results(pipeline), copy.deepcopy(pipeline)
    assert equal(results(copied), fast) == BOTH
    with accelerate(copied) as taken:
        assert taken.report == FAST and equal(results(copied), fast) == BOTH
    assert equal(results(copied), before) == BOTH and "forward" not in vars(copied.unet)
    assert equal(results(pipeline), fast) == BOTH and acceleration.report == FAST


class Another(UNetSpatioTemporalConditionModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Derived(UNetSpatioTemporalConditionModel):
    """Like derivatives that change only how the network is built."""


def test_subclasses_hooks_and_second_calls() -> None:
    config = unet_config(32, 64)
    derived, another = Derived(**config), Another(**config)
    acceleration = accelerate(SimpleNamespace(components={"unet": derived, "other": None}))
    assert acceleration.report == {"unet": "fast"}
    again = accelerate(SimpleNamespace(components={"unet": derived}))
    assert again.report == {"unet": "as before: its forward was replaced before, by hooks or by accelerate"}
    acceleration.undo()
    left = accelerate(SimpleNamespace(components={"unet": another}))
    assert ".Another has a forward of its own; supported is that of UNetSpatioTemporal" in left.report["unet"]
    derived._hf_hook = object()
    assert "replaced before, by hooks" in accelerate(SimpleNamespace(components={"unet": derived})).report["unet"]


def test_a_pipeline_of_another_kind() -> None:
    with pytest.raises(ReducioError, match="has no UNetSpatio.*, PixArtTransformer2DModel or AutoencoderKL$"):
        accelerate(SimpleNamespace(components={"vae": torch.nn.Linear(2, 2)}))


def test_compile_is_checked(pipe: StableVideoDiffusionPipeline) -> None:
    with pytest.raises(ReducioError, match="compile: must be True, False or None, is 'no'"):
        accelerate(pipe, compile="no")
    assert "forward" not in vars(pipe.unet), "nothing was replaced"


@pytest.mark.parametrize("sample_size", [8, 128])
def test_pixart(sample_size: int) -> None:
    """The picture stays, whatever the network's conditions; what the twin does not support runs as before."""
    pipeline = pixart(sample_size)
    pipeline.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 48, "num_inference_steps": 2, "use_resolution_binning": False, "output_type": "np"}

    def draw(**changes: Any) -> np.ndarray:
        arguments = {"prompt": "a red circle", "clean_caption": False, "generator": torch.Generator().manual_seed(0)}
        return pipeline(**(arguments | call | changes)).images[0]

    before, unguided = draw(), draw(guidance_scale=1.0)
    with accelerate(pipeline) as acceleration:
        assert acceleration.report == {"transformer": "fast", "vae": "fast"}
        fast = draw()
        assert np.abs(fast - before).max() <= 2 / 255 and not np.array_equal(fast, before), "the twins ran"
        assert np.abs(draw(guidance_scale=1.0) - unguided).max() <= 2 / 255
        assert np.array_equal(draw(), fast)
        pipeline.transformer.proj_out.weight.data.mul_(-1)
        changed = draw()
        assert np.abs(changed - before).max() > 2 / 255, "changed weights are seen"
        pipeline.vae.enable_tiling()
        tiled = draw()
        assert np.abs(tiled - changed).max() > 2 / 255, "tiles are no whole picture"
        hook = pipeline.transformer.proj_out.register_forward_hook(doubled)
        draw()
        assert acceleration.report["transformer"] == "as before: proj_out has forward hooks"
        hook.remove()
    assert np.abs(draw() - tiled).max() <= 2 / 255, "tiles are diffusers' own"
