"""Parameter-efficient fine-tuning as overlays: one method a file, one line of registration each."""

from qtjax.overlays import lora
from qtjax.overlays.base import METHODS, Method, Overlay, init_overlay, merge, overlay_axes, register

register("lora", lora.METHOD)

__all__ = ["METHODS", "Method", "Overlay", "init_overlay", "merge", "overlay_axes", "register"]
