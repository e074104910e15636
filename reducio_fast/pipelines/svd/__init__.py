"""Stable Video Diffusion: an image in, a clip of it out."""
