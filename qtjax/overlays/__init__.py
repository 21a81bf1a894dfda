"""Parameter-efficient fine-tuning as overlays: one method a file, one line of registration each."""

from qtjax.overlays import laplace, lora, qlora
from qtjax.overlays.base import METHODS, Method, Overlay, abstract_overlay, init_overlay, method_named, overlay_axes, register
from qtjax.overlays.merge import merge

register("lora", lora.METHOD)
register("qlora", qlora.METHOD)
register("laplace", laplace.METHOD)

__all__ = [
    "METHODS", "Method", "Overlay", "abstract_overlay", "init_overlay", "merge", "method_named", "overlay_axes", "register",
]  # fmt: skip
