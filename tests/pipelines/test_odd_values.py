"""Values of a wrong kind, and legal values of a rare kind, as arguments of every method: one line that names the
argument, before any work."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import reducio_fast
from reducio_fast import ReducioPipeline
from reducio_fast.media.contact_sheet import contact_sheet
from reducio_fast.media.image_files import read_image, read_images
from reducio_fast.media.video_files import write_video
from reducio_fast.pipelines.reducio.autoencoder import VideoAutoencoder
from reducio_fast.server import batch
from reducio_fast.system.errors import ReducioError, shown
from reducio_fast.training import recipe_file
from reducio_fast.training.reducio.dit import DiTRecipe

pytestmark = pytest.mark.slow

PROMPT = "a red circle moving right"
ODD = {
    "array": np.zeros((3, 3)),
    "clip": np.zeros((16, 64, 64, 3), np.uint8),
    "tensor": torch.zeros(3, 3),
    "time span": np.timedelta64(1, "s"),
    "4300 digits": 10**5000,
    "two lines": "a\nb",
    "list": [[1]],
    "dict": {"a": 1},
}
FREE = ("self", "prompt", "negative_prompt", "image", "content_kwargs", "callback_on_step_end", "generator")


def one_line(error: pytest.ExceptionInfo[ReducioError], name: str) -> None:
    text = str(error.value)
    assert name in text and "\n" not in text and len(text) < 600, text


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_arguments_of_a_call(pipe: ReducioPipeline, value):
    for name in inspect.signature(ReducioPipeline.__call__).parameters:
        if name not in FREE and not (name == "guidance_reuse" and isinstance(value, int)):  # larger than all steps
            with pytest.raises(ReducioError) as error:
                pipe.check_inputs(**{"prompt": PROMPT, name: value})
            one_line(error, name)


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_arguments_of_methods(pipe: ReducioPipeline, clip, value):
    frames = np.zeros((16, 64, 64, 3), np.uint8)
    latent = torch.zeros(16, 4, 2, 2)
    calls = {
        "refine": lambda: pipe.encode_motion(frames, refine=value),
        "step": lambda: pipe.encode_motion(frames, step=value),
        "output_type": lambda: pipe.decode(latent, frames[0], output_type=value),
        "motion_strength": lambda: pipe.decode(latent, frames[0], motion_strength=value),
        "keep_content": lambda: pipe.decode(latent, frames[0], keep_content=value),
        "unload": lambda: pipe.unload(value),
        "decoding": lambda: pipe.forecast(64, 64, decoding=value),
        "encoding": lambda: clip.save("clip.mp4", encoding=value),
        "interpolate": lambda: clip.interpolated(value),
        "deadline": lambda: pipe.warmup(deadline=value),
        "sizes": lambda: pipe.warmup(sizes=value if isinstance(value, dict | int) else [value]),
        "columns": lambda: contact_sheet([frames, frames], value),
        "fps": lambda: write_video(frames, "clip.mp4", value),
        "adapter_name": lambda: pipe.load_lora_weights({}, adapter_name=value if not isinstance(value, str) else 5),
        "hotswap": lambda: pipe.load_lora_weights({}, hotswap=value),
        "adapter_names": lambda: pipe.set_adapters(value),
        "components": lambda: pipe.fuse_lora(components=value),
    }
    if not isinstance(value, str | dict):
        calls["source"] = lambda: pipe.load_lora_weights(value)
    if not isinstance(value, str):
        calls["path"] = lambda: clip.save(value)
    for name, call in calls.items():
        with pytest.raises(ReducioError) as error:
            call()
        one_line(error, name)
    with pytest.raises(ReducioError):
        pipe.set_attention_backend(value)


@pytest.mark.parametrize("name", ["latents", "motion_latents"])
def test_tensors_without_values(pipe: ReducioPipeline, name: str):
    given = torch.zeros(1, 16, 4, 2, 2)
    for empty in (given.to("meta"), given[0].to("meta"), given.to_sparse(), given[0].to_sparse()):
        with pytest.raises(ReducioError, match=f"^{name}: must hold its values; it is torch.s.* on "):
            pipe.check_inputs(prompt=PROMPT, height=64, width=64, **{name: empty})


def test_steps_of_the_first_stage_are_those_of_its_scheduler(pipe: ReducioPipeline):
    assert pipe.check_inputs(prompt=PROMPT, guidance_reuse=np.int64(2)) is not None
    with pytest.raises(ReducioError, match="^content_kwargs: num_inference_steps: must be from 1 to 1000, is 1001$"):
        reducio_fast.generate(PROMPT, content_kwargs={"num_inference_steps": 1001})


def test_names_of_arguments(pipe: ReducioPipeline):
    with pytest.raises(ReducioError, match="bogus: no argument of this model's call"):
        pipe.stream(prompt=PROMPT, bogus=1)


def test_diffusers_arguments_of_loading(folder: Path):
    for words in ({"use_safetensors": True}, {"low_cpu_mem_usage": True, "use_safetensors": None}):
        assert ReducioPipeline.from_pretrained(folder, device="cpu", **words).vae is not None
    with pytest.raises(ReducioError, match="from_pretrained: unknown use_safetensors"):
        ReducioPipeline.from_pretrained(folder, device="cpu", use_safetensors=False)


@pytest.fixture(scope="module")
def autoencoder(folder: Path) -> VideoAutoencoder:
    return VideoAutoencoder.load(folder, dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (None, "clip: must be an array"),
        ([np.zeros((64, 64, 3), np.uint8)] * 16, "clip: must be an array"),
        (np.zeros((16, 64, 64, 3), np.float32), "must be a path, a list of pictures or uint8"),
        (np.zeros((15, 64, 64, 3), np.uint8), "has 15 frames; the model takes 16"),
        (np.zeros((16, 64, 64, 4), np.uint8), "must be a path, a list of pictures or uint8"),
        (np.zeros((64, 64, 3), np.uint8), "must be a path, a list of pictures or uint8"),
        (np.zeros((16, 33, 64, 3), np.uint8), "height: 33 is not a multiple of 32"),
    ],
)
def test_clips_of_the_autoencoder_alone(autoencoder: VideoAutoencoder, clip, message: str):
    with pytest.raises(ReducioError, match=message):
        autoencoder.encode(clip)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"latent": None}, "latents: must be a floating-point tensor"),
        ({"latent": torch.zeros(1, 16, 4, 2, 2, dtype=torch.int32)}, "latents: must be a floating-point tensor"),
        ({"latent": torch.zeros(2, 16, 4, 2, 2)}, "latent: one is decoded at a time, 2 given"),
        ({"content": None}, "image: None given"),
        ({"content": np.full((64, 64, 3), 300.0)}, r"a float image must lie in \[0, 1\]"),
        ({"output_type": "latent"}, "output_type: must be one of np, pil, pt, is 'latent'"),
        ({"motion_strength": -1}, "motion_strength: must be a number from 0 to 4, is -1"),
        ({"motion_strength": float("nan")}, "motion_strength: must be a number"),
        ({"keep_content": "x"}, "keep_content: must be True or False"),
    ],
)
def test_latents_of_the_autoencoder_alone(autoencoder: VideoAutoencoder, words: dict, message: str):
    rng = np.random.default_rng(0)
    given = {"latent": torch.zeros(1, 16, 4, 2, 2), "content": rng.integers(0, 255, (64, 64, 3), np.uint8)}
    assert autoencoder.decode(**given).shape == (16, 64, 64, 3)
    with pytest.raises(ReducioError, match=message):
        autoencoder.decode(**given | words)


def test_images_as_tensors_and_in_foreign_byte_order():
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    tensor = torch.from_numpy(picture / 255.0).permute(2, 0, 1).float()
    assert np.array_equal(read_image(tensor), picture) and np.array_equal(
        read_image(tensor.bfloat16())[0, 0], picture[0, 0]
    )
    assert np.array_equal(np.stack(read_images(torch.stack([tensor, 1 - tensor]), 2))[0], picture)
    sixteen = picture.astype(np.uint16) * 257
    assert np.array_equal(read_image(sixteen.astype(">u2")), read_image(sixteen))
    for wrong in (tensor[:2], tensor[None, None], (tensor * 255).byte(), tensor * 255):
        with pytest.raises(ReducioError, match="image"):
            read_image(wrong)


def test_rows_of_a_batch(folder: Path, tmp_path: Path):
    def read(name: str, text: str) -> list:
        (tmp_path / name).write_text(text)
        return batch.read_prompts(tmp_path / name)

    for name, text, message in (
        (
            "open.csv",
            'prompt,seed\n"a red circle,1\na blue square,2\n',
            "open.csv cannot be read: unexpected end of data",
        ),
        ("twice.csv", "prompt,prompt\na,b\n", "twice.csv cannot be read: prompt is named twice"),
        ("twice.jsonl", '{"prompt": "a", "prompt": "b"}\n', "twice.jsonl cannot be read: prompt is named twice"),
    ):
        with pytest.raises(ReducioError, match=message):
            read(name, text)
    rows = read("p.jsonl", "".join(json.dumps({"prompt": PROMPT} | more) + "\n" for more in ({}, {"fps": 7}, {})))
    worker = {"model": str(folder), "device": "cpu"}
    call = {"num_inference_steps": 1}
    settings = batch.Settings(out=str(tmp_path / "out"), worker=worker, call=call, suffix=".gif")
    done = batch.make_clips(rows, settings)
    assert done.made == 2 and "fps: no argument of this model's call" in done.errors[0][1]


@pytest.mark.parametrize(
    "change",
    ["loop.learning_rate=" + "9" * 400, "loop.steps=" + "9" * 5000, "a=" + "[" * 3000],
    ids=["no float", "4300 digits", "depth"],
)
def test_numbers_of_a_recipe(change: str):
    with pytest.raises(ReducioError) as error:
        recipe_file.load(DiTRecipe, "dit-256", [change])
    one_line(error, "")


def test_a_value_is_shown_short():
    assert shown(np.zeros((3, 3))) == "array([[0., 0., 0.], [0., 0., 0.], [0., 0., 0.]])"
    assert len(shown("x" * 1000)) == 60 and shown(10**5000) == "a int"
    assert str(ReducioError("a\n  b")) == "a b"


def test_a_callback_may_read_where_the_scheduler_is(picture):
    """diffusers' schedulers count their steps, and the fast sampler does not step them."""
    seen: dict[str, list] = {}
    for backend in ("reference", "fast"):
        pipe = reducio_fast.SVDPipeline.from_pretrained("svd-tiny", device="cpu", dtype="float32", backend=backend)

        def look(pipe, step, timestep, tensors, backend=backend):
            index = pipe.scheduler.step_index
            seen.setdefault(backend, []).append((index, float(pipe.scheduler.sigmas[index])))
            return {}

        call = {"height": 32, "width": 32, "num_frames": 2, "num_inference_steps": 3, "progress": False, "seed": 0}
        pipe(picture, callback_on_step_end=look, **call)
    assert seen["fast"] == seen["reference"] and [index for index, _ in seen["fast"]] == [1, 2, 3]


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
