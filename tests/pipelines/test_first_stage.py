"""Stage one by name: diffusers' own pipelines from their folders, the size they draw at, and what both stages share."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from reducio_fast.checkpoints import networks
from reducio_fast.checkpoints.diffusers_folders import find_text_to_image, load_text_to_image
from reducio_fast.media.image_files import fit_image
from reducio_fast.pipelines.execution.drawing import draw_image, drawing_size, native_size, warn_once
from reducio_fast.pipelines.execution.executor import Executor
from reducio_fast.pipelines.execution.plain_engine import PlainEngine
from reducio_fast.pipelines.reducio.encoders import clean_caption
from reducio_fast.system.errors import ReducioError
from tiny_pixart import autoencoder, pixart, randomise, t5

pytestmark = pytest.mark.slow

PROMPT = "a red circle"
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


def clip_text(projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=16, bos_token_id=52, eos_token_id=53,
    )  # fmt: skip
    return randomise((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def unet(**kwargs: Any) -> Any:
    from diffusers import UNet2DConditionModel

    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    return randomise(UNet2DConditionModel(sample_size=8, **blocks, **sizes, **kwargs))


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    network = unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
    )
    tokenizers = clip_tokenizer(), clip_tokenizer()
    parts = autoencoder(), clip_text(), clip_text(projection=True), *tokenizers, network, EulerDiscreteScheduler()
    return StableDiffusionXLPipeline(*parts, add_watermarker=False)


def stable_diffusion() -> Any:
    """With its safety checker, whose library is a module of diffusers' own pipelines."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = tiny | {"image_size": 16, "patch_size": 8}
    checker = randomise(StableDiffusionSafetyChecker(CLIPConfig(text_config=tiny, vision_config=vit, projection_dim=8)))
    checker.concept_embeds_weights.fill_(2.0)  # above any cosine: no image is found unsafe and blacked out
    checker.special_care_embeds_weights.fill_(2.0)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    network = unet(cross_attention_dim=16)
    scheduler = PNDMScheduler(skip_prk_steps=True)
    return StableDiffusionPipeline(autoencoder(), clip_text(), clip_tokenizer(), network, scheduler, checker, processor)


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    network = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    tokenizer, text = t5()
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(
        scheduler, autoencoder(1, shift_factor=0.1), clip_text(), clip_tokenizer(), text, tokenizer, randomise(network)
    )


PIPELINES = {"pixart": pixart, "sdxl": sdxl, "sd": stable_diffusion, "flux": flux}
EXTRA_KWARGS = {"pixart": {"use_resolution_binning": False}, "flux": {"max_sequence_length": 16}}


@pytest.fixture(scope="module", params=PIPELINES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a kind of pipeline, and the folder that diffusers saves it to."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("first") / request.param
    PIPELINES[request.param]().save_pretrained(folder)
    return request.param, folder


def test_draws_what_diffusers_draws(saved: tuple[str, Path]):
    """Against diffusers' own loader and call: same folder, same arguments, same seed."""
    from diffusers import DiffusionPipeline

    name, folder = saved
    theirs = DiffusionPipeline.from_pretrained(folder)
    ours = load_text_to_image(folder, {}, torch.float32, "cpu")
    assert type(ours) is type(theirs) and ours.components.keys() == theirs.components.keys()
    assert not any(
        parameter.requires_grad for network in networks.pipeline_networks(ours) for parameter in network.parameters()
    )
    size = {"height": 64, "width": 96}
    call = {"num_inference_steps": 2, "guidance_scale": 3.0} | size | EXTRA_KWARGS.get(name, {})
    theirs.set_progress_bar_config(disable=True)
    drawn = theirs(PROMPT, generator=torch.Generator().manual_seed(5), output_type="np", **call).images[0]
    expected = fit_image((drawn.clip(0, 1) * 255).round().astype(np.uint8), 64, 64)
    assert expected.std() > 1, "a blank picture would show nothing"
    kwargs = {key: value for key, value in call.items() if key != "use_resolution_binning"}
    image = draw_image(ours, PROMPT, "", 64, 64, torch.Generator().manual_seed(5), False, kwargs)
    assert np.array_equal(image, expected)


def test_its_own_steps_and_guidance_are_the_default(saved: tuple[str, Path], monkeypatch: pytest.MonkeyPatch):
    _, folder = saved
    pipeline = load_text_to_image(folder, {}, torch.float32, "cpu")
    defaults = {name: p.default for name, p in inspect.signature(pipeline.__call__).parameters.items()}
    seen: list[dict] = []

    class Watched(type(pipeline)):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            seen.append({**defaults, **kwargs})
            return SimpleNamespace(images=np.zeros((1, 64, 64, 3), np.float32))

        __call__.__signature__ = inspect.signature(type(pipeline).__call__)

    pipeline.__class__ = Watched
    draw_image(pipeline, PROMPT, "", 64, 64, torch.Generator(), False)
    draw_image(pipeline, PROMPT, "noise", 64, 64, torch.Generator(), False, {"num_inference_steps": 3})
    assert (seen[0]["num_inference_steps"], seen[0]["guidance_scale"]) == (
        defaults["num_inference_steps"],
        defaults["guidance_scale"],
    )
    assert seen[0]["negative_prompt"] == defaults["negative_prompt"]
    assert (seen[1]["num_inference_steps"], seen[1]["negative_prompt"]) == (3, "noise")


def test_a_published_pixart_names_its_transformer_by_an_older_class(tmp_path: Path):
    """PixArt-alpha on the hub says Transformer2DModel in its index and config; diffusers maps it to the new class."""
    pipeline = pixart()
    pipeline.save_pretrained(tmp_path)
    for file, key in ((tmp_path / "model_index.json", "transformer"), (tmp_path / "transformer/config.json", None)):
        values = json.loads(file.read_text())
        if key is None:
            values |= {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}
        else:
            values[key] = ["diffusers", "Transformer2DModel"]
        file.write_text(json.dumps(values))
    old = load_text_to_image(tmp_path, {}, torch.float32, "cpu")
    assert type(old.transformer) is type(pipeline.transformer)
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(old.transformer.state_dict()[name], tensor), name


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "3KB"}], ids=["whole", "sharded"])
def test_a_folder_of_half_precision_files_alone(tmp_path: Path, shards: dict):
    """As `hf download --include "*fp16*"` leaves it: the fp16 files of every part and no other weights."""
    pipeline = pixart()
    pipeline.save_pretrained(tmp_path, variant="fp16", **shards)
    assert not list(tmp_path.glob("*/*model.safetensors")) and list(tmp_path.glob("*/*.fp16*.safetensors"))
    half = load_text_to_image(tmp_path, {}, torch.float32, "cpu")
    for name in ("transformer", "text_encoder", "vae"):
        for key, tensor in getattr(pipeline, name).state_dict().items():
            assert torch.equal(getattr(half, name).state_dict()[key], tensor), key


# ---- the size that is drawn ------------------------------------------------------------------------------------------


def stub(native: int, kind: str = "default") -> Any:
    """A stub that has a pipeline's native size in one of the three places where pipelines keep it."""
    config = SimpleNamespace(config=SimpleNamespace(sample_size=native // 8))
    return {
        "default": SimpleNamespace(default_sample_size=native // 8, vae_scale_factor=8),
        "transformer": SimpleNamespace(transformer=config, vae_scale_factor=8),
        "unet": SimpleNamespace(unet=config, vae_scale_factor=8),
    }[kind]


@pytest.mark.parametrize("kind", ["default", "transformer", "unet"])
def test_a_size_near_the_native_one_is_drawn_as_it_is(kind: str):
    from reducio_fast.media.aspect_buckets import BASES, buckets

    for native in BASES:
        for size in buckets(native):
            assert drawing_size(stub(native, kind), *size) == size
    assert drawing_size(stub(768), 768, 768) == (768, 768)
    assert drawing_size(SimpleNamespace(), 96, 96) == (96, 96), "a pipeline that tells no size is asked for the clip's"


def test_other_sizes_are_drawn_at_the_native_one_of_the_nearest_ratio():
    """For 256, 512 and 1024 the answer is the one PixArt's pipeline gives itself; ratios by hand for the others."""
    from diffusers.image_processor import PixArtImageProcessor
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as pixart

    tables = {native: getattr(pixart, f"ASPECT_RATIO_{native}_BIN") for native in (256, 512, 1024)}
    for height, width in ((1024, 1024), (768, 1344), (1344, 768), (512, 2048), (64, 4096)):
        for native, table in tables.items():
            size = (height, width) if native == 256 else (height // 4, width // 4)
            assert drawing_size(stub(native), *size) == PixArtImageProcessor.classify_height_width_bin(
                *size, ratios=table
            )
    assert drawing_size(stub(256), 1024, 1024) == (256, 256) and drawing_size(stub(1024), 256, 256) == (1024, 1024)
    assert drawing_size(stub(768), 1024, 1024) == (768, 768)
    for height, width in ((256, 512), (512, 256), (1024, 2048)):
        drawn = drawing_size(stub(768), height, width)
        assert all(side % 48 == 0 for side in drawn) and 0.9 < drawn[0] * drawn[1] / 768**2 < 1.1
        assert drawn[0] / drawn[1] == pytest.approx(height / width, rel=0.1)


def test_a_smaller_drawer_is_scaled_up_with_one_warning(caplog: pytest.LogCaptureFixture):
    sizes = []

    class Small:
        default_sample_size, vae_scale_factor = 32, 8

        def set_progress_bar_config(self, **kwargs: Any) -> None:
            pass

        def __call__(self, prompt: str, height: int, width: int, generator: Any, output_type: str) -> Any:
            sizes.append((height, width))
            half = np.zeros((1, height, width, 3), np.float32)
            half[:, :, width // 2 :] = 1
            return SimpleNamespace(images=half)

    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        images = [draw_image(Small(), PROMPT, "", 1024, 1024, torch.Generator(), False) for _ in range(2)]
        small = draw_image(Small(), PROMPT, "", 64, 64, torch.Generator(), False)
    assert sizes == [(256, 256)] * 3 and small.shape == (64, 64, 3)
    assert images[0].shape == (1024, 1024, 3) and images[0][:, :500].max() < 5 and images[0][:, 524:].min() > 250
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1 and "Small draws 256x256, which is scaled up to the clip's 1024x1024" in lines[0]


# ---- by name ---------------------------------------------------------------------------------------------------------


def test_names_that_lead_nowhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(ReducioError, match=r"text_to_image: '.*nowhere' is neither a folder nor a hub id"):
        find_text_to_image(tmp_path / "nowhere")
    with pytest.raises(ReducioError) as caught:
        find_text_to_image("PixArt-alpha/PixArt-XL-2-1024-MS")
    assert "\n" not in str(caught.value)
    assert "run `hf download PixArt-alpha/PixArt-XL-2-1024-MS --local-dir DIR`, then pass DIR" in str(caught.value)
    assert capfd.readouterr().err == "", "one line in all"
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NoPipeline"}))
    with pytest.raises(ReducioError, match="names the pipeline 'NoPipeline', which diffusers does not have"):
        load_text_to_image(tmp_path, {}, torch.float32, "cpu")


def test_code_is_imported_from_known_libraries_only(tmp_path: Path):
    pipeline = pixart()
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    good = json.loads(path.read_text())
    for library, message in (
        ("os", "is of library 'os'; known are diffusers, transformers"),
        ("diffusers_evil", "is of library 'diffusers_evil'"),
    ):
        path.write_text(json.dumps(good | {"vae": [library, "AutoencoderKL"]}))
        with pytest.raises(ReducioError, match=message):
            load_text_to_image(tmp_path, {}, torch.float32, "cpu")


KWARGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "fewer steps": {"num_inference_steps": 3, "guidance_scale": 2.0},
    "unguided": {"guidance_scale": 1.0},
    "its own timesteps": {"timesteps": [999, 500, 100]},
    "another size": {"height": 48, "width": 80},
    "cleaned": {"clean_caption": True},
    "for diffusers": {"eta": 0.5},
}


@pytest.mark.parametrize(
    ("words", "scheduler"), [*((w, "DPMSolverMultistepScheduler") for w in KWARGS), ("as it is", "DDIMScheduler")]
)
def test_twins_draw_what_diffusers_draws(words: str, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    from reducio_fast.fast.engine import Engine
    from reducio_fast.pipelines.execution import first_stage

    ours = pixart()
    ours.scheduler = getattr(diffusers, scheduler).from_config(ours.scheduler.config)
    executor = SimpleNamespace(engine=Engine(), offload=None, adoptions={}, _placed={})
    executor.twin = lambda network: Executor.twin(executor, network)
    executor.sample = lambda *args, **kwargs: Executor.sample(executor, *args, **kwargs)
    executor._plain = PlainEngine()
    stage = first_stage.FirstStage(lambda: ours, executor, clean_caption)
    arguments = (PROMPT + " .. 12", "blue", 64, 64)
    expected = draw_image(ours, *arguments, torch.Generator().manual_seed(5), False, KWARGS[words])
    seen: list[int] = []
    if words != "for diffusers":
        monkeypatch.setattr(first_stage, "draw_image", None)
    drawn = stage.draw(*arguments, torch.Generator().manual_seed(5), False, KWARGS[words], seen.append)
    assert np.abs(drawn.astype(int) - expected).max() <= 1 and drawn.std() > 5
    assert seen == list(range(3 if words in ("fewer steps", "its own timesteps") else 20))
    assert stage.line == "fast: its transformer and decoder run as twins"


def test_why_diffusers_draws() -> None:
    from reducio_fast.fast.engine import Engine
    from reducio_fast.pipelines.execution.first_stage import FirstStage

    ours, other = pixart(), sdxl()
    pipeline = ours
    executor = SimpleNamespace(engine=Engine(), offload=None, adoptions={}, _placed={})
    executor.twin = lambda network: Executor.twin(executor, network)
    stage = FirstStage(lambda: pipeline, executor)
    ours.vae.enable_tiling()
    assert stage.line == "diffusers: the autoencoder decodes in tiles or slices"
    ours.vae.disable_tiling()
    ours.transformer.proj_out.register_forward_hook(lambda *_: None)
    assert stage.line == "diffusers: transformer proj_out has forward hooks"
    pipeline = other
    assert stage.line.startswith("diffusers: a StableDiffusionXLPipeline draws by itself")
    executor.engine = PlainEngine()
    assert stage.line == "diffusers: the networks run on the reference"


def test_a_network_under_torch_compile_tells_its_size() -> None:
    """A compiled network has no truth value: torch 2.14's wrapper raises in `__len__`."""
    compiled = SimpleNamespace(unet=torch.compile(unet()), vae_scale_factor=8)
    assert native_size(compiled) == 64 and native_size(SimpleNamespace(vae_scale_factor=8)) is None
