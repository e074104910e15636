"""Encoders by the names people know, small and random, in folders as their own libraries write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

PROMPT = "a red circle moving right on a black background"
LENGTH = 120
FAST = {"num_inference_steps": 2, "progress": False}
CLIP_SIZES = {
    "embed_dim": 16,
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}


def randomise(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.normal_(0, 0.1)
    return network.requires_grad_(False).eval()


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    words = [(f"▁{word}", -3.0) for word in dict.fromkeys(PROMPT.split())]
    letters = [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz'\",."]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=0)


def write_t5(folder: Path) -> Path:
    """A whole T5 v1.1 (gated GELU, decoder, untied head) with its tokenizer, as google/flan-t5-xxl lies on the hub."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 48}
    words = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    randomise(T5ForConditionalGeneration(T5Config(**sizes, **words))).save_pretrained(folder)
    t5_tokenizer().save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(64, 32)}, file, metadata={"format": "pt"})
    return folder


def write_clip(folder: Path) -> Path:
    """ViT-H-14 scaled down (patch 14 at 224 pixels kept) as a whole CLIP, written by open_clip itself."""
    from open_clip.model import CLIP, set_model_preprocess_cfg
    from open_clip.push_to_hf_hub import save_config_for_hf

    torch.manual_seed(0)
    config = CLIP_SIZES | {
        "vision_cfg": {"image_size": 224, "layers": 2, "width": 40, "head_width": 20, "patch_size": 14}
    }
    clip = randomise(CLIP(**config))
    statistics = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
    set_model_preprocess_cfg(clip, {"size": 224} | statistics)
    save_config_for_hf(clip, folder / "open_clip_config.json", config)
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def write_vae(folder: Path) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    randomise(AutoencoderKL(**blocks, **sizes)).save_pretrained(folder)
    return folder
