"""Parameter-efficient fine-tuning as overlays: one method a file, one line of registration each."""

from qtjax.overlays import (
    adalora, diffprune, dora, fourierft, loha, lokr, lora, poly, vblora, vera, xlora,
)  # fmt: skip
from qtjax.overlays.base import (
    METHODS, Method, Overlay, abstract_overlay, field_names, init_overlay, method_named, overlay_axes, register,
)  # fmt: skip
from qtjax.overlays.merge import merge

register("lora", lora.METHOD)
register("dora", dora.METHOD)
register("adalora", adalora.METHOD)
register("loha", loha.METHOD)
register("lokr", lokr.METHOD)
register("vera", vera.METHOD)
register("fourierft", fourierft.METHOD)
register("vblora", vblora.METHOD)
register("poly", poly.METHOD)
register("xlora", xlora.METHOD)
register("diffprune", diffprune.METHOD)

__all__ = [
    "METHODS", "Method", "Overlay", "abstract_overlay", "field_names", "init_overlay", "merge", "method_named", "overlay_axes",
    "register",
]  # fmt: skip
