"""A clip in a fresh process without diffusers and transformers: the same bytes, by component and as a whole."""

from __future__ import annotations

import gc
import json
import operator
import shutil
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recorded_graphs import Recorder
from reducio_fast import ReducioPipeline, generate
from reducio_fast.checkpoints.networks import load_foreign
from reducio_fast.checkpoints.strict_files import embedded_model
from reducio_fast.compile.graphs import Graphs
from reducio_fast.fast.engine import Engine
from reducio_fast.memory.offload import Offload
from reducio_fast.pipelines import generate as generating
from reducio_fast.pipelines.execution.first_stage import Parts
from reducio_fast.pipelines.reducio import light
from reducio_fast.reference.multistep_schedule import MultistepSchedule

PROMPT = "a red circle moving right on a black background"
TEXTS = (PROMPT, "x", "", "é 日 </s> a <pad>  b", "q" * 300, "ends </s>")


@pytest.fixture(scope="module")
def pipe() -> ReducioPipeline:
    loaded = light.load(embedded_model(), torch.float32, torch.device("cpu"), False)
    assert loaded is not None
    return loaded


@pytest.mark.slow
def test_a_fresh_process_imports_neither() -> None:
    code = textwrap.dedent(f"""
        import sys

        import reducio_fast

        out = reducio_fast.generate({PROMPT!r}, num_inference_steps=2, progress=False)
        assert out.frames.shape == (16, 128, 128, 3)
        heavy = ("diffusers", "transformers", "open_clip", "torchvision", "timm", "peft", "scipy")
        heavy += ("torch._dynamo", "torch._inductor", "sympy")  # 3 s with torch 2.14
        print([name for name in heavy if name in sys.modules], len(sys.modules))
    """)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/")
    imported, _, count = done.stdout.strip().rpartition(" ")
    assert imported == "[]" and int(count) < 3000, done.stdout  # 4508 modules with the libraries


@torch.no_grad()
def test_components_are_the_libraries_to_the_bit(pipe: ReducioPipeline) -> None:
    folder = embedded_model()

    def theirs(library: str, class_name: str, name: str) -> Any:
        return load_foreign(library, class_name, folder / name, torch.float32, "cpu")

    tokenizer = theirs("transformers", "ByT5Tokenizer", "tokenizer")
    encoder = theirs("transformers", "T5EncoderModel", "text_encoder")
    kwargs = {"padding": "max_length", "truncation": True, "max_length": 120, "return_tensors": "pt"}
    for text in TEXTS:
        assert list(tokenizer(text).input_ids) == pipe.tokenizer(text).input_ids
        expected, tokens = tokenizer([text], **kwargs), pipe.tokenizer([text], **kwargs)
        assert torch.equal(expected.input_ids, tokens.input_ids)
        assert torch.equal(expected.attention_mask, tokens.attention_mask)
        inputs = (tokens.input_ids, tokens.attention_mask)
        assert torch.equal(encoder(inputs[0], attention_mask=inputs[1])[0], pipe.text_encoder(*inputs)[0])
    image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    vae = theirs("diffusers", "AutoencoderKL", "content_encoder")
    assert torch.equal(vae.encode(image).latent_dist.mode(), pipe.content_encoder.encode(image))


@pytest.mark.parametrize("quick", [False, True])
@torch.no_grad()
def test_the_image_tower_is_open_clips_to_the_bit(pipe: ReducioPipeline, quick: bool) -> None:
    from open_clip.model import _build_vision_tower

    from reducio_fast.reference.reducio.vision_tower import VisionTower

    sizes = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16, "mlp_ratio": 3.0}
    torch.manual_seed(0)
    theirs = _build_vision_tower(24, sizes, quick).eval()
    torch.manual_seed(0)
    ours = VisionTower(24, **sizes, quick_gelu=quick).eval()
    fresh, expected = ours.state_dict(), theirs.state_dict()
    assert fresh.keys() == expected.keys() and all(torch.equal(fresh[name], expected[name]) for name in fresh)
    theirs.output_tokens = True
    image = torch.randn(2, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(ours(image), theirs(image), strict=True))
    assert type(pipe.image_encoder.visual) is VisionTower


def test_steps_are_diffusers_to_the_bit() -> None:
    from diffusers import DPMSolverMultistepScheduler

    for changes in ({}, {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"}):
        theirs = DPMSolverMultistepScheduler(**changes)
        ours = MultistepSchedule({"_class_name": "DPMSolverMultistepScheduler", **theirs.config})
        for kwargs in ({"num_inference_steps": 1}, {"num_inference_steps": 20}, {"timesteps": [999, 500, 3]}):
            theirs.set_timesteps(**kwargs)
            ours.set_timesteps(**kwargs)
            assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(ours.timesteps, theirs.timesteps)
    for name, value in (("use_karras_sigmas", True), ("timestep_spacing", "trailing"), ("beta_schedule", "sigmoid")):
        with pytest.raises(ValueError, match=name):
            MultistepSchedule({"_class_name": "DPMSolverMultistepScheduler", **theirs.config, name: value})


@pytest.mark.slow
def test_clips_are_the_same_bytes() -> None:
    kwargs = {"num_inference_steps": 2, "progress": False}
    generating.forget()
    clip = generate(PROMPT, quality="balanced", **kwargs)
    assert isinstance(generating.kept()[0].text_to_image, Parts)
    whole = ReducioPipeline.from_pretrained(embedded_model())(PROMPT, quality="balanced", **kwargs)
    assert np.array_equal(clip.content, whole.content) and np.array_equal(clip.frames, whole.frames)
    other = generate(PROMPT, content_kwargs={"num_inference_steps": 3}, **kwargs)
    assert type(generating.kept()[-1].text_to_image).__name__ == "PixArtAlphaPipeline" and len(generating.kept()) == 2
    assert not np.array_equal(other.content, clip.content)
    generating.forget()


@pytest.mark.slow
def test_a_folder_that_needs_the_libraries(tmp_path: Path) -> None:
    """Another scheduler, tokenizer or kind of network: the libraries read it, or say what is wrong."""
    folder = embedded_model()
    for number, (file, changes) in enumerate((
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}),
        ("scheduler/scheduler_config.json", {"solver_order": 0}),
        ("text_to_image/scheduler/scheduler_config.json", {"solver_type": "none"}),
        ("model_index.json", {"tokenizer": ["transformers", "T5Tokenizer"]}),
        ("text_encoder/config.json", {"feed_forward_proj": "relu"}),
        ("text_to_image/transformer/config.json", {"norm_type": "layer_norm"}),
    )):  # fmt: skip
        changed = tmp_path / str(number)
        shutil.copytree(folder, changed)
        values = json.loads((changed / file).read_text())
        (changed / file).write_text(json.dumps(values | changes))
        assert light.load(changed, torch.float32, torch.device("cpu"), False) is None
    assert light.load(tmp_path, torch.float32, torch.device("cpu"), False) is None


def draw(pipe: ReducioPipeline) -> np.ndarray:
    sizes = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
    return pipe(PROMPT, seed=0, progress=False, **sizes).content


def loaded(libraries: bool) -> ReducioPipeline:
    if libraries:
        pipe = ReducioPipeline.from_pretrained(embedded_model(), device="cpu", dtype="float32", backend="fast")
    else:
        pipe = light.load(embedded_model(), torch.float32, torch.device("cpu"), False)
    pipe.executor.engine = Engine(graphs=Graphs(Recorder()))
    return pipe


def graph_names(pipe: ReducioPipeline) -> set[str]:
    return {graph["name"] for graph in pipe.describe()["graphs"]["graphs"]}


@pytest.mark.parametrize("libraries", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_unloading_frees_what_was_made_of_the_first_stage_alone(libraries: bool) -> None:
    pipe = loaded(libraries)
    draw(pipe)
    assert graph_names(pipe) == {"content.step", "dit.step"}
    twins = {type(twin).__name__: weakref.ref(twin) for twin in pipe.executor.engine.packed()}
    seen = [weakref.ref(pipe.text_to_image.transformer), twins["FastPixArt"], twins["FastImageVAE"]]
    pipe.unload("text_to_image")
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3 and twins["FastReducioDiT"]() is not None
    assert graph_names(pipe) == {"dit.step"}


@pytest.mark.parametrize("change", ["offload", "to"])
def test_moving_weights_frees_what_was_made_of_them(change: str) -> None:
    pipe = loaded(False)
    draw(pipe)
    twins = [weakref.ref(twin) for twin in pipe.executor.engine.packed()]
    pipe.to("cpu", torch.float32)  # changes nothing
    assert len(twins) == 3 and all(ref() is not None for ref in twins)
    if change == "to":
        pipe.to(torch.bfloat16)
    else:
        pipe.enable_model_cpu_offload(device="cpu")
    gc.collect()
    assert [ref() for ref in twins] == [None] * 3 and graph_names(pipe) == set()


def test_offloading_moves_the_twins_that_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are packed once from the weights at home, not at each clip from those that are on the device for a stage."""
    placed, moved = Offload.placed, list[set[str]]()

    @contextmanager
    def noted(self: Offload, *networks: torch.nn.Module) -> Iterator[None]:
        moved.append({type(network).__name__ for network in networks})
        with placed(self, *networks):
            yield

    pipe = loaded(False)
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")  # copies the weights, since there is no second device
    monkeypatch.setattr(Offload, "placed", noted)
    assert np.array_equal(draw(pipe), expected)
    assert {"FastPixArt", "FastImageVAE"} < moved[0]
    twins = {id(twin) for twin in pipe.executor.engine.packed()}
    draw(pipe)
    assert {id(twin) for twin in pipe.executor.engine.packed()} == twins


@pytest.mark.parametrize("name", ["text_to_image.transformer", "text_to_image.vae", "transformer"])
def test_hooks_run_where_no_library_is_loaded(name: str) -> None:
    """The networks then run as they are, and their results are the twins' up to rounding."""
    pipe = light.load(embedded_model(), torch.float32, torch.device("cpu"), False)
    assert pipe is not None
    sizes = {"height": 64, "width": 64, "num_inference_steps": 2, "progress": False}
    before, calls = pipe(PROMPT, **sizes), list[int]()
    network = operator.attrgetter(name)(pipe)
    layer = network.decoder.conv_out if name.endswith("vae") else network.proj_out
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    after = pipe(PROMPT, **sizes)
    assert calls and np.abs(after.content.astype(int) - before.content).max() <= 2
    assert np.abs(after.frames.astype(int) - before.frames).mean() < 1
    line = pipe.report["transformer"] if name == "transformer" else pipe.content.line
    assert line.startswith("reference: ") and "has forward hooks" in line
    handle.remove()
    assert np.array_equal(pipe(PROMPT, **sizes).frames, before.frames)


def test_a_step_set_on_the_scheduler_of_a_first_stage_is_called(pipe: ReducioPipeline) -> None:
    calls: list[int] = []

    def step(prediction: torch.Tensor, timestep: Any, latent: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        calls.append(1)
        return (latent,)

    scheduler = pipe.text_to_image.scheduler
    scheduler.step = step
    try:
        draw(pipe)
    finally:
        del scheduler.step
    assert calls
