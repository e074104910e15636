"""Configurations of Stable Video Diffusion's two networks, as diffusers' config.json has them.

Defaults are those of the published img2vid-xt weights (25 frames). Only what those files leave open has a field of its
own: the epsilons of the res blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import DictMixin

# Published defaults of diffusers' pipeline and Stability's script. The network's input is fps - 1.
HEIGHT, WIDTH, NUM_INFERENCE_STEPS, FPS, MOTION_BUCKET_ID, NOISE_AUG_STRENGTH = 576, 1024, 25, 7, 127, 0.02
MIN_GUIDANCE_SCALE, MAX_GUIDANCE_SCALE = 1.0, 3.0

ATTENTION_DOWN, PLAIN_DOWN = "CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"
ATTENTION_UP, PLAIN_UP = "CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"
NORM_GROUPS = 32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VideoUNetConfig(DictMixin):
    """The space-time U-Net. Lists have one entry per level, the finest first; a number stands for all levels."""

    sample_size: int | None = 96
    in_channels: int = 8  # the noisy latent and that of the conditioning image
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (ATTENTION_DOWN,) * 3 + (PLAIN_DOWN,)
    up_block_types: tuple[str, ...] = (PLAIN_UP,) + (ATTENTION_UP,) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    addition_time_embed_dim: int | tuple[int, ...] = 256  # channels of every time id, or one entry per time id
    projection_class_embeddings_input_dim: int = 768
    layers_per_block: int | tuple[int, ...] = 2
    cross_attention_dim: int | tuple[int, ...] = 1024
    transformer_layers_per_block: int | tuple[int, ...] = 1
    num_attention_heads: int | tuple[int, ...] = (5, 10, 20, 20)
    num_frames: int = 25
    # diffusers has 1e-6 in down blocks with attention and in all up blocks, where Stability's code has 1e-5 throughout.
    attention_down_eps: float = 1e-6
    plain_down_eps: float = 1e-5
    middle_eps: float = 1e-5
    up_eps: float = 1e-6

    def __post_init__(self) -> None:
        self.check_numbers()
        levels = len(self.block_out_channels)
        for name, known in (
            ("down_block_types", (ATTENTION_DOWN, PLAIN_DOWN)),
            ("up_block_types", (ATTENTION_UP, PLAIN_UP)),
        ):
            types = getattr(self, name)
            if len(types) != levels:
                raise ValueError(f"{name} has {len(types)} entries, block_out_channels {levels}")
            if unknown := [t for t in types if t not in known]:
                raise ValueError(f"{name}: {unknown[0]!r} is not one of {', '.join(known)}")
        for name in ("layers_per_block", "cross_attention_dim", "transformer_layers_per_block", "num_attention_heads"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"{name} has {len(value)} entries, block_out_channels {levels}")
        if sum(time_id_widths(self)) != self.projection_class_embeddings_input_dim:
            raise ValueError(
                f"projection_class_embeddings_input_dim is {self.projection_class_embeddings_input_dim}, numbers are "
                f"embedded in {self.addition_time_embed_dim} channels"
            )
        if odd := [width for width in time_id_widths(self) if width % 2]:
            raise ValueError(f"addition_time_embed_dim={odd[0]}: must be even, for half are sines and half cosines")
        for channels, heads in zip(self.block_out_channels, self.per_level("num_attention_heads"), strict=True):
            if channels % NORM_GROUPS or channels % heads:
                raise ValueError(
                    f"block_out_channels: {channels} is no multiple of {NORM_GROUPS} norm groups and {heads} heads"
                )

    def per_level(self, name: str) -> tuple[int, ...]:
        """The field `name`, one number per level."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    def to_dict(self) -> dict[str, Any]:
        """diffusers' fields, and the epsilons where they are not diffusers'."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        values = DictMixin.to_dict(self)
        return {n: v for n, v in values.items() if not n.endswith("_eps") or v != defaults[n]}


def time_id_widths(config: Any) -> tuple[int, ...]:
    """Embedding channels of each time id of a U-Net, from this configuration or from diffusers'."""
    width = config.addition_time_embed_dim
    return width if isinstance(width, tuple) else (width,) * (config.projection_class_embeddings_input_dim // width)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TemporalVAEConfig(DictMixin):
    """The image encoder of Stable Diffusion and a decoder that also convolves over frames."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    sample_size: int = 768
    scaling_factor: float = 0.18215
    force_upcast: bool = True  # encode in float32 under float16 weights

    def __post_init__(self) -> None:
        self.check_numbers()
        if set(self.down_block_types) != {"DownEncoderBlock2D"}:
            raise ValueError(f"down_block_types: {self.down_block_types} has others than DownEncoderBlock2D")
        if len(self.down_block_types) != len(self.block_out_channels):
            raise ValueError(
                f"down_block_types has {len(self.down_block_types)} entries, block_out_channels "
                f"{len(self.block_out_channels)}"
            )
        if bad := [c for c in self.block_out_channels if c % NORM_GROUPS]:
            raise ValueError(f"block_out_channels: {bad[0]} is no multiple of {NORM_GROUPS} norm groups")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell: 8."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FrameVAEConfig(DictMixin):
    """Stable Diffusion's autoencoder of images (diffusers' `AutoencoderKL`), with which SV3D decodes its frames. Fields
    below `scaling_factor` can have only one value; defaults are those of SV3D's file, without a post_quant_conv."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    sample_size: int = 768
    use_post_quant_conv: bool = True
    force_upcast: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: float | None = None
    latents_std: float | None = None
    act_fn: str = "silu"
    norm_num_groups: int = NORM_GROUPS
    use_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        self.check_numbers()
        fields = {f.name: f for f in dataclasses.fields(self)}
        fixed = ("shift_factor", "latents_mean", "latents_std", "act_fn", "norm_num_groups", "use_quant_conv")
        for name in (*fixed, "mid_block_add_attention"):
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be {fields[name].default!r}")
        levels = len(self.block_out_channels)
        for name, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if getattr(self, name) != (known,) * levels:
                raise ValueError(f"{name}: {getattr(self, name)} must be {known} for each of {levels} levels")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell: 8."""
        return 2 ** (len(self.block_out_channels) - 1)
