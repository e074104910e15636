"""Memory: forecasts compared with the allocator's record, the choice of a way that fits, handling of out-of-memory
errors, and offloaded weights that are on the device only during their stage.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from reducio_fast import ReducioPipeline
from reducio_fast.cli import main
from reducio_fast.fast.engine import Engine
from reducio_fast.media.video_files import read_video
from reducio_fast.memory.dry_run import DryRun
from reducio_fast.memory.fit import HEADROOM, Fit
from reducio_fast.memory.offload import Offload
from reducio_fast.pipelines.call.request import Embeds
from reducio_fast.pipelines.execution import decoding
from reducio_fast.pipelines.execution import drawing as drawing_stage
from reducio_fast.pipelines.execution.decoding import Decoding, TiledDecoder
from reducio_fast.pipelines.execution.fitting import Fitter
from reducio_fast.pipelines.execution.sampling import Sampler
from reducio_fast.pipelines.reducio.conditioner import Conditioner
from reducio_fast.reference import Condition, DiTConfig, ReducioDiT, ReducioVAE, VAEConfig, initial_latent
from reducio_fast.reference.reducio.config import VAE_PRESETS
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow

PROMPT = "a red circle moving right"
GREY = np.full((64, 64, 3), 128, np.uint8)
CALL = {"image": GREY, "height": 64, "width": 64, "num_inference_steps": 1, "progress": False}
# Tiles of 64 pixels at a spatial factor of 8: small frames are decoded in several tiles, and 32 pixels are half a tile.
VAE = dict(
    channel_multipliers=(1, 1, 2, 2), content_channel_multipliers=(1, 1, 2), norm_groups=4, num_heads=2,
    fusion_head_dim=8, num_res_blocks=1, temporal_factor=2, fusion_levels=(None, 1, 2, None), tile_size=64,
)  # fmt: skip
DIT = dict(num_heads=2, caption_channels=128, semantic_channels=128, spatial_factor=8)


@pytest.fixture(scope="module")
def embedded(bundle: Path) -> dict[str, Any]:
    return ReducioPipeline.from_pretrained(bundle, device="cpu", backend="reference").components


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REDUCIO_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bare(embedded: dict[str, Any]) -> dict[str, Any]:
    """The embedded model's components without the first stage and the image encoders."""
    return embedded | dict.fromkeys(("text_to_image", "image_encoder", "content_encoder"))


def pipeline(parts: dict[str, Any], backend: str, vae: dict | None = None, dit: dict | None = None) -> ReducioPipeline:
    """The embedded model, with networks of another width if configurations are given."""
    torch.manual_seed(0)
    changed = {}
    if vae is not None and dit is not None:
        changed["vae"] = ReducioVAE(VAEConfig(**VAE, **vae))
        changed["transformer"] = ReducioDiT(DiTConfig(**DIT, **dit))
        parts = parts | {"preview_decoder": None}  # the embedded one previews other latents
        for network in changed.values():
            network.requires_grad_(False).eval()
            for p in network.parameters():
                p.normal_(0, 0.05)
    return ReducioPipeline(**parts | changed, backend=backend)


def measured(tmp_path: Path, function: Any, *args: Any) -> tuple[Any, int]:
    """The function's result, and the peak bytes allocated by torch's CPU allocator, including inside operators."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function(*args)
    record.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    live = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return result, peak


@pytest.mark.parametrize(
    ("backend", "vae", "dit", "size"),
    [
        pytest.param("reference", None, None, (64, 64), id="reference-embedded-64x64"),
        pytest.param("fast", None, None, (64, 96), id="fast-embedded-64x96"),
        pytest.param(
            "reference", {"base_channels": 8, "content_base_channels": 8}, {"hidden_size": 32, "depth": 2}, (96, 128),
            id="reference-narrow-tiled",
        ),
        pytest.param(
            "fast", {"base_channels": 24, "content_base_channels": 16, "causal": True},
            {"hidden_size": 96, "depth": 3, "attention": "2d+1d"}, (64, 144), id="fast-wide-causal-tiled",
        ),
        pytest.param(
            "fast", {"base_channels": 8, "content_base_channels": 8, "fusion": "linear"},
            {"hidden_size": 48, "depth": 4, "content_groups": 4}, (64, 64), id="fast-linear-grouped",
        ),
    ],
)  # fmt: skip
@torch.no_grad()
def test_forecast_is_within_15_percent_of_what_is_allocated(
    embedded: dict, tmp_path: Path, backend: str, vae: dict | None, dit: dict | None, size: tuple[int, int]
) -> None:
    pipe = pipeline(embedded, backend, vae, dit)
    expected = {stage.stage: stage.activations for stage in pipe.forecast(*size).stages}
    frame = np.zeros((*size, 3), np.uint8)
    for stage in ("dit.step", "vae.decode"):
        pipe.executor.networks_of(stage)  # packs the weights first, so that no stage allocates them
    allocated = {}
    text, mask = pipe.conditioner.encode_text(PROMPT * 5)  # fills the model's caption length
    assert mask.all()
    (semantic, image), allocated["image.encode"] = measured(tmp_path, pipe.conditioner.encode_image, frame, Embeds())
    cond = Condition(text, mask, semantic, image)
    uncond = cond.without_text(pipe.transformer.null_text)
    generator = torch.Generator().manual_seed(0)
    config = pipe.vae.config
    shape = (config.latent_channels, config.num_frames // config.temporal_factor)
    noise = initial_latent((1, *shape, *(n // config.spatial_factor for n in size)), [generator])
    latent, allocated["dit.step"] = measured(tmp_path, pipe.sampler, noise, cond, uncond, 4.5, 2, generator, None)
    way = pipe.decoder.default(*size)
    _, allocated["vae.decode"] = measured(tmp_path, pipe.decoder.decode, latent, frame, way)
    shares = {stage: expected[stage] / bytes for stage, bytes in allocated.items()}
    assert all(0.85 <= share <= 1.15 for share in shares.values()), shares


def test_first_stage_and_text_are_forecast_too(embedded: dict, tmp_path: Path) -> None:
    pipe = pipeline(embedded, "reference")
    expected = {stage.stage: stage.activations for stage in pipe.forecast(64, 64).stages}
    arguments = (pipe.text_to_image, PROMPT, "", 64, 64, torch.Generator().manual_seed(0), False)
    with torch.no_grad():
        _, drawing = measured(tmp_path, drawing_stage.draw_image, *arguments)
        _, text = measured(tmp_path, pipe.conditioner.encode_text, PROMPT)
    assert 0.85 <= expected["content.generate"] / drawing <= 1.15
    assert 0.85 <= expected["text.encode"] / text <= 1.15


def test_forecast_of_gpu_kernels_needs_no_gpu(bare: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels allocate only their results, weights are offloaded, and batches of tiles grow with the free memory."""
    widths = {"base_channels": 32, "content_base_channels": 8}, {"hidden_size": 32, "depth": 2}
    pipe, size = pipeline(bare, "fast", *widths), (256, 256)  # 16 tiles, 9 of which have the same shape
    on_cpu = pipe.forecast(*size)
    pipe.executor.offload = Offload(torch.device("cuda"))
    one, two, four = (pipe.forecast(*size, Decoding(True, 64, n)).peak(True) for n in (1, 2, 4))
    fresh = Fitter(pipe.parts, pipe.executor, pipe.decoder, pipe.fitter.dry_stages)  # no earlier forecast
    assert fresh.forecast(*size, Decoding(True, 64, 4)).peak(True) == four
    assert one < on_cpu.peak(True)
    step = two - one
    assert step > 0 and abs(four - one - 3 * step) < 0.05 * four
    pipe.fitter.free_bytes = lambda device: int((one + 2.5 * step) / HEADROOM)
    assert pipe.fitter.fit(*size) == Fit(Decoding(True, 64, 3), True)
    pipe.fitter.free_bytes = lambda device: int(one * 0.99 / HEADROOM)
    assert pipe.fitter.fit(*size).decoding.tile_size == 32


def test_a_tiled_decode_at_1024_needs_less_than_seven_tenths_of_the_reference() -> None:
    """Content frame and clip at published widths, one tile at a time, in bfloat16."""
    config = VAE_PRESETS["reducio-ft4"]
    with torch.device("meta"):
        model = ReducioVAE(config).bfloat16().eval()
    image = torch.empty(1, 3, 1024, 1024, dtype=torch.bfloat16, device="meta")
    latent = torch.empty(1, *config.latent_shape(1024, 1024), dtype=torch.bfloat16, device="meta")
    peaks = []
    with torch.no_grad(), DryRun() as dry:
        fast = Engine(compile=False).without_weights(dry.opaque, torch.device("cuda")).twin(model)
        dry.given(model, fast)
        for network in (model, fast):
            dry.remember(network.decoder, network.encoder_2d)
            run = partial(lambda vae: vae.decode(latent, vae.encode_content(image, tiled=True), tiled=True), network)
            peaks.append(dry.peak_of(run)[1])
    assert peaks[0] > 3e9 and peaks[1] < 0.7 * peaks[0], peaks


def test_weights_are_counted_once_and_include_packed_copies(embedded: dict) -> None:
    plain = pipeline(embedded, "reference").forecast(64, 64)
    networks = pipeline(embedded, "reference").parts.networks()
    sizes = {x.data_ptr(): x.nbytes for n in networks for x in (*n.parameters(), *n.buffers())}
    assert plain.weights == sum(sizes.values())
    assert pipeline(embedded, "fast").forecast(64, 64).weights > plain.weights
    assert plain.peak(offload=True) < plain.peak()
    assert json.loads(json.dumps(plain.as_dict()))["peak"] == plain.peak()


def test_too_little_memory_is_reported_before_any_work(bare: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(bare, "reference")
    needed, smaller = pipe.forecast(256, 256).peak(), pipe.forecast(192, 192).peak()
    free = (needed + smaller) / 2 - pipe.executor.resident_bytes()
    pipe.fitter.free_bytes = lambda device: int(free / HEADROOM)
    monkeypatch.setattr(decoding, "half_tile", lambda config: None)
    monkeypatch.setattr(
        "reducio_fast.pipelines.reducio.pipeline.initial_latent", lambda *_: pytest.fail("work was done")
    )
    with pytest.raises(ReducioError, match=r"256x256 needs .* on cpu .* MiB more than there is; 192x192 would fit"):
        pipe(PROMPT, **CALL | {"height": 256, "width": 256})
    pipe.fitter.free_bytes = lambda device: 1
    with pytest.raises(ReducioError, match="32x32 does not fit either, the weights alone need"):
        pipe(PROMPT, **CALL)


def test_a_refusal_considers_every_way(embedded: dict) -> None:
    """Of 1024x1024 and of the smaller sizes: 256x256 fits in tiles alone."""
    pipe = pipeline(embedded, "reference")
    default = pipe.decoder.default(256, 256)
    peaks = [pipe.forecast(256, 256, way).peak() for way in (default, *pipe.decoder.ways(default))]
    room = (min(peaks) + max(peaks)) / 2
    assert min(peaks) < room < max(peaks)
    pipe.fitter.free_bytes = lambda device: int((room - pipe.executor.resident_bytes()) / HEADROOM)
    with pytest.raises(ReducioError, match=r"a clip of 1024x1024 needs .*; 256x256 would fit"):
        pipe.fitter.fit(1024, 1024)


def test_smaller_tiles_are_chosen_if_they_fit(
    bare: dict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = pipeline(bare, "fast", {"base_channels": 8, "content_base_channels": 8}, {"hidden_size": 32, "depth": 2})
    whole, tiles = pipe.forecast(64, 64).peak(), pipe.forecast(64, 64, Decoding(True, 32)).peak()
    assert tiles < whole
    free = (whole + tiles) / 2 - pipe.executor.resident_bytes()
    pipe.fitter.free_bytes = lambda device: int(free / HEADROOM)
    out = pipe(PROMPT, **CALL)
    assert out.frames.shape == (16, 64, 64, 3)
    assert pipe.fitter.fits[64, 64] == Fit(Decoding(True, 32))
    assert caplog.messages == ["vae.decode: 64x64 is decoded in tiles of 32, 1 at once to fit into memory"]


class Scarce:
    """A decoder whose first `failures` calls raise an out-of-memory error; it records the shapes of all calls."""

    def __init__(self, decoder: torch.nn.Module, failures: int, error: Exception) -> None:
        self.run, self.failures, self.error, self.shapes = decoder.forward, failures, error, []

    def __call__(self, z: torch.Tensor, features: Any) -> torch.Tensor:
        self.shapes.append(tuple(z.shape[:1] + z.shape[-2:]))
        if len(self.shapes) <= self.failures:
            raise self.error
        return self.run(z, features)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory"), id="device"),
        pytest.param(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), id="host"),
    ],
)
def test_decode_out_of_memory_retries_with_less_memory(
    embedded: dict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    pipe = pipeline(
        embedded, "reference", {"base_channels": 8, "content_base_channels": 8}, {"hidden_size": 32, "depth": 2}
    )
    monkeypatch.setattr(pipe.fitter, "fit", lambda *_: Fit(Decoding(True, 64, 3)))
    scarce = Scarce(pipe.vae.decoder, 2, error)
    monkeypatch.setattr(pipe.vae.decoder, "forward", scarce)
    out = pipe(PROMPT, **CALL)
    assert out.frames.shape == (16, 64, 64, 3)
    assert scarce.shapes[:4] == [(1, 8, 8), (1, 8, 8), (1, 5, 5), (1, 5, 4)]
    assert "vae.decode: out of memory, trying again in tiles of 64, 1 at once" in caplog.messages
    assert "vae.decode: out of memory, trying again in tiles of 32, 1 at once" in caplog.messages


def test_other_errors_of_the_decoder_are_not_retried(embedded: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(embedded, "reference")
    scarce = Scarce(pipe.vae.decoder, 9, RuntimeError("shapes do not fit"))
    monkeypatch.setattr(pipe.vae.decoder, "forward", scarce)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        pipe(PROMPT, **CALL)
    assert len(scarce.shapes) == 1


def test_latents_are_saved_when_the_decode_runs_out_of_memory(
    bundle: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names a file, and its command decodes it into the frames that the call would have returned. Another
    autoencoder is refused."""
    pipe = ReducioPipeline.from_pretrained(bundle, device="cpu", backend="fast", dtype="float32")
    kwargs = CALL | {"prompt": [PROMPT, PROMPT], "image": [GREY, GREY], "seed": 3, "loop": True, "motion_strength": 2}
    expected = pipe(**kwargs).frames
    decoder, calls = pipe.executor.network("vae").decoder, []
    forward = decoder.forward

    def second_clip_fails(z: torch.Tensor, features: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(z, features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "forward", second_clip_fails)
        with pytest.raises(ReducioError, match="out of memory at 64x64; the latents are kept") as caught:
            pipe(**kwargs)
    (file,) = (cache / "latents").iterdir()
    assert f"reducio-fast decode {file} --model {bundle} --out clip.mp4" in str(caught.value)
    argv = ["decode", str(file), "--model", str(bundle), "--out", str(tmp_path / "clip"), "--backend", "fast"]
    argv += ["--device", "cpu", "--dtype", "float32", "--json"]  # the dtype of the call
    assert main.main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["seeds"] == [3, 4] and result["fps"] == pipe.fps
    for path, clip in zip(result["paths"], expected, strict=True):
        assert (read_video(path)[0] == clip).all()

    shutil.copytree(bundle / "vae", tmp_path / "other")
    weights = tmp_path / "other" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.float() * 1.1 for name, tensor in load_file(weights).items()}, weights)
    argv = ["decode", str(file), "--model", str(tmp_path / "other"), "--out", str(tmp_path / "wrong.mp4")]
    assert main.main(argv) == 2
    line = capsys.readouterr().err
    assert f"holds latents of another autoencoder; name {bundle} (--model)" in line and line.count("\n") == 1
    assert not (tmp_path / "wrong.mp4").exists()


def test_decode_command_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    for name, reason in (("other", "no latents"), ("broken", "is no file of latents"), ("missing", "no such file")):
        assert main.main(["decode", str(tmp_path / f"{name}.safetensors"), "--out", str(tmp_path / "clip.mp4")]) == 2
        line = capsys.readouterr().err
        assert reason in line and line.count("\n") == 1
    assert not (tmp_path / "clip.mp4").exists()


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_offloaded_weights_are_on_the_device_only_during_their_stage(
    embedded: dict, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    pipe = pipeline(embedded, backend)
    expected = pipe(PROMPT, **CALL).frames
    pipe.enable_model_cpu_offload(device="cpu")  # copies the weights, since there is no second device
    networks = {"text_encoder": pipe.text_encoder, "transformer": pipe.transformer, "vae": pipe.vae}
    fast = backend == "fast"
    if fast:
        twins = {f"fast {name}": pipe.executor.network(name) for name in ("transformer", "vae")}
        networks |= twins
    home = {name: [p.data_ptr() for p in network.parameters()] for name, network in networks.items()}
    away: dict[str, set[str]] = {}

    def note(stage: str, owner: type, method: str) -> None:
        run = getattr(owner, method)

        def noted(*args: Any) -> Any:
            away[stage] = {
                name for name, n in networks.items() if all(p.data_ptr() not in home[name] for p in n.parameters())
            }
            return run(*args)

        monkeypatch.setattr(owner, method, noted)

    note("text.encode", Conditioner, "encode_text")
    note("dit.step", Sampler, "__call__")
    note("vae.decode", TiledDecoder, "decode")
    assert (pipe(PROMPT, **CALL).frames == expected).all()
    assert away["text.encode"] == {"text_encoder"}
    assert away["dit.step"] == {"transformer"} | ({"fast transformer"} if fast else set())
    assert away["vae.decode"] == {"vae"} | ({"fast vae"} if fast else set())
    assert home == {name: [p.data_ptr() for p in network.parameters()] for name, network in networks.items()}
    if fast:
        for name, twin in twins.items():
            assert pipe.executor.network(name.removeprefix("fast ")) is twin  # weights were not packed again
            assert twin.graphs is None

    with pytest.raises(ReducioError, match="call disable_model_cpu_offload"):
        pipe.to("cpu")
    pipe.disable_model_cpu_offload()
    assert (pipe.to("cpu")(PROMPT, **CALL).frames == expected).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")
def test_offload_needs_a_gpu(embedded: dict) -> None:
    with pytest.raises(ReducioError, match="there is no GPU here"):
        pipeline(embedded, "reference").enable_model_cpu_offload()


def test_forecasts_and_fits_of_ever_new_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    from reducio_fast.pipelines.execution import fitting

    monkeypatch.setattr(fitting, "KEPT", 2)
    pipe = ReducioPipeline.from_pretrained(bundle, backend="reference")
    for side in (32, 64, 96, 128):
        pipe.fitter.settle(side, side)
        pipe.forecast(side, side)
    assert list(pipe.fitter.fits) == [(96, 96), (128, 128)] and len(pipe.fitter._forecasts) == 2
