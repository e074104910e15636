"""Training data: clips of the toy world, of photographs and of real video; curation of videos; latents on disk."""
