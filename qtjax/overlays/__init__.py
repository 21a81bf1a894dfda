"""Parameter-efficient fine-tuning as overlays: one method a file, one line of registration each."""

from qtjax.overlays import bitfit, boft, houlsby, ia3, ln_tuning, lora, oft
from qtjax.overlays.base import METHODS, Method, Overlay, abstract_overlay, init_overlay, method_named
from qtjax.overlays.base import overlay_axes, register
from qtjax.overlays.merge import merge

register("lora", lora.METHOD)
register("ia3", ia3.METHOD)
register("oft", oft.METHOD)
register("boft", boft.METHOD)
register("ln_tuning", ln_tuning.METHOD)
register("bitfit", bitfit.METHOD)
register("houlsby", houlsby.METHOD)

__all__ = [
    "METHODS", "Method", "Overlay", "abstract_overlay", "init_overlay", "merge", "method_named", "overlay_axes", "register",
]  # fmt: skip
