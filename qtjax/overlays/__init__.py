"""Parameter-efficient fine-tuning as overlays: one method a file, one line of registration each."""

from qtjax.overlays import laplace, lora, qlora
from qtjax.overlays.base import METHODS, Method, Overlay, abstract_overlay, init_overlay, method_named, overlay_axes, register
from qtjax.overlays.merge import merge
from qtjax.overlays.posterior import calibration_error, fit_laplace, predictive

register("lora", lora.METHOD)
register("qlora", qlora.METHOD)
register("laplace", laplace.METHOD)

__all__ = [
    "METHODS", "Method", "Overlay", "abstract_overlay", "calibration_error", "fit_laplace", "init_overlay", "merge",
    "method_named", "overlay_axes", "predictive", "register",
]  # fmt: skip
