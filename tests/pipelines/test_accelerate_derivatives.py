"""`accelerate` on networks that other packages derive from diffusers': known ones run fast, others as they are."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet
from torch import Tensor, nn

from reducio_fast import accelerate
from svd_derivatives import FRAMES, DepthUNet, OrbitUNet, frame_autoencoder, inputs_of, network, pipeline_of
from tiny_networks import assert_right

pytestmark = pytest.mark.slow

KNOWN = (
    "UNetSpatioTemporalConditionModel (diffusers) and "
    "DiffusersUNetSpatioTemporalConditionModelDepthCrafter (DepthCrafter) and "
    "SV3DUNetSpatioTemporalConditionModel (sv3d-diffusers)"
)


def in_pipeline(unet: Any) -> Any:
    return SimpleNamespace(components={"unet": unet})


@pytest.mark.parametrize("changes", [{}, {"guidance": 1.5}], ids=["alone", "guided"])
def test_depth_of_a_video(changes: dict[str, float]) -> None:
    pipe, run = pipeline_of("DepthCrafter")
    the_clip_stays_and_undo_leaves_nothing(pipe, lambda seed: run(seed, **changes))


def test_an_orbit() -> None:
    pipe, run = pipeline_of("sv3d-diffusers")
    assert np.abs(run(polar=1.0) - run()).max() > 2 / 255, "the camera shows"
    the_clip_stays_and_undo_leaves_nothing(pipe, run)


def the_clip_stays_and_undo_leaves_nothing(pipe: Any, run: Callable[[int], np.ndarray]) -> None:
    pipe.set_progress_bar_config(disable=True)
    attributes = {name: sorted(vars(getattr(pipe, name))) for name in ("unet", "vae")}
    own_forward = type(pipe.unet).forward
    before = run(0)
    assert np.abs(run(1) - before).max() > 2 / 255
    with accelerate(pipe) as acceleration:
        assert acceleration.report == {"unet": "fast", "vae": "fast"}
        with torch.inference_mode():
            fast = run(0)
        assert np.abs(fast - before).max() <= 2 / 255 and not np.array_equal(fast, before), "the twins ran"
        assert np.array_equal(run(0), fast)
        copied = copy.deepcopy(pipe)
        assert copied.unet.forward.__self__ is not pipe.unet.forward.__self__
        pipe.unet.conv_out.weight.data.mul_(-1)
        assert np.abs(run(0) - fast).max() > 2 / 255, "changed weights are seen"
        pipe.unet.conv_out.weight.data.mul_(-1)
        assert acceleration.report == {"unet": "fast", "vae": "fast"}
    assert {name: sorted(vars(getattr(pipe, name))) for name in ("unet", "vae")} == attributes
    assert pipe.unet.forward.__func__ is own_forward
    assert np.array_equal(run(0), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network_class", [DepthUNet, OrbitUNet])
@torch.no_grad()
def test_one_step(network_class: Any, dtype: torch.dtype) -> None:
    """The token or the camera of every frame shows in the result, and the twin's result is the same."""
    unet, depth = network(network_class).to(dtype), network_class is DepthUNet
    inputs = inputs_of(unet, dtype)
    if depth:
        inputs["sample"] = inputs["sample"].float()  # it casts what it is given
    eager = unet(**inputs).sample
    oracle = copy.deepcopy(unet).double()(**{name: double(value) for name, value in inputs.items()}).sample
    name = "encoder_hidden_states" if depth else "added_time_ids"
    for frame in range(FRAMES if dtype == torch.float32 else 0):
        told = copy.deepcopy(inputs[name])
        (told if depth else told[1])[:, frame] += 1.0
        assert (unet(**inputs | {name: told}).sample - eager).abs().max() > 1e-3 * eager.abs().max()
    with accelerate(in_pipeline(unet)) as acceleration:
        fast = unet(**inputs).sample
        assert acceleration.report == {"unet": "fast"}
        assert fast.dtype == eager.dtype == dtype and not torch.equal(fast, eager), "the twin ran"
        assert_right(fast, eager, oracle)
        in_order = [inputs[name] for name in ("sample", "timestep", "encoder_hidden_states", "added_time_ids")]
        assert torch.equal(unet(*in_order, False)[0], fast)
    assert torch.equal(unet(**inputs).sample, eager)


def double(value: Any) -> Any:
    return [v.double() for v in value] if isinstance(value, list) else value.double()


@torch.no_grad()
def test_other_inputs_run_as_before() -> None:
    """What the classes take beside the arguments of their pipelines."""
    orbit, depth = network(OrbitUNet), network(DepthUNet)
    tensor = inputs_of(orbit) | {"added_time_ids": torch.rand(2, 5)}
    per_frame = inputs_of(depth)
    short = per_frame | {"encoder_hidden_states": per_frame["encoder_hidden_states"].flatten(0, 1)[None]}
    for unet, inputs in ((orbit, tensor), (depth, short)):
        before = unet(**inputs).sample
        with accelerate(in_pipeline(unet)):
            assert torch.equal(unet(**inputs).sample, before)


class Another(DiffusersUNet):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class OfDepthCrafter(DepthUNet):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def with_another_argument(
    self: Any,
    sample: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    added_time_ids: Tensor,
    pose_latents: Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    return DiffusersUNet.forward(self, sample, timestep, encoder_hidden_states, added_time_ids, return_dict)


def named(name: str, *bases: type, **methods: Any) -> type:
    return type(name, bases, {"__module__": __name__} | methods)


OTHERS: dict[str, tuple[type, str]] = {
    "a subclass": (Another, "Another"),
    "a subclass of DepthCrafter's": (OfDepthCrafter, "OfDepthCrafter"),
    "a copy with diffusers' name": (
        named("UNetSpatioTemporalConditionModel", DiffusersUNet, forward=with_another_argument),
        "UNetSpatioTemporalConditionModel",
    ),
    "DepthCrafter's name and other arguments": (
        named(DepthUNet.__name__, DiffusersUNet, forward=with_another_argument),
        DepthUNet.__name__,
    ),
    "sv3d-diffusers' name and no angles": (
        named(OrbitUNet.__name__, DiffusersUNet, forward=OrbitUNet.forward, __module__=OrbitUNet.__module__),
        OrbitUNet.__name__,
    ),
}


@pytest.mark.parametrize("case", OTHERS)
@torch.no_grad()
def test_a_class_that_is_not_known_runs_as_it_is(case: str) -> None:
    network_class, name = OTHERS[case]
    unet = network(network_class)
    acceleration = accelerate(in_pipeline(unet))
    full_name = f"{network_class.__module__}.{name}"
    assert acceleration.report == {
        "unet": f"as before: {full_name} has a forward of its own; supported is that of {KNOWN}"
    }
    assert "forward" not in vars(unet), "nothing was replaced"


def test_a_forward_replaced_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = network(DiffusersUNet)
    monkeypatch.setattr(DiffusersUNet, "forward", with_another_argument)
    assert "has a forward of its own" in accelerate(in_pipeline(unet)).report["unet"]


@torch.no_grad()
def test_a_decoder_with_a_decode_of_its_own() -> None:
    """`decode` calls `_decode`."""
    vae = frame_autoencoder()
    vae.__class__ = named("Doubled", AutoencoderKL, _decode=lambda self, z, return_dict=True: None)
    assert accelerate(SimpleNamespace(components={"vae": vae})).report == {
        "vae": f"as before: {__name__}.Doubled has a decode of its own; supported is that of AutoencoderKL (diffusers)"
    }


class Gelu(DiffusersUNet):
    """Without a forward of its own, but with another activation."""

    @functools.wraps(DiffusersUNet.__init__)
    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.conv_act = nn.GELU()


@torch.no_grad()
def test_subclasses_that_inherit_forward() -> None:
    """The class that defines `forward` counts: a class with DepthCrafter's name may inherit diffusers'."""
    bare = network(named(DepthUNet.__name__, DiffusersUNet))
    inputs = inputs_of(bare)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :1]
    for unet, report in (
        (bare, "fast"),
        (network(named("Derived", DepthUNet)), "fast"),
        (network(Gelu), "as before: conv_act is a GELU instead of a SiLU"),
    ):
        own = inputs_of(unet) if isinstance(unet, DepthUNet) else inputs
        before = unet(**own).sample
        with accelerate(in_pipeline(unet)) as acceleration:
            fast = unet(**own).sample
            assert acceleration.report == {"unet": report}
        torch.testing.assert_close(fast, before, rtol=1e-4, atol=1e-4)
        assert torch.equal(fast, before) == (report != "fast")
