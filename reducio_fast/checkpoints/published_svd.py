"""Stability AI's names for Stable Video Diffusion and SV3D, and the names of diffusers, which are ours.

One file of Stability AI holds all networks:

    model.diffusion_model.*                                 the U-Net
    first_stage_model.decoder.*                             the decoder: over time in SVD, of frames in SV3D
    conditioner.embedders.N.encoder.{encoder,quant_conv}.*  the autoencoder that encodes the picture
    conditioner.embedders.0.open_clip.model.visual.*        the image encoder, in open_clip's layout

The facts are from the modules of Stability-AI/generative-models (commit 0ad7de9). The tests compare names, shapes and
results on small weights with those modules. All functions map state dicts to state dicts. A name that they do not know
passes through, so that the strict report names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..reference.svd.config import ATTENTION_DOWN, ATTENTION_UP, PLAIN_DOWN, PLAIN_UP

# As in the published repositories.
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "interpolation_type": "linear",
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "use_karras_sigmas": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
}
FEATURE_EXTRACTOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}

TELLTALE = re.compile(r"model\.diffusion_model\..*\.time_mixer\.mix_factor$")
HEAD_WIDTH, IMAGE_HEAD_WIDTH = 64, 80  # channels per head in the U-Net and the image encoder, which no shape shows

_UNET, _DECODER = "model.diffusion_model.", "first_stage_model."
_ENCODER = re.compile(r"conditioner\.embedders\.\d+\.encoder\.(?=encoder\.|quant_conv\.)")
_VISUAL = re.compile(r"conditioner\.embedders\.\d+\.open_clip\.model\.visual\.")
# Not used by a call: a second encoder, a second decoder, the text half of CLIP, averages and losses of training.
_LEFT_OUT = re.compile(
    r"first_stage_model\.(encoder|loss)\.|conditioner\.embedders\.\d+\.encoder\.(decoder|post_quant_conv|loss)\."
    r"|conditioner\.embedders\.\d+\.open_clip\.(mean|std|model\.(?!visual\.))|model_ema\."
)

_RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_VAE_RES = {"nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_CLIP_ENDS = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' own spelling
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors of a file by component (unet, vae, image_encoder; "": unknown ones), under Stability's names without
    their prefixes, and the names that no component needs."""
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "vae": {}, "image_encoder": {}, "": {}}
    left_out = []
    for name, tensor in tensors.items():
        encoder, visual = _ENCODER.match(name), _VISUAL.match(name)
        if name.startswith(_UNET):
            parts["unet"][name.removeprefix(_UNET)] = tensor
        elif name.startswith(_DECODER + "decoder."):
            parts["vae"][name.removeprefix(_DECODER)] = tensor
        elif encoder is not None:
            parts["vae"][name[encoder.end() :]] = tensor
        elif visual is not None:
            parts["image_encoder"][name[visual.end() :]] = tensor
        elif _LEFT_OUT.match(name):
            left_out.append(name)
        else:
            parts[""][name] = tensor
    return parts, left_out


# ---- the U-Net ---------------------------------------------------------------------------------------------------


def _levels(names: Iterable[str]) -> list[list[int]]:
    """The input blocks of each level, the finest first, without the convolutions between levels."""
    names = set(names)
    count = 1 + max((int(n.split(".")[1]) for n in names if n.startswith("input_blocks.")), default=0)
    levels: list[list[int]] = [[]]
    for block in range(1, count):
        if f"input_blocks.{block}.0.op.weight" in names:
            levels.append([])
        else:
            levels[-1].append(block)
    return levels


def unet_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a `VideoUNetConfig` from names and shapes; the number of heads follows from the width of a head."""
    levels = _levels(tensors)

    def depth(block: int) -> int:
        pattern = re.compile(rf"input_blocks\.{block}\.1\.transformer_blocks\.(\d+)\.")
        return len({match[1] for name in tensors if (match := pattern.match(name))})

    firsts = [level[0] for level in levels if level]
    channels = [len(tensors[f"input_blocks.{first}.0.out_layers.0.weight"]) for first in firsts]
    attends = [depth(first) > 0 for first in firsts]
    contexts = [t.shape[1] for n, t in tensors.items() if n.endswith(".transformer_blocks.0.attn2.to_k.weight")]
    added = tensors["label_emb.0.0.weight"].shape[1]
    depths = [max(depth(first), 1) for first in firsts]
    return {
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "out_channels": len(tensors["out.2.weight"]),
        "block_out_channels": channels,
        "down_block_types": [ATTENTION_DOWN if a else PLAIN_DOWN for a in attends],
        "up_block_types": [ATTENTION_UP if a else PLAIN_UP for a in reversed(attends)],
        "layers_per_block": len(levels[0]),
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "cross_attention_dim": contexts[0],
        "num_attention_heads": [max(width // HEAD_WIDTH, 1) for width in channels],
        "projection_class_embeddings_input_dim": added,
        # Numbers are embedded in 256 channels each; SV3D_p's angles of the camera in 512.
        "addition_time_embed_dim": [256, 512, 512] if added == 1280 else 256,
    }


def unet_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's tensors under diffusers' names."""
    levels = _levels(tensors)
    places = {block: (level, i) for level, blocks in enumerate(levels) for i, block in enumerate(blocks)}
    halvings = {blocks[-1] + 1: level for level, blocks in enumerate(levels) if blocks}

    def place(side: str, block: int) -> tuple[int, int] | None:
        """The level of a res block, in the order in which levels run, and its index there."""
        if side == "input":
            return places.get(block)
        level, index = divmod(block, len(levels[0]) + 1)
        return (level, index) if level < len(levels) else None

    def renamed(name: str) -> str:
        stem, _, leaf = name.rpartition(".")
        if stem in _UNET_ENDS:
            return f"{_UNET_ENDS[stem]}.{leaf}"
        if (match := re.fullmatch(r"middle_block\.([012])\.(.+)", name)) is not None:
            part, rest = int(match[1]), match[2]
            return (
                f"mid_block.attentions.0.{_transformer(rest)}"
                if part == 1
                else _res(f"mid_block.resnets.{part // 2}", rest)
            )
        match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", name)
        if match is None:
            return name
        side, block, part, rest = match[1], int(match[2]), int(match[3]), match[4]
        if rest.startswith("op.") and block in halvings:
            return f"down_blocks.{halvings[block]}.downsamplers.0.conv.{leaf}"
        if (at := place(side, block)) is None:
            return name
        where = f"{'down' if side == 'input' else 'up'}_blocks.{at[0]}"
        if rest.startswith("conv."):
            return f"{where}.upsamplers.0.{rest}"
        return (
            _res(f"{where}.resnets.{at[1]}", rest) if part == 0 else f"{where}.attentions.{at[1]}.{_transformer(rest)}"
        )

    return {renamed(name): tensor for name, tensor in tensors.items()}


def _res(where: str, rest: str) -> str:
    if rest == "time_mixer.mix_factor":
        return f"{where}.{rest}"
    over_time = rest.startswith("time_stack.")
    stem, _, leaf = rest.removeprefix("time_stack.").rpartition(".")
    part = "temporal_res_block" if over_time else "spatial_res_block"
    return f"{where}.{part}.{_RES.get(stem, stem)}.{leaf}"


def _transformer(rest: str) -> str:
    rest = re.sub(r"^time_stack\.", "temporal_transformer_blocks.", rest)
    return re.sub(r"^time_pos_embed\.([02])\.", lambda m: f"time_pos_embed.linear_{1 + int(m[1]) // 2}.", rest)


# ---- the autoencoder ---------------------------------------------------------------------------------------------


def is_temporal(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a decoder convolves over time, as SVD's does and SV3D's does not."""
    return "decoder.conv_out.time_mix_conv.weight" in tensors


def vae_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of the autoencoder's configuration, from names and shapes."""
    levels = {int(m[1]) for n in tensors if (m := re.match(r"encoder\.down\.(\d+)\.", n))}
    layers = {int(m[1]) for n in tensors if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", n))}
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": len(tensors["decoder.conv_out.weight"]),
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "block_out_channels": [len(tensors[f"encoder.down.{i}.block.0.norm2.weight"]) for i in sorted(levels)],
        "layers_per_block": len(layers),
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
    }


def vae_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of encoder, quant_conv and decoder under diffusers' names."""
    levels = 1 + max((int(m[1]) for n in tensors if (m := re.match(r"decoder\.up\.(\d+)\.", n))), default=0)
    temporal = is_temporal(tensors)
    state = {}
    for name, tensor in tensors.items():
        renamed = _vae_name(name, levels, temporal)
        # The source stores the linear layers of the attention as 1x1 convolutions.
        flat = ".attentions." in renamed and tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
        state[renamed] = tensor.flatten(1) if flat else tensor
    return state


def _vae_name(name: str, levels: int, temporal: bool) -> str:
    side, _, rest = name.partition(".")
    if side not in ("encoder", "decoder"):
        return name
    if rest.startswith("conv_out.time_mix_conv."):
        return f"decoder.time_conv_out.{rest.rpartition('.')[2]}"
    if rest.startswith("norm_out."):
        return f"{side}.conv_{rest}"
    if (match := re.fullmatch(r"mid\.attn_1\.(.+)\.(weight|bias)", rest)) is not None:
        return f"{side}.mid_block.attentions.0.{_VAE_ATTENTION.get(match[1], match[1])}.{match[2]}"
    over_time = temporal and side == "decoder"
    if (match := re.fullmatch(r"mid\.block_(\d+)\.(.+)", rest)) is not None:
        return _vae_res(f"{side}.mid_block.resnets.{int(match[1]) - 1}", match[2], over_time)
    match = re.fullmatch(r"(down|up)\.(\d+)\.(.+)", rest)
    if match is None:
        return name
    level = int(match[2]) if match[1] == "down" else levels - 1 - int(match[2])
    where, inner = f"{side}.{match[1]}_blocks.{level}", match[3]
    if (block := re.fullmatch(r"block\.(\d+)\.(.+)", inner)) is not None:
        return _vae_res(f"{where}.resnets.{block[1]}", block[2], over_time)
    return f"{where}.{re.sub(r'^(down|up)sample.', lambda m: f'{m[1]}samplers.0.', inner)}"


def _vae_res(where: str, rest: str, over_time: bool) -> str:
    if rest == "mix_factor":
        return f"{where}.time_mixer.mix_factor"
    if rest.startswith("time_stack."):
        return _res(where, rest)
    stem, _, leaf = rest.rpartition(".")
    inner = f"{_VAE_RES.get(stem, stem)}.{leaf}"
    return f"{where}.spatial_res_block.{inner}" if over_time else f"{where}.{inner}"


# ---- the image encoder -------------------------------------------------------------------------------------------


def image_encoder_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """transformers' configuration of the open_clip tower; the number of heads follows from the width of a head."""
    patches, width = tensors["positional_embedding"].shape
    patch = tensors["conv1.weight"].shape[-1]
    layers = {m[1] for n in tensors if (m := re.match(r"transformer\.resblocks\.(\d+)\.", n))}
    return {
        "hidden_size": width,
        "intermediate_size": len(tensors["transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(width // IMAGE_HEAD_WIDTH, 1),
        "projection_dim": tensors["proj"].shape[1],
        "patch_size": patch,
        "image_size": patch * round((patches - 1) ** 0.5),
        "hidden_act": "gelu",
    }


def image_encoder_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's visual tower under the names of transformers' `CLIPVisionModelWithProjection`."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        if name == "proj":  # used as x @ proj
            state["visual_projection.weight"] = tensor.t()
        elif block is None:
            state[_CLIP_ENDS.get(name, name)] = tensor
        else:
            prefix, inner = f"vision_model.encoder.layers.{block[1]}", block[2]
            if inner.startswith("attn.in_proj_"):
                leaf = inner.removeprefix("attn.in_proj_")
                thirds = torch.tensor_split(tensor, 3)
                state |= {f"{prefix}.self_attn.{n}_proj.{leaf}": t for n, t in zip("qkv", thirds, strict=True)}
            else:
                stem, _, leaf = inner.rpartition(".")
                state[f"{prefix}.{_CLIP_BLOCK.get(stem, stem)}.{leaf}"] = tensor
    return state
