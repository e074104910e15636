"""Reducio as its paper states it (arXiv 2411.13552), in plain PyTorch."""
