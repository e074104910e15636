"""Files, settings and sizes as people have them: narrow dtypes, shards, tied weights, full disks, large frames."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from reducio_fast import ReducioError, ReducioPipeline, generate
from reducio_fast.checkpoints.strict_files import embedded_model, load_tensors
from reducio_fast.media.image_files import MAX_PIXELS, read_image
from reducio_fast.pipelines import generate as generate_module
from reducio_fast.pipelines import registry

pytestmark = pytest.mark.slow

PROMPT = "a red circle moving right on a black background"
KWARGS: dict[str, Any] = {"num_inference_steps": 1, "progress": False, "seed": 0}
IMAGE = np.full((64, 64, 3), 90, np.uint8)
WEIGHTS = "diffusion_pytorch_model.safetensors"
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> ReducioPipeline:
    return ReducioPipeline.from_pretrained(bundle)


@pytest.fixture
def folder(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "model"))


@pytest.mark.parametrize("dtype", FP8)
def test_a_lora_in_eight_bits_is_loaded(bundle: Path, dtype: torch.dtype) -> None:
    pipe = ReducioPipeline.from_pretrained(bundle)
    path = "transformer_blocks.0.attn1.to_q"
    before = pipe.transformer.get_submodule(path).weight.clone()
    out, width = before.shape
    lora = {f"{path}.lora_A.weight": torch.ones(1, width), f"{path}.lora_B.weight": torch.full((out, 1), 0.5)}
    pipe.load_lora_weights({name: tensor.to(dtype) for name, tensor in lora.items()})
    torch.testing.assert_close(pipe.transformer.get_submodule(path).weight, before + 0.5)


@pytest.mark.parametrize("dtype", FP8)
def test_latents_in_eight_bits_are_noise_like_any_other(pipe: ReducioPipeline, dtype: torch.dtype) -> None:
    shape = pipe.vae.config.latent_shape(64, 64)
    noise = torch.randn(shape).to(dtype)
    clips = [
        pipe(PROMPT, IMAGE, height=64, width=64, latents=x, output_type="latent", **KWARGS).frames
        for x in (noise, noise.float())
    ]
    assert torch.equal(*clips)
    with pytest.raises(ReducioError, match="latents: holds values that are not finite"):
        pipe(PROMPT, IMAGE, height=64, width=64, latents=torch.full(shape, torch.nan).to(dtype), **KWARGS)


@pytest.mark.parametrize("component", ["latents", "mask", "LoRA", "file"])
def test_packed_four_bit_numbers_are_refused_by_name(pipe: ReducioPipeline, tmp_path: Path, component: str) -> None:
    """torch stores two of them as one element and has no operator for them, not even a conversion."""

    def packed(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)

    config, key = pipe.transformer.config, "transformer_blocks.0.attn1.to_q.lora_A.weight"
    text = (config.caption_length, config.caption_channels)
    save_file({key: packed(4, 4)}, tmp_path / "x.safetensors")
    name, call = {
        "latents": ("latents", lambda: pipe(PROMPT, IMAGE, height=64, width=64, latents=packed(16, 4, 2, 2), **KWARGS)),
        "mask": (
            "prompt_attention_mask",
            lambda: pipe(None, IMAGE, prompt_embeds=torch.zeros(text), prompt_attention_mask=packed(text[0]), **KWARGS),
        ),
        "LoRA": (key, lambda: pipe.load_lora_weights({key: packed(4, 4)})),
        "file": (key, lambda: load_tensors(tmp_path / "x.safetensors", torch.float32)),
    }[component]
    with pytest.raises(ReducioError, match=f"{name}: is of float4_e2m1fn_x2, which torch cannot convert"):
        call()


@pytest.mark.parametrize("component", ["vae", "transformer"])
def test_shards_in_a_model_folder_are_loaded(folder: Path, pipe: ReducioPipeline, component: str) -> None:
    component_folder = folder / component
    tensors = load_file(component_folder / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, component_folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (component_folder / WEIGHTS).unlink()
    index = component_folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loaded = ReducioPipeline.from_pretrained(folder)
    for name, tensor in getattr(loaded, component).state_dict().items():
        assert torch.equal(tensor, getattr(pipe, component).state_dict()[name]), name
    for wrong in ({}, {"weight_map": ["a"]}, {"weight_map": {names[0]: "../x"}}, {"weight_map": {names[0]: "gone"}}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(ReducioError, match="index.json"):
            ReducioPipeline.from_pretrained(folder)


def test_tied_weights_are_saved_and_come_back(bundle: Path, tmp_path: Path) -> None:
    pipe = ReducioPipeline.from_pretrained(bundle)
    first, second = (pipe.transformer.transformer_blocks[i].attn1 for i in (0, 1))
    second.to_q.weight = first.to_q.weight
    whole = torch.cat([first.to_k.weight.data, first.to_v.weight.data])  # two views of one storage
    first.to_k.weight.data, first.to_v.weight.data = whole.chunk(2)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = ReducioPipeline.from_pretrained(tmp_path / "saved")
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[name], tensor), name


def test_a_disk_that_fills_leaves_the_earlier_model(pipe: ReducioPipeline, tmp_path: Path) -> None:
    target = tmp_path / "model"
    pipe.save_pretrained(target)
    before = {f: f.read_bytes() for f in target.rglob("*") if f.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(ReducioError, match="save_directory: cannot write .*model "):
            pipe.save_pretrained(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {f: f.read_bytes() for f in target.rglob("*") if f.is_file()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("fps", None), ("fps", "16"), ("fps", 0), ("fps", True), ("fps", [16]), ("sample_height", 100),
     ("sample_width", "256"), ("sample_height", -32), ("clean_caption", "no"), ("content_scaling_factor", None)],
)  # fmt: skip
def test_settings_of_a_folder_are_checked_by_name(folder: Path, name: str, value: Any) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {name: value}))
    with pytest.raises(ReducioError, match=f"{name}: .*must be|{name}: .*not a multiple"):
        ReducioPipeline.from_pretrained(folder)


@pytest.mark.parametrize("size", [(32, 32), (128, 128), (320, 320), (352, 32), (32, 2048), (1024, 1024), (4096, 4096)])
def test_the_quick_check_is_a_bound_of_the_forecast(pipe: ReducioPipeline, size: tuple[int, int]) -> None:
    assert pipe.decoder.generous(*size) > pipe.forecast(*size).peak()


def test_a_large_frame_is_refused_before_the_kernel_refuses_it(bundle: Path) -> None:
    pipe = ReducioPipeline.from_pretrained(bundle, text_to_image=None)
    pipe.fitter.free_bytes = lambda device: 2**29
    with pytest.raises(ReducioError, match="memory: a clip of 800x800 needs .* would fit"):
        pipe(PROMPT, np.zeros((64, 64, 3), np.uint8), height=800, width=800, **KWARGS)


def test_a_picture_of_many_pixels_is_refused_by_its_header(tmp_path: Path) -> None:
    side = int(MAX_PIXELS**0.5) + 200
    Image.new("1", (side, side)).save(tmp_path / "large.png")
    with pytest.raises(ReducioError, match="33.6 million are the most"):
        read_image(tmp_path / "large.png")
    Image.new("L", (side, side), 90).save(tmp_path / "large.jpg")
    assert read_image(tmp_path / "large.jpg").shape == (side // 2, side // 2, 3)


def test_pixart_needs_two_steps(pipe: ReducioPipeline) -> None:
    with pytest.raises(ReducioError, match="content_kwargs: num_inference_steps is 1"):
        pipe(PROMPT, content_kwargs={"num_inference_steps": 1}, **KWARGS)
    with pytest.raises(ReducioError, match="content frame: PixArtAlphaPipeline: "):
        pipe(PROMPT, content_kwargs={"height": 60}, **KWARGS)


def test_the_first_stage_can_be_followed_and_stopped(pipe: ReducioPipeline) -> None:
    seen: list[tuple[str, int]] = []
    original = pipe.text_to_image.transformer.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        assert pipe.call is not None
        seen.append((pipe.call.stage, pipe.call.step))
        pipe._interrupt = pipe.call.step == 3
        return original(*args, **kwargs)

    pipe.text_to_image.transformer.forward = watch
    try:
        with pytest.raises(ReducioError, match="interrupted while the content frame was drawn"):
            pipe(PROMPT, **KWARGS)
    finally:
        del pipe.text_to_image.transformer.forward
    assert seen == [("content.generate", i) for i in range(4)]
    assert not pipe(PROMPT, **KWARGS).interrupted


def test_a_long_prompt_is_not_logged_whole(pipe: ReducioPipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipe.encode_prompt("a red circle " * 5000)
    assert caplog.messages and max(map(len, caplog.messages)) < 200


def test_a_model_that_loads_holds_up_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_module.forget()
    call = {"height": 64, "width": 64, **KWARGS}
    generate(PROMPT, IMAGE, **call)
    loading, go_on = threading.Event(), threading.Event()
    find = registry.find

    def slow(model: Any, variant: str | None) -> registry.Model:
        entry = find(model, variant)
        if model is None:
            return entry

        def load(*args: Any, **kwargs: Any) -> Any:
            loading.set()
            go_on.wait(60)
            return entry.load(*args, **kwargs)

        return registry.Model(entry.key, load, entry.load_arguments, entry.call_defaults, files=entry.files)

    monkeypatch.setattr(registry, "find", slow)
    thread = threading.Thread(target=lambda: generate(PROMPT, IMAGE, folder, **call))
    thread.start()
    assert loading.wait(60)
    start = time.monotonic()
    generate(PROMPT, IMAGE, **call)
    assert time.monotonic() - start < 30 and not go_on.is_set()
    go_on.set()
    thread.join()
    assert len(generate_module.kept()) == 2
    generate_module.forget()


def test_a_folder_of_the_owners_name_hides_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    with pytest.raises(ReducioError, match="hf download owner/name"):
        generate(PROMPT, IMAGE, "owner/name", **KWARGS)


def test_steps_that_share_a_time_are_refused_before_the_work(pipe: ReducioPipeline) -> None:
    """A call may take up to the scheduler's 1000 training steps, but two of its 1000 times are the same, and the solver
    divides by the time between them."""
    call = {"prompt": PROMPT, "image": IMAGE, "height": 32, "width": 32}
    with pytest.raises(ReducioError, match="num_inference_steps: 1000 is too many"):
        pipe(**call, **{**KWARGS, "num_inference_steps": 1000})
    assert pipe.check_inputs(**call, num_inference_steps=999).num_inference_steps == 999


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_a_clip_can_be_stopped_while_it_is_decoded(backend: str) -> None:
    """Another thread stops it between two tiles. A stop before the decode still gives the clip, as in diffusers."""
    pipe = ReducioPipeline.from_pretrained(embedded_model(), device="cpu", dtype="float32", backend=backend)
    kwargs = {"seed": 1, "num_inference_steps": 1, "guidance_scale": 1.0, "progress": False}
    image, small = np.full((512, 512, 3), 90, np.uint8), np.full((128, 128, 3), 90, np.uint8)
    before = pipe("a red circle", image=small, **kwargs).frames

    def stop_the_decode() -> None:
        while pipe.call is None or pipe.call.stage != "vae.decode":
            time.sleep(0.002)
        time.sleep(0.05)
        pipe._interrupt = True

    stopper = threading.Thread(target=stop_the_decode)
    pipe.call = None
    stopper.start()
    with pytest.raises(ReducioError, match="interrupted while the clip was decoded: there is no clip"):
        pipe("a red circle", image=image, height=512, width=512, **kwargs)
    stopper.join()
    assert (pipe("a red circle", image=small, **kwargs).frames == before).all()

    def stop_here(pipe: ReducioPipeline, *_: object) -> None:
        pipe._interrupt = True

    out = pipe("a red circle", image=small, callback_on_step_end=stop_here, **kwargs)
    assert out.interrupted and (out.frames == before).all()


@pytest.mark.slow
def test_a_listener_can_end_a_clip_between_two_tiles(pipe: ReducioPipeline) -> None:
    """The call raises the listener's exception, and the next call gives the same bytes as the one before."""

    class Ended(Exception):
        pass

    heard: list[tuple[str, int]] = []

    def listen(stage: str, step: int) -> None:
        heard.append((stage, step))
        if sum(entry[0] == "vae.decode" for entry in heard) == 3:  # the stage, its first tile, its second
            raise Ended

    image = np.full((128, 384, 3), 90, np.uint8)
    kwargs = {"image": image, "seed": 1, "num_inference_steps": 1, "progress": False, "height": 128, "width": 384}
    before = pipe("a red circle", **kwargs).frames
    pipe.listener = listen
    try:
        with pytest.raises(Ended):
            pipe("a red circle", **kwargs)
    finally:
        pipe.listener = None
    assert heard[-1][0] == "vae.decode" and (pipe("a red circle", **kwargs).frames == before).all()
