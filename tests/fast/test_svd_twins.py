"""SVD's fast twins against the reference: every configuration of both networks, and the sampler's table.

The oracle is the reference in float64, eager is the reference in float32, the rule is that of `accuracy_rule`.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from reducio_fast import reference as ref
from reducio_fast.fast import sampler as fast_sampler
from reducio_fast.fast.packed_layers import UpConv
from reducio_fast.fast.plan import Plan
from reducio_fast.fast.solver_tables import coefficients
from reducio_fast.fast.svd.layers import Norm, SpatialRes, TemporalRes, TimeConv
from reducio_fast.fast.svd.transformer import SelfAttention
from reducio_fast.fast.svd.unet import FastVideoUNet
from reducio_fast.fast.svd.vae import FastTemporalVAE
from reducio_fast.media.pixels import to_bytes
from reducio_fast.memory.dry_run import DryRun
from reducio_fast.reference.svd.layers import SpatialResBlock
from reducio_fast.reference.svd.sampler import ImageCondition
from reducio_fast.triton_kernels.registry import OPS
from tiny_networks import assert_right, plan
from tiny_svd import unet_inputs, unets, vaes

pytestmark = pytest.mark.slow


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).double().norm() / expected.double().norm()).item()


def double(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in values.items()}


# ---- the U-Net -------------------------------------------------------------------------------------------------------

UNETS: dict[str, tuple[tuple[int, ...], int, tuple[int, int], int, dict[str, Any]]] = {
    "two levels": ((32, 64), 5, (8, 12), 1, {}),
    "three tokens": ((32, 64), 3, (4, 6), 3, {}),
    "one frame": ((32, 64), 1, (4, 4), 1, {}),
    "two transformers a block": ((32, 64, 64), 4, (8, 8), 1, {"transformer_layers_per_block": 2}),
    "four levels": ((32, 32, 64, 64), 3, (8, 16), 1, {"layers_per_block": 2, "num_attention_heads": 2}),
    "a size that is halved upwards": ((32, 64, 64), 2, (5, 7), 1, {}),
}


@pytest.mark.parametrize("case", UNETS)
def test_unet(case: str) -> None:
    channels, frames, size, tokens, changes = UNETS[case]
    model, theirs = unets(*channels, **changes)
    inputs = unet_inputs(model.config, frames, size, tokens=tokens)
    fast = FastVideoUNet(model, plan())(**inputs)
    assert_right(fast, model(**inputs), copy.deepcopy(model).double()(**double(inputs)))
    assert torch.equal(FastVideoUNet(theirs, plan())(**inputs), fast), "built from diffusers' modules: the same bits"


def test_unet_in_float64_is_the_reference() -> None:
    """Folding is exact, not an approximation."""
    model, _ = unets(32, 64, dtype=torch.float64)
    inputs = unet_inputs(model.config, 5, (8, 12), torch.float64)
    assert relative(FastVideoUNet(model, plan(torch.float64))(**inputs), model(**inputs)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_unet_in_half_precision(dtype: torch.dtype) -> None:
    model, _ = unets(32, 64)
    inputs = unet_inputs(model.config, 5, (8, 8))
    half, halved = copy.deepcopy(model).to(dtype), {name: tensor.to(dtype) for name, tensor in inputs.items()}
    oracle = copy.deepcopy(half).double()(**double(halved))
    assert_right(FastVideoUNet(half, plan(dtype))(**halved), half(**halved), oracle)


@pytest.mark.parametrize(
    "told", ["ids of the clip", "ids of a frame", "token of a frame", "tokens of a frame", "same ids"]
)
def test_what_each_frame_is_told(told: str) -> None:
    """SV3D gives each frame its own elevation and azimuth; frames of other clips share one row, on a shorter path."""
    model, _ = unets(32, 64)
    inputs, draw = unet_inputs(model.config, 4, (4, 4)), torch.Generator().manual_seed(2)
    if told == "ids of a frame":
        inputs["added_time_ids"] = 100 * torch.rand(2, 4, 3, generator=draw)
    elif "of a frame" in told:
        inputs["encoder_hidden_states"] = torch.randn(2, 4, 1 if told == "token of a frame" else 2, 24, generator=draw)
    elif told == "same ids":
        inputs["added_time_ids"] = inputs["added_time_ids"][:1].repeat(2, 1)
    oracle = copy.deepcopy(model).double()(**double(inputs))
    fast, eager = FastVideoUNet(model, plan())(**inputs), model(**inputs)
    assert_right(fast, eager, oracle)
    shared = model(
        **(inputs | {"added_time_ids": unet_inputs(model.config, 4, (4, 4))["added_time_ids"][1:].repeat(2, 1)})
    )
    assert relative(shared, eager) > 1e-4, "what is told must show"


def test_unet_refuses_what_the_reference_refuses() -> None:
    model, _ = unets(32, 64)
    inputs = unet_inputs(model.config, 2, (4, 4))
    for name, shape in (("sample", (2, 2, 7, 4, 4)), ("added_time_ids", (2, 4)), ("encoder_hidden_states", (1, 1, 24))):
        messages = []
        for network in (model, FastVideoUNet(model, plan())):
            with pytest.raises(ValueError, match=f"{name} has shape") as raised:
                network(**(inputs | {name: torch.zeros(shape)}))
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


# ---- the autoencoder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [0, 2**15, 2**25])
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("size", [(6, 8), (5, 3)], ids=str)
def test_decoder(frames: int, size: tuple[int, int], together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs frame by frame from the start, from some level on, or never."""
    monkeypatch.setattr("reducio_fast.fast.svd.vae.TOGETHER", together)
    model, theirs = vaes(32, 64, 64)
    z = torch.randn(2, frames, 4, *size, generator=torch.Generator().manual_seed(0))
    fast = FastTemporalVAE(model, plan()).decode(z)
    assert_right(fast, model.decode(z), copy.deepcopy(model).double().decode(z.double()))
    assert torch.equal(FastTemporalVAE(theirs, plan()).decode(z), fast), "built from diffusers' modules: the same bits"


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_streamed_is_at_once(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frame by frame from the start, from some level on, or never: the same clip but for the order in which a library
    adds, which turns a byte here and there into its neighbour; each path repeats itself to the byte."""
    model, _ = vaes(32, 64, 64)
    z = torch.randn(2, frames, 4, 6, 8, generator=torch.Generator().manual_seed(0))

    def decoded(together: int) -> Tensor:
        monkeypatch.setattr("reducio_fast.fast.svd.vae.TOGETHER", together)
        return FastTemporalVAE(model, plan()).decode(z)

    at_once = decoded(2**40)
    at_once_bytes = to_bytes(at_once).int()
    assert at_once_bytes.float().std() > 5
    for together in (0, 2**15):
        streamed = decoded(together)
        assert relative(streamed, at_once) < 1e-5 and torch.equal(decoded(together), streamed)
        difference = (to_bytes(streamed).int() - at_once_bytes).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


@pytest.mark.parametrize("chunk", [1, 2, 5, 7])
def test_chunks_are_diffusers(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reducio_fast.fast.svd.vae.TOGETHER", 0)
    model, theirs = vaes(32, 64, dtype=torch.float64)
    z = torch.randn(1, 5, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.cat([theirs.decode(part, num_frames=len(part)).sample for part in z[0].split(chunk)])
    fast = FastTemporalVAE(model, plan(torch.float64)).decode(z, chunk)[0]
    assert relative(fast, expected) < 1e-13
    if chunk < 5:
        together = FastTemporalVAE(model, plan(torch.float64)).decode(z)[0]
        assert relative(fast, together) > 1e-3, "chunks make another clip"


def test_frame_by_frame_is_all_at_once() -> None:
    """A norm over time has the statistics of all frames, also where it reads one after the other; the statistics stay
    accurate when the mean is a hundred times the spread."""
    block = torch.nn.GroupNorm(8, 16, dtype=torch.float64)
    torch.nn.init.normal_(block.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 3, 5, 16, generator=torch.Generator().manual_seed(1)).double() + 100
    expected = torch.nn.functional.silu(block(x.permute(3, 0, 1, 2)[None])[0]).permute(1, 2, 3, 0)
    norm = Norm(block, plan(torch.float64), "norm")
    sums = torch.cat([norm.statistics(frame) for frame in x])
    apart = torch.stack([norm.of_frame(frame.clone(), sums) for frame in x])
    # The statistics are float32 on every path, as in the kernels.
    assert relative(norm(x[None])[0], expected) < 1e-5 and relative(apart, expected) < 1e-5
    convolution = torch.nn.Conv3d(16, 12, (3, 1, 1), padding=(1, 0, 0), dtype=torch.float64)
    conv = TimeConv(convolution, plan(torch.float64), "conv")
    whole = conv(torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 1, 1))[None])[0]
    each = torch.stack([conv.of_frames(*pair) for pair in zip([None, *x[:-1]], x, [*x[1:], None], strict=True)])
    expected = convolution(x.permute(3, 0, 1, 2)[None])[0].permute(1, 2, 3, 0)
    assert relative(whole, expected) < 1e-14 and relative(each, expected) < 1e-14


class InOne(Plan):
    """A plan as on a GPU; the functions that `pick` returns run on a CPU too."""

    def runs_kernel(self, op: str, shape: str) -> bool:
        return True


@pytest.mark.parametrize("case", UNETS)
def test_skips_are_joined_in_place(case: str) -> None:
    """Kernels leave room for them, except res blocks without transformers, or if a size is not twice the one below."""
    channels, frames, size, tokens, changes = UNETS[case]
    model, _ = unets(*channels, dtype=torch.float64, **changes)
    inputs = unet_inputs(model.config, frames, size, torch.float64, tokens=tokens)
    fast, joined = FastVideoUNet(model, InOne(torch.device("cpu"), torch.float64)), []

    class Joins(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.cat and args[0][0].ndim == 4:
                joined.append(args[0][0].shape)
            return func(*args, **(kwargs or {}))

    expected = model(**inputs)
    with Joins():
        assert relative(fast(**inputs), expected) < 1e-14
    assert len(joined) == len(fast.ups[0].blocks) + (2 if "halved upwards" in case else 0), joined


@pytest.mark.parametrize("plan", [Plan, InOne])
@pytest.mark.parametrize("widths", [(32, 32), (32, 64)], ids=str)
def test_a_res_block_in_space(widths: tuple[int, int], plan: type[Plan]) -> None:
    block = SpatialResBlock(*widths, eps=1e-5).double()
    x = torch.randn(3, 6, 7, widths[0], generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        expected = block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        assert relative(SpatialRes(block, plan(torch.device("cpu"), torch.float64), "res")(x), expected) < 1e-14


@pytest.mark.parametrize("size", [None, (12, 14), (11, 13), (12, 13)], ids=str)
def test_folded_up_sampling(size: tuple[int, int] | None) -> None:
    conv = torch.nn.Conv2d(8, 6, 3, padding=1, dtype=torch.float64)
    x = torch.randn(2, 6, 7, 8, generator=torch.Generator().manual_seed(0)).double()
    images = torch.nn.functional.interpolate(x.permute(0, 3, 1, 2), size=size or (12, 14), mode="nearest")
    expected = conv(images).permute(0, 2, 3, 1)
    plan = Plan(torch.device("cpu"), torch.float64)
    assert relative(UpConv(conv, plan, "up")(x, size), expected) < 1e-14
    plan = InOne(torch.device("cpu"), torch.float64)
    assert relative(UpConv(conv, plan, "up")(x, size), expected) < 1e-14


def test_streaming_needs_little_more_than_two_tensors() -> None:
    """Peak live bytes at published widths, with meta tensors: the reference holds six full-size tensors."""
    from reducio_fast.reference.svd.config import TemporalVAEConfig
    from reducio_fast.reference.svd.vae import TemporalVAE

    with torch.device("meta"):
        model = TemporalVAE(TemporalVAEConfig()).half().eval()
    fast = FastTemporalVAE(model, plan(torch.float16))
    z = torch.empty(1, 25, 4, 72, 128, dtype=torch.float16, device="meta")
    with torch.no_grad(), DryRun() as dry:
        dry.given(model, fast)
        at_once, streamed = (dry.peak_of(network.decode, z)[1] for network in (model, fast))
    assert at_once > 30e9 and streamed < 9e9, (at_once, streamed)


# ---- what a GPU runs ------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans pick our kernels, which run in Triton's interpreter here, in place of the algebra on torch ops."""
    launches = {name: SimpleNamespace(twin=module.launch) for name, module in OPS.items()}
    monkeypatch.setattr("reducio_fast.fast.plan.OPS", launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("kernels")
def test_layers_on_kernels(dtype: torch.dtype) -> None:
    """One block of each kind, since the interpreter takes a minute for a network."""
    draw = torch.Generator().manual_seed(0)
    vae, _ = vaes(32, dtype=dtype)
    block = vae.decoder.mid_block.resnets[0].temporal_res_block
    x = torch.randn(1, 32, 2, 3, 2, generator=draw).to(dtype)
    fast = TemporalRes(block, torch.zeros((), dtype=dtype), plan(dtype), "block")
    frames = fast.streamed(list(x[0].permute(1, 2, 3, 0).contiguous()))
    oracle = copy.deepcopy(block).double()(x.double(), None)
    assert_right(torch.stack(frames).permute(3, 0, 1, 2)[None], block(x, None), oracle)
    model, _ = unets(64, 64, dtype=dtype)
    attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    tokens = torch.randn(2, 5, 64, generator=draw).to(dtype)
    for over_frames in (False, True):  # as 2 frames of 5 positions, or as 5 frames of 2
        fast_attention = SelfAttention(attention, plan(dtype), "attention", over_frames)
        x = tokens.transpose(0, 1).contiguous()[None] if over_frames else tokens
        y = fast_attention.add_to(x.clone(), x) + fast_attention.out.bias
        y = y[0].transpose(0, 1) if over_frames else y
        oracle = tokens.double() + copy.deepcopy(attention).double()(tokens.double())
        assert_right(y, tokens + attention(tokens), oracle)


# ---- the sampler -----------------------------------------------------------------------------------------------------

PUBLISHED = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "interpolation_type": "linear",
    "prediction_type": "v_prediction",
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_the_table_steps_as_the_scheduler(prediction_type: str, steps: int) -> None:
    usual = PUBLISHED if prediction_type == "v_prediction" else {"beta_schedule": "scaled_linear"}
    scheduler = EulerDiscreteScheduler(**(usual | {"prediction_type": prediction_type}))
    table = coefficients(scheduler, steps)
    latent = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
    stepped = ours = latent * scheduler.init_noise_sigma
    scales = fast_sampler.input_scales(scheduler)
    assert scales is not None and len(scales) == len(table) == steps
    for index, (timestep, (p, q, a, b, c)) in enumerate(zip(scheduler.timesteps, table.tolist(), strict=True)):
        scaled = scheduler.scale_model_input(stepped, timestep)
        torch.testing.assert_close(ours * scales[index], scaled, rtol=1e-4, atol=1e-4)
        prediction = torch.sin(scaled)
        stepped = scheduler.step(prediction, timestep, stepped).prev_sample
        clean = p * ours + q * torch.sin(ours * scales[index])
        ours, _ = a * ours + b * clean + c * 0, clean
    torch.testing.assert_close(ours, stepped, rtol=1e-4, atol=1e-4)  # the scheduler steps in float32


def test_timesteps_that_repeat_are_refused() -> None:
    scheduler = EulerDiscreteScheduler(**(PUBLISHED | {"prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match="timesteps repeat"):
        coefficients(scheduler, 4)


@pytest.mark.parametrize("guidance", ["none", "one", "a frame"])
def test_sampling(guidance: str) -> None:
    model, _ = unets(32, 64)
    draw = torch.Generator().manual_seed(3)
    cond = ImageCondition(
        torch.randn(1, 1, 24, generator=draw),
        torch.randn(1, 4, 8, 8, generator=draw),
        torch.tensor([[6.0, 127.0, 0.02]]),
    )
    scale = {"none": 1.0, "one": 3.0, "a frame": torch.linspace(1, 3, 5)}[guidance]
    noise = torch.randn(1, 5, 4, 8, 8, generator=draw)

    def run(network: Any, sample: Any, dtype: torch.dtype) -> Tensor:
        condition = ImageCondition(*(tensor.to(dtype) for tensor in (cond.embeds, cond.latents, cond.added_time_ids)))
        denoise = network.denoiser(condition, None, scale)
        return sample(denoise, EulerDiscreteScheduler(**PUBLISHED), noise.to(dtype), 4)

    oracle = run(copy.deepcopy(model).double(), ref.sample, torch.float64)
    eager = run(model, ref.sample, torch.float32)
    assert_right(run(FastVideoUNet(model, plan()), fast_sampler.sample, torch.float32), eager, oracle)


def test_a_permuted_latent_goes_through_the_op_that_a_gpu_runs() -> None:
    """The op takes contiguous tensors alone; a latent that a caller has permuted gives the same clip."""
    model, _ = unets(32, 64)
    twin = FastVideoUNet(model, plan())
    twin.step_update = torch.ops.reducio_fast.guidance_dpm_step
    draw = torch.Generator().manual_seed(3)
    embeds, latents = torch.randn(1, 1, 24, generator=draw), torch.randn(1, 4, 8, 8, generator=draw)
    cond = ImageCondition(embeds, latents, torch.tensor([[6.0, 127.0, 0.02]]))
    noise = torch.randn(1, 5, 4, 8, 8, generator=draw)
    permuted = noise.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    plain, same = (
        fast_sampler.sample(twin.denoiser(cond, None, 3.0), EulerDiscreteScheduler(**PUBLISHED), x, 2)
        for x in (noise, permuted)
    )
    assert not permuted.is_contiguous() and torch.equal(plain, same)
