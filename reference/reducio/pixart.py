"""PixArt-alpha's image transformer, which draws content frames: the network of `dit.py` on one frame and text alone.

Source: PixArt-alpha (arXiv 2310.00426). State-dict names and configuration are those of diffusers'
`PixArtTransformer2DModel`, so a published folder loads as it is. Legend as in `dit.py`; h w in lower case are cells of
the image latent.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..config import DictMixin
from ..sampler import Denoiser, guided
from .config import DiTConfig
from .dit import NORM_EPS, AdaLNSingle, CaptionProjection, DiTBlock, JointCondition, LatentTransformer, PatchEmbedding
from .initialization import normal

PIXELS = 8  # per cell of the image latent, in each direction
# Sample sizes, in cells, from which diffusers derives what a published configuration leaves open.
UNIT_SCALE_SIZE, SIZE_CONDITIONED = 64, 128
# Fields that diffusers has for other transformers, with the one value that PixArt gives each.
FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "norm_elementwise_affine": False,
    "norm_eps": NORM_EPS,
    "norm_type": "ada_norm_single",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PixArtConfig(DictMixin):
    """diffusers' fields and defaults: PixArt-XL at 1024 pixels.

    Raises ValueError for a transformer that diffusers' class could also build but that is not PixArt: other norms or
    activations, attention without biases, captions that are not projected.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = 8
    num_layers: int = 28
    dropout: float = 0.0
    norm_num_groups: int = 32
    cross_attention_dim: int | None = 1152
    attention_bias: bool = True
    sample_size: int = 128
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int | None = 1000
    upcast_attention: bool = False
    norm_type: str = "ada_norm_single"
    norm_elementwise_affine: bool = False
    norm_eps: float = NORM_EPS
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int | None = 4096
    attention_type: str = "default"
    # From files that diffusers wrote for its general transformer, as which PixArt was first published.
    double_self_attention: bool = False
    only_cross_attention: bool = False
    num_vector_embeds: int | None = None
    use_linear_projection: bool = False

    def __post_init__(self) -> None:
        for name, value in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)!r}: PixArt has {value!r}")
        for name in ("double_self_attention", "only_cross_attention", "num_vector_embeds", "use_linear_projection"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: PixArt has none")
        self.check_numbers("num_vector_embeds")
        width = self.num_attention_heads * self.attention_head_dim
        if self.caption_channels is None:
            raise ValueError("caption_channels=None: PixArt projects its captions")
        if self.cross_attention_dim != width:
            raise ValueError(f"cross_attention_dim={self.cross_attention_dim}: the projected captions have {width}")
        if self.latent_output_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(f"out_channels={self.out_channels}: must be in_channels={self.in_channels}, or twice that")
        self.transformer  # noqa: B018  # validates the sizes

    @property
    def latent_output_channels(self) -> int:
        return self.in_channels if self.out_channels is None else self.out_channels

    @property
    def transformer(self) -> DiTConfig:
        """The same transformer in this package's terms."""
        scale, additional = self.interpolation_scale, self.use_additional_conditions
        return DiTConfig(
            latent_channels=self.in_channels,
            patch_size=(1, self.patch_size, self.patch_size),
            hidden_size=self.num_attention_heads * self.attention_head_dim,
            depth=self.num_layers,
            num_heads=self.num_attention_heads,
            caption_channels=self.caption_channels,
            learn_sigma=self.latent_output_channels != self.in_channels,
            position_base_size=max(self.sample_size // self.patch_size, 1),
            position_scale=float(max(self.sample_size // UNIT_SCALE_SIZE, 1) if scale is None else scale),
            size_conditioning=self.sample_size == SIZE_CONDITIONED if additional is None else additional,
            spatial_factor=PIXELS,
        )


class PixArt(LatentTransformer):
    """Predicts the noise in an image latent [B, 4, h, w]."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.config, self.sizes = config, config.transformer
        sizes, D = self.sizes, self.sizes.hidden_size
        self.pos_embed = PatchEmbedding(sizes)
        self.adaln_single = AdaLNSingle(sizes)
        self.caption_projection = CaptionProjection(sizes)
        self.transformer_blocks = nn.ModuleList(DiTBlock(sizes) for _ in range(sizes.depth))
        self.norm_out = nn.LayerNorm(D, elementwise_affine=False, eps=NORM_EPS)
        self.scale_shift_table = nn.Parameter(normal(2, D, scale=D**-0.5))
        self.proj_out = nn.Linear(D, config.patch_size**2 * config.latent_output_channels)

    def forward(
        self, latent: Tensor, timestep: Tensor, text: Tensor, mask: Tensor | None = None, size: Tensor | None = None
    ) -> Tensor:
        """latent [B, C, h, w]; timestep [B] or one for all; text [B, L, caption_channels]; mask [B, L], nonzero =
        attend; size [B, 2] height and width in pixels, read by models with size conditioning, by default the latent's.
        Returns [B, out_channels, h, w] in the weights' dtype: the prediction and, where it is learned, the variance.

        Raises ValueError for a latent whose sides are no multiples of the patch.
        """
        self.check_inputs(latent)
        B, (h, w), patch = len(latent), latent.shape[-2:], self.config.patch_size
        size = self.size_of(latent) if size is None else size
        x_BLD = self.pos_embed(latent[:, :, None].to(self.dtype))
        modulation_B6D, embedding_BD = self.adaln_single(timestep.expand(B), size.expand(B, 2))
        grid = (1, h // patch, w // patch)
        x_BLD = self.forward_tokens(x_BLD, modulation_B6D, self.embed_condition(text, mask), grid)
        return self.unpatchify(self.final_layer(x_BLD, embedding_BD), grid)[:, :, 0]

    def denoiser(
        self,
        text: Tensor,
        mask: Tensor,
        negative: tuple[Tensor, Tensor] | None = None,
        guidance_scale: float = 1.0,
        size: Tensor | None = None,
    ) -> Denoiser:
        """For `sample` on latents [1, C, 1, h, w]: text [1, L, C] and mask [1, L] of the prompt; negative: those of the
        negative prompt, needed if `guidance_scale` exceeds 1; size [1, 2] in pixels."""

        def predict(latent: Tensor, timestep: Tensor) -> Tensor:
            prediction = self(latent[:, :, 0], timestep, text, mask, size)
            return prediction[:, : self.config.in_channels, None].to(latent.dtype)  # without the variance

        if guidance_scale <= 1:
            return predict
        if negative is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs the negative prompt's text")
        text, mask = torch.cat([negative[0], text]), torch.cat([negative[1], mask])
        return guided(predict, guidance_scale)

    def embed_condition(self, text: Tensor, mask: Tensor | None = None) -> JointCondition:
        """The condition tokens, which depend on no timestep."""
        return JointCondition([self.caption_projection(text.to(self.dtype))], None if mask is None else mask.bool())

    @staticmethod
    def size_of(latent: Tensor) -> Tensor:
        """Height and width in pixels, float32 [1, 2]."""
        return torch.tensor([[float(n * PIXELS) for n in latent.shape[-2:]]], device=latent.device)

    def check_inputs(self, latent: Tensor) -> None:
        channels, patch = self.config.in_channels, self.config.patch_size
        if latent.ndim != 4 or latent.shape[1] != channels or any(n % patch for n in latent.shape[2:]):
            raise ValueError(
                f"latent has shape {tuple(latent.shape)}, must be [B, {channels}, h, w] with sides of multiples of "
                f"{patch}"
            )
