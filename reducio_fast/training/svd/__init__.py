"""Training for Stable Video Diffusion: LoRAs on its attention over time, and the small embedded model."""
