"""Other image-to-video models, run through diffusers."""
