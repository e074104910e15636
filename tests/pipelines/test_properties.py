"""Any input gives a clip of exactly the requested form, or our own error in one line; and one seed gives one clip.

hypothesis chooses the calls, always the same ones (`derandomize`), on the small random model at 32 to 96 pixels.
"""

from __future__ import annotations

import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints.layouts import REDUCIO
from reducio_fast.media import image_files
from reducio_fast.pipelines.execution.adapters import Adapters
from reducio_fast.system.errors import ReducioError


def quick(max_examples: int = 50) -> settings:
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


SIZES = st.sampled_from([32, 64, 96])
OUTPUT_TYPES = st.sampled_from(["np", "pil", "pt", "latent"])
WORDS = st.text(max_size=60).filter(str.strip)
DTYPES = ("float32", "bfloat16", "float16")
SEEDS = st.integers(0, 2**63 - 10)
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)


@pytest.fixture(scope="session")
def pipes(folder: Path, pipe: ReducioPipeline) -> dict[str, ReducioPipeline]:
    """Ready pipelines by dtype."""
    kwargs = {"device": "cpu", "text_to_image": None}
    return {
        dtype: ReducioPipeline.from_pretrained(folder, dtype=dtype, **kwargs) for dtype in ("bfloat16", "float16")
    } | {"float32": pipe}


def call(pipe: ReducioPipeline, **kwargs: Any) -> Any:
    """The result, or None after our own error, which must be one short line."""
    try:
        return pipe(**({"num_inference_steps": 1, "progress": False} | kwargs))
    except ReducioError as error:
        assert "\n" not in str(error) and 10 < len(str(error)) < 500, str(error)
        return None


def check_form(frames: Any, output_type: str, height: int, width: int) -> None:
    """One clip is of the type, shape and range that `ReducioOutput` promises."""
    if output_type == "np":
        assert frames.dtype == np.uint8 and frames.shape == (16, height, width, 3)
    elif output_type == "pil":
        assert [(f.mode, f.size) for f in frames] == [("RGB", (width, height))] * 16
    elif output_type == "pt":
        assert frames.dtype == torch.float32 and frames.shape == (16, 3, height, width)
        assert frames.min() >= 0 and frames.max() <= 1
    else:
        assert frames.dtype == torch.float32 and frames.shape == (16, 4, height // 32, width // 32)
        assert torch.isfinite(frames).all()


# ---- one seed, one clip ----------------------------------------------------------------------------------------------


@quick(14)
@given(data=st.data(), height=SIZES, width=st.just(32), output_type=OUTPUT_TYPES)
@pytest.mark.slow
def test_a_clip_does_not_know_its_neighbours(pipe: ReducioPipeline, data, height: int, width: int, output_type: str):
    """A clip of any list, by whichever words its seed came, has the bytes it has alone."""
    count, per_prompt = data.draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)]))
    prompts = data.draw(st.lists(WORDS, min_size=count, max_size=count))
    negatives = data.draw(st.lists(st.text(max_size=10), min_size=count, max_size=count))
    seeds = data.draw(st.lists(SEEDS, min_size=count * per_prompt, max_size=count * per_prompt))
    steps, scale = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1.0, 4.5]))
    images = [np.roll(PICTURE, i, axis=0) for i in range(count)]
    common = {
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "output_type": output_type,
        "progress": False,
    }
    many = pipe(
        prompts,
        images,
        negatives,
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        num_videos_per_prompt=per_prompt,
        **common,
    )
    assert many.seeds == seeds and len(many.frames) == len(seeds)
    k = data.draw(st.integers(0, len(seeds) - 1))
    i = k // per_prompt
    alone = pipe(prompts[i], images[i], negatives[i], seed=seeds[k], **common)
    check_form(alone.frames, output_type, height, width)
    assert np.array_equal(np.asarray(alone.content), many.content[k])
    for a, b in zip(alone.frames, many.frames[k], strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


@quick(8)
@given(height=SIZES, width=SIZES, output_type=OUTPUT_TYPES, seed=SEEDS, dtype=st.sampled_from(DTYPES))
@pytest.mark.slow
def test_every_legal_size_and_dtype_has_its_form(
    pipes, height: int, width: int, output_type: str, seed: int, dtype: str
):
    words = {"image": PICTURE, "height": height, "width": width, "seed": seed, "num_inference_steps": 1}
    out = pipes[dtype]("a star", output_type=output_type, progress=False, **words)
    check_form(out.frames, output_type, height, width)
    assert out.content.shape == (height, width, 3) and out.seed == seed


@quick()
@given(size=st.integers(1, 10**7), name=st.sampled_from(["height", "width"]))
def test_an_illegal_size_names_the_two_nearest_legal_ones(pipe: ReducioPipeline, size: int, name: str):
    below, above = max(size // 32 * 32, 32), max(size // 32 * 32, 32) + 32
    if size % 32:
        with pytest.raises(ReducioError, match=f"{name}: {size} is not a multiple of 32; .* are {below} and {above}$"):
            pipe("a star", PICTURE, **{"height": 32, "width": 32, name: size}, progress=False)


# ---- whatever is passed ----------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.sampled_from([np.int64(32), np.float32(32.5), np.array(32), torch.tensor(32), 64j, "32", math.inf, object()]),
)
TEXTS = st.one_of(
    WORDS, st.text(max_size=5), SCALARS, st.just("\ud800"), st.lists(st.one_of(WORDS, SCALARS), max_size=3)
)
KINDS = st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64])
VALUES = st.sampled_from([0.0, 1.0, 1e30, math.nan, math.inf])
TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.sampled_from([(), (1,), (16, 4, 1, 1), (1, 16, 4, 1, 1), (2, 16, 4, 1, 1), (16, 4, 1, 0), (16, 4, 10**6, 0)]),
    KINDS,
    VALUES,
)
EMBEDS = st.one_of(
    SCALARS,
    TENSORS,
    st.builds(
        lambda shape, dtype, value: torch.full(shape, value).to(dtype),
        st.sampled_from([(40, 32), (1, 40, 32), (2, 40, 32), (0, 40, 32), (40,), (1, 40), (1, 4, 32), (1, 4, 4, 4)]),
        KINDS,
        VALUES,
    ),
)
GENERATORS = st.one_of(
    SCALARS, st.builds(torch.Generator), st.lists(st.one_of(st.builds(torch.Generator), SCALARS), max_size=3)
)
ANYTHING = {
    "prompt": TEXTS,
    "negative_prompt": TEXTS,
    "height": SCALARS,
    "width": SCALARS,
    "num_frames": SCALARS,
    "num_inference_steps": st.one_of(SCALARS, st.sampled_from([1, 2, 1001])),
    "guidance_scale": SCALARS,
    "seed": SCALARS,
    "generator": GENERATORS,
    "latents": st.one_of(SCALARS, TENSORS),
    "output_type": st.one_of(SCALARS, OUTPUT_TYPES, st.just(["np"])),
    "callback_on_step_end": SCALARS,
    "callback_on_step_end_tensor_inputs": TEXTS,
    "prompt_embeds": EMBEDS,
    "prompt_attention_mask": EMBEDS,
    "negative_prompt_embeds": EMBEDS,
    "negative_prompt_attention_mask": EMBEDS,
    "semantic_embeds": EMBEDS,
    "content_latents": EMBEDS,
    "content_kwargs": st.one_of(SCALARS, st.dictionaries(st.sampled_from(["height", "prompt", "x", 3]), SCALARS)),
    "num_videos_per_prompt": st.one_of(SCALARS, st.integers(1, 2)),
    "image": st.one_of(
        SCALARS, st.just([PICTURE]), st.just([PICTURE, PICTURE]), st.just(PICTURE[None]), st.just([]), st.just([None]),
        st.just(np.zeros((0, 4, 4, 3), np.uint8)), st.just(torch.zeros(3, 32, 32)), st.just(Path("/")), st.just(""),
    ),
}  # fmt: skip


@quick(200)
@given(data=st.data())
@pytest.mark.slow
def test_any_word_may_be_anything(pipe: ReducioPipeline, data):
    """One to three words of an otherwise good call are replaced by anything."""
    words: dict[str, Any] = {"prompt": "a star", "image": PICTURE, "height": 32, "width": 32, "output_type": "latent"}
    for name in data.draw(st.lists(st.sampled_from(list(ANYTHING)), min_size=1, max_size=3, unique=True)):
        words[name] = data.draw(ANYTHING[name], label=name)
    if words.get("image") is None:
        words.pop("height"), words.pop("width")  # one size is enough where the first stage draws
    out = call(pipe, **words)
    if out is not None:
        clips = list(out.frames) if out.is_list else [out.frames]
        for clip in clips:
            check_form(clip, words["output_type"], *out.content.shape[-3:-1])


@quick(100)
@given(latents=st.one_of(SCALARS, TENSORS), image=ANYTHING["image"], output_type=st.one_of(SCALARS, OUTPUT_TYPES))
@example(latents=torch.zeros(16, 4, 1, 1), image=PICTURE, output_type="np")
def test_decode_takes_anything(pipe: ReducioPipeline, latents: Any, image: Any, output_type: Any):
    try:
        frames = pipe.decode(latents, image, output_type)
    except ReducioError as error:
        assert "\n" not in str(error)
    else:
        for clip in frames if latents.ndim == 5 else [frames]:
            check_form(clip, output_type, 32, 32)


# ---- odd images ------------------------------------------------------------------------------------------------------


def check_fitted(image: Any, height: int, width: int) -> None:
    try:
        (read,) = image_files.read_images(image, 1)
        assert read is not None and read.dtype == np.uint8 and read.shape[2:] == (3,) and read.size
        fitted = image_files.fit_image(read, height, width)
    except ReducioError as error:
        assert "\n" not in str(error)
    else:
        assert fitted.dtype == np.uint8 and fitted.shape == (height, width, 3)


@quick(200)
@given(
    image=arrays.arrays(
        st.one_of(arrays.scalar_dtypes(), arrays.unicode_string_dtypes(), st.just(np.dtype(object))),
        st.one_of(
            arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6),
            st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 5])),
        ),
    ),
    size=st.tuples(SIZES, SIZES),
)
@pytest.mark.slow
def test_an_array_is_a_picture_or_refused(image: np.ndarray, size: tuple[int, int]):
    check_fitted(image, *size)


@quick(100)
@given(
    mode=st.sampled_from("1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I F I;16".split()),
    extent=st.tuples(st.integers(0, 40), st.integers(0, 40)) | st.sampled_from([(1, 3000), (3000, 1)]),
    turn=st.integers(0, 9),
    size=st.tuples(SIZES, SIZES),
)
def test_a_picture_of_any_mode_and_extent(mode: str, extent: tuple[int, int], turn: int, size: tuple[int, int]):
    image = Image.new(mode, extent)
    image.getexif()[0x0112] = turn  # the camera's rotation tag; only 1 to 8 mean something
    check_fitted(image, *size)


@quick(60)
@given(
    cut=st.integers(0, 400),
    flip=st.integers(0, 400),
    suffix=st.sampled_from(["png", "jpg", "webp", "gif", "bmp", "tif"]),
)
def test_a_damaged_file_is_a_picture_or_refused(cut: int, flip: int, suffix: str, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"damaged.{suffix}"
    Image.fromarray(PICTURE[:8, :8]).save(path)
    data = bytearray(path.read_bytes())
    data[flip % len(data)] ^= 0xFF
    path.write_bytes(data[: len(data) - cut % len(data)])
    check_fitted(path, 32, 64)


# ---- adapters --------------------------------------------------------------------------------------------------------


class Owner(Adapters):
    """Two layers that take adapters: the methods need no more than a denoiser and a lock."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.transformer = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 5), "b": torch.nn.Conv2d(3, 4, 2)}).to(dtype)
        with torch.no_grad():
            for parameter in self.transformer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        super().__init__(
            SimpleNamespace(layout=REDUCIO, denoiser=self.transformer), SimpleNamespace(lock=threading.RLock())
        )

    def bits(self) -> list[torch.Tensor]:
        return [p.clone() for p in self.transformer.parameters()]


def adapter(seed: int, layers: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": ((2, 6), (5, 2)), "b": ((2, 3, 2, 2), (4, 2, 1, 1))}
    return {
        f"{layer}.lora_{part}.weight": torch.randn(shape, generator=generator) * 10.0 ** (seed % 5)
        for layer in layers
        for part, shape in zip("AB", shapes[layer], strict=True)
    }


NAMES = st.sampled_from(["x", "y", "z"])
WEIGHTS = st.floats(-3, 3, width=32)
LORA_CALLS = st.one_of(
    st.tuples(
        st.just("load"),
        st.builds(adapter, st.integers(0, 9), st.sampled_from(["a", "b", "ab"])),
        NAMES,
        st.none(),
        st.booleans(),
    ),
    st.tuples(st.just("activate"), st.lists(NAMES, max_size=2), st.none() | WEIGHTS),
    st.tuples(st.just("fuse"), st.just(("transformer",)), WEIGHTS, st.none()),
    st.tuples(st.just("delete"), NAMES),
    st.tuples(st.just("unfuse"), st.just(("transformer",))),
    st.tuples(st.just("enable"), st.booleans()),
)


@quick(60)
@given(words=st.lists(LORA_CALLS, max_size=12), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
@pytest.mark.slow
def test_adapters_leave_no_trace(words: list[tuple], dtype: torch.dtype):
    """After any sequence of words the weights are, to the bit, those of a fresh owner with the adapters that are in
    effect; and after `unload` the originals."""
    owner, files = Owner(dtype), {}
    original = owner.bits()
    for word, *given_words in words:
        try:
            getattr(owner, word)(*given_words)
        except ReducioError as error:
            assert "\n" not in str(error)
        else:
            if word == "load":
                files[given_words[1]] = given_words[0]
    effect = {} if owner.merge is None else owner.merge.effect
    loaded = [] if owner.merge is None else list(owner.merge.loaded)
    fresh = Owner(dtype)
    for name in loaded:
        fresh.load(files[name], name)
    if loaded:
        fresh.activate(list(effect), list(effect.values()))
    assert all(map(torch.equal, owner.bits(), fresh.bits()))
    owner.unfuse(("transformer",))
    owner.unload()
    assert all(map(torch.equal, owner.bits(), original))
