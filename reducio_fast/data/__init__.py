"""Clips to learn from: the toy world, photographs, real video; curation of more, and latents on disk."""
