"""The model folder: it loads as it was saved, parts can be replaced, and errors name broken parts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import reducio_fast
from reducio_fast import ReducioPipeline
from reducio_fast.reference import ReducioVAE, VAEConfig
from reducio_fast.system.errors import ReducioError

PROMPT = "a red circle moving right"
FAST = {"num_inference_steps": 2, "progress": False}
SHAPE = (16, 4, 2, 2)  # motion latent of a 64x64 clip


def weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


def test_import_is_quick_and_exports_few_names():
    code = (
        "import sys, time; start = time.perf_counter(); import reducio_fast; seconds = time.perf_counter() - start\n"
        "assert not {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules), 'heavy imports'\n"
        "assert seconds < 0.2, seconds\n"
        "names = ['ReducioError', 'ReducioPipeline', 'ReducioVAE', 'SV3DPipeline', 'SVDPipeline', 'accelerate']\n"
        "names += ['generate', 'parallelize']\n"
        "assert reducio_fast.__all__ == sorted([*names, '__version__'])\n"
        "assert [n for n in dir(reducio_fast) if n[0] != '_' and n not in ('TYPE_CHECKING', 'Any', 'annotations')] "
        "== names\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert reducio_fast.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'sampler'"):
        _ = reducio_fast.sampler


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("vae", {"norm_groups": 0}, "norm_groups=0: must be an integer of at least 1"),
        ("vae", {"num_frames": 16.0}, "num_frames=16.0: must be an integer of at least 1"),
        ("vae", {"num_heads": 3}, "is not a multiple of num_heads=3"),
        ("vae", {"latent_channels": 10**30}, ""),  # torch says what is wrong with it
        ("transformer", {"depth": "2"}, "depth='2': must be an integer of at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_numbers_in_a_configuration_are_one_line(
    folder: Path, tmp_path: Path, component: str, changes: dict, message: str
):
    shutil.copytree(folder, tmp_path / "model")
    config = tmp_path / "model" / component / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ReducioError) as caught:
        ReducioPipeline.from_pretrained(tmp_path / "model", device="cpu")
    line = str(caught.value)
    assert line.startswith(f"{config}: ") and message in line and "\n" not in line


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("text_encoder/config.json", {"d_model": "128"}),
        ("content_encoder/config.json", {"norm_num_groups": 0}),
        ("scheduler/scheduler_config.json", {"solver_order": 0}),
        ("scheduler/scheduler_config.json", {"lambda_min_clipped": None}),
        ("scheduler/scheduler_config.json", {"final_sigmas_type": "none"}),
        ("scheduler/scheduler_config.json", {"prediction_type": "none"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": -1}),
        ("text_to_image/scheduler/scheduler_config.json", {"solver_order": 0}),
    ],
    ids=str,
)
def test_wrong_values_of_foreign_components_are_one_line(copy: Path, file: str, values: dict[str, Any]):
    config = copy / file
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    for load in (ReducioPipeline.from_pretrained, lambda model: reducio_fast.generate(PROMPT, model=model, **FAST)):
        with pytest.raises(ReducioError) as caught:
            load(copy)
        assert str(config.parent) in str(caught.value) and "\n" not in str(caught.value)


def test_a_saved_model_loads_to_the_same_bits(folder: Path, pipe: ReducioPipeline, tmp_path: Path):
    pipe.save_pretrained(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(folder)
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index == json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == ["reducio_fast", "ReducioVAE"] and index["image_encoder"] == [
        "reducio_fast",
        "SemanticEncoder",
    ]
    assert (index["fps"], index["sample_height"]) == (12, 64)
    assert not [p for p in tmp_path.iterdir() if p.name != "again"], "temporary folders left behind"


@pytest.mark.slow
def test_half_precision_storage_round_trips(pipe: ReducioPipeline, folder: Path, tmp_path: Path):
    half = ReducioPipeline.from_pretrained(folder, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    assert (tmp_path / "half/vae/diffusion_pytorch_model.safetensors").stat().st_size < 0.6 * (
        folder / "vae/diffusion_pytorch_model.safetensors"
    ).stat().st_size
    full = ReducioPipeline.from_pretrained(tmp_path / "half", torch_dtype="float32")
    for name, value in full.vae.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, pipe.vae.state_dict()[name].half().float())
    assert all(p.dtype == torch.float32 for n in full.parts.networks() for p in n.parameters())
    assert full.to(dtype="bfloat16").dtype == torch.bfloat16
    assert full(PROMPT, **FAST).frames.shape == (16, 64, 64, 3)


def test_the_first_stage_shares_what_its_folder_lacks(folder: Path, pipe: ReducioPipeline, copy: Path, tmp_path: Path):
    assert sorted(p.name for p in (folder / "text_to_image").iterdir()) == [
        "model_index.json",
        "scheduler",
        "transformer",
    ]
    assert pipe.text_to_image.text_encoder is pipe.text_encoder
    assert pipe.text_to_image.tokenizer is pipe.tokenizer
    assert pipe.text_to_image.vae is pipe.content_encoder
    shutil.copytree(copy / "content_encoder", copy / "text_to_image" / "vae")
    own = ReducioPipeline.from_pretrained(copy)
    assert own.text_to_image.vae is not own.content_encoder
    own.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own/text_to_image/vae/config.json").is_file()


@pytest.mark.slow
def test_components_can_be_replaced_or_left_out(folder: Path, pipe: ReducioPipeline, tmp_path: Path):
    seen = []

    def tokens(image: torch.Tensor) -> torch.Tensor:
        seen.append((image.shape, image.min() >= -1, image.max() <= 1))
        return torch.zeros(1, 5, 32)

    own = ReducioPipeline.from_pretrained(folder, image_encoder=tokens, content_encoder=None, text_to_image=None)
    assert own(PROMPT, Image.new("RGB", (64, 64), "red"), **FAST).frames.shape == (16, 64, 64, 3)
    assert seen == [((1, 3, 64, 64), True, True)]
    with pytest.raises(ReducioError, match="image: None given, and this model has no text-to-image stage"):
        own(PROMPT, **FAST)
    with pytest.raises(ReducioError, match="image_encoder: a function cannot be saved"):
        own.save_pretrained(tmp_path / "own")
    assert not list(tmp_path.iterdir())
    own.image_encoder = None
    own.save_pretrained(tmp_path / "own")
    again = ReducioPipeline.from_pretrained(tmp_path / "own")
    assert again.image_encoder is None and again.content_encoder is None and again.text_to_image is None
    with pytest.raises(ReducioError, match="unknown unet; known are vae, transformer"):
        ReducioPipeline.from_pretrained(folder, unet=None)
    with pytest.raises(ReducioError, match="transformer has latent_channels=16, vae gives 8"):
        narrow = VAEConfig(
            base_channels=8, content_base_channels=8, norm_groups=4, latent_channels=8, fusion_head_dim=8
        )
        ReducioPipeline.from_pretrained(folder, vae=ReducioVAE(narrow))


@pytest.mark.slow
def test_generate_keeps_the_loaded_model(folder: Path, clip):
    from reducio_fast.pipelines import generate

    generate.forget()
    first = reducio_fast.generate(PROMPT, model=folder, seed=3, dtype="float32", device="cpu", **FAST)
    loaded = generate.kept()
    again = reducio_fast.generate(PROMPT, model=str(folder), seed=3, dtype=torch.float32, device="cpu", **FAST)
    assert generate.kept() == loaded and len(loaded) == 1
    assert np.array_equal(first.frames, clip.frames) and np.array_equal(again.frames, clip.frames)
    for backend, dtype in (("reference", "float32"), ("auto", "bfloat16"), ("auto", "float32")):
        reducio_fast.generate(PROMPT, model=folder, backend=backend, dtype=dtype, device="cpu", **FAST)
        assert len(generate.kept()) <= generate.KEPT_PIPELINES


class Recorder:
    """A model that answers a call with its arguments."""

    def __init__(self) -> None:
        self.executor = SimpleNamespace(ranks=None)

    def __call__(self, **kwargs: Any) -> dict[str, Any]:
        return kwargs | {"ranks": self.executor.ranks}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`generate` finds recorders only; the arguments of each loading."""
    from reducio_fast.pipelines import generate

    loads: list[dict[str, Any]] = []

    def load(dtype: Any, device: Any, backend: str, **parts: Any) -> Recorder:
        loads.append(parts)
        return Recorder()

    model = generate.registry.Model(("recorder",), load, ("fps",), {})
    monkeypatch.setattr(generate.registry, "find", lambda name, variant=None: model)
    monkeypatch.setattr(generate, "parallelize", lambda pipe: setattr(pipe.executor, "ranks", "all"))
    generate.forget()
    yield loads
    generate.forget()


def test_generate_needs_no_prompt_beside_motion(recorded: list[dict[str, Any]]):
    motion = torch.zeros(SHAPE)
    made = reducio_fast.generate(image="a.png", motion_latents=motion)
    assert made["motion_latents"] is motion and made["prompt"] is None
    with pytest.raises(ReducioError, match="prompt: None given"):
        reducio_fast.generate(image="a.png")


def test_generate_takes_values_without_a_hash(recorded: list[dict[str, Any]]):
    for name, value in (("backend", ["fast"]), ("parallel", ["yes"]), ("dtype", ["float32"])):
        with pytest.raises(ReducioError, match=rf"{name}: must be .*, is \['"):
            reducio_fast.generate("a", **{name: value})
    assert not recorded
    setting = (1, [2])
    reducio_fast.generate("a", fps=setting)
    reducio_fast.generate("b", fps=setting)
    assert recorded == [{"fps": setting}]


def test_generate_notices_files_behind_links(recorded: list[dict[str, Any]], tmp_path: Path, monkeypatch):
    """A component that is a single file, one with `~`, and one that is a link to a folder, in a circle too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    weights = tmp_path / "elsewhere" / "unet.safetensors"
    weights.write_text("first")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "transformer").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "model" / "circle").symlink_to(tmp_path / "model")
    names = [str(weights), "~/elsewhere/unet.safetensors", str(tmp_path / "model"), f"local-dir:{tmp_path / 'model'}"]
    for number, name in enumerate(names):
        reducio_fast.generate("a", fps=name)
        reducio_fast.generate("a", fps=name)
        weights.write_text("other" * (number + 2))
        reducio_fast.generate("a", fps=name)
        assert len(recorded) == 2 * (number + 1), name


def test_generate_alone_after_generate_together(recorded: list[dict[str, Any]]):
    ranks = [reducio_fast.generate("a", parallel=parallel)["ranks"] for parallel in (True, False, True)]
    assert ranks == ["all", None, "all"] and len(recorded) == 2


@pytest.mark.parametrize("name", ["vae", "transformer", "scheduler"])
def test_what_a_model_cannot_lack(folder: Path, pipe: ReducioPipeline, name: str):
    with pytest.raises(ReducioError, match=f"{name}: None given, a ReducioPipeline needs one"):
        ReducioPipeline.from_pretrained(folder, **{name: None})
    with pytest.raises(ReducioError, match=f"{name}: None given, a Reducio model needs one"):
        ReducioPipeline(**pipe.components | {name: None})


# ---- broken folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["vae", "transformer", "text_encoder", "image_encoder", "content_encoder", "text_to_image/transformer"]
)
@pytest.mark.slow
def test_damaged_weights_are_named(copy: Path, name: str):
    file = next((copy / name).glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ReducioError, match=f"{file}: truncated, has {len(content) - 100} bytes .* {len(content)}"):
        ReducioPipeline.from_pretrained(copy)
    file.unlink()
    torch.save({}, file.with_name("weights.bin"))
    with pytest.raises(ReducioError, match=f"{file.parent}: holds the pickle weights.bin and no safetensors"):
        ReducioPipeline.from_pretrained(copy)
    shutil.rmtree(file.parent)
    with pytest.raises(ReducioError, match="no such|shares no component"):
        ReducioPipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    "name", ["vae", "transformer", "text_encoder", "image_encoder", "content_encoder", "text_to_image/transformer"]
)
@pytest.mark.slow
def test_foreign_weights_are_listed(copy: Path, name: str):
    from safetensors.torch import load_file, save_file

    file = next((copy / name).glob("*.safetensors"))
    tensors = load_file(file)
    dropped = next(n for n in tensors if n.endswith("weight"))
    tensors["one.too.many"] = tensors.pop(dropped)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ReducioError) as caught:
        ReducioPipeline.from_pretrained(copy)
    message = str(caught.value)
    assert (
        str(file.parent) in message and f"1 missing: {dropped}" in message and "1 unexpected: one.too.many" in message
    )


def test_bad_index(copy: Path, tmp_path: Path):
    path = copy / "model_index.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"_class_name": "WanPipeline"}, "is of a WanPipeline, not of a ReducioPipeline"),
        ({"unet": ["diffusers", "UNet"]}, "unknown unet; known are vae"),
        ({"vae": None}, "vae is missing"),
        ({"scheduler": "DPM"}, r"scheduler must be \[library, class\], is 'DPM'"),
        ({"scheduler": ["os", "system"]}, "is of library 'os'; known are diffusers, transformers"),
        ({"scheduler": ["diffusers", "NoScheduler"]}, "is a NoScheduler, which diffusers .* does not have"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ReducioError, match=message):
            ReducioPipeline.from_pretrained(copy)
    path.write_text("{")
    with pytest.raises(ReducioError, match="model_index.json: not readable as JSON"):
        ReducioPipeline.from_pretrained(copy)
    path.unlink()
    with pytest.raises(ReducioError, match="is no model folder, it has no model_index.json"):
        ReducioPipeline.from_pretrained(copy)


def test_a_component_without_access_is_one_line(copy: Path, monkeypatch: pytest.MonkeyPatch):
    stat = os.stat

    def refusing(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if isinstance(path, str | Path) and Path(path).parent == copy / "tokenizer":
            raise PermissionError(13, "Permission denied")
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refusing)
    with pytest.raises(ReducioError, match=f"{copy / 'tokenizer'}.* cannot be accessed .Permission denied"):
        ReducioPipeline.from_pretrained(copy)


def test_the_first_stage_needs_what_it_cannot_share(copy: Path):
    path = copy / "text_to_image" / "model_index.json"
    good = json.loads(path.read_text())
    shutil.rmtree(copy / "text_to_image" / "scheduler")
    with pytest.raises(
        ReducioError, match="scheduler has no folder here and the model shares no component of that name"
    ):
        ReducioPipeline.from_pretrained(copy)
    path.write_text(json.dumps(good | {"_class_name": "NoPipeline"}))
    with pytest.raises(ReducioError, match="names the pipeline 'NoPipeline', which diffusers does not have"):
        ReducioPipeline.from_pretrained(copy)
    path.write_text(json.dumps(good | {"scheduler": [None, None], "unet": [None, None]}))
    with pytest.raises(ReducioError, match="PixArtAlphaPipeline cannot be built"):
        ReducioPipeline.from_pretrained(copy)


def test_a_class_that_is_no_text_is_one_line(tmp_path: Path):
    (tmp_path / "model_index.json").write_text('{"_class_name": ["a"]}')
    with pytest.raises(ReducioError, match=r"is of a \['a'\]; known are ReducioPipeline, "):
        reducio_fast.generate(PROMPT, model=tmp_path, device="cpu")
