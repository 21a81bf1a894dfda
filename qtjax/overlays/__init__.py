"""Parameter-efficient fine-tuning as overlays: one method a file, one line of registration each."""

from qtjax.overlays import fourierft, loha, lokr, lora, vblora, vera
from qtjax.overlays.base import METHODS, Method, Overlay, abstract_overlay, init_overlay, method_named, overlay_axes, register
from qtjax.overlays.merge import merge

register("lora", lora.METHOD)
register("loha", loha.METHOD)
register("lokr", lokr.METHOD)
register("fourierft", fourierft.METHOD)
register("vera", vera.METHOD)
register("vblora", vblora.METHOD)

__all__ = [
    "METHODS", "Method", "Overlay", "abstract_overlay", "init_overlay", "merge", "method_named", "overlay_axes", "register",
]  # fmt: skip
