"""The components and settings of each model family: the one list."""

from __future__ import annotations

SETTINGS = ("fps", "sample_height", "sample_width", "clean_caption", "content_scaling_factor")
# In the order they are loaded: text_to_image comes last because it may share the others.
COMPONENTS = (
    "vae",
    "transformer",
    "scheduler",
    "text_encoder",
    "tokenizer",
    "image_encoder",
    "content_encoder",
    "text_to_image",
)
OPTIONAL = ("text_encoder", "tokenizer", "image_encoder", "content_encoder", "text_to_image")
# Name within the diffusers pipeline -> name of the component here that it may share.
SHARED = {"text_encoder": "text_encoder", "tokenizer": "tokenizer", "vae": "content_encoder"}
