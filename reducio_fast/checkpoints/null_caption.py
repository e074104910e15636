"""PixArt's null caption: the embedding that guidance leads away from if no negative prompt is given.

The .pth files of PixArt-alpha hold it (`y_embedder.y_embedding`). diffusers' folders do not: their pipeline encodes the
empty prompt with the text encoder that lies beside the transformer.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ..system.errors import ReducioError
from ..system.paths import is_file, is_folder
from . import hub
from .foreign_files import read_weights
from .networks import load_foreign

FRESH = "fresh"  # for a model that is then trained: random numbers, as in a new PixArt
TENSORS = ("y_embedder.y_embedding", "null_text")
ENCODER_FILES = ("text_encoder/*", "tokenizer/*", "model_index.json")


def read_null_text(path: Path, source: str | os.PathLike[str] | None, shape: tuple[int, int]) -> Tensor | None:
    """The null caption of the PixArt in `path`, [tokens, channels] = `shape`; None for a fresh one.

    source: a .pth or .safetensors file that holds it, a folder or hub id with `text_encoder/` and `tokenizer/`,
    "fresh", or None for what lies in `path` or beside it. Raises ReducioError if it is missing or has another shape.
    """
    if source is None:
        beside = [folder for folder in (path, path.parent) if _has_encoder(folder)]
        if not is_folder(path) or not beside:
            raise ReducioError(
                f"null_text: {path} holds no null caption (diffusers leaves it out), and guidance would lead away from "
                "noise; give PixArt's .pth, a folder or hub id with text_encoder/ and tokenizer/, or 'fresh' for "
                "training"
            )
        return _of_empty_prompt(beside[0], shape)
    if str(source) == FRESH:
        return None
    if is_file(source, "null_text"):
        tensors, _ = read_weights(Path(source))
        captions = [tensors[name] for name in TENSORS if name in tensors]
        if not captions:
            raise ReducioError(f"null_text: {source} holds none of {', '.join(TENSORS)}")
        null = captions[0]
        if null.shape != shape:
            raise ReducioError(f"null_text: {source} has one of shape {list(null.shape)} instead of {list(shape)}")
        return null
    folder = hub.find_model(source, "null_text", ENCODER_FILES)
    if not _has_encoder(folder):
        raise ReducioError(f"null_text: {folder} has no text_encoder/ and tokenizer/")
    return _of_empty_prompt(folder, shape)


def _has_encoder(folder: Path) -> bool:
    return is_folder(folder / "text_encoder") and is_folder(folder / "tokenizer")


@torch.no_grad()
def _of_empty_prompt(folder: Path, shape: tuple[int, int]) -> Tensor:
    """Encode the empty prompt in float32, for which a T5-XXL needs 19 GB, once."""
    tokenizer = load_foreign("transformers", "AutoTokenizer", folder / "tokenizer", torch.float32, "cpu")
    encoder = load_foreign("transformers", "T5EncoderModel", folder / "text_encoder", torch.float32, "cpu")
    tokens = tokenizer("", max_length=shape[0], padding="max_length", truncation=True, return_tensors="pt")
    embedded = encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0]
    if embedded.shape != shape:
        raise ReducioError(
            f"null_text: the text encoder in {folder} gives shape {list(embedded.shape)} instead of {list(shape)}"
        )
    return embedded
