"""Names and layouts of published weights for layers of our networks: PixArt-alpha's transformer, LDM's image VAE.

All functions map state dicts to state dicts and copy no tensor. A name they do not know passes through, so that the
strict report names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..reference import DiTConfig
from ..system.errors import ReducioError, first_line

# Parts of a Reducio-DiT that PixArt-alpha does not have, or not at every size.
PIXART_LACKS = (
    "null_text",
    "semantic_projection.",
    "content_embedding.",
    "attn_temporal.",
    "resolution_",
    "aspect_ratio_",
)

# PixArt-alpha's own names -> diffusers', which are ours.
_PIXART = {
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
}
_PIXART_WHOLE = {"y_embedder.y_embedding": "null_text", "final_layer.scale_shift_table": "scale_shift_table"}
_PIXART_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_PIXART_FUSED = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}


def pixart_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A PixArt-alpha state dict under diffusers' names, and the names left out: tables that the network computes.

    Both spellings are accepted. A name that is in neither stays as it is, so that the report lists it.
    """
    tables = [n for n in tensors if n in ("pos_embed", "pos_embed.pos_embed")]
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if name in tables:
            continue
        if name in _PIXART_WHOLE:
            state[_PIXART_WHOLE[name]] = tensor
        elif stem in _PIXART:
            state[f"{_PIXART[stem]}.{leaf}"] = tensor
        elif block is None:
            state[name] = tensor
        else:
            prefix, (inner, _, leaf) = f"transformer_blocks.{block[1]}", block[2].rpartition(".")
            if inner in _PIXART_FUSED and tensor.ndim:
                parts = _PIXART_FUSED[inner]
                rows = -(-len(tensor) // len(parts))
                state |= {f"{prefix}.{p}.{leaf}": t for p, t in zip(parts, tensor.split(rows), strict=False)}
            else:
                state[".".join(filter(None, (prefix, _PIXART_BLOCK.get(inner, inner), leaf)))] = tensor
    return state, tables


def pixart_patches(config: DiTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn patches of p x p pixels into channels, in `pixel_unshuffle` order, on the way in and on the way out.

    So PixArt's 4 channels in patches of 2 become the 16 channels in patches of 1 of a Reducio latent, and every tensor
    fits. If the model learns no variance, PixArt's variance outputs are left out.
    """
    state = dict(state)
    patch = state.get("pos_embed.proj.weight")
    if patch is None or patch.ndim != 4 or not patch.numel() or config.patch_size != (1, 1, 1):
        return state
    p = patch.shape[-1]
    state["pos_embed.proj.weight"] = patch.flatten(1)[:, :, None, None]
    for name in {"proj_out.weight", "proj_out.bias"} & set(state):
        if not state[name].ndim or len(state[name]) % p**2:
            continue
        # PixArt's rows are (row, column, channel) of a patch; ours are channels, each spread over its patch.
        rows = state[name].unflatten(0, (p, p, -1)).movedim(2, 0).flatten(0, 2)
        state[name] = rows if config.learn_sigma else rows[: config.latent_channels]
    return state


def ldm_vae_names(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of an image VAE from the LDM code's names to diffusers'. An unknown name stays as it is."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    names, values = list(tensors), list(tensors.values())
    # diffusers' converter drops names that it does not know. It gets numbers instead of the tensors; they show how it
    # renames each tensor.
    tags = {n: torch.full((1, 1, 1, 1), float(i)) for i, n in enumerate(names)}
    try:
        renamed = {n: int(tag) for n, tag in convert_ldm_vae_checkpoint(tags, network.config).items()}
    except (KeyError, TypeError, ValueError, IndexError) as error:  # it takes the name of one tensor for another's
        raise ReducioError(f"source: its tensors are not those of an LDM autoencoder: {first_line(error)}") from error
    unknown = {names[i]: values[i] for i in set(range(len(names))) - set(renamed.values())}
    return {n: values[i] for n, i in renamed.items()} | unknown


def attention_name(name: str) -> str:
    """The current name of a tensor of the VAE's attention. Before 0.18 diffusers used other names, which SD 2.1's files
    still have."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = re.sub(rf"(\.attentions\.\d+\.){old}\.", rf"\g<1>{new}.", name)
    return name


# Add and linear fusion once had other names than in the release; folders with these are read, never written.
EARLIER_NAMES = (("content_conv", "conv_context"), ("frame_embed", "temp_embed"), ("mix", "conv"))


def current_name(name: str) -> str:
    """The name of a tensor of a `ReducioVAE` as it is now."""
    for earlier, current in EARLIER_NAMES:
        name = re.sub(rf"(\.fuse\.\d+\.){earlier}(?=\.|$)", rf"\1{current}", name)
    return name
