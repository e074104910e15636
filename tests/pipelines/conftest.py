"""Shared by the tests of the pipeline: a folder of very small random networks of the real classes, 64x64 pixels."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import encoder_folders
from reducio_fast import ReducioPipeline
from reducio_fast.pipelines.reducio.encoders import SemanticEncoder
from reducio_fast.reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig

TOWER = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    },
    "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]},
}


def randomise(network: nn.Module) -> nn.Module:
    """Fills every tensor with random values: several layers start at zero, which would leave whole paths untested."""
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_(0, 0.08)
    return network.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    narrow = {"base_channels": 8, "channel_multipliers": (1, 1, 1, 1, 2, 2), "norm_groups": 4, "num_res_blocks": 1}
    content = {"content_base_channels": 8, "content_channel_multipliers": (1, 1, 1, 2)}
    vae = ReducioVAE(VAEConfig(**narrow, **content, num_heads=2, fusion_head_dim=8))
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 2, "caption_length": 40}
    transformer = ReducioDiT(DiTConfig(**sizes, caption_channels=32, semantic_channels=32, learn_sigma=False))
    text_encoder = T5EncoderModel(T5Config(vocab_size=384, d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=32))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    content_encoder = AutoencoderKL(
        **blocks, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4
    )
    pixart = PixArtTransformer2DModel(
        sample_size=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        in_channels=4,
        out_channels=4,
        caption_channels=32,
        cross_attention_dim=32,
    )
    tokenizer, schedule = ByT5Tokenizer(), {"beta_start": 1e-4, "beta_end": 0.02}
    for network in (vae, transformer, text_encoder, content_encoder, pixart):
        randomise(network)
    pipe = ReducioPipeline(
        vae,
        transformer,
        DPMSolverMultistepScheduler(**schedule),
        text_encoder,
        tokenizer,
        randomise(SemanticEncoder(TOWER)),
        content_encoder,
        PixArtAlphaPipeline(tokenizer, text_encoder, content_encoder, pixart, DPMSolverMultistepScheduler(**schedule)),
        fps=12,
        sample_height=64,
        sample_width=64,
    )
    path = tmp_path_factory.mktemp("model") / "small"
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pipe(folder: Path) -> ReducioPipeline:
    return ReducioPipeline.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def clip(pipe: ReducioPipeline):
    return pipe("a red circle moving right", seed=3, num_inference_steps=2, progress=False)


@pytest.fixture(scope="session")
def moving() -> np.ndarray:
    """A smooth picture that shifts two pixels a frame, uint8 [16, 64, 64, 3]."""
    rng = np.random.default_rng(0)
    picture = np.array(Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize((96, 96)))
    return np.stack([picture[8:72, 2 * t : 2 * t + 64] for t in range(16)])


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the model folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folders.write_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folders.write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folders.write_vae(tmp_path_factory.mktemp("vae"))
