"""Parameter-efficient fine-tuning as overlays: one method a file, one line of registration each."""

from qtjax.overlays import (
    adalora, bitfit, boft, diffprune, dora, fourierft, houlsby, ia3, laplace, llama_adapter, ln_tuning, loha, lokr,
    lora, mpt, oft, poly, prefix, prompt, ptuning, qlora, vblora, vera, xlora,
)  # fmt: skip
from qtjax.overlays.base import (
    METHODS, Method, Overlay, abstract_overlay, field_names, init_overlay, method_named, overlay_axes, register,
)  # fmt: skip
from qtjax.overlays.merge import merge
from qtjax.overlays.posterior import calibration_error, fit_laplace, predictive

register("lora", lora.METHOD)
register("qlora", qlora.METHOD)
register("dora", dora.METHOD)
register("adalora", adalora.METHOD)
register("loha", loha.METHOD)
register("lokr", lokr.METHOD)
register("ia3", ia3.METHOD)
register("oft", oft.METHOD)
register("boft", boft.METHOD)
register("vera", vera.METHOD)
register("fourierft", fourierft.METHOD)
register("vblora", vblora.METHOD)
register("poly", poly.METHOD)
register("xlora", xlora.METHOD)
register("ln_tuning", ln_tuning.METHOD)
register("bitfit", bitfit.METHOD)
register("diffprune", diffprune.METHOD)
register("houlsby", houlsby.METHOD)
register("prompt", prompt.METHOD)
register("ptuning", ptuning.METHOD)
register("mpt", mpt.METHOD)
register("prefix", prefix.METHOD)
register("llama_adapter", llama_adapter.METHOD)
register("laplace", laplace.METHOD)

__all__ = [
    "METHODS", "Method", "Overlay", "abstract_overlay", "calibration_error", "field_names", "fit_laplace", "init_overlay",
    "merge", "method_named", "overlay_axes", "predictive", "register",
]  # fmt: skip
