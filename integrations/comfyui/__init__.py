"""Reducio in ComfyUI: put this folder, or a link to it, into `ComfyUI/custom_nodes/` and install the package."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
