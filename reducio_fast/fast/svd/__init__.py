"""Fast twins of the networks of Stable Video Diffusion."""
