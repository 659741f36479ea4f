"""NextFlow for ComfyUI: put this folder, or a link to it, into ComfyUI's `custom_nodes/`."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
