"""Stable Video Diffusion (arXiv 2311.15127) in plain PyTorch; attributes and tensors have the published names."""
