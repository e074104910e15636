"""Reducio in ComfyUI: this folder, or a link to it, goes into `ComfyUI/custom_nodes/`, the package beside it."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
