"""The frozen encoders that turn the prompt and the content frame into the DiT's joint condition.

Each is a small callable with one job and can be replaced by another of the same signature. What is extracted follows
the latent extraction of the Reducio-VAE release: text tokens with their mask, image tokens of an OpenCLIP tower, and
the latent of a 2D autoencoder without its scaling factor.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoints import build, check_component, load_tensors, read_json, save_tensors, write_json
from .errors import ReducioError

TOWER_CONFIG = "open_clip_config.json"
TOWER_WEIGHTS = "open_clip_model.safetensors"

logger = logging.getLogger(__name__)


class TextEncoder:
    """Prompts -> last hidden state of a transformers encoder, padded and cut to `length` tokens (PixArt-alpha: 120)."""

    def __init__(self, model: nn.Module, tokenizer: Any, length: int) -> None:
        self.model, self.tokenizer, self.length = model, tokenizer, length

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """-> text [B, length, C] in the model's dtype, and mask bool [B, length], True where there is text."""
        for prompt in prompts:
            if (n := len(self.tokenizer(prompt).input_ids)) > self.length:
                logger.warning("prompt has %d tokens, the model reads the first %d: %r", n, self.length, prompt)
        words = {"padding": "max_length", "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        tokens = self.tokenizer(prompts, **words)
        device = next(self.model.parameters()).device
        mask = tokens.attention_mask.to(device)
        return self.model(tokens.input_ids.to(device), attention_mask=mask)[0], mask.bool()


class ContentEncoder:
    """Content image -> mode of the posterior of a diffusers `AutoencoderKL`, without the scaling factor."""

    def __init__(self, vae: nn.Module) -> None:
        self.vae = vae

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> [B, 4, H/8, W/8]."""
        weight = next(self.vae.parameters())
        return self.vae.encode(image.to(weight.device, weight.dtype)).latent_dist.mode()


class SemanticEncoder(nn.Module):
    """Content image -> patch tokens of an open_clip vision transformer: after its final norm, class token dropped.

    `config` is open_clip's own: {"model_cfg": {"embed_dim", "vision_cfg"}, "preprocess_cfg": {"mean", "std"}}.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        # Imported here: open_clip brings timm and torchvision along, half a second that only a caller should pay.
        from open_clip.model import _build_vision_tower
        from open_clip.transformer import VisionTransformer

        self.config = config
        try:
            model, preprocess = config["model_cfg"], config["preprocess_cfg"]
            tower = _build_vision_tower(model["embed_dim"], model["vision_cfg"], model.get("quick_gelu", False))
            mean, std = (torch.tensor(preprocess[key])[:, None, None] for key in ("mean", "std"))
        except KeyError as error:
            raise ReducioError(f"open_clip configuration: {error} is missing") from error
        except TypeError as error:
            raise ReducioError(f"open_clip configuration: {error}") from error
        if not isinstance(tower, VisionTransformer) or tower.attn_pool is not None or tower.final_ln_after_pool:
            raise ReducioError(
                "open_clip configuration: needs a VisionTransformer that normalises all of its tokens "
                "(no timm or ResNet tower, no attentional_pool, no final_ln_after_pool)"
            )
        tower.output_tokens = True
        self.visual = tower
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> [B, patches, width].

        The whole frame is resized to the tower's square, its aspect ratio not kept (Reducio-VAE release).
        """
        weight = self.visual.conv1.weight
        size = self.visual.image_size
        x = F.interpolate(image.to(weight.device).float(), size, mode="bicubic", align_corners=True, antialias=True)
        x = ((x + 1) / 2 - self.mean.float()) / self.std.float()
        _, tokens = self.visual(x.to(weight.dtype))
        rows, columns = self.visual.grid_size
        return tokens[:, -rows * columns :]

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> SemanticEncoder:
        """Load `open_clip_config.json` and, strictly, `open_clip_model.safetensors` (the image tower, `visual.*`)."""
        folder = Path(folder)
        config = read_json(folder / TOWER_CONFIG)
        check_component(folder)
        path = folder / TOWER_WEIGHTS
        return build(lambda: cls(config), load_tensors(path, dtype, device), path, device)

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / TOWER_CONFIG, self.config)
        save_tensors(self.state_dict(), folder / TOWER_WEIGHTS)
