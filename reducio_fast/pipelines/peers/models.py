"""The peers' sizes: what each family is built of, and the call its authors publish. Where the numbers come from:

svd   Stable Video Diffusion XT (arXiv 2311.15127). U-Net: the class defaults of diffusers. VAE and image encoder: the
      sizes of SD 2.1's VAE and of OpenCLIP ViT-H-14, which it is built on. Scheduler: diffusers' tests of the pipeline.
ltx   LTX-Video 0.9 (arXiv 2501.00103). Transformer and VAE: the class defaults, equal to diffusers' converter for
      0.9.0, as is the scheduler. Text encoder: t5-v1_1-xxl.
wan   Wan 2.1 T2V-1.3B (arXiv 2503.20314), the member of the family of Reducio's own size. Transformer: diffusers'
      converter. VAE: class defaults. Scheduler: diffusers' page on Wan, for 480p. Text encoder: umt5-xxl.

Height, width, frames, steps and guidance are the defaults of the diffusers call, the frame rates those of its
examples. The tiny sizes keep every class and are small enough for one core.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from ...checkpoints import networks, published_svd
from ...system.errors import ReducioError

# Library (or transformers' configuration class), class, arguments of its configuration.
Component = tuple[str, str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Peer:
    """One family: its published call (the defaults of ours) and how to build it from nothing."""

    name: str
    title: str
    hub_id: str
    denoiser: str  # name of the component that runs once per step
    pipelines: tuple[str, ...]  # diffusers classes whose folders are taken; the first is the one built
    call: dict[str, Any]  # height, width, num_frames, num_inference_steps, guidance_scale, fps
    tiny_call: dict[str, Any]
    names: dict[str, str]  # our argument -> theirs, for guidance_scale and, where the pipeline takes it, fps
    size_factor: Callable[[Any], int]  # what height and width must be multiples of, for a loaded pipeline
    full: dict[str, Component]
    tiny: dict[str, Component]
    extra: dict[str, Any] = field(default_factory=dict)  # further arguments of their call


def _temporal_vae(*channels: int) -> dict[str, Any]:
    kinds = ("DownEncoderBlock2D",) * len(channels)
    return {"block_out_channels": channels, "down_block_types": kinds, "layers_per_block": 2}


_WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
_SVD_SCHEDULER = {name: value for name, value in published_svd.SCHEDULER.items() if name != "_class_name"}
_CLIP_VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
_T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}
_LTX_SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
_TINY_SVD_UNET = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "cross_attention_dim": 32,
    "num_attention_heads": 4,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "layers_per_block": 1,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 96,
}
_TINY_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 32,
    "image_size": 224,
    "projection_dim": 32,
}
_TINY_T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 384}
_TINY_LTX = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "num_layers": 1,
    "caption_channels": 32,
}
_TINY_LTX_VAE = {
    "latent_channels": 8,
    "block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
}
_TINY_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
# A byte tokenizer replaces T5's, whose vocabulary would need a download: padded to the same length, the encoder does
# the same work.
_BYTES: Component = ("transformers", "ByT5Tokenizer", {})

PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            name="svd",
            title="Stable Video Diffusion XT",
            hub_id="stabilityai/stable-video-diffusion-img2vid-xt",
            denoiser="unet",
            pipelines=("StableVideoDiffusionPipeline",),
            call={"height": 576, "width": 1024, "num_inference_steps": 25, "guidance_scale": 3.0, "fps": 7},
            tiny_call={"height": 32, "width": 32, "num_frames": 4},
            names={"guidance_scale": "max_guidance_scale", "fps": "fps"},
            # The U-Net halves again at each level but the last.
            size_factor=lambda pipe: pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1),
            # Frames decoded at once: what diffusers' own example uses; all 25 need tens of gigabytes.
            extra={"decode_chunk_size": 8},
            full={
                "unet": ("diffusers", "UNetSpatioTemporalConditionModel", {"sample_size": 96}),
                "vae": ("diffusers", "AutoencoderKLTemporalDecoder", _temporal_vae(128, 256, 512, 512)),
                "image_encoder": ("CLIPVisionConfig", "CLIPVisionModelWithProjection", _CLIP_VIT_H),
                "scheduler": ("diffusers", "EulerDiscreteScheduler", _SVD_SCHEDULER),
                "feature_extractor": ("transformers", "CLIPImageProcessor", {}),
            },
            tiny={
                "unet": ("diffusers", "UNetSpatioTemporalConditionModel", _TINY_SVD_UNET),
                "vae": ("diffusers", "AutoencoderKLTemporalDecoder", _temporal_vae(32, 64)),
                "image_encoder": ("CLIPVisionConfig", "CLIPVisionModelWithProjection", _TINY_CLIP),
                "scheduler": ("diffusers", "EulerDiscreteScheduler", _SVD_SCHEDULER),
                "feature_extractor": ("transformers", "CLIPImageProcessor", {}),
            },
        ),
        Peer(
            name="ltx",
            title="LTX-Video 0.9",
            hub_id="Lightricks/LTX-Video",
            denoiser="transformer",
            pipelines=("LTXImageToVideoPipeline", "LTXPipeline"),  # one set of components serves both
            call={"height": 512, "width": 704, "num_inference_steps": 50, "guidance_scale": 3.0, "fps": 25}
            | {"num_frames": 161},
            tiny_call={"height": 64, "width": 64, "num_frames": 9},
            names={"guidance_scale": "guidance_scale", "fps": "frame_rate"},
            size_factor=lambda pipe: pipe.vae_spatial_compression_ratio * pipe.transformer_spatial_patch_size,
            full={
                "transformer": ("diffusers", "LTXVideoTransformer3DModel", {}),
                "vae": ("diffusers", "AutoencoderKLLTXVideo", {}),
                "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", _LTX_SCHEDULER),
                "text_encoder": ("T5Config", "T5EncoderModel", _T5_XXL | {"vocab_size": 32128}),
                "tokenizer": _BYTES,
            },
            tiny={
                "transformer": ("diffusers", "LTXVideoTransformer3DModel", _TINY_LTX),
                "vae": ("diffusers", "AutoencoderKLLTXVideo", _TINY_LTX_VAE),
                "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {}),
                "text_encoder": ("T5Config", "T5EncoderModel", _TINY_T5),
                "tokenizer": _BYTES,
            },
        ),
        Peer(
            name="wan",
            title="Wan 2.1 T2V-1.3B",
            hub_id="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            denoiser="transformer",
            pipelines=("WanPipeline", "WanImageToVideoPipeline"),
            call={"height": 480, "width": 832, "num_inference_steps": 50, "guidance_scale": 5.0, "fps": 16}
            | {"num_frames": 81},
            tiny_call={"height": 64, "width": 64, "num_frames": 5},
            names={"guidance_scale": "guidance_scale"},
            size_factor=lambda pipe: pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[-1],
            full={
                "transformer": ("diffusers", "WanTransformer3DModel", _WAN_1_3B),
                "vae": ("diffusers", "AutoencoderKLWan", {}),
                "scheduler": ("diffusers", "UniPCMultistepScheduler", _WAN_SCHEDULER),
                "text_encoder": ("UMT5Config", "UMT5EncoderModel", _T5_XXL | {"vocab_size": 256384}),
                "tokenizer": _BYTES,
            },
            tiny={
                "transformer": ("diffusers", "WanTransformer3DModel", _TINY_WAN),
                "vae": ("diffusers", "AutoencoderKLWan", {"base_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1}),
                "scheduler": ("diffusers", "UniPCMultistepScheduler", _WAN_SCHEDULER),
                "text_encoder": ("UMT5Config", "UMT5EncoderModel", _TINY_T5),
                "tokenizer": _BYTES,
            },
        ),
    )
}


def build_random(peer: Peer, tiny: bool, dtype: torch.dtype, device: torch.device) -> Any:
    """The pipeline with fresh weights, the same ones each time. They are drawn on the device: T5-XXL on a CPU takes
    minutes."""
    components = peer.tiny if tiny else peer.full
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        built = {name: _component(*component, device) for name, component in components.items()}
    for part in built.values():
        if isinstance(part, torch.nn.Module):
            networks.cast(part, device, dtype).requires_grad_(False).eval()
    return diffusers_class(peer.pipelines[0])(**built)


def _component(library: str, class_name: str, kwargs: dict[str, Any], device: torch.device) -> Any:
    """A component by its class; if `library` is a configuration class of transformers, a model with that."""
    if library in networks.LIBRARIES:
        cls = getattr(importlib.import_module(library), class_name)
        if not issubclass(cls, torch.nn.Module):
            return cls(**kwargs)  # on the CPU: schedulers make NumPy arrays of their tables
        with device:
            return cls(**kwargs)
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, library)(**kwargs)
    with device:
        return getattr(transformers, class_name)(config)


def diffusers_class(class_name: str) -> Any:
    model_class = getattr(importlib.import_module("diffusers"), class_name, None)
    if model_class is None:
        raise ReducioError(f"diffusers {metadata.version('diffusers')} has no {class_name}")
    return model_class
