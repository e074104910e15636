"""Configurations of the two networks: frozen, validated once, and convertible to plain dictionaries and back.

Full-size defaults follow the Reducio-VAE release (microsoft/Reducio-VAE) and PixArt-alpha; where neither says, the
field's comment names the assumption.
"""

from __future__ import annotations

import dataclasses
import math

from ..config import DictMixin

# The published sampling: DPM-Solver++ in 20 steps; PixArt-alpha's guidance; clips of 16 frames.
NUM_INFERENCE_STEPS, GUIDANCE_SCALE, NUM_FRAMES = 20, 4.5, 16

FUSION_KINDS = ("attn", "add", "linear", "add+attn")
FUSION_POSITIONS = ("none", "sincos")
OUTPUTS = ("rgb", "warp")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VAEConfig(DictMixin):
    """Reducio-VAE: 3D encoder, content (2D) encoder and fusion decoder. Defaults are the published ft4 model.

    The spatial factor is 2 ** (levels - 1): 32 for the six levels of the release.
    """

    temporal_factor: int = 4  # 4 = the ft4 release, 2 = ft2
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4, 4, 4)
    content_base_channels: int = 128
    content_channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    latent_channels: int = 16
    num_frames: int = 16
    # One kind for every fusion point, or one entry per decoder level. The middle always uses attention: its grid (H/32)
    # differs from the content grid (H/8), so nothing could be added to it cell by cell.
    fusion: str | tuple[str, ...] = "attn"
    fusion_levels: tuple[int | None, ...] = (None, None, 2, 3, None, None)  # content feature fused at decoder level i
    window_size: int = 128  # cells of the context grid (fusion) or of the H/32 grid (middle self-attention)
    causal: bool = False
    norm_groups: int = 32
    tile_size: int = 256  # pixels
    tile_overlap: float = 0.25  # share of a tile that is read beyond it
    # Fields the release keeps constant.
    # At each level of the encoders; the decoder has this many on either side of a fusion. One number, or one per level.
    num_res_blocks: int | tuple[int, ...] = 2
    num_heads: int = 8  # middle self-attention
    fusion_head_dim: int = 64  # a fusion point has channels / fusion_head_dim heads
    content_window_size: int = 256  # middle self-attention of the content encoder, cells of the H/8 grid
    # The release pads windows and lets queries attend to the padding, which dilutes the softmax. It was trained on 256
    # pixels, where there is no window, and runs so above 512 pixels untiled; the default does the same. True masks the
    # padded keys.
    mask_window_padding: bool = False
    # The next two fields are this project's, not the paper's; the released weights have the defaults.
    # "sincos" gives queries and keys of the fusion attention their place in the frame. Published: none; a network of
    # 437M parameters learns it from its zero padding; one of 2M does not (about 1 dB at equal steps).
    fusion_position: str = "none"
    # "warp": the decoder moves the content frame by a flow and adds a residual; "rgb": it predicts every pixel itself.
    output: str = "rgb"

    def __post_init__(self) -> None:
        self.check_numbers("num_res_blocks", "fusion_levels")
        for name, known in (("fusion_position", FUSION_POSITIONS), ("output", OUTPUTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(known)}")
        levels, factor = len(self.channel_multipliers), self.temporal_factor
        if factor & (factor - 1) or factor > 2 ** (levels - 1):
            raise ValueError(
                f"temporal_factor={factor}: must be a power of two up to {2 ** (levels - 1)} for {levels} levels"
            )
        if self.num_frames % factor:
            raise ValueError(f"num_frames={self.num_frames} is not a multiple of temporal_factor={factor}")
        if len(self.fusion_levels) != levels:
            raise ValueError(f"fusion_levels has {len(self.fusion_levels)} entries, channel_multipliers has {levels}")
        if not isinstance(self.fusion, str) and len(self.fusion) != levels:
            raise ValueError(f"fusion has {len(self.fusion)} entries, channel_multipliers has {levels}")
        for level, (fusion, source) in enumerate(zip(self.fusion_kinds, self.fusion_levels, strict=True)):
            if fusion not in FUSION_KINDS:
                raise ValueError(f"fusion={fusion!r}: must be one of {', '.join(FUSION_KINDS)}")
            if source is None:
                continue
            if not 0 <= source <= self.content_levels:
                raise ValueError(f"fusion_levels[{level}]={source}: the content encoder has 0..{self.content_levels}")
            if fusion != "attn" and min(source, self.content_levels - 1) != level:
                raise ValueError(
                    f"fusion_levels[{level}]={source} with fusion={fusion!r}: adding needs the content feature of the "
                    f"same resolution, level {level}"
                )
        if not isinstance(self.num_res_blocks, int) and len(self.num_res_blocks) != levels:
            raise ValueError(f"num_res_blocks has {len(self.num_res_blocks)} entries, channel_multipliers has {levels}")
        for multipliers in (self.channel_multipliers, self.content_channel_multipliers):
            for level in range(len(multipliers)):
                near = {1 if level == 0 else multipliers[level - 1], multipliers[min(level + 1, len(multipliers) - 1)]}
                if self.res_blocks_at(level) == 0 and near != {multipliers[level]}:
                    raise ValueError(
                        f"num_res_blocks={self.num_res_blocks}: level {level} needs one to change the width"
                    )
        if self.content_levels > levels:
            raise ValueError(f"content_channel_multipliers has {self.content_levels} levels, the decoder has {levels}")
        for name, width in (
            *(("channel_multipliers", self.base_channels * m) for m in self.channel_multipliers),
            *(
                ("content_channel_multipliers", self.content_base_channels * m)
                for m in self.content_channel_multipliers
            ),
        ):
            if width % self.norm_groups:
                raise ValueError(f"{name}: width {width} is not a multiple of norm_groups={self.norm_groups}")
        for name, base in (
            ("channel_multipliers", "base_channels"),
            ("content_channel_multipliers", "content_base_channels"),
        ):
            width = getattr(self, base) * getattr(self, name)[-1]
            if width % self.num_heads:
                raise ValueError(f"{name}: last width {width} is not a multiple of num_heads={self.num_heads}")
        for level in [levels - 1, *(i for i in range(levels) if self.fusion_levels[i] is not None)]:
            width = self.base_channels * self.channel_multipliers[level]
            if width % self.fusion_head_dim and (
                self.fusion_kinds[level] not in ("add", "linear") or level == levels - 1
            ):
                raise ValueError(
                    f"level {level} has {width} channels, not a multiple of fusion_head_dim={self.fusion_head_dim}"
                )
        if not 0.0 <= self.tile_overlap < 1.0:
            raise ValueError(f"tile_overlap={self.tile_overlap}: must lie in [0, 1)")
        if self.tile_size % self.spatial_factor:
            raise ValueError(
                f"tile_size={self.tile_size} is not a multiple of the spatial factor {self.spatial_factor}"
            )

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell along each axis (32 in the release)."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def content_levels(self) -> int:
        """Levels of the content encoder; its feature list has one entry more (the middle)."""
        return len(self.content_channel_multipliers)

    @property
    def fusion_kinds(self) -> tuple[str, ...]:
        """The fusion kind of each decoder level, whether or not that level fuses."""
        return (self.fusion,) * len(self.channel_multipliers) if isinstance(self.fusion, str) else self.fusion

    def res_blocks_at(self, level: int) -> int:
        """Res-blocks of the encoders at `level`, and of the decoder before and again after its fusion."""
        return self.num_res_blocks if isinstance(self.num_res_blocks, int) else self.num_res_blocks[level]

    @property
    def warps(self) -> bool:
        """Whether `decode` moves the content frame, which is then the last entry of the content features."""
        return self.output == "warp"

    @property
    def content_frame(self) -> int:
        """Index of the frame that serves as content image: the centre, 7 of 16."""
        return (self.num_frames - 1) // 2

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """[C, T/f, H/32, W/32] of the motion latent of a clip of this many pixels."""
        factor = self.spatial_factor
        return self.latent_channels, self.num_frames // self.temporal_factor, height // factor, width // factor

    def needs_tiling(self, height: int, width: int) -> bool:
        """Whether a frame is larger than one tile reads (320 pixels): there the release, and the paper, work in tiles.

        Either side counts. The release looks at the height alone, so that 288x896 would go untiled.
        """
        return max(height, width) > self.tile_size * (1 + self.tile_overlap)

    def halves_time(self, level: int) -> bool:
        """Whether the step between `level` and `level + 1` scales time as well as space."""
        time_steps = self.temporal_factor.bit_length() - 1
        return level >= len(self.channel_multipliers) - 1 - time_steps

    def frames_at(self, level: int) -> int:
        """Time steps of the features at `level`."""
        return self.num_frames >> sum(self.halves_time(i) for i in range(level))


VAE_PRESETS: dict[str, VAEConfig] = {
    "reducio-ft4": VAEConfig(),
    "reducio-ft2": VAEConfig(temporal_factor=2),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DiTConfig(DictMixin):
    """Reducio-DiT: a PixArt-alpha transformer (DiT-XL, AdaLN-single) over video latents. Defaults: the 256-pixel stage.

    The paper (Reducio, arXiv 2411.13552) names the backbone, the full 3D attention and the joint condition, and leaves
    the sizes below `content_groups` open; each of those says what is assumed.
    """

    latent_channels: int = 16
    # Time, height, width. Patch 1 gives 256 tokens at 256 pixels, as many as PixArt-256 has, and its in/out layers fit.
    patch_size: tuple[int, int, int] = (1, 1, 1)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096  # T5-XXL
    caption_length: int = 120
    semantic_channels: int = 1280  # OpenCLIP ViT-H patch tokens
    content_channels: int = 4  # SD-VAE latents
    attention: str = "3d"  # "2d+1d": attention within each frame, then an added layer along time
    learn_sigma: bool = True  # the output has a second half of channels, the variance
    # A square number. With 4 (at 1024) content tokens form dilated groups and block b sees group b mod 4 (DeepStack).
    content_groups: int = 1

    # Latent patches [C, 2, 2]: the SD latent's H/8 grid becomes H/16, the patch PixArt itself takes of the same latent.
    content_patch_size: int = 2
    # "mlp" is the form of PixArt's caption projector; "linear" a single layer.
    semantic_projection: str = "mlp"
    # Coordinate of token i on an axis of n tokens: i * position_base_size / n / position_scale (PixArt-alpha). Content
    # tokens take the same formula, so equal coordinates are equal places in the frame. The base is the native token
    # grid, as PixArt's code sets it for a latent of this size; 16, 32, 64 would keep PixArt's coordinate per pixel.
    position_base_size: int = 8
    position_scale: float = 1.0
    temporal_position: bool = True  # fixed 1D sin/cos over the latent frames, added to the 2D one; none on one frame
    size_conditioning: bool = False  # height, width, aspect ratio join the time embedding, as in PixArt's 1024 model
    spatial_factor: int = 32  # pixels per latent cell: gives size_conditioning its pixels
    # Frame rate and amount of motion join the time embedding, each by an MLP of its own (this project's; the paper has
    # neither). An unknown value adds nothing.
    clip_conditioning: bool = False

    def __post_init__(self) -> None:
        self.check_numbers()
        if len(self.patch_size) != 3:
            raise ValueError(f"patch_size={self.patch_size}: has {len(self.patch_size)} entries, must have 3 (T, H, W)")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size={self.hidden_size}: 2D sin/cos positions need a multiple of 4")
        if self.size_conditioning and self.hidden_size % 3:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of 3, which size_conditioning="
                f"{self.size_conditioning} needs: height, width and aspect ratio take a third of the channels each"
            )
        for name, kinds in (("attention", ("3d", "2d+1d")), ("semantic_projection", ("mlp", "linear"))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(kinds)}")
        for name in ("mlp_ratio", "position_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be greater than 0")
        if self.content_stride**2 != self.content_groups:
            raise ValueError(f"content_groups={self.content_groups}: must be a square number (1, 4, 9, ...)")

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: the latent's, twice with a learned variance."""
        return self.latent_channels * (2 if self.learn_sigma else 1)

    @property
    def content_stride(self) -> int:
        """Step of the dilated split of the content grid along each axis: 2 for four groups."""
        return math.isqrt(self.content_groups)


DIT_PRESETS: dict[str, DiTConfig] = {
    "reducio-256": DiTConfig(),
    "reducio-512": DiTConfig(position_base_size=16),
    # PixArt's 1024 model halves the coordinates' step and adds the size embeddings; here likewise.
    "reducio-1024": DiTConfig(position_base_size=32, position_scale=2.0, size_conditioning=True, content_groups=4),
}
