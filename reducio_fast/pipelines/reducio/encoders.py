"""The frozen encoders that turn the prompt and the content frame into the DiT's joint condition.

Each is a small callable with one job and can be replaced by another of the same signature. What is extracted follows
the latent extraction of the Reducio-VAE release: T5 tokens with their mask, patch tokens of OpenCLIP ViT-H-14, and the
latent of the SD autoencoder without its scaling factor. At full size that is 120 x 4096, 256 x 1280 and 4 x H/8 x W/8.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.hub import find_model
from ...checkpoints.networks import build, load_foreign, require
from ...checkpoints.strict_files import (
    CONFIG,
    WEIGHTS,
    check_component,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)
from ...media.antialias import blur_and_resize
from ...reference.reducio.image_vae import ImageVAE
from ...reference.reducio.vision_tower import VisionTower
from ...system.errors import ReducioError, first_line, is_out_of_memory
from ...system.paths import expanded, is_file, is_folder

logger = logging.getLogger(__name__)

TOWER_CONFIG = "open_clip_config.json"
TOWER_WEIGHTS = "open_clip_model.safetensors"
# Key prefixes of an open_clip file of a whole CLIP besides the image tower: the text tower, bare or under `text.`.
CLIP_TEXT = (
    "text.",
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
    "logit_scale",
    "logit_bias",
)
# Key prefixes of a published T5 besides the encoder.
T5_DECODER = ("decoder.", "lm_head.")
# Files that are fetched from a hub repository for an encoder, which is alone there or in a folder of a diffusers
# pipeline: neither pickles nor the half-precision copies of the same weights.
TEXT_FILES = tuple(
    f"{inner}{file}"
    for inner in ("", "text_encoder/")
    for file in (CONFIG, "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
)
TOKENIZER_FILES = tuple(
    f"{inner}{file}"
    for inner in ("", "tokenizer/")
    for file in ("tokenizer*.json", "spiece.model", "added_tokens.json", "special_tokens_map.json")
)
VAE_FILES = tuple(f"{inner}{file}" for inner in ("", "vae/") for file in (CONFIG, WEIGHTS))


def clean_caption(text: str) -> str:
    """A caption as PixArt-alpha's text encoder was trained to read it; "" where nothing is left.

    This is diffusers' own cleaning, which runs twice over each caption as upstream does: lower case, no markup,
    addresses, file names, ids, CJK characters or rare punctuation. Raises ReducioError if a package that it needs is
    missing; diffusers would leave the caption as it is.
    """
    require("bs4", "ftfy", argument="clean_caption")
    return _caption_cleaner()._text_preprocessing(text, clean_caption=True)[0]


@functools.cache
def _caption_cleaner() -> Any:
    from diffusers import PixArtAlphaPipeline

    return PixArtAlphaPipeline.__new__(PixArtAlphaPipeline)  # without networks: the method needs none


class TextEncoder:
    """Prompts -> last hidden state of a transformers encoder, padded and cut to `length` tokens (PixArt-alpha: 120).

    clean: put each prompt through `clean_caption` first; without it the tokenizer gets the text as it stands.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, length: int, clean: bool = False) -> None:
        self.model, self.tokenizer, self.length, self.clean = model, tokenizer, length, clean

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """-> text [B, length, C] in the model's dtype, and mask bool [B, length], True where there is text."""
        if self.clean:
            prompts = [clean_caption(prompt) for prompt in prompts]
        for prompt in prompts:
            if (n := len(self.tokenizer(prompt).input_ids)) > self.length:
                logger.warning("prompt has %d tokens, the model reads the first %d: %.60r", n, self.length, prompt)
        kwargs = {"padding": "max_length", "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        tokens = self.tokenizer(prompts, **kwargs)
        device = next(self.model.parameters()).device
        mask = tokens.attention_mask.to(device)
        return self.model(tokens.input_ids.to(device), attention_mask=mask)[0], mask.bool()


class ContentEncoder:
    """Content image -> latent of a diffusers `AutoencoderKL`, times `scaling_factor`.

    The factor is 1, not the autoencoder's own (0.18215 for Stable Diffusion's): the release stores the bare latent.
    """

    def __init__(self, vae: Any, scaling_factor: float = 1.0) -> None:
        self.vae, self.scaling_factor = vae, scaling_factor

    @property
    def factor(self) -> int:
        """Pixels per latent cell, in each direction."""
        return 2 ** (len(getattr(self.vae.config, "block_out_channels", (0,) * 4)) - 1)

    @torch.no_grad()
    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> [B, 4, H/8, W/8] in the autoencoder's dtype.

        Returns the mode of the posterior; with a generator, a sample of it, which is what the release stored for
        training. A clip needs the mode, so that its content latent depends on its content frame alone.
        """
        weight = next(self.vae.parameters())
        if isinstance(self.vae, ImageVAE) and generator is None:
            return self.vae.encode(image.to(weight.device, weight.dtype)) * self.scaling_factor
        posterior = self.vae.encode(image.to(weight.device, weight.dtype)).latent_dist
        latent = posterior.mode() if generator is None else posterior.sample(generator)
        return latent * self.scaling_factor


class SemanticEncoder(nn.Module):
    """Content image -> patch tokens of an open_clip vision transformer: after its final norm, class token dropped.

    `config` is open_clip's own: {"model_cfg": {"embed_dim", "vision_cfg"}, "preprocess_cfg": {"mean", "std"}}.
    """

    mean: Tensor
    std: Tensor
    visual: Any  # ours, or open_clip's

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        try:
            model, preprocess = config["model_cfg"], config["preprocess_cfg"]
            tower = _tower(model["embed_dim"], model["vision_cfg"], model.get("quick_gelu", False))
            mean, std = (torch.tensor(preprocess[key])[:, None, None] for key in ("mean", "std"))
        except KeyError as error:
            raise ReducioError(f"open_clip configuration: {error} is missing") from error
        except Exception as error:  # of torch and open_clip, for values of any type
            if isinstance(error, ReducioError) or is_out_of_memory(error):
                raise
            raise ReducioError(f"open_clip configuration: {first_line(error)}") from error
        if mean.shape != (3, 1, 1) or std.shape != (3, 1, 1):
            raise ReducioError("open_clip configuration: mean and std must be three numbers each")
        self.visual = tower
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> [B, patches, width].

        The release's own resize scales the whole frame to the tower's square; the aspect ratio is not kept.
        """
        weight = self.visual.conv1.weight
        size = self.visual.image_size
        x = blur_and_resize(image.to(weight.device).float(), size)
        x = ((x + 1) / 2 - self.mean.float()) / self.std.float()
        _, tokens = self.visual(x.to(weight.dtype))
        rows, columns = self.visual.grid_size
        return tokens[:, -rows * columns :]

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        width: int | None = None,
    ) -> SemanticEncoder:
        """Load the image tower (`visual.*`, strictly) of an open_clip folder or hub repository; see `find_tower`.

        Raises ReducioError before any weight is read if `width` is given and the tower has another.
        """
        folder = find_tower(name)
        config = read_json(folder / TOWER_CONFIG)
        try:
            stated = config["model_cfg"]["vision_cfg"].get("width")
        except (AttributeError, KeyError, TypeError):  # the constructor says what is wrong
            stated = None
        _check_width("image_encoder", stated, width, folder)
        check_component(folder)
        path = folder / TOWER_WEIGHTS
        return build(lambda: cls(config), load_tensors(path, dtype, device, skip=CLIP_TEXT), path, device)

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / TOWER_CONFIG, self.config)
        save_tensors(self.state_dict(), folder / TOWER_WEIGHTS)


PLAIN_TOWER = ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio")


def _tower(embed_dim: int, vision: dict[str, Any], quick_gelu: bool) -> Any:
    """Our tower for a plain vision transformer, bit-identical to open_clip's; open_clip's for one with options.

    open_clip imports timm, torchvision and transformers, which takes half a second; a plain tower needs none of them.
    """
    sizes = {name: vision[name] for name in PLAIN_TOWER if name in vision}
    options = {name: value for name, value in vision.items() if name not in (*PLAIN_TOWER, "output_tokens") and value}
    if not options and all(isinstance(value, int | float) for value in sizes.values()):
        return VisionTower(embed_dim, **sizes, quick_gelu=bool(quick_gelu))
    from open_clip.model import _build_vision_tower
    from open_clip.transformer import VisionTransformer

    tower = _build_vision_tower(embed_dim, vision, quick_gelu)
    if not isinstance(tower, VisionTransformer) or tower.attn_pool is not None or tower.final_ln_after_pool:
        raise ReducioError(
            "open_clip configuration: needs a VisionTransformer that normalises all of its tokens "
            "(no timm or ResNet tower, no attentional_pool, no final_ln_after_pool)"
        )
    tower.output_tokens = True
    return tower


def find_tower(name: str | os.PathLike[str]) -> Path:
    """The folder of an open_clip model. `name` is a folder or a hub id, either with or without open_clip's prefixes
    `local-dir:` and `hf-hub:`, or a model and a tag of open_clip's own list, `ViT-H-14/laion2b_s32b_b79k`."""
    if isinstance(name, str):
        name = name.removeprefix("local-dir:").removeprefix("hf-hub:")
        if not is_folder(expanded(name, "image_encoder"), "image_encoder") and name.count("/") == 1:
            from open_clip import get_pretrained_cfg

            listed = get_pretrained_cfg(*name.split("/"))
            name = listed.get("hf_hub", name).rstrip("/")
    return find_model(name, "image_encoder", (TOWER_CONFIG, TOWER_WEIGHTS))


def load_text_encoder(
    name: str | os.PathLike[str], dtype: torch.dtype, device: str | torch.device, width: int | None = None
) -> nn.Module:
    """The text encoder of a transformers folder or hub id, or of a diffusers pipeline: T5, mT5, UMT5, CLIP ...

    Of a whole T5, only the encoder is loaded. Raises ReducioError before any weight is read if `width` is given and the
    encoder has another.
    """
    from transformers import AutoConfig, AutoModelForTextEncoding

    folder = find_text_encoder(name)
    model_type = read_json(folder / CONFIG).get("model_type")
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        model_class = AutoModelForTextEncoding._model_mapping[type(config)]
    except (ValueError, KeyError, OSError) as error:
        raise ReducioError(f"text_encoder: {folder} is of the type {model_type!r}, which is no text encoder") from error
    except Exception as error:  # of values that the configuration's class refuses
        raise ReducioError(f"text_encoder: {folder / CONFIG}: {first_line(error)}") from error
    _check_width("text_encoder", getattr(config, "hidden_size", None), width, folder)
    return load_foreign("transformers", model_class.__name__, folder, dtype, device, skip=T5_DECODER)


def find_text_encoder(name: str | os.PathLike[str]) -> Path:
    return _inner(find_model(name, "text_encoder", TEXT_FILES), "text_encoder", CONFIG)


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The tokenizer beside a text encoder."""
    folder = _inner(find_model(name, "tokenizer", TOKENIZER_FILES), "tokenizer", "tokenizer_config.json")
    return load_foreign("transformers", "AutoTokenizer", folder, torch.float32, "cpu")


def load_content_encoder(
    name: str | os.PathLike[str], dtype: torch.dtype, device: str | torch.device, channels: int | None = None
) -> nn.Module:
    """The autoencoder of a diffusers folder or hub id, alone there or the `vae` of a pipeline.

    Raises ReducioError before any weight is read if `channels` is given and the latent has another number.
    """
    folder = find_content_encoder(name)
    config = read_json(folder / CONFIG)
    if config.get("_class_name") != "AutoencoderKL":
        raise ReducioError(f"content_encoder: {folder} is of {config.get('_class_name')!r}, must be an AutoencoderKL")
    _check_width("content_encoder", config.get("latent_channels"), channels, folder)
    return load_foreign("diffusers", "AutoencoderKL", folder, dtype, device)


def find_content_encoder(name: str | os.PathLike[str]) -> Path:
    return _inner(find_model(name, "content_encoder", VAE_FILES), "vae", CONFIG)


def _inner(folder: Path, name: str, file: str) -> Path:
    """A component alone in `folder`, or in its sub-folder `name` as in a diffusers pipeline."""
    return folder / name if not is_file(folder / file) and is_folder(folder / name) else folder


def _check_width(name: str, width: int | None, needed: int | None, folder: Path) -> None:
    if needed is not None and width is not None and width != needed:
        raise ReducioError(f"{name}: {folder} gives {width} channels, the transformer reads {needed}")
